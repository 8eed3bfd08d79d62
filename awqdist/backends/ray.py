"""The Ray backend: one worker in every actor of a placement group, on one machine or on a cluster. Ray is imported in this file only.

Actors hand chunks to each other as object references, two at a time, and copy them into private memory as they come, so that the object
store holds no more than those on their way, however long a worker is busy. The driver deals the layers and listens. When an actor dies the
others finish what they are searching; it is replaced, wherever there is room, and all go on from the newest usable boundary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.util.metrics import Counter, Gauge
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from awqdist.backends.remote_worker import Introduction, Order, RemoteWorker, agreed, with_device
from awqdist.backends.room import Room, room_for_workers
from awqdist.errors import AwqdistError
from awqdist.model.registry import registered_mappings
from awqdist.recipe.settings import Placement
from awqdist.run.events import ChunkForwarded, Event, LayerFinished, Listen, Message, Warned, WorkerLost, WorkerStatus
from awqdist.run.job import Job, with_threads
from awqdist.run.lead import Lead
from awqdist.run.output import check_free
from awqdist.run.records import RunSummary
from awqdist.run.ring import Assignment
from awqdist.run.shared_folder import check_answers, offer_token, remove_token

_START_S = 120.0  # for the cluster to place the workers
_REPLACE_S = 60.0  # for a lost worker to find a new place; after that the run goes on without it
_POLL_S = 0.5
_FAREWELL_S = 7.0  # for workers to finish writing when the run is interrupted


def run_ray(job: Job, samples: Tensor, placement: Placement, listen: Listen) -> RunSummary:
    """Quantizes the model of `job` with calibration samples (N, L) on a Ray cluster, or goes on where an earlier run was interrupted.

    Raises AwqdistError for bad input, a cluster without room, or more lost workers than `placement.max_restarts`.
    """
    check_free(job.settings.output)
    with (
        _connected(placement),
        _Crew(job, samples, placement) as crew,
        Lead(with_device(job, crew.device), samples, listen, crew.fingerprint) as lead,
    ):
        lead.begin("ray", len(crew.actors))
        crew.run(lead)
        return lead.finish()


class RayWorker(RemoteWorker):
    """What an actor is. Chunks travel as bytes: NumPy has no bfloat16, and arrays are shared without a copy."""

    def __init__(self, number: int, order: Order, samples: Tensor) -> None:
        super().__init__(number, order, samples)
        tags = {"worker": str(number)}
        self._tokens = Counter("awqdist_forwarded_tokens", "Calibration tokens taken through layers", ("worker",))
        self._layers = Counter("awqdist_finished_layers", "Layers searched and written", ("worker",))
        self._memory = Gauge("awqdist_memory_bytes", "Resident memory of the worker", ("worker",))
        for metric in (self._tokens, self._layers, self._memory):
            metric.set_default_tags(tags)

    def work(self, attempt: int, assignment: Assignment, peer: Any) -> bool:
        def deliver(layer: int, chunk: int, hidden: Tensor) -> None:
            data = hidden.contiguous().view(torch.uint8).numpy()
            ray.get(peer.deliver.options(concurrency_group="chunks").remote(attempt, layer, chunk, data))

        return self.work_and_deliver(attempt, assignment, deliver)

    def deliver(self, attempt: int, layer: int, chunk: int, data: np.ndarray[Any, Any]) -> None:
        """data: (B, L, H · bytes per value) uint8, in the object store; copied out of it."""
        self.put(attempt, layer, chunk, torch.from_numpy(data.copy()).view(self._job.skeleton.dtype))

    def emit(self, event: Event) -> None:
        super().emit(event)
        match event:
            case ChunkForwarded():
                self._tokens.inc(event.num_tokens)
            case LayerFinished():
                self._layers.inc()
            case WorkerStatus():
                self._memory.set(event.memory_bytes)
            case _:
                pass


class _Crew:
    """The actors of a run by their numbers, in their placement group."""

    def __init__(self, job: Job, samples: Tensor, placement: Placement) -> None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._room = room_for_workers(nodes, placement.num_workers, job.settings.device)
        self._max_restarts, self._num_restarts = placement.max_restarts, 0
        self._order = _order(job, self._room)
        self._samples = ray.put(samples)
        bundles = [self._room.bundle] * self._room.num_workers
        self._group: PlacementGroup = placement_group(bundles, strategy="PACK", name="awqdist")
        self.actors: dict[int, Any] = {}
        self.fingerprint: dict[str, str] = {}
        self.device = ""

    def __enter__(self) -> _Crew:
        count = self._room.num_workers
        try:
            if not self._group.wait(_START_S):
                raise AwqdistError(
                    f"the Ray cluster has no room for {count} workers of {self._room.bundle} each; it has {ray.available_resources()}"
                    " free: use fewer --num-workers, or wait for what else runs there"
                )
            self.actors = {number: self._new_actor(number) for number in range(count)}
            introductions = self._introduced(self.actors, _START_S)
            if len(introductions) < count:
                raise AwqdistError(
                    f"only {len(introductions)} of {count} workers came up in {_START_S:.0f} s; see Ray's logs"
                )
            self.fingerprint, self.device = agreed(list(introductions.values())), introductions[0].device
        except BaseException:
            self._dismiss()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._dismiss()

    def run(self, lead: Lead) -> None:
        """Attempts the layers that are left until none is. Raises AwqdistError."""
        attempt = 0
        while assignments := lead.assignments(len(self.actors)):
            attempt += 1
            trial = _Attempt(self.actors, attempt, lead)
            try:
                lost = trial.carry_out(assignments)
            except AwqdistError:
                trial.wind_up(None)  # what the other workers are searching is worth waiting for
                raise
            except BaseException:
                trial.wind_up(_FAREWELL_S)
                raise
            self._replace(lost, lead)

    def _replace(self, lost: dict[int, str], lead: Lead) -> None:
        """New actors in the places of those that died; without those that find no place in time."""
        for number, reason in lost.items():
            self._num_restarts += 1
            if self._num_restarts > self._max_restarts:
                raise AwqdistError(
                    f"worker {number} was lost ({reason}), and the {self._max_restarts} restarts of --max-restarts are used up;"
                    " finished layers are kept, the same command resumes"
                )
            lead.tell(WorkerLost(reason, self._num_restarts, self._max_restarts), number)
            ray.kill(self.actors.pop(number))  # it may only be out of reach
        fresh = {number: self._new_actor(number) for number in lost}
        present = self._introduced(fresh, _REPLACE_S)
        for number, actor in fresh.items():
            if number in present:
                self.actors[number] = actor
            else:
                ray.kill(actor)
                lead.tell(
                    Warned(f"worker {number} found no new place in {_REPLACE_S:.0f} s; the run goes on without it")
                )
        self.actors = dict(sorted(self.actors.items()))
        if not self.actors:
            raise AwqdistError("all workers were lost and none found a new place; the same command resumes")

    def _new_actor(self, number: int) -> Any:
        actor = ray.remote(
            num_cpus=self._room.cpus,
            num_gpus=int(self._room.on_gpu),
            concurrency_groups={"chunks": 4, "messages": 1, "calls": 1},
        )(RayWorker)
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)
        name = f"awqdist-{self._group.id.hex()[:8]}-worker-{number}.{self._num_restarts}"
        return actor.options(name=name, scheduling_strategy=strategy).remote(number, self._order, self._samples)

    def _introduced(self, actors: dict[int, Any], patience_s: float) -> dict[int, Introduction]:
        """Who answered in time. Raises AwqdistError if one cannot work."""
        output = self._order.settings.output
        token = offer_token(output)
        refs = {actor.introduce.remote(token): number for number, actor in actors.items()}
        try:
            ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=patience_s) if refs else ([], [])
            answers = {}
            for ref in ready:
                with suppress(RayActorError):
                    answers[refs[ref]] = _get(ref)
            check_answers(output, token, list(answers))
            return answers
        finally:
            remove_token(output, token)

    def _dismiss(self) -> None:
        for actor in self.actors.values():
            ray.kill(actor)
        remove_placement_group(self._group)


class _Attempt:
    """All workers at work on one dealing of the layers, until they are done or one of them is lost."""

    def __init__(self, actors: dict[int, Any], attempt: int, lead: Lead) -> None:
        self._actors, self._attempt, self._lead = actors, attempt, lead
        self._works: dict[Any, int] = {}  # reference -> number of the worker
        self._polls: dict[Any, int] = {}
        self._lost: dict[int, str] = {}

    def carry_out(self, assignments: Sequence[Assignment]) -> dict[int, str]:
        """Returns the workers that were lost, and why. Raises AwqdistError for what a worker refuses."""
        numbers = list(self._actors)
        for place, (number, assignment) in enumerate(zip(numbers, assignments, strict=True)):
            peer = self._actors[numbers[(place + 1) % len(numbers)]]
            name = f"layers {', '.join(map(str, assignment.schedule.layers_of(place)))}"
            self._works[self._actors[number].work.options(name=name).remote(self._attempt, assignment, peer)] = number
            self._poll(number)
        while self._works:
            self._take_next(1.0)
        self._drain()
        return self._lost

    def wind_up(self, patience_s: float | None) -> None:
        """Stops all workers and listens to them until they are done, or patience ends."""
        self._stop()
        deadline = None if patience_s is None else time.monotonic() + patience_s
        with suppress(AwqdistError):  # the first error is the one to tell
            while self._works and (deadline is None or time.monotonic() < deadline):
                self._take_next(0.2)
            self._drain()

    def _take_next(self, patience_s: float) -> None:
        ready, _ = ray.wait([*self._works, *self._polls], timeout=patience_s)
        for ref in ready:
            is_poll = ref in self._polls
            number = self._polls.pop(ref) if is_poll else self._works.pop(ref)
            try:
                value = _get(ref)
            except RayActorError as error:
                self._lose(number, error)
                continue
            for message in value if is_poll else ():
                self._lead.observe(message)
            if is_poll:
                self._poll(number)

    def _poll(self, number: int) -> None:
        poll = self._actors[number].messages.options(concurrency_group="messages").remote(_POLL_S)
        self._polls[poll] = number

    def _drain(self) -> None:
        """Takes the last messages of the workers that live."""
        for number in set(self._actors) - set(self._lost):
            with suppress(RayActorError):
                for ref in [r for r, n in self._polls.items() if n == number]:
                    self._observe_all(_get(ref))
                last = self._actors[number].messages.options(concurrency_group="messages").remote(0.0)
                self._observe_all(_get(last))
        self._polls = {}

    def _observe_all(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self._lead.observe(message)

    def _lose(self, number: int, error: RayActorError) -> None:
        self._lost.setdefault(number, _reason(error))
        self._works = {ref: n for ref, n in self._works.items() if n != number}
        self._polls = {ref: n for ref, n in self._polls.items() if n != number}
        self._stop()

    def _stop(self) -> None:
        for number, actor in self._actors.items():
            if number not in self._lost:
                actor.stop.options(concurrency_group="calls").remote(self._attempt)


def _order(job: Job, room: Room) -> Order:
    """The job for all workers: paths that hold from anywhere, and the number of threads settled."""
    settings = replace(
        with_threads(job.settings, room.threads),
        device="cuda" if room.on_gpu else "cpu",
        model=job.settings.model.resolve(),
        output=job.settings.output.resolve(),
    )
    architecture = job.skeleton.architecture
    config = job.skeleton.model.config.get_text_config(decoder=True)
    return Order(job.recipe, settings, architecture, registered_mappings(architecture, config))


def _get(ref: Any) -> Any:
    """The value of a reference. What a worker refused comes out as it was raised there."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, AwqdistError):
            raise error.cause from None
        raise


def _reason(error: RayActorError) -> str:
    """Ray's explanation, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = next(
        (line for line in lines if "exit" in line.lower() or "died" in line.lower() or "node" in line.lower()), lines[0]
    )
    return cause[:200]


@contextmanager
def _connected(placement: Placement) -> Iterator[None]:
    """Within a Ray cluster: the one at the address, the one that this machine belongs to, or one of its own that ends with the run."""
    joined = ray.is_initialized()
    if not joined:
        try:
            ray.init(address=placement.ray_address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = placement.ray_address or "here"
            raise AwqdistError(f"no Ray cluster can be joined at {where}: {str(error).splitlines()[0]}") from None
    try:
        yield
    finally:
        if not joined:
            ray.shutdown()
