"""The leader of a run: the one process that writes the log, assigns layers to workers, and completes the output.

Every backend has one leader. How workers are started and how their messages arrive is the backend's business.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from types import TracebackType

from torch import Tensor

from awqdist.layer.records import RunSummary
from awqdist.run.chunks import newest_usable, remove_old_snapshots, sweep_offload
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
    bytes_read,
    seconds_of_runs,
)
from awqdist.run.finish import finish_output, warnings_of
from awqdist.run.job import Job, check_sources, fingerprint, token_chunks
from awqdist.run.journal import open_journal
from awqdist.run.output import check_output
from awqdist.run.schedule import Schedule
from awqdist.run.worker import Assignment


class Leader:
    """Leads a run. `with Leader(...) as lead` holds the lock of the output folder.

    Args:
        job: the same as every worker's, but for the device.
        samples: the calibration tokens, (N, L) int64, the same as every worker's.
        listen: is given every message once it is in the log, never two at a time.
        agreed_fingerprint: that of the workers' jobs, where their devices are not this process's.

    Raises:
        OutputError: the folder is in use, or holds something else.
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
        except BaseException:
            self._journal.close()
            raise
        self._earlier_s = seconds_of_runs(self._journal.earlier)
        self._bytes_read = Counter(bytes_read(self._journal.earlier))

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            if error is not None:
                self._journal.add(Message(RunFailed(str(error) or type(error).__name__), None, time.time()))
            sweep_offload(self._job)
            self._journal.close()

    def begin(self, backend: str, num_workers: int) -> None:
        """Tells that the run begins or resumes, and what the log warns of."""
        job, entries = self._job, self._journal.entries
        model, output = str(job.settings.model), str(job.settings.output)
        num_tokens, num_layers = self._samples.numel(), len(job.plan.tasks)
        self._num_workers = num_workers
        self.tell(
            RunStarted(
                model, output, str(job.device), num_layers, len(entries.layers), num_tokens, num_workers, backend
            )
        )
        for warning in self._journal.warnings:
            self.tell(Warned(warning))

    def assignments(self, num_workers: int) -> list[Assignment]:
        """Returns an assignment for each worker, from the newest usable snapshot on; none if all layers are finished."""
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
            forward_only=frozenset(records),
        )
        finished = {layer: record.source_crc32 for layer, record in records.items()}
        return [Assignment(worker, schedule, finished, snapshot) for worker in range(num_workers)]

    def observe(self, message: Message) -> None:
        """Takes a message of a worker: writes it to the log, then tells the listener. Any thread may call."""
        with self._lock:
            event = message.event
            if isinstance(event, LayerFinished) and event.layer in self._journal.entries.layers:
                return  # told twice
            self._journal.add(message)
            if isinstance(event, SnapshotSaved):
                remove_old_snapshots(self._journal, min(self._unfinished(), default=event.layer))
            elif isinstance(event, SourceRead):
                self._bytes_read[message.worker] += event.num_bytes
            self._listen(message)

    def tell(self, event: Event, worker: int | None = None) -> None:
        """Logs an event of the leader itself, about a worker or about the run, and tells the listener."""
        self.observe(Message(event, worker, time.time()))

    def finish(self) -> RunSummary:
        """Completes the output and returns the summary. Raises OutputError if a layer is not finished."""
        start = time.perf_counter()
        job, records = self._job, self._journal.entries.layers
        output_bytes = finish_output(job, self._journal, self.tell)
        end = time.perf_counter()
        layers = tuple(records[layer] for layer in sorted(records))
        summary = RunSummary(
            model=str(job.settings.model),
            output=str(job.settings.output),
            architecture=job.plan.architecture,
            device=str(job.device),
            recipe=job.recipe.to_yaml(),
            num_calibration_samples=self._samples.shape[0],
            sequence_length=self._samples.shape[1],
            num_workers=self._num_workers,
            layers=layers,
            seconds={"merge": end - start, "total": self._earlier_s + end - self._begun},
            source_bytes=job.index.stored_bytes,
            output_bytes=output_bytes,
            ignored=job.plan.ignored,
            warnings=warnings_of(job, layers),
            bytes_read=dict(self._bytes_read),
        )
        self.tell(RunFinished(summary.output, summary.seconds["total"], summary.floor_seconds, output_bytes))
        return summary

    def _unfinished(self) -> list[int]:
        return [task.index for task in self._job.plan.tasks if task.index not in self._journal.entries.layers]
