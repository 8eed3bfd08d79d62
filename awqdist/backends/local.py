"""The local backend: one worker, in this process."""

from __future__ import annotations

import time

from torch import Tensor

from awqdist.run.events import Emit, LayerFinished, LayerForwarded, RunFinished, RunStarted, Warned
from awqdist.run.job import Job, check_sources, fingerprint, other_weights
from awqdist.run.journal import Journal, open_journal
from awqdist.run.merge import merge
from awqdist.run.output import check_output
from awqdist.run.records import RunSummary
from awqdist.run.snapshots import load_newest_snapshot, save_snapshot
from awqdist.run.summary import summarize
from awqdist.run.worker import Worker


def run_local(job: Job, samples: Tensor, emit: Emit) -> RunSummary:
    """Quantizes the model of `job` with calibration samples (N, L), or goes on where an earlier run was interrupted."""
    start = time.perf_counter()
    check_output(job.settings)
    journal = open_journal(job.settings.output, fingerprint(job, samples), overwrite=job.settings.overwrite)
    try:
        check_sources(job, journal.entries.layers)
        model, output = str(job.settings.model), str(job.settings.output)
        num_finished = len(journal.entries.layers)
        earlier = sum(sum(record.seconds.values()) for record in journal.entries.layers.values())
        emit(RunStarted(model, output, str(job.device), len(job.plan.tasks), num_finished, samples.numel()))
        for file in journal.damaged:
            emit(Warned(f"{file} is missing or damaged since the earlier run; it is made again"))
        _run_layers(job, journal, samples, emit)
        merge_start = time.perf_counter()
        output_bytes = merge(job, journal)
        end = time.perf_counter()
        seconds = {"merge": end - merge_start, "total": earlier + end - start}
        summary = summarize(job, journal.entries, samples, seconds, output_bytes)
        emit(RunFinished(output, seconds["total"], summary.floor_seconds, output_bytes))
        return summary
    finally:
        journal.close()


def _run_layers(job: Job, journal: Journal, samples: Tensor, emit: Emit) -> None:
    """All layers in order: those of an earlier run are forwarded only, or skipped where a snapshot lies behind them."""
    finished = journal.entries.layers
    unfinished = [task.layer for task in job.plan.tasks if task.layer not in finished]
    if not unfinished:
        return
    worker = Worker(job, emit)
    first, chunks = 0, worker.embed(samples)
    snapshot = load_newest_snapshot(journal, unfinished[0])
    if snapshot is not None:
        first, chunks = snapshot
    for task in job.plan.tasks[first : unfinished[-1] + 1]:
        if task.layer > first and task.layer % job.settings.snapshot_every == 0:
            save_snapshot(journal, task.layer, chunks)
        done = task.layer in finished
        worker.begin(task, forward_only=done)
        for index, chunk in enumerate(chunks):
            chunks[index] = worker.forward(index, chunk)
        if done:
            if worker.leave() != finished[task.layer].source_crc32:
                raise other_weights(job, task.layer)
            emit(LayerForwarded(task.layer))
        else:
            record = worker.finish()
            journal.add_layer(record)
            emit(LayerFinished(task.layer, record))
