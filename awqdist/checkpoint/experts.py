"""Knows the families that store all experts of a block in one 3-D tensor, and finds each expert's linears in it.

What is read, quantized and written is a linear (O, I) of each expert with a name of its own, as the other families store it and as vLLM
names it. What transformers computes with is the 3-D tensor. `ExpertLayout.linear` ties the two: a view of one linear in an expert's slice.

`split_experts` turns an index with such tensors into one in which every linear has an entry. An expert's slice is a range of bytes. Linears
that follow one another in it are ranges themselves; those whose rows lie mixed are views of the slice, which is then read once for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from awqdist.checkpoint.index import DTYPES, CheckpointIndex, TensorEntry
from awqdist.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Where the rows of an expert's linears are in its slice."""

    transposed: bool = False  # they are the slice's columns
    interleaved: bool = False  # row i of all linears comes before row i + 1 of any; else linears follow one another

    def linear(self, expert: Tensor, number: int, count: int) -> Tensor:
        """Returns a view (O, I) of one linear of an expert.

        Args:
            expert: a slice (count·O, I), or (I, count·O) where transposed; biases are (count·O,) and their view (O,).
            number: which linear, from 0 to count - 1.
            count: how many linears the slice holds.
        """
        rows = expert.T if self.transposed and expert.ndim == 2 else expert
        size = rows.shape[0] // count
        return rows[number::count] if self.interleaved else rows[number * size : (number + 1) * size]

    def parts(self, shape: Sequence[int], count: int) -> list[Tensor]:
        """Returns views of all `count` linears of a slice of that shape, on meta: their shapes, strides and offsets."""
        expert = torch.empty(*shape, device="meta")
        return [self.linear(expert, number, count) for number in range(count)]

    def fuse(self, experts: Sequence[Sequence[Tensor]]) -> Tensor:
        """Returns the tensor (E, count·O, I), or (E, I, count·O), of every expert's linears, each (O, I).

        Biases (O,) become a tensor (E, count·O).
        """
        count, first = len(experts[0]), experts[0][0]
        shape = (count * first.shape[0], *first.shape[1:])
        fused = first.new_empty(len(experts), *(shape[::-1] if self.transposed else shape))
        for expert, linears in zip(fused, experts, strict=True):
            for number, linear in enumerate(linears):
                self.linear(expert, number, count).copy_(linear)
        return fused


ROWS = ExpertLayout()  # one linear's rows, then the next one's
_COLUMNS = ExpertLayout(transposed=True)
_MIXED_COLUMNS = ExpertLayout(transposed=True, interleaved=True)


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """A 3-D tensor that holds some linears of all experts of a block."""

    stored: str  # the end of the tensor's name
    module: str  # the end of the name that experts' names begin with
    linears: tuple[str, ...]  # those of one expert, in their order in the tensor
    layout: ExpertLayout = ROWS  # where they lie in the stored tensor
    bias: str | None = None  # the end of the name of the tensor (E, ΣO) of their biases
    computed: ExpertLayout | None = None  # the layout that transformers computes with; None if it is the stored one

    def leaf(self, name: str) -> str | None:
        """Returns what a tensor holds of each linear: "weight", "bias", or None for a tensor without experts."""
        if name.endswith(f".{self.stored}"):
            return "weight"
        return "bias" if self.bias and name.endswith(f".{self.bias}") else None

    def end(self, leaf: str) -> str:
        """Returns the end of the name of the tensor that holds all weights or biases. leaf: "weight" or "bias"."""
        return str(self.bias) if leaf == "bias" else self.stored

    def names(self, name: str, num_experts: int) -> list[list[str]]:
        """Returns for every expert the names of its linears' weights or biases, which the tensor `name` holds."""
        leaf = self.leaf(name)
        assert leaf is not None
        module = name.removesuffix(self.end(leaf)) + self.module
        return [[f"{module}.{expert}.{linear}.{leaf}" for linear in self.linears] for expert in range(num_experts)]


def _gate_up_and_down(
    module: str,
    gate_up: ExpertLayout,
    down: ExpertLayout,
    *,
    biases: bool = False,
    computed: ExpertLayout | None = None,
) -> tuple[FusedExperts, ...]:
    """Returns the tensors gate_up_proj and down_proj that lie right under the experts' module."""
    tensors = (("gate_up_proj", ("gate_proj", "up_proj"), gate_up), ("down_proj", ("down_proj",), down))
    return tuple(
        FusedExperts(f"{module}.{name}", module, linears, layout, f"{module}.{name}_bias" if biases else None, computed)
        for name, linears, layout in tensors
    )


_GRANITE = (
    FusedExperts("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts", ("w1", "w3")),
    FusedExperts("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts", ("w2",)),
)
_LLAMA4 = _gate_up_and_down("feed_forward.experts", _COLUMNS, _COLUMNS)
_QWEN3_5_MOE = _gate_up_and_down("mlp.experts", ROWS, ROWS)
_BY_MODEL_TYPE = {
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "gpt_oss": _gate_up_and_down("mlp.experts", _MIXED_COLUMNS, _COLUMNS, biases=True),
    "qwen3_vl_moe": _gate_up_and_down("mlp.experts", _COLUMNS, _COLUMNS, computed=ROWS),
    "qwen3_5_moe": _QWEN3_5_MOE,
    "qwen3_5_moe_text": _QWEN3_5_MOE,
}


def fused_experts(model_type: str | None) -> tuple[FusedExperts, ...]:
    """Returns the 3-D tensors of experts of a model type, as in config.json; () if every expert is stored separately."""
    return _BY_MODEL_TYPE.get(model_type or "", ())


@dataclass(frozen=True, slots=True)
class ExpertPlace:
    """Where a linear's weight or bias belongs: in tensor `stored`, as number `linear` of expert `expert`."""

    fused: FusedExperts
    prefix: str
    expert: int
    linear: int
    leaf: str  # "weight" or "bias"

    @property
    def stored(self) -> str:
        """Returns the name of the 3-D tensor."""
        return self.prefix + self.fused.end(self.leaf)


def place_of(name: str, families: Sequence[FusedExperts]) -> ExpertPlace | None:
    """Returns where the tensor of that name belongs, if it is a weight or a bias of an expert's linear."""
    for fused in families:
        linears = "|".join(map(re.escape, fused.linears))
        found = re.fullmatch(rf"(.*\.){re.escape(fused.module)}\.(\d+)\.({linears})\.(weight|bias)", name)
        if found and (found[4] == "weight" or fused.bias):
            return ExpertPlace(fused, found[1], int(found[2]), fused.linears.index(found[3]), found[4])
    return None


def join_experts(tensors: Mapping[str, Tensor], families: Sequence[FusedExperts]) -> dict[str, Tensor]:
    """Returns tensors by the names that the family stores, made from tensors in which every expert's linear has a name.

    Raises:
        KeyError: a tensor of an expert is missing; the error is its name.
    """
    joined = dict(tensors)
    counts: dict[str, tuple[FusedExperts, int]] = {}  # stored tensor -> its number of experts
    for place in (place_of(name, families) for name in tensors):
        if place is not None:
            earlier = counts.get(place.stored, (place.fused, 0))[1]
            counts[place.stored] = place.fused, max(earlier, place.expert + 1)
    for stored, (fused, num_experts) in counts.items():
        parts = [[joined.pop(name) for name in expert] for expert in fused.names(stored, num_experts)]
        joined[stored] = fused.layout.fuse(parts)
    return joined


def split_experts(index: CheckpointIndex, families: Sequence[FusedExperts]) -> CheckpointIndex:
    """Returns the index with every tensor of all experts replaced by entries of their linears.

    Raises:
        CheckpointError: a tensor cannot be split, by its shape or its format.
    """
    entries: dict[str, TensorEntry] = {}
    stored = _in_stored_layout(index, families)
    for name, entry in index.entries.items():
        fused = next((f for f in stored if f.leaf(name)), None)
        entries.update([(name, entry)] if fused is None else expert_entries(entry, fused))
    return replace(index, entries=entries)


def expert_entries(entry: TensorEntry, fused: FusedExperts) -> Iterator[tuple[str, TensorEntry]]:
    """Yields the names and entries of all linears whose weights or biases the tensor of `entry` holds.

    Raises:
        CheckpointError: its shape does not hold them, or its format does not store an expert as rows of blocks.
    """
    if entry.packing is not None and entry.packing.dtype in DTYPES:
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
        whole = _slice(entry, expert)
        for name, view in zip(names, views, strict=True):
            shape, strides, offset = tuple(view.shape), tuple(view.stride()), int(view.storage_offset())
            if view.is_contiguous() and whole.packing is None and whole.strides is None:
                width = DTYPES[whole.dtype].itemsize
                start = whole.start + offset * width
                part = replace(whole, name=name, shape=shape, start=start, stop=start + prod(shape) * width)
            else:
                part = replace(whole, name=name, shape=shape, strides=strides, packing=None, whole=whole, offset=offset)
            yield name, part


def _in_stored_layout(index: CheckpointIndex, families: Sequence[FusedExperts]) -> Sequence[FusedExperts]:
    """Returns the families in the layout that their tensors have: as published, or as transformers computes and saves.

    The shapes of gate and up (E, ·, ·) and of down (E, ·, ·) tell: in the latter they are (2I, H) and (H, I), else transposed.
    """
    if not any(fused.computed for fused in families):
        return families
    shapes = [next((e.shape for n, e in index.entries.items() if f.leaf(n) == "weight"), ()) for f in families]
    outer, inner = shapes
    if len(outer) == len(inner) == 3 and outer[1:] == (2 * inner[2], inner[1]):
        return [replace(fused, layout=fused.computed or fused.layout) for fused in families]
    return families


def _slice(entry: TensorEntry, number: int) -> TensorEntry:
    """Returns the entry of one expert's slice of a tensor (E, …) that lies in the order of its rows, or of its strides."""
    packing = entry.packing
    if packing is not None:
        packing = replace(packing, parts=tuple(_slice(part, number) for part in packing.parts))
    if entry.strides is None:
        length = (entry.stop - entry.start) // entry.shape[0]
        start, stop, strides = entry.start + number * length, entry.start + (number + 1) * length, None
    else:
        width, strides = DTYPES[entry.dtype].itemsize, entry.strides[1:]
        last = sum((n - 1) * stride for n, stride in zip(entry.shape[1:], strides, strict=True))
        start = entry.start + number * entry.strides[0] * width
        stop = start + (last + 1) * width
    return replace(entry, shape=entry.shape[1:], start=start, stop=stop, strides=strides, packing=packing)
