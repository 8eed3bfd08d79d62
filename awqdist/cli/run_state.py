"""Adds up the messages of a run: what each worker is doing, how far the run is, when it will end.

Times are those of the messages, so a log gives the state that a listener had, on any machine and at any time. What depends on the
present takes it as `now`, by the clock of the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from awqdist.layer.records import MappingRecord
from awqdist.run import events as ev
from awqdist.run.events import Message

BACKGROUND_STAGES = ("read", "write")  # they overlap the other stages of their worker


@dataclass(slots=True)
class Pace:
    """How fast a worker finishes layers. Its first layer counts from its first chunk on, because it waits for that."""

    layers_left: set[int] | None = None  # None: unknown
    num_finished: int = 0
    finished_seconds: float = 0.0  # that these layers took
    layer_began: float = 0.0  # the layer that it will finish next
    is_under_way: bool = False

    def start(self, layers: set[int], time: float) -> None:
        """Takes in which layers the worker will do."""
        self.layers_left, self.layer_began, self.is_under_way = layers, time, False

    def first_chunk(self, time: float) -> None:
        """Takes in that the worker begins to forward a layer."""
        self.layer_began = self.layer_began if self.is_under_way else time
        self.is_under_way = True

    def finish(self, layer: int, time: float, *, is_new: bool) -> None:
        """Takes in that a layer is done. One that an earlier run had finished costs little and does not count for the pace."""
        if self.layers_left is not None:
            self.layers_left.discard(layer)
        if is_new:
            self.num_finished += 1
            self.finished_seconds += time - self.layer_began
        else:
            self.is_under_way = False
        self.layer_began = time

    def remaining_seconds(self, now: float, share: int, seconds_per_layer: float) -> float:
        """Returns the time left at this pace.

        Args:
            now: The present, in seconds since 1970.
            share: How many layers are left, where the worker did not tell.
            seconds_per_layer: Used until the worker has finished a layer.
        """
        num_left = share if self.layers_left is None else len(self.layers_left)
        own = self.finished_seconds / self.num_finished if self.num_finished else seconds_per_layer
        return max(0.0, num_left * own - (now - self.layer_began)) if num_left else 0.0


@dataclass(slots=True)
class WorkerState:
    """What a worker is doing. It computes one layer while it reads the next and writes the one before."""

    number: int
    since: float = 0.0  # when its stage began
    host: str = ""
    device: str = ""
    stage: str = "starting"  # or a stage that computes, "waiting", "lost", "done"
    layer: int | None = None  # None while it waits
    chunk: int = 0  # that were forwarded
    num_chunks: int = 0
    num_tokens: int = 0  # of them
    forward_seconds: float = 0.0  # spent on them
    background: dict[str, int] = field(default_factory=dict)  # stage -> layer
    mapping: MappingRecord | None = None  # the last that was searched
    status: ev.WorkerStatus | None = None
    peak_memory_bytes: int = 0
    peak_device_memory_bytes: int = 0
    pace: Pace = field(default_factory=Pace)

    @property
    def tokens_per_second(self) -> float | None:
        """Returns the speed in the layer that it forwarded last, without the time in which it waited for chunks."""
        return self.num_tokens / self.forward_seconds if self.forward_seconds > 0 else None

    def turn_to(self, stage: str, time: float, layer: int | None = None) -> None:
        """Sets the stage, and when it began."""
        self.stage, self.since, self.layer = stage, time, layer

    def observe(self, event: ev.Event, time: float) -> None:
        """Takes in an event of this worker."""
        match event:
            case ev.WorkerStarted():
                self.host, self.device = event.host, event.device
                self.pace.start(set(event.layers), time)
                self.mapping, self.background = None, {}
                self.turn_to("waiting", time)
            case ev.WorkerStatus():
                self.status = event
                self.peak_memory_bytes = max(self.peak_memory_bytes, event.memory_bytes)
                self.peak_device_memory_bytes = max(self.peak_device_memory_bytes, event.device_memory_bytes)
            case ev.WorkerLost():
                self.status, self.background = None, {}
                self.turn_to("lost", time, self.layer)
            case ev.StageStarted() | ev.StageEnded() if event.stage in BACKGROUND_STAGES:
                self.background.pop(event.stage, None)
                if isinstance(event, ev.StageStarted):
                    self.background[event.stage] = event.layer
            case ev.StageStarted():
                self.turn_to(event.stage, time, event.layer)
                if event.stage == "forward":
                    self.chunk, self.num_tokens, self.forward_seconds = 0, 0, 0.0
                    self.pace.first_chunk(time)
            case ev.StageEnded() if event.stage == self.stage:
                self.turn_to("waiting", time)
            case ev.ChunkForwarded():
                self.chunk, self.num_chunks = min(event.chunk + 1, event.num_chunks), event.num_chunks
                self.num_tokens += event.num_tokens
                self.forward_seconds += event.seconds
            case ev.MappingSearched():
                self.mapping = event.mapping
            case ev.LayerForwarded():
                self.pace.finish(event.layer, time, is_new=False)
                self.turn_to("waiting", time)
            case ev.LayerFinished():
                self.pace.finish(event.layer, time, is_new=True)


@dataclass(slots=True)
class RunState:
    """The state of a run after the messages so far. A RunStarted begins it anew."""

    started: ev.RunStarted | None = None
    finished: ev.RunFinished | None = None
    lost: ev.WorkerLost | None = None  # the last loss
    workers: dict[int, WorkerState] = field(default_factory=dict)
    num_done: int = 0  # layers finished by this run and by those before it
    began: float = 0.0
    time: float = 0.0  # of the newest message

    def observe(self, message: Message) -> None:
        """Takes in the next message."""
        event, self.time = message.event, max(self.time, message.time)
        match event:
            case ev.RunStarted():
                self.started, self.finished, self.lost = event, None, None
                self.num_done, self.began, self.time = event.num_finished_layers, message.time, message.time
                self.workers = {number: _new_worker(number, message.time) for number in range(event.num_workers)}
            case ev.RunFinished():
                self.finished = event
                for worker in self.workers.values():
                    worker.turn_to("done", message.time)
            case ev.LayerFinished():
                self.num_done += 1
            case ev.WorkerLost():
                self.lost = event
            case ev.WorkerStarted():  # the layers of lost workers are assigned again
                for worker in self.workers.values():
                    if worker.stage == "lost":
                        worker.pace.layers_left = set()
        if message.worker is not None:
            worker = self.workers.setdefault(message.worker, _new_worker(message.worker, message.time))
            worker.observe(event, message.time)

    @property
    def num_layers(self) -> int:
        """Returns the number of layers of the model; 0 before a run."""
        return self.started.num_layers if self.started else 0

    def by_number(self) -> list[WorkerState]:
        """Returns the workers in the order of their numbers."""
        return sorted(self.workers.values(), key=lambda worker: worker.number)

    def elapsed_seconds(self, now: float) -> float:
        """Returns the time since the run began, until its end if it has finished."""
        return max(0.0, (self.time if self.finished else now) - self.began) if self.started else 0.0

    def silent_seconds(self, now: float) -> float:
        """Returns the time since the newest message; 0 before a run and after it."""
        return max(0.0, now - self.time) if self.started and not self.finished else 0.0

    def remaining_seconds(self, now: float) -> float | None:
        """Returns the time left of the worker with most left to do; None before the first layer is finished.

        Each worker's own pace counts, or that of all while it has finished no layer. The first layers of all workers end almost at once,
        so one pace for the whole ring would be wrong by the number of workers at first.
        """
        if self.finished:
            return 0.0
        paces = [worker.pace for worker in self.workers.values()]
        num_finished = sum(pace.num_finished for pace in paces)
        if not num_finished:
            return None
        share = math.ceil((self.num_layers - self.num_done) / len(paces))
        seconds_per_layer = sum(pace.finished_seconds for pace in paces) / num_finished
        return max(pace.remaining_seconds(now, share, seconds_per_layer) for pace in paces)


def _new_worker(number: int, time: float) -> WorkerState:
    return WorkerState(number, time, pace=Pace(layer_began=time))
