"""A worker: takes boundary chunks through its layers, one layer in memory at a time, and leaves each finished layer on disk.

Per layer: read, forward all chunks while the statistics are gathered, quantize, write, journal. Layers that an earlier run finished are
only forwarded, or skipped where a snapshot of the activations lies behind them. The worker emits events and never prints.
"""

from __future__ import annotations

from torch import Tensor

from awqdist.checkpoint.reader import check_finite, read_tensors
from awqdist.checkpoint.writer import write_safetensors
from awqdist.errors import NumericalError, OutputError
from awqdist.model.forward import LayerCall, forward_layer, head_inputs, record_calls, with_buffers
from awqdist.quant.stats import InputStatistics
from awqdist.run.device import compute_dtype, peak_memory_bytes
from awqdist.run.events import ChunkForwarded, Emit, LayerFinished, LayerForwarded, MappingSearched
from awqdist.run.job import Job
from awqdist.run.journal import Journal
from awqdist.run.plan import LayerTask
from awqdist.run.quantize_layer import LayerResult, Trial, quantize_layer
from awqdist.run.records import LayerRecord
from awqdist.run.snapshots import load_newest_snapshot, save_snapshot
from awqdist.run.stopwatch import Stopwatch


class Worker:
    """Quantizes the layers of a job, in order."""

    def __init__(self, job: Job, journal: Journal, emit: Emit) -> None:
        self._job = job
        self._journal = journal
        self._emit = emit
        self._dtype = compute_dtype(job.device, job.skeleton.dtype)

    def run(self, samples: Tensor) -> None:
        """Takes the calibration samples (N, L) int64 through all layers."""
        finished = self._journal.entries.layers
        unfinished = [task.layer for task in self._job.plan.tasks if task.layer not in finished]
        if not unfinished:
            return
        batch = max(1, self._job.settings.chunk_tokens // samples.shape[1])
        token_chunks = list(samples.split(batch))
        chunks, calls = self._embed(token_chunks)
        start = 0
        snapshot = load_newest_snapshot(self._journal, unfinished[0])
        if snapshot is not None:
            start, chunks = snapshot
        for task in self._job.plan.layers[start:]:
            self._layer(task, chunks, calls, forward_only=task.layer in finished)
            if unfinished[-1] == task.layer:
                break
            following = task.layer + 1
            if following % self._job.settings.snapshot_every == 0 and following > start:
                save_snapshot(self._journal, following, chunks)
        if self._job.plan.head is not None and self._job.plan.head.layer in unfinished:
            self._head(self._job.plan.head, chunks, token_chunks)

    def _embed(self, token_chunks: list[Tensor]) -> tuple[list[Tensor], list[list[LayerCall]]]:
        """Inputs of the first layer and the calls of all layers, by chunk. Equal calls are kept once."""
        outside = self._outside()
        chunks: list[Tensor] = []
        calls: list[list[LayerCall]] = []
        for tokens in token_chunks:
            hidden, chunk_calls = record_calls(self._job.skeleton, outside, tokens.to(self._job.device))
            known = next((c for c in calls if all(a.equals(b) for a, b in zip(c, chunk_calls, strict=True))), None)
            calls.append(known or chunk_calls)
            chunks.append(hidden.to("cpu", self._job.skeleton.dtype))
        return chunks, calls

    def _outside(self) -> dict[str, Tensor]:
        names = self._job.skeleton.outside_names()
        tensors = self._read(names, "the tensors outside the decoder layers")[0]
        parameters = {name: tensor.to(self._dtype) for name, tensor in tensors.items()}
        return with_buffers(self._job.skeleton.decoder, parameters, self._job.device)

    def _layer(self, task: LayerTask, chunks: list[Tensor], calls: list[list[LayerCall]], forward_only: bool) -> None:
        """Runs one layer: `chunks` are its inputs before and its outputs after."""
        job, watch = self._job, Stopwatch(task.layer, self._job.device, self._emit)
        module = job.skeleton.layers[task.layer]
        with watch.stage("read"):
            parameters, checksum = self._read(task.disk_names, f"layer {task.layer}")
        statistics = {} if forward_only else self._statistics(task, sum(chunk[..., 0].numel() for chunk in chunks))
        trial = Trial(module, chunks[0][:1].to(job.device), calls[0][task.layer])
        working = with_buffers(module, {n: p.to(self._dtype) for n, p in parameters.items()}, job.device)
        watches = {path: s.add for path, s in statistics.items()}
        with watch.stage("forward"):
            for i, chunk in enumerate(chunks):
                hidden = chunk.to(job.device, self._dtype)
                call = calls[i][task.layer].cast(job.device, self._dtype)
                chunks[i] = forward_layer(module, working, hidden, call, watches).to("cpu", job.skeleton.dtype)
                self._emit(ChunkForwarded(task.layer, i, len(chunks), chunk[..., 0].numel()))
        del working
        if forward_only:
            self._check_source(task, checksum)
            self._emit(LayerForwarded(task.layer))
            return
        self._finish(task, parameters, statistics, trial, (watch, checksum))

    def _head(self, task: LayerTask, chunks: list[Tensor], token_chunks: list[Tensor]) -> None:
        """Quantizes lm_head on what the final norm gives it."""
        watch = Stopwatch(task.layer, self._job.device, self._emit)
        with watch.stage("read"):
            parameters, checksum = self._read(task.disk_names, "lm_head")
        statistics = self._statistics(task, sum(chunk[..., 0].numel() for chunk in chunks))
        outside = self._outside()
        with watch.stage("forward"):
            for tokens, chunk in zip(token_chunks, chunks, strict=True):
                hidden = chunk.to(self._job.device, self._dtype)
                final = head_inputs(self._job.skeleton, outside, tokens.to(self._job.device), hidden)
                statistics[task.sites[0][0]].add(final)
        self._finish(task, parameters, statistics, None, (watch, checksum))

    def _finish(
        self,
        task: LayerTask,
        parameters: dict[str, Tensor],
        statistics: dict[str, InputStatistics],
        trial: Trial | None,
        timing: tuple[Stopwatch, int],
    ) -> None:
        """Quantizes, writes and journals a layer whose statistics are complete."""
        watch, checksum = timing
        for site, collected in statistics.items():
            if not collected.is_finite():
                raise NumericalError(
                    f"layer {task.layer}: the input of {site} is not finite on the calibration text; run the model in a wider dtype"
                    " or check its weights; the layers before it are kept"
                )
        result = quantize_layer(task, parameters, statistics, self._job.recipe, trial, watch)
        with watch.stage("write"):
            record = self._write(task, result, checksum, watch)
        for mapping in record.mappings:
            self._emit(MappingSearched(task.layer, mapping))
        self._emit(LayerFinished(task.layer, record))

    def _write(self, task: LayerTask, result: LayerResult, checksum: int, watch: Stopwatch) -> LayerRecord:
        tensors = {task.disk_names[name]: tensor for name, tensor in result.parameters.items()}
        for path, weight in result.weights.items():
            for kind, tensor in self._job.format.pack(weight).items():
                tensors[f"{task.disk_module(path)}.{kind}"] = tensor
        written = write_safetensors(self._job.settings.output / layer_file(task.layer), tensors)
        record = LayerRecord(
            layer=task.layer,
            file=written.name,
            num_bytes=written.num_bytes,
            sha256=written.sha256,
            source_crc32=checksum,
            smoothing_error=result.smoothing_error,
            mappings=result.mappings,
            linears=result.linears,
            sites=result.sites,
            skipped=task.skipped,
            seconds=dict(watch.seconds),
            peak_memory_bytes=peak_memory_bytes(self._job.device),
        )
        self._journal.add_layer(record)
        return record

    def _read(self, names: dict[str, str], where: str) -> tuple[dict[str, Tensor], int]:
        """Tensors by their names in the layer, on the device, checked for NaN; and the checksum of their bytes."""
        entries = [self._job.index.entries[disk] for disk in names.values()]
        tensors, checksum = read_tensors(sorted(entries, key=lambda e: (e.file.name, e.start)))
        check_finite(tensors, where)
        return {name: tensors[disk].to(self._job.device) for name, disk in names.items()}, checksum

    def _statistics(self, task: LayerTask, num_tokens: int) -> dict[str, InputStatistics]:
        return {
            site[0]: InputStatistics(task.shapes[site[0]][1], num_tokens, self._job.device) for site in task.sites
        }

    def _check_source(self, task: LayerTask, checksum: int) -> None:
        if self._journal.entries.layers[task.layer].source_crc32 != checksum:
            raise OutputError(
                f"layer {task.layer} of {self._job.settings.output} was made from other weights than {self._job.settings.model}"
                " holds now; use --overwrite to begin anew, or another output folder"
            )


def layer_file(layer: int) -> str:
    """Name of the output file of a layer."""
    return f"model-layer-{layer:05d}.safetensors"


