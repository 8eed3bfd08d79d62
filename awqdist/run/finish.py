"""Completes the output once all layers are finished: copies what is not quantized, writes the index last, and sums the run up.

Before the index is there, no loader takes the folder for a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from awqdist.checkpoint.index import INDEX_FILE, TensorEntry, read_header
from awqdist.checkpoint.reader import check_finite, read_tensors
from awqdist.checkpoint.writer import LazyTensor, copy_file, remove_temporary_files, stream_safetensors, write_json
from awqdist.errors import OutputError
from awqdist.layer.records import FEW_TOKENS, BlockTokens, LayerRecord, tokens_of_experts
from awqdist.run.chunks import remove_snapshots
from awqdist.run.events import Emit, OutsideCopied, SourceRead
from awqdist.run.job import Job
from awqdist.run.journal import Journal
from awqdist.run.output import remove_token

_OUTSIDE_FILE = "model-outside.safetensors"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx"}
_NOT_COPIED = {"config.json", INDEX_FILE, "pytorch_model.bin.index.json"}


def finish_output(job: Job, journal: Journal, emit: Emit) -> int:
    """Completes the output folder of a job whose layers are all in the log. Returns the bytes of the model's tensors.

    Args:
        job: what was to be done.
        journal: what is done.
        emit: is told once the tensors outside the layers are copied, and at the end how much was read for that.

    Raises:
        OutputError: a layer is missing, or its file differs from what the log says.
    """
    output, entries, num_bytes = job.settings.output, journal.entries, 0
    for task in job.plan.tasks:
        record = entries.layers.get(task.index)
        if record is None:
            raise OutputError(f"{output}: layer {task.index} is missing; run the same command again")
        file = output / record.file
        if not file.is_file() or file.stat().st_size != record.num_bytes:
            raise OutputError(f"{file} is missing or has another size than the log says; run the same command again")

    def lazy(entry: TensorEntry) -> LazyTensor:
        def load() -> Tensor:
            nonlocal num_bytes
            reading = read_tensors([entry])
            num_bytes += reading.num_bytes
            check_finite(reading.tensors, str(entry.file))
            return reading.tensors[entry.name]

        return LazyTensor(entry.name, entry.dtype, entry.shape, entry.num_bytes, load)

    if entries.outside is None:
        # by name: equal models give equal bytes, in whatever order their files hold them
        tensors = [lazy(job.index.entries[name]) for name in sorted(job.plan.outside)]
        written = stream_safetensors(output / _OUTSIDE_FILE, tensors)
        emit(OutsideCopied(written.name, written.num_bytes, written.sha256))
    for file in sorted(job.settings.model.iterdir()):  # tokenizer, generation settings, chat template, licence
        if file.is_file() and file.name not in _NOT_COPIED and file.suffix not in _WEIGHT_SUFFIXES:
            copy_file(file, output / file.name)
    write_json(output / "config.json", _config(job))
    index = _index(output, [record.file for record in entries.layers.values()] + [_OUTSIDE_FILE])
    remove_snapshots(journal.folder)
    for folder in (output, journal.folder):
        remove_temporary_files(folder)
    remove_token(output)
    write_json(output / INDEX_FILE, index)
    emit(SourceRead(None, num_bytes))
    return int(index["metadata"]["total_size"])


def _config(job: Job) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((job.settings.model / "config.json").read_text())
    for fields in (config, config.get("text_config")):
        if isinstance(fields, dict):
            fields.pop("quantization_config", None)  # the source's own, which its tensors do not follow any more
    config["quantization_config"] = job.format.config(job.recipe, job.plan.ignored)
    return config


def _index(output: Path, files: list[str]) -> dict[str, Any]:
    """Returns the contents of model.safetensors.index.json for `files`."""
    weight_map: dict[str, str] = {}
    total = 0
    for file in files:
        for entry in read_header(output / file):
            if entry.name in weight_map:
                raise OutputError(f"{output}: tensor {entry.name} is in both {weight_map[entry.name]} and {file}")
            weight_map[entry.name] = file
            total += entry.num_bytes
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def warnings_of(job: Job, layers: tuple[LayerRecord, ...]) -> tuple[str, ...]:
    """What a user should know although the run succeeded."""
    found = []
    if job.plan.inferred:
        found.append(
            f"{job.plan.architecture} is not in the registry: its mappings were inferred from its structure and verified;"
            " `awqdist mappings MODEL --as-recipe` prints them as a recipe to keep"
        )
    found += _source_warnings(job)
    nonfinite = sum(mapping.num_nonfinite_candidates for record in layers for mapping in record.mappings)
    if nonfinite:
        found.append(f"{nonfinite} candidates of the scale searches were not finite and were left out")
    found += [_few_tokens(block) for block in tokens_of_experts(layers) if block.few_token_experts]
    for record in layers:
        for linear in record.linears:
            if linear.num_dead_inputs:
                found.append(f"{linear.name}: {linear.num_dead_inputs} inputs were zero on the whole calibration text")
            if linear.relative_error > linear.relative_error_nearest:
                found.append(f"{linear.name}: its own output error is above that of rounding to nearest")
    return tuple(found)


def _source_warnings(job: Job) -> list[str]:
    """What is in the output otherwise than in the source, and what is in it although the model knows nothing of it."""
    found = []
    entries, unknown = job.index.entries, job.skeleton.unknown
    packed: dict[str, list[str]] = {}  # kind -> dtypes
    for entry in entries.values():
        if entry.quantized:
            packed.setdefault(entry.quantized.format, []).append(entry.dtype)
    for kind, became in packed.items():
        dtypes = ", ".join(sorted(set(became)))
        found.append(f"{len(became)} {kind} weights of the source were dequantized to {dtypes} as they were read")
    if job.index.left_out:
        names = _some(job.index.left_out)
        found.append(f"{len(job.index.left_out)} scales of the source's activations and caches were left out: {names}")
    if unknown:
        widened = sum(entries[name].quantized is not None for name in unknown)
        how = f"were copied, {widened} of them dequantized" if widened else "were copied unchanged"
        found.append(f"{len(unknown)} tensors that the model does not have {how}: {_some(unknown)}")
    return found


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _few_tokens(block: BlockTokens) -> str:
    """Returns a warning that names the experts with few calibration tokens."""
    return (
        f"{block.block}: {len(block.few_token_experts)} of {len(block.tokens)} experts received fewer than {FEW_TOKENS} tokens:"
        f" {block.named_few(8)}; they are fitted to all tokens of the layer instead; use more calibration text, or text"
        " that resembles your real traffic"
    )
