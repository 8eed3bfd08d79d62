"""The workers of a Ray run: actors in one placement group, with a GPU or a share of the CPUs each, replaced when they die."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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

from awqdist.backends.remote_worker import Introduction, Order, RemoteWorker, agreed, order_for
from awqdist.backends.room import room_for_workers
from awqdist.errors import AwqdistError
from awqdist.run.events import ChunkForwarded, Event, LayerFinished, WorkerStatus
from awqdist.run.job import Job
from awqdist.run.ring import Assignment
from awqdist.run.shared_folder import check_answers, offer_token, remove_token
from awqdist.settings import Placement

_START_S = 120.0  # for the cluster to place the workers
_REPLACE_S = 60.0  # for a lost worker to find a new place; after that the run goes on without it
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
_GROUPS = {"chunks": 4, "messages": 1, "calls": 1}  # threads of an actor, beside the one that works


class RayWorker(RemoteWorker):
    """What an actor is. Chunks travel as bytes: NumPy has no bfloat16, and arrays are shared without a copy."""

    def __init__(self, number: int, order: Order, samples: Tensor) -> None:
        super().__init__(number, order, samples)
        self._tokens = Counter("awqdist_forwarded_tokens", "Calibration tokens taken through layers", ("worker",))
        self._layers = Counter("awqdist_finished_layers", "Layers searched and written", ("worker",))
        self._memory = Gauge("awqdist_memory_bytes", "Resident memory of the worker", ("worker",))
        for metric in (self._tokens, self._layers, self._memory):
            metric.set_default_tags({"worker": str(number)})

    def work(self, attempt: int, assignment: Assignment, peer: Any) -> str | None:
        """peer: the actor behind this one in the ring. Returns why the work did not come to its end, if so."""

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


class Crew:
    """The actors of a run by their numbers. Within `with`, they are up and agree on what they work on."""

    def __init__(self, job: Job, samples: Tensor, placement: Placement) -> None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._room = room_for_workers(nodes, placement.num_workers, job.settings.device)
        self._order = order_for(job, self._room)
        self._samples = ray.put(samples)
        self._num_started = 0
        self._absent: dict[int, str] = {}  # why workers did not come up
        bundles = [self._room.bundle] * self._room.num_workers
        self._group: PlacementGroup = placement_group(bundles, strategy="PACK", name="awqdist")
        self.actors: dict[int, Any] = {}
        self.fingerprint: dict[str, str] = {}
        self.device = ""

    def __enter__(self) -> Crew:
        try:
            self._start()
        except BaseException:
            self._dismiss()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._dismiss()

    def replace(self, number: int) -> bool:
        """A new actor in the place of one that died, wherever there is room. Returns whether it came up in time."""
        ray.kill(self.actors.pop(number))  # it may only be out of reach
        actor = self._new_actor(number)
        if number not in self._introduced({number: actor}, _REPLACE_S):
            ray.kill(actor)
            return False
        self.actors = dict(sorted({**self.actors, number: actor}.items()))
        return True

    def _start(self) -> None:
        count = self._room.num_workers
        if not self._group.wait(_START_S):
            raise AwqdistError(
                f"the Ray cluster has no room for {count} workers of {self._room.bundle} each; it has {ray.available_resources()}"
                " free: use fewer --num-workers, or wait for what else runs there"
            )
        self.actors = {number: self._new_actor(number) for number in range(count)}
        introductions = self._introduced(self.actors, _START_S)
        if len(introductions) < count:
            why = "; ".join(self._absent.values()) or "see Ray's logs"
            raise AwqdistError(f"only {len(introductions)} of {count} workers came up: {why}")
        self.fingerprint, self.device = agreed(list(introductions.values())), introductions[0].device

    def _new_actor(self, number: int) -> Any:
        self._num_started += 1
        needs: dict[str, Any] = {
            "num_cpus": self._room.cpus,
            "num_gpus": int(self._room.on_gpu),
            "concurrency_groups": _GROUPS,
        }
        kind: Any = ray.remote(**needs)(RayWorker)
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)
        name = f"awqdist-{self._group.id.hex()[:8]}-worker-{number}.{self._num_started}"
        return kind.options(name=name, scheduling_strategy=place).remote(number, self._order, self._samples)

    def _introduced(self, actors: dict[int, Any], patience_s: float) -> dict[int, Introduction]:
        """Who answered in time. Raises AwqdistError if one cannot work."""
        output = self._order.settings.output
        token = offer_token(output)
        refs = {actor.introduce.remote(token): number for number, actor in actors.items()}
        try:
            ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=patience_s)
            answers = {}
            for ref in ready:
                try:
                    answers[refs[ref]] = get(ref)
                except RayActorError as error:
                    self._absent[refs[ref]] = f"worker {refs[ref]}: {str(error).strip().splitlines()[-1]}"
            check_answers(output, token, list(answers))
            return answers
        finally:
            remove_token(output, token)

    def _dismiss(self) -> None:
        for actor in self.actors.values():
            ray.kill(actor)
        remove_placement_group(self._group)


def get(ref: Any) -> Any:
    """The value of a reference. What a worker refused comes out as it was raised there. Raises RayActorError for a worker that is gone."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, AwqdistError):
            raise error.cause from None
        raise


@contextmanager
def joined_cluster(address: str | None) -> Iterator[None]:
    """Within a Ray cluster: the one at `address`, else the one that this machine belongs to, else one of its own for the time of the run.

    Raises AwqdistError if none can be joined.
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
        for number, handler in handlers.items():  # Ray puts its own in their place, which end the process at once
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def describe_cluster(address: str | None) -> str:
    """The cluster that a run would join, in words; starts none. Raises AwqdistError if one is named and cannot be joined."""
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        _join(address)
    except AwqdistError:
        if address:
            raise
        return f"{ray.__version__}; this machine belongs to no cluster: --backend ray starts one for the time of a run"
    try:
        num_nodes, total = sum(node["Alive"] for node in ray.nodes()), ray.cluster_resources()
        counts = ", ".join(f"{total.get(kind, 0):.0f} {kind}s" for kind in ("CPU", "GPU"))
        return f"{ray.__version__}; a cluster of {num_nodes} nodes with {counts}"
    finally:
        ray.shutdown()


def _join(address: str | None) -> None:
    """Joins the cluster at `address`, or the one that this machine belongs to. Raises AwqdistError."""
    os.environ.setdefault(
        "RAY_gcs_server_port_wait_time_s", "1"
    )  # what belongs to no cluster any more fails in 40 s, not 15 min
    try:
        _check_answers(address or _own_address())
        ray.init(address=address or "auto", **_QUIET)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AwqdistError(
            f"no Ray cluster can be joined at {address}: {reason}; give HOST:PORT of its head, or nothing for this machine's own"
        ) from None


def _own_address() -> str | None:
    """Where the head of this machine's cluster was when Ray last started here."""
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    return file.read_text().strip() if file.is_file() else None


def _check_answers(address: str | None) -> None:
    """Raises OSError at once where nothing answers at HOST:PORT: Ray itself would try for long, and fill the screen."""
    host, _, port = (address or "").rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
