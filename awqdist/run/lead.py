"""The leader of a run: the one process that keeps the journal. It deals the layers, takes every message of every worker, and makes a model
of the finished layers. There is one, whatever the backend; who the workers are and how their messages come is the backend's business."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import replace
from types import TracebackType

from torch import Tensor

from awqdist.checkpoint.writer import output_error
from awqdist.layer.records import RunSummary
from awqdist.run.chunks import sweep_offload
from awqdist.run.event_log import EVENTS_FILE, EventLog, bytes_read, read_events, seconds_of_runs
from awqdist.run.events import (
    Event,
    LayerFinished,
    Listen,
    Message,
    RunFailed,
    RunFinished,
    RunStarted,
    SnapshotSaved,
    SourceRead,
    Warned,
)
from awqdist.run.job import Job, check_sources, fingerprint, token_chunks
from awqdist.run.journal import SnapshotRecord, open_journal
from awqdist.run.merge import merge
from awqdist.run.output import check_output
from awqdist.run.ring import Assignment
from awqdist.run.schedule import Schedule
from awqdist.run.snapshots import newest_usable, remove_old_snapshots
from awqdist.run.summary import summarize


class Lead:
    """An opened run. `with Lead(...) as lead` holds the lock of the output folder.

    job, samples (N, L): the same as every worker's; listen: is given every message, once it is safe, never two at a time;
    agreed_fingerprint: of the workers' jobs, where their devices are not this process's.
    Raises OutputError if the folder is in use or holds something else.
    """

    def __init__(
        self, job: Job, samples: Tensor, listen: Listen, agreed_fingerprint: dict[str, str] | None = None
    ) -> None:
        check_output(job.settings)
        self._job, self._samples, self._listen = job, samples, listen
        self._lock = threading.RLock()
        self._begun = time.perf_counter()
        self._journal = open_journal(
            job.settings.output, agreed_fingerprint or fingerprint(job, samples), overwrite=job.settings.overwrite
        )
        try:
            sweep_offload(job)
            check_sources(job, self._journal.entries.layers)
            file, is_new = job.settings.output / EVENTS_FILE, not self._journal.entries.layers
            self._earlier_s = 0.0 if is_new else seconds_of_runs(file)
            self._bytes_read = Counter({} if is_new else bytes_read(read_events(file)))
            self._log = EventLog(file, anew=is_new)
        except BaseException as error:
            self._journal.close()
            if isinstance(error, OSError):
                raise output_error(job.settings.output / EVENTS_FILE, error) from error
            raise

    def __enter__(self) -> Lead:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            if error is not None:
                self._log.append(Message(RunFailed(str(error) or type(error).__name__), None, time.time()))
            self._log.close()
            sweep_offload(self._job)
            self._journal.close()

    def begin(self, backend: str, num_workers: int) -> None:
        """Tells that the run begins, or goes on."""
        job, entries = self._job, self._journal.entries
        model, output = str(job.settings.model), str(job.settings.output)
        num_tokens, num_layers = self._samples.numel(), len(job.plan.tasks)
        self._num_workers = num_workers
        self.tell(
            RunStarted(
                model, output, str(job.device), num_layers, len(entries.layers), num_tokens, num_workers, backend
            )
        )
        for file in self._journal.damaged:
            self.tell(Warned(f"{file} is missing or damaged since the earlier run; it is made again"))

    def assignments(self, num_workers: int) -> list[Assignment]:
        """Deals the layers that are left to the workers, from the newest usable boundary on. Empty if none are left."""
        with self._lock:
            records = dict(self._journal.entries.layers)
            unfinished = self._unfinished()
            snapshot = newest_usable(self._journal, unfinished[0]) if unfinished else None
        if not unfinished:
            return []
        schedule = Schedule(
            first=snapshot.layer if snapshot else 0,
            stop=unfinished[-1] + 1,
            num_workers=num_workers,
            num_chunks=len(token_chunks(self._job.settings, self._samples)),
            layers_per_block=self._job.settings.layers_per_block,
            forward_only=frozenset(records),
        )
        finished = {layer: record.source_crc32 for layer, record in records.items()}
        return [Assignment(worker, schedule, finished, snapshot) for worker in range(num_workers)]

    def observe(self, message: Message) -> None:
        """Takes a message of a worker: what must be safe is journaled first, then the world is told. Any thread may call."""
        with self._lock:
            match message.event:
                case LayerFinished(layer, record):
                    if layer in self._journal.entries.layers:
                        return  # told twice
                    self._journal.add_layer(record)
                case SnapshotSaved(layer, file, sha256):
                    self._journal.add_snapshot(SnapshotRecord(layer, file, sha256))
                    remove_old_snapshots(self._journal, min(self._unfinished(), default=layer))
                case SourceRead(_, num_bytes):
                    self._bytes_read[message.worker] += num_bytes
                case _:
                    pass
            self._log.append(message)
            self._listen(message)

    def tell(self, event: Event, worker: int | None = None) -> None:
        """Takes an event of the leader itself, about a worker or about the run."""
        self.observe(Message(event, worker, time.time()))

    def finish(self) -> RunSummary:
        """Makes the model, once all layers are finished. Raises OutputError if one is not."""
        start = time.perf_counter()
        copied: list[int] = []
        output_bytes = merge(self._job, self._journal, copied.append)
        self.tell(SourceRead(None, sum(copied)))
        end = time.perf_counter()
        seconds = {"merge": end - start, "total": self._earlier_s + end - self._begun}
        entries = self._journal.entries
        summary = replace(
            summarize(self._job, entries, self._samples, seconds, output_bytes, self._num_workers),
            bytes_read=dict(self._bytes_read),
        )
        output = str(self._job.settings.output)
        self.tell(RunFinished(output, seconds["total"], summary.floor_seconds, output_bytes))
        return summary

    def _unfinished(self) -> list[int]:
        return [task.layer for task in self._job.plan.tasks if task.layer not in self._journal.entries.layers]
