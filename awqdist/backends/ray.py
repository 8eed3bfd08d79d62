"""The Ray backend: one worker in every actor of a placement group, on one machine or on a cluster. Ray is imported here and in `ray_crew`.

Actors hand chunks to each other as object references, two at a time, and copy them into private memory as they come, so that the object
store holds no more than those on their way, however long a worker is busy. The driver deals the layers and listens. When an actor dies the
others finish what they are searching; it is replaced, wherever there is room, and all go on from the newest usable boundary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError
from torch import Tensor

from awqdist.backends.ray_crew import Crew, get, joined_cluster
from awqdist.backends.remote_worker import with_device
from awqdist.errors import AwqdistError
from awqdist.layer.records import RunSummary
from awqdist.run.events import Listen, Message, Warned, WorkerLost
from awqdist.run.job import Job
from awqdist.run.lead import Lead
from awqdist.run.output import check_free
from awqdist.run.ring import Assignment
from awqdist.settings import Placement

_POLL_S = 0.5
_FAREWELL_S = 7.0  # for workers to finish writing when the run is interrupted


def run_ray(job: Job, samples: Tensor, placement: Placement, listen: Listen) -> RunSummary:
    """Quantizes the model of `job` with calibration samples (N, L) on a Ray cluster, or goes on where an earlier run was interrupted.

    Raises AwqdistError for bad input, a cluster without room, or more lost workers than `placement.max_restarts`.
    """
    check_free(job.settings.output)
    with (
        joined_cluster(placement.ray_address),
        Crew(job, samples, placement) as crew,
        Lead(with_device(job, crew.device), samples, listen, crew.fingerprint) as lead,
    ):
        lead.begin("ray", len(crew.actors))
        _run(crew, lead, placement.max_restarts)
        return lead.finish()


def _run(crew: Crew, lead: Lead, max_restarts: int) -> None:
    """Attempts the layers that are left until none is."""
    attempt = num_restarts = 0
    while assignments := lead.assignments(len(crew.actors)):
        attempt += 1
        trial = _Attempt(crew.actors, attempt, lead)
        try:
            lost = trial.carry_out(assignments)
        except AwqdistError:
            trial.wind_up(None)  # what the other workers are searching is worth waiting for
            raise
        except BaseException:
            trial.wind_up(_FAREWELL_S)
            raise
        for number, reason in (lost or trial.failed).items():
            num_restarts += 1
            if num_restarts > max_restarts:
                raise AwqdistError(
                    f"worker {number} was lost ({reason}), and the {max_restarts} restarts of --max-restarts are used up;"
                    " finished layers are kept, the same command resumes"
                )
            lead.tell(WorkerLost(reason, num_restarts, max_restarts), number)
            if not crew.replace(number):
                lead.tell(Warned(f"worker {number} found no new place; the run goes on without it"))
        if not crew.actors:
            raise AwqdistError("all workers were lost and none found a new place; the same command resumes")


class _Attempt:
    """All workers at work on one dealing of the layers, until they are done or one of them is lost."""

    def __init__(self, actors: dict[int, Any], attempt: int, lead: Lead) -> None:
        self._actors, self._attempt, self._lead = dict(actors), attempt, lead
        self._works: dict[Any, int] = {}  # reference -> number of the worker
        self._polls: dict[Any, int] = {}
        self._lost: dict[int, str] = {}
        self._is_stopped = False
        self.failed: dict[int, str] = {}  # workers that live, but could not go on, and why

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
                value = get(ref)
            except RayActorError as error:
                self._lose(number, error)
                continue
            if is_poll:
                self._observe(value)
                self._poll(number)
            elif value is not None and not self._is_stopped:
                self.failed[number] = value
                self._stop()

    def _poll(self, number: int, patience_s: float = _POLL_S) -> None:
        poll = self._actors[number].messages.options(concurrency_group="messages").remote(patience_s)
        self._polls[poll] = number

    def _drain(self) -> None:
        """Takes the last messages of the workers that live: after those that are on their way."""
        for number in set(self._actors) - set(self._lost):
            self._poll(number, 0.0)
        for ref in self._polls:
            with suppress(RayActorError):
                self._observe(get(ref))
        self._polls = {}

    def _observe(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self._lead.observe(message)

    def _lose(self, number: int, error: RayActorError) -> None:
        self._lost.setdefault(number, _reason(error))
        self._works = {ref: n for ref, n in self._works.items() if n != number}
        self._polls = {ref: n for ref, n in self._polls.items() if n != number}
        self._stop()

    def _stop(self) -> None:
        self._is_stopped = True
        for number, actor in self._actors.items():
            if number not in self._lost:
                actor.stop.options(concurrency_group="calls").remote(self._attempt)


def _reason(error: RayActorError) -> str:
    """Ray's explanation, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if " because " in line), lines[0])[:200]
