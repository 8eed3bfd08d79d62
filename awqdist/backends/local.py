"""Chooses the backend of a run, and is the local one: one worker, in this process. Imports neither Ray nor process groups."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from awqdist.errors import AwqdistError
from awqdist.layer.records import RunSummary
from awqdist.run.device import launcher_value
from awqdist.run.events import Event, Listen, Message
from awqdist.run.job import Job, with_threads
from awqdist.run.leader import Leader
from awqdist.run.worker import run_worker
from awqdist.settings import Placement

BACKENDS = ("local", "ray", "torchrun")


def choose_backend(placement: Placement) -> str:
    """Returns one of BACKENDS; "auto" is torchrun if a launcher started several ranks, else local. Raises AwqdistError."""
    if placement.backend == "auto":
        return "torchrun" if int(launcher_value("WORLD_SIZE") or 1) > 1 else "local"
    if placement.backend not in BACKENDS:
        raise AwqdistError(f"unknown backend {placement.backend!r}; use auto, {', '.join(BACKENDS)}")
    return placement.backend


class NoTransport:
    """The transport of a ring of one worker, whose chunks never leave it."""

    def send(self, layer: int, chunk: int, hidden: Tensor) -> None:
        """Is never called."""
        raise AssertionError("a single worker has no neighbour to send to")

    def receive(self, layer: int, chunk: int) -> Tensor:
        """Is never called."""
        raise AssertionError("a single worker has no neighbour to receive from")

    def check(self) -> None:
        """Does nothing: a ring of one cannot break."""


def run_local(job: Job, samples: Tensor, listen: Listen) -> RunSummary:
    """Quantizes the model of `job` in this process, or resumes an interrupted run.

    Args:
        samples: calibration samples (N, L) int64.
        listen: called with every message.
    """
    job = replace(job, settings=with_threads(job.settings, torch.get_num_threads()))
    torch.set_num_threads(job.settings.threads or 1)
    with Leader(job, samples, listen) as lead:

        def emit(event: Event) -> None:
            lead.observe(Message(event, 0, time.time()))

        lead.begin("local", 1)
        for assignment in lead.assignments(1):
            run_worker(job, samples, assignment, NoTransport(), emit)
        return lead.finish()
