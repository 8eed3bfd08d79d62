"""Completes the output once all layers are finished: copies what is not quantized, checks the layers, and writes the index last.

Before the index is there, no loader takes the folder for a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from awqdist.checkpoint.index import INDEX_FILE, TensorEntry, read_header
from awqdist.checkpoint.reader import check_finite, read_tensors
from awqdist.checkpoint.writer import LazyTensor, copy_file, remove_temporary_files, stream_safetensors, write_json
from awqdist.errors import OutputError
from awqdist.run.events import Emit, OutsideCopied
from awqdist.run.job import Job
from awqdist.run.journal import Journal, JournalEntries
from awqdist.run.layer_plans import Plan
from awqdist.run.shared_folder import remove_token
from awqdist.run.snapshots import remove_snapshots

OUTSIDE_FILE = "model-outside.safetensors"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx"}
_NOT_COPIED = {"config.json", INDEX_FILE, "pytorch_model.bin.index.json"}


def merge(job: Job, journal: Journal, emit: Emit, count: Callable[[int], None]) -> int:
    """Completes the output folder of a job whose layers are all in the log. Returns the bytes of the model's tensors.

    Args:
        emit: is told once the tensors outside the layers are copied.
        count: is given the bytes read of every tensor that is copied.

    Raises:
        OutputError: a layer is missing, or its file differs from what the log says.
    """
    output = job.settings.output
    check_layers(output, job.plan, journal.entries)
    if journal.entries.outside is None:
        # by name: equal models give equal bytes, in whatever order their files hold them
        tensors = [_lazy(job.index.entries[name], count) for name in sorted(job.plan.outside)]
        written = stream_safetensors(output / OUTSIDE_FILE, tensors)
        emit(OutsideCopied(written.name, written.num_bytes, written.sha256))
    _copy_companions(job.settings.model, output)
    write_json(output / "config.json", _config(job))
    index = build_index(output, [record.file for record in journal.entries.layers.values()] + [OUTSIDE_FILE])
    remove_snapshots(journal.folder)
    for folder in (output, journal.folder):
        remove_temporary_files(folder)
    remove_token(output)
    write_json(output / INDEX_FILE, index)
    return int(index["metadata"]["total_size"])


def check_layers(output: Path, plan: Plan, entries: JournalEntries) -> None:
    """Raises OutputError unless every layer of the plan has a record and a file of the recorded size."""
    for task in plan.tasks:
        record = entries.layers.get(task.index)
        if record is None:
            raise OutputError(f"{output}: layer {task.index} is missing; run the same command again")
        file = output / record.file
        if not file.is_file() or file.stat().st_size != record.num_bytes:
            raise OutputError(f"{file} is missing or has another size than the log says; run the same command again")


def build_index(output: Path, files: list[str]) -> dict[str, Any]:
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


def _lazy(entry: TensorEntry, count: Callable[[int], None]) -> LazyTensor:
    def load() -> Tensor:
        reading = read_tensors([entry])
        count(reading.num_bytes)
        check_finite(reading.tensors, str(entry.file))
        return reading.tensors[entry.name]

    return LazyTensor(entry.name, entry.dtype, entry.shape, entry.num_bytes, load)


def _copy_companions(model: Path, output: Path) -> None:
    """Tokenizer, generation settings, chat template, licence: every small file of the source that is not weights."""
    for file in sorted(model.iterdir()):
        if file.is_file() and file.name not in _NOT_COPIED and file.suffix not in _WEIGHT_SUFFIXES:
            copy_file(file, output / file.name)


def _config(job: Job) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((job.settings.model / "config.json").read_text())
    for fields in (config, config.get("text_config")):
        if isinstance(fields, dict):
            fields.pop("quantization_config", None)  # the source's own, which its tensors do not follow any more
    config["quantization_config"] = job.format.config(job.recipe, job.plan.ignored)
    return config
