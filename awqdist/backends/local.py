"""The local backend: one worker, in this process."""

from __future__ import annotations

import time

from torch import Tensor

from awqdist.run.events import Emit, RunFinished, RunStarted, Warned
from awqdist.run.job import Job, fingerprint
from awqdist.run.journal import open_journal
from awqdist.run.merge import merge
from awqdist.run.output import check_output
from awqdist.run.records import RunSummary
from awqdist.run.summary import summarize
from awqdist.run.worker import Worker


def run_local(job: Job, samples: Tensor, emit: Emit) -> RunSummary:
    """Quantizes the model of `job` with calibration samples (N, L), or goes on where an earlier run was interrupted."""
    start = time.perf_counter()
    check_output(job.settings)
    journal = open_journal(job.settings.output, fingerprint(job, samples), overwrite=job.settings.overwrite)
    try:
        model, output = str(job.settings.model), str(job.settings.output)
        num_finished = len(journal.entries.layers)
        emit(RunStarted(model, output, str(job.device), len(job.plan.tasks), num_finished, samples.numel()))
        for file in journal.damaged:
            emit(Warned(f"{file} is missing or damaged since the earlier run; it is made again"))
        Worker(job, journal, emit).run(samples)
        merge_start = time.perf_counter()
        output_bytes = merge(job, journal)
        end = time.perf_counter()
        seconds = {"merge": end - merge_start, "total": end - start}
        summary = summarize(job, journal.entries, samples, seconds, output_bytes)
        emit(RunFinished(output, seconds["total"], summary.floor_seconds, output_bytes))
        return summary
    finally:
        journal.close()
