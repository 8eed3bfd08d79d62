"""Checks a finished output: hashes, index, config, every packed tensor, and, given the source, every dequantized weight.

Smoothing scales a linear's columns and rows by factors that are not stored. So a dequantized weight is compared with the source after
the best row and column factors have been fitted: what remains is the quantization error.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awqdist.checkpoint.index import INDEX_FILE, CheckpointIndex, TensorEntry, read_header, read_index
from awqdist.checkpoint.reader import read_tensor
from awqdist.checkpoint.sources import read_source
from awqdist.errors import CheckpointError, OutputError
from awqdist.export.formats import Format, output_format
from awqdist.layer.records import LinearRecord
from awqdist.quant.grid import QuantizedWeight
from awqdist.recipe import WeightScheme
from awqdist.run.events import STATE_FOLDER
from awqdist.run.journal import is_whole, read_journal

_UNRELATED = 0.5  # relative weight error above which a linear cannot come from this source


@dataclass(frozen=True, slots=True)
class LinearCheck:
    """weight_error: ‖dequantized - source‖ / ‖source‖ after the best row and column factors; None without a source."""

    name: str
    problem: str | None
    weight_error: float | None


@dataclass(frozen=True, slots=True)
class Verification:
    """Holds the problems of files, index and config, and one check per linear."""

    problems: tuple[str, ...]
    num_files: int
    linears: tuple[LinearCheck, ...]

    @property
    def ok(self) -> bool:
        """Returns whether nothing is wrong."""
        return not self.problems and all(linear.problem is None for linear in self.linears)


def verify(output: Path, source: Path | None = None) -> Verification:
    """Verifies the finished model in `output`.

    Args:
        output: the folder that `quantize` wrote.
        source: the checkpoint that it was made from; with it every weight is compared.

    Raises:
        OutputError: the folder is not an output of awqdist, or is not finished.
    """
    entries = read_journal(output)
    if not entries.fingerprint:
        raise OutputError(f"{output} has no log in {STATE_FOLDER}; it is not an output of awqdist")
    if not (output / INDEX_FILE).is_file():
        raise OutputError(
            f"{output} is not finished ({len(entries.layers)} layers done); run the same quantize command again"
        )
    files = {record.file: (record.num_bytes, record.sha256) for record in entries.layers.values()}
    if entries.outside:
        files[entries.outside.name] = (entries.outside.num_bytes, entries.outside.sha256)
    problems = list(_file_problems(output, files))
    original = read_source(source) if source else None
    try:
        index = read_index(output)
        stored = {entry.name for name in files if (output / name).is_file() for entry in read_header(output / name)}
    except CheckpointError as error:
        return Verification((*problems, str(error)), len(files), ())
    named = {entry.file.name for entry in index.entries.values()}
    problems += [f"{name} is in the index but not in the log" for name in sorted(named - set(files))]
    problems += [f"{name} is stored but not in {INDEX_FILE}" for name in sorted(stored - set(index.entries))]
    layout = output_format(entries.fingerprint["format"])
    records = [linear for record in entries.layers.values() for linear in record.linears]
    parts: dict[str, list[TensorEntry]] = defaultdict(list)  # by module: there are tens of thousands
    for name, entry in index.entries.items():
        parts[name.rpartition(".")[0]].append(entry)
    linears = tuple(_check_linear(record, parts[record.name], layout, original) for record in records)
    return Verification((*problems, *_config_problems(output, index, records)), len(files), linears)


def fit_error(quantized: Tensor, source: Tensor) -> float:
    """Returns ‖Q - diag(r)·W·diag(s)‖ / ‖diag(r)·W·diag(s)‖ for the r and s that alternating least squares finds. Both (O, I) float32."""
    fitted = source
    for _ in range(4):
        for dim in (0, 1):  # columns, then rows
            norm = (fitted * fitted).sum(dim, keepdim=True)
            fitted = fitted * torch.where(
                norm > 0, (quantized * fitted).sum(dim, keepdim=True) / norm, torch.ones_like(norm)
            )
    return float((quantized - fitted).norm() / fitted.norm().clamp(min=1e-20))


def _file_problems(output: Path, files: dict[str, tuple[int, str]]) -> Iterator[str]:
    for name, (num_bytes, sha256) in files.items():
        if not (output / name).is_file():
            yield f"{name} is missing"
        elif not is_whole(output / name, num_bytes, sha256):
            yield f"{name} differs from the file that the log records"


def _config_problems(output: Path, index: CheckpointIndex, records: list[LinearRecord]) -> Iterator[str]:
    try:
        config: dict[str, Any] = json.loads((output / "config.json").read_text()).get("quantization_config") or {}
    except (OSError, ValueError, AttributeError) as error:
        yield f"config.json cannot be read ({error!r})"
        return
    if not config:
        yield "config.json has no quantization_config"
    ignored = set(config.get("ignore") or config.get("modules_to_not_convert") or ())
    for record in records:
        if record.name in ignored:
            yield f"{record.name} is quantized but listed in quantization_config as ignored"
        if f"{record.name}.weight" in index.entries:
            yield f"{record.name} is stored both quantized and in full precision"


def _check_linear(
    record: LinearRecord, parts: Sequence[TensorEntry], layout: Format, source: CheckpointIndex | None
) -> LinearCheck:
    tensors = {e.name.removeprefix(f"{record.name}."): read_tensor(e) for e in parts}
    tensors.pop("bias", None)
    scheme = WeightScheme(record.num_bits, record.symmetric, record.group_size)
    try:
        weight = layout.unpack(tensors, scheme)
        problem = _problem(weight, record)
    except (KeyError, RuntimeError, ValueError) as error:
        return LinearCheck(record.name, f"cannot be unpacked: {error!r}", None)
    if problem or source is None:
        return LinearCheck(record.name, problem, None)
    entry = source.entries.get(f"{record.name}.weight")
    if entry is None:
        return LinearCheck(record.name, "the source has no such weight", None)
    if entry.shape != record.shape:
        return LinearCheck(record.name, f"the source's weight has shape {entry.shape}, not {record.shape}", None)
    distance = fit_error(weight.dequantize(), read_tensor(entry).float())
    problem = f"weight error {distance:.2f}: not this source" if distance > _UNRELATED else None
    return LinearCheck(record.name, problem, distance)


def _problem(weight: QuantizedWeight, record: LinearRecord) -> str | None:
    if tuple(weight.codes.shape) != record.shape:
        return f"shape {tuple(weight.codes.shape)}, expected {record.shape}"
    if not bool(torch.isfinite(weight.weight_scale).all()):
        return "weight_scale is not finite"
    if not bool((weight.weight_scale != 0).all()):
        return "weight_scale has zeros"
    return None
