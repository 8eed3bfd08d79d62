"""Tensors that hold all experts, as entries of every expert's linears: an index in which each linear has a name and a place of its own.

An expert's slice is a range of bytes. Linears that follow one another in it are ranges themselves; those whose rows lie mixed are views of
the slice, which is then read once for all of them. Experts in MXFP4 (`…_blocks` and `…_scales`) are rows of blocks, never transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from awqdist.checkpoint.index import DTYPES, MXFP4, CheckpointIndex, Packing, TensorEntry
from awqdist.checkpoint.mxfp4 import BLOCK
from awqdist.errors import CheckpointError
from awqdist.layouts import FusedExperts

_BLOCKS, _SCALES = "_blocks", "_scales"


def split_experts(index: CheckpointIndex, families: Sequence[FusedExperts]) -> CheckpointIndex:
    """The index with every tensor of all experts replaced by their linears. Raises CheckpointError for shapes that cannot be split."""
    entries: dict[str, TensorEntry] = {}
    stored = _as_stored(index, families)
    for name, entry in index.entries.items():
        fused = next((f for f in stored if f.leaf(name)), None)
        parts = [(name, entry)] if fused is None else _linears(entry, fused)
        entries.update(parts)
    return replace(index, entries=entries)


def _as_stored(index: CheckpointIndex, families: Sequence[FusedExperts]) -> Sequence[FusedExperts]:
    """The families in the layout that their tensors have: as published, or as transformers computes with and saves them.

    The shapes of gate and up (E, ·, ·) and of down (E, ·, ·) tell: in the latter they are (2I, H) and (H, I), else transposed.
    """
    if not any(fused.computed for fused in families):
        return families
    shapes = [next((e.shape for n, e in index.entries.items() if f.leaf(n) == "weight"), ()) for f in families]
    outer, inner = shapes
    if len(outer) == len(inner) == 3 and outer[1:] == (2 * inner[2], inner[1]):
        return [replace(fused, layout=fused.computed or fused.layout) for fused in families]
    return families


def join_mxfp4(index: CheckpointIndex, families: Sequence[FusedExperts], dtype: str) -> CheckpointIndex:
    """The index with every tensor of experts in MXFP4 and its scales joined to the linears of `dtype`.

    Raises CheckpointError for values without scales, scales without values, and shapes that do not fit each other.
    """
    entries: dict[str, TensorEntry] = {}
    for name, entry in index.entries.items():
        stored = next((name.removesuffix(end) for end in (_BLOCKS, _SCALES) if name.endswith(end)), None)
        fused = next((f for f in families if stored and f.leaf(stored) == "weight"), None)
        if stored is None or fused is None:
            entries[name] = entry
            continue
        missing = next((stored + end for end in (_BLOCKS, _SCALES) if stored + end not in index.entries), None)
        if missing:
            raise CheckpointError(f"{entry.file}: {name} is there, but not {missing}; download the checkpoint again")
        if name.endswith(_BLOCKS):
            values = _dequantized(stored, entry, index.entries[stored + _SCALES], dtype)
            rows = replace(fused, layout=replace(fused.layout, transposed=False))
            entries.update(_linears(values, rows))
    return replace(index, entries=entries)


def _dequantized(name: str, blocks: TensorEntry, scales: TensorEntry, dtype: str) -> TensorEntry:
    """The entry (E, R, I) of blocks (E, R, I / 32, 16) and scales (E, R, I / 32), both uint8."""
    if (
        blocks.dtype != "U8"
        or scales.dtype != "U8"
        or (*scales.shape, BLOCK // 2) != blocks.shape
        or len(blocks.shape) != 4
    ):
        raise CheckpointError(
            f"{blocks.file}: {blocks.name} is {blocks.dtype} of shape {blocks.shape} and {scales.name} {scales.dtype} of shape"
            f" {scales.shape}; expected uint8 of (E, R, I / 32, 16) and (E, R, I / 32)"
        )
    shape = (*blocks.shape[:2], blocks.shape[2] * BLOCK)
    return TensorEntry(
        name, blocks.file, dtype, shape, blocks.start, blocks.stop, None, Packing(MXFP4, scales, (1, BLOCK))
    )


def _linears(entry: TensorEntry, fused: FusedExperts) -> Iterator[tuple[str, TensorEntry]]:
    """The entries of all linears that the tensor of `entry` holds weights or biases of, by their names."""
    if entry.packing is not None and entry.packing.dtype != MXFP4:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name} holds all experts in {entry.packing.dtype}; of experts that share a tensor only those in"
            " 16 or 32 bits and in MXFP4 can be read; give the original"
        )
    expected = 3 if fused.leaf(entry.name) == "weight" else 2
    rows = entry.shape[-1 if fused.layout.transposed else 1] if len(entry.shape) == expected else 1
    if rows % len(fused.linears) or len(entry.shape) != expected:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name} has shape {entry.shape}, which does not hold {' and '.join(fused.linears)} of every"
            " expert; config.json and weights are not of one model"
        )
    views = fused.layout.parts(entry.shape[1:], len(fused.linears))
    for expert, names in enumerate(fused.names(entry.name, entry.shape[0])):
        whole = _expert(entry, expert)
        for name, view in zip(names, views, strict=True):
            shape, strides, offset = tuple(view.shape), tuple(view.stride()), int(view.storage_offset())
            if view.is_contiguous() and whole.packing is None and whole.strides is None:
                width = DTYPES[whole.dtype].itemsize
                start = whole.start + offset * width
                yield name, replace(whole, name=name, shape=shape, start=start, stop=start + prod(shape) * width)
            else:
                yield (
                    name,
                    replace(whole, name=name, shape=shape, strides=strides, packing=None, whole=whole, offset=offset),
                )


def _expert(entry: TensorEntry, number: int) -> TensorEntry:
    """The entry of one expert's slice of a tensor (E, …) that lies in the order of its rows, or of its strides."""
    packing = entry.packing
    if packing is not None:
        packing = replace(packing, scale=_expert(packing.scale, number))
    if entry.strides is None:
        length = (entry.stop - entry.start) // entry.shape[0]
        start, stop, strides = entry.start + number * length, entry.start + (number + 1) * length, None
    else:
        width, strides = DTYPES[entry.dtype].itemsize, entry.strides[1:]
        last = sum((n - 1) * stride for n, stride in zip(entry.shape[1:], strides, strict=True))
        start = entry.start + number * entry.strides[0] * width
        stop = start + (last + 1) * width
    return replace(entry, shape=entry.shape[1:], start=start, stop=stop, strides=strides, packing=packing)
