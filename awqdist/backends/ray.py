"""The Ray backend: one worker in every actor of a placement group, on one machine or on a cluster. Only this file imports Ray.

The driver assigns the layers and collects messages. Actors hand chunks to each other as object references, at most two at a time, and copy
them into private memory on arrival, so the object store holds only chunks in flight, however long a worker is busy. When an actor dies,
the others finish the layer they are searching; the actor is restarted wherever the group has room, and all resume from the newest snapshot.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.util.metrics import Counter, Gauge
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from awqdist.backends.remote_worker import (
    RemoteWorker,
    WorkerInfo,
    WorkerSpec,
    agreed_fingerprint,
    allocate,
    worker_spec,
)
from awqdist.errors import AwqdistError, first_line
from awqdist.layer.records import RunSummary
from awqdist.run.events import ChunkForwarded, Event, LayerFinished, Listen, Message, Warned, WorkerLost, WorkerStatus
from awqdist.run.job import Job
from awqdist.run.leader import Leader
from awqdist.run.output import check_answers, check_free, offer_token, remove_token
from awqdist.run.worker import Assignment
from awqdist.settings import Placement

_START_S = 120.0  # for the cluster to place the workers
_RESTART_S = 60.0  # for a lost worker to be placed again; after that the run continues without it
_POLL_S = 0.5
_INTERRUPT_S = 7.0  # for workers to finish writing when the run is interrupted
_THREADS = {"chunks": 4, "messages": 1, "calls": 1}  # of an actor, by concurrency group, beside the one that works
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def run_ray(job: Job, samples: Tensor, placement: Placement, listen: Listen) -> RunSummary:
    """Quantizes the model of `job` on a Ray cluster, or resumes an interrupted run.

    Args:
        samples: calibration samples (N, L) int64.
        listen: called with every message.

    Raises:
        AwqdistError: the input is bad, the cluster has no room, or more workers were lost than `placement.max_restarts`.
    """
    check_free(job.settings.output)
    with (
        _joined_cluster(placement.ray_address),
        RayActors(job, samples, placement) as actors,
        Leader(replace(job, device=torch.device(actors.device)), samples, listen, actors.fingerprint) as lead,
    ):
        lead.begin("ray", len(actors.by_number))
        num_attempts = num_restarts = 0
        while assignments := lead.assignments(len(actors.by_number)):
            num_attempts += 1
            for number, reason in _Attempt(actors.by_number, num_attempts, lead).run(assignments).items():
                num_restarts += 1
                if num_restarts > placement.max_restarts:
                    raise AwqdistError(
                        f"worker {number} was lost ({reason}), and the {placement.max_restarts} restarts of --max-restarts are"
                        " used up; finished layers are kept, the same command resumes"
                    )
                lead.tell(WorkerLost(reason, num_restarts, placement.max_restarts), number)
                if not actors.restart(number):
                    left = len(actors.by_number)
                    lead.tell(Warned(f"could not restart worker {number}; continuing with {left} workers"))
            if not actors.by_number:
                raise AwqdistError("all workers were lost and none could be restarted; the same command resumes")
        return lead.finish()


class RayWorker(RemoteWorker):
    """A worker in an actor. Chunks travel as bytes, because NumPy has no bfloat16 and Ray shares arrays without a copy."""

    def __init__(self, number: int, spec: WorkerSpec, samples: Tensor) -> None:
        super().__init__(number, spec, samples)
        self._tokens = Counter("awqdist_forwarded_tokens", "Calibration tokens forwarded through layers", ("worker",))
        self._layers = Counter("awqdist_finished_layers", "Layers quantized and written", ("worker",))
        self._memory = Gauge("awqdist_memory_bytes", "Resident memory of the worker", ("worker",))
        for metric in (self._tokens, self._layers, self._memory):
            metric.set_default_tags({"worker": str(number)})

    def work(self, attempt: int, assignment: Assignment, peer: Any) -> str | None:
        """Carries out an assignment and delivers chunks to `peer`, the next actor of the ring. Returns why it was not completed, if so."""

        def deliver(layer: int, chunk: int, hidden: Tensor) -> None:
            data = hidden.contiguous().view(torch.uint8).numpy()
            ray.get(peer.deliver.options(concurrency_group="chunks").remote(attempt, layer, chunk, data))

        return self.work_and_deliver(attempt, assignment, deliver)

    def deliver(self, attempt: int, layer: int, chunk: int, data: np.ndarray[Any, Any]) -> None:
        """Receives a chunk. data: (B, L, H · bytes per value) uint8, in the object store; copied out of it."""
        self.put(attempt, layer, chunk, torch.from_numpy(data.copy()).view(self._job.skeleton.dtype))

    def emit(self, event: Event) -> None:
        """Queues an event, and counts it in Ray's metrics."""
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


class RayActors:
    """The actors of a run, by number, in one placement group. Within `with`, they are up and agree on what they work on."""

    def __init__(self, job: Job, samples: Tensor, placement: Placement) -> None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._allocation = allocate(nodes, placement.num_workers, job.settings.device)
        self._spec = worker_spec(job, self._allocation)
        self._samples = ray.put(samples)
        self._num_started = 0
        self._failures: dict[int, str] = {}  # why workers did not start
        bundles = [self._allocation.bundle] * self._allocation.num_workers
        self._group: PlacementGroup = placement_group(bundles, strategy="PACK", name="awqdist")
        self.by_number: dict[int, Any] = {}
        self.fingerprint: dict[str, str] = {}
        self.device = ""

    def __enter__(self) -> RayActors:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.by_number.values():
            ray.kill(actor)
        remove_placement_group(self._group)

    def restart(self, number: int) -> bool:
        """Replaces an actor that died, wherever the group has room. Returns whether the new one came up in time."""
        ray.kill(self.by_number.pop(number))  # it may only be out of reach
        actor = self._new_actor(number)
        if number not in self._introduced({number: actor}, _RESTART_S):
            ray.kill(actor)
            return False
        self.by_number = dict(sorted({**self.by_number, number: actor}.items()))
        return True

    def _start(self) -> None:
        count = self._allocation.num_workers
        if not self._group.wait(_START_S):
            raise AwqdistError(
                f"the Ray cluster has no room for {count} workers of {self._allocation.bundle} each; free are"
                f" {ray.available_resources()}: use fewer --num-workers, or wait for other jobs to end"
            )
        self.by_number = {number: self._new_actor(number) for number in range(count)}
        workers = self._introduced(self.by_number, _START_S)
        if len(workers) < count:
            why = "; ".join(self._failures.values()) or "see Ray's logs"
            raise AwqdistError(f"only {len(workers)} of {count} workers started: {why}")
        self.fingerprint, self.device = agreed_fingerprint(list(workers.values())), workers[0].device

    def _new_actor(self, number: int) -> Any:
        self._num_started += 1
        needs: dict[str, Any] = {
            "num_cpus": self._allocation.cpus,
            "num_gpus": int(self._allocation.on_gpu),
            "concurrency_groups": _THREADS,
        }
        kind: Any = ray.remote(**needs)(RayWorker)
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)
        name = f"awqdist-{self._group.id.hex()[:8]}-worker-{number}.{self._num_started}"
        return kind.options(name=name, scheduling_strategy=place).remote(number, self._spec, self._samples)

    def _introduced(self, actors: dict[int, Any], patience_s: float) -> dict[int, WorkerInfo]:
        """Returns the workers that answered in time. Raises AwqdistError if one of them cannot work."""
        output = self._spec.settings.output
        token = offer_token(output)
        refs = {actor.introduce.remote(token): number for number, actor in actors.items()}
        try:
            ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=patience_s)
            answers = {}
            for ref in ready:
                try:
                    answers[refs[ref]] = _get(ref)
                except RayActorError as error:
                    self._failures[refs[ref]] = f"worker {refs[ref]}: {str(error).strip().splitlines()[-1]}"
            check_answers(output, token, list(answers))
            return answers
        finally:
            remove_token(output, token)


class _Attempt:
    """All actors at work on one set of assignments, until they are done or one of them is lost."""

    def __init__(self, actors: dict[int, Any], attempt: int, lead: Leader) -> None:
        self._actors, self._attempt, self._lead = dict(actors), attempt, lead
        self._works: dict[Any, int] = {}  # reference -> number of the worker
        self._polls: dict[Any, int] = {}
        self._lost: dict[int, str] = {}
        self._failed: dict[int, str] = {}  # workers that are alive, but could not go on, and why
        self._is_stopped = False

    def run(self, assignments: Sequence[Assignment]) -> dict[int, str]:
        """Returns the workers to restart, each with the reason. Raises AwqdistError for what a worker refuses."""
        numbers = list(self._actors)
        try:
            for place, (number, assignment) in enumerate(zip(numbers, assignments, strict=True)):
                peer = self._actors[numbers[(place + 1) % len(numbers)]]
                name = f"layers {', '.join(map(str, assignment.schedule.layers_of(place)))}"
                work = self._actors[number].work.options(name=name).remote(self._attempt, assignment, peer)
                self._works[work] = number
                self._poll(number)
            while self._works:
                self._take_next(1.0)
            self._drain()
        except AwqdistError:
            self._wind_up(None)  # the layers that the other workers are searching are worth waiting for
            raise
        except BaseException:
            self._wind_up(_INTERRUPT_S)
            raise
        return self._lost or self._failed

    def _wind_up(self, patience_s: float | None) -> None:
        """Stops all workers and takes their messages until they are done or `patience_s` is over."""
        self._stop()
        deadline = None if patience_s is None else time.monotonic() + patience_s
        with suppress(AwqdistError):  # the first error is the one to report
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
            if is_poll:
                self._observe(value)
                self._poll(number)
            elif value is not None and not self._is_stopped:
                self._failed[number] = value
                self._stop()

    def _poll(self, number: int, patience_s: float = _POLL_S) -> None:
        poll = self._actors[number].messages.options(concurrency_group="messages").remote(patience_s)
        self._polls[poll] = number

    def _drain(self) -> None:
        """Takes the last messages of the workers that are alive, after those that are under way."""
        for number in set(self._actors) - set(self._lost):
            self._poll(number, 0.0)
        for ref in self._polls:
            with suppress(RayActorError):
                self._observe(_get(ref))
        self._polls = {}

    def _observe(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self._lead.observe(message)

    def _lose(self, number: int, error: RayActorError) -> None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if " because " in line), lines[0])[:200]
        self._lost.setdefault(number, reason)
        self._works = {ref: n for ref, n in self._works.items() if n != number}
        self._polls = {ref: n for ref, n in self._polls.items() if n != number}
        self._stop()

    def _stop(self) -> None:
        self._is_stopped = True
        for number, actor in self._actors.items():
            if number not in self._lost:
                actor.stop.options(concurrency_group="calls").remote(self._attempt)


def _get(ref: Any) -> Any:
    """Returns the value of a reference. Raises the AwqdistError of the worker as it is, and RayActorError if the worker is lost."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, AwqdistError):
            raise error.cause from None
        raise


@contextmanager
def _joined_cluster(address: str | None) -> Iterator[None]:
    """Connects to a Ray cluster: the one at `address`, else the one of this machine, else a new one for the duration of the run.

    Raises:
        AwqdistError: the cluster at `address` cannot be joined.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _join(address)
    except AwqdistError:
        if address:
            raise
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **_QUIET)
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray replaces them by its own, which end the process at once
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def describe_cluster(address: str | None) -> str:
    """Describes the cluster that a run would join, without starting one. Raises AwqdistError if the one at `address` cannot be joined."""
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        _join(address)
    except AwqdistError:
        if address:
            raise
        return (
            f"{ray.__version__}; this machine belongs to no cluster: --backend ray starts one for the duration of a run"
        )
    try:
        num_nodes, total = sum(node["Alive"] for node in ray.nodes()), ray.cluster_resources()
        counts = ", ".join(f"{total.get(kind, 0):.0f} {kind}s" for kind in ("CPU", "GPU"))
        return f"{ray.__version__}; a cluster of {num_nodes} nodes with {counts}"
    finally:
        ray.shutdown()


def _join(address: str | None) -> None:
    """Joins the cluster at `address`, or the one that this machine belongs to. Raises AwqdistError."""
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")  # give up a dead cluster after 40 s, not 15 min
    current = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        head = address or (current.read_text().strip() if current.is_file() else "")
        host, _, port = head.rpartition(":")
        if port.isdigit() and "/" not in host:  # fail at once if nothing answers: Ray retries for long, and prints much
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        ray.init(address=address or "auto", **_QUIET)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise AwqdistError(
            f"no Ray cluster can be joined at {address}: {first_line(error)}; give HOST:PORT of its head, or nothing for this machine's own"
        ) from None
