"""The local backend: one worker, in this process."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from awqdist.layer.records import RunSummary
from awqdist.run.events import Event, Listen, Message
from awqdist.run.job import Job, with_threads
from awqdist.run.lead import Lead
from awqdist.run.ring import work


class Alone:
    """The transport of a ring of one: its chunks never leave it."""

    def send(self, layer: int, chunk: int, hidden: Tensor) -> None:
        raise AssertionError("a single worker has nobody to send to")

    def receive(self, layer: int, chunk: int) -> Tensor:
        raise AssertionError("a single worker has nobody to receive from")

    def check(self) -> None:
        """Nothing can break."""


def run_local(job: Job, samples: Tensor, listen: Listen) -> RunSummary:
    """Quantizes the model of `job` with calibration samples (N, L), or goes on where an earlier run was interrupted."""
    job = replace(job, settings=with_threads(job.settings, torch.get_num_threads()))
    torch.set_num_threads(job.settings.threads or 1)
    with Lead(job, samples, listen) as lead:

        def emit(event: Event) -> None:
            lead.observe(Message(event, 0, time.time()))

        lead.begin("local", 1)
        for assignment in lead.assignments(1):
            work(job, samples, assignment, Alone(), emit)
        return lead.finish()
