"""How experts lie in 3-D tensors: the families that store one tensor for all experts of a block, and which linear is where in it.

What is read, quantized and written is a linear (O, I) of each expert with a name of its own, as the other families store them and as
vLLM names them. What transformers computes with is the 3-D tensor, laid out as it is stored or otherwise. `Layout.linear` ties the two:
a view of one linear in an expert's slice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of an expert's linears are in its slice.

    transposed: they are its columns; interleaved: row i of all linears comes before row i + 1 of any, else linears follow one another.
    """

    transposed: bool = False
    interleaved: bool = False

    def linear(self, expert: Tensor, number: int, count: int) -> Tensor:
        """A view of the linear with that number, of `count`: (O, I) of a slice (count·O, I), or (I, count·O) where transposed; (O,) of
        biases (count·O,)."""
        rows = expert.T if self.transposed and expert.ndim == 2 else expert
        size = rows.shape[0] // count
        return rows[number::count] if self.interleaved else rows[number * size : (number + 1) * size]

    def parts(self, shape: Sequence[int], count: int) -> list[Tensor]:
        """The views of all linears of a slice of that shape, on the meta device: their shapes, strides and offsets."""
        expert = torch.empty(*shape, device="meta")
        return [self.linear(expert, number, count) for number in range(count)]

    def fuse(self, experts: Sequence[Sequence[Tensor]]) -> Tensor:
        """The tensor (E, count·O, I), or (E, I, count·O), of every expert's linears, each (O, I); (E, count·O) of biases (O,)."""
        count, first = len(experts[0]), experts[0][0]
        shape = (count * first.shape[0], *first.shape[1:])
        fused = first.new_empty(len(experts), *(shape[::-1] if self.transposed else shape))
        for expert, linears in zip(fused, experts, strict=True):
            for number, linear in enumerate(linears):
                self.linear(expert, number, count).copy_(linear)
        return fused


ROWS = Layout()  # one linear's rows, then the next one's


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """A 3-D tensor of some linears of all experts, as it is stored.

    stored: the end of its name; module: the end of the name that experts' names begin with; linears: of an expert, in their order in the
    tensor; bias: the end of the name of the tensor (E, ΣO) of their biases; computed: the layout that transformers computes with.
    """

    stored: str
    module: str
    linears: tuple[str, ...]
    layout: Layout = ROWS
    bias: str | None = None
    computed: Layout | None = None  # None: as it is stored

    def leaf(self, name: str) -> str | None:
        """What the tensor of that name holds of each linear: "weight", "bias", or None for any other tensor."""
        if name.endswith(f".{self.stored}"):
            return "weight"
        return "bias" if self.bias and name.endswith(f".{self.bias}") else None

    def end(self, leaf: str) -> str:
        """The end of the name of the tensor that holds all weights or biases."""
        return str(self.bias) if leaf == "bias" else self.stored

    def names(self, name: str, num_experts: int) -> list[list[str]]:
        """For every expert the names of its linears' weights or biases, which the tensor of that name holds."""
        leaf = self.leaf(name)
        assert leaf is not None
        module = name.removesuffix(self.end(leaf)) + self.module
        return [[f"{module}.{expert}.{linear}.{leaf}" for linear in self.linears] for expert in range(num_experts)]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a linear's weight or bias belongs: in tensor `stored`, as number `linear` of expert `expert`. leaf: "weight" or "bias"."""

    fused: FusedExperts
    prefix: str
    expert: int
    linear: int
    leaf: str

    @property
    def stored(self) -> str:
        return self.prefix + self.fused.end(self.leaf)


_GRANITE = (
    FusedExperts("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts", ("w1", "w3")),
    FusedExperts("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts", ("w2",)),
)
_LLAMA4 = (
    FusedExperts(
        "feed_forward.experts.gate_up_proj", "feed_forward.experts", ("gate_proj", "up_proj"), Layout(transposed=True)
    ),
    FusedExperts("feed_forward.experts.down_proj", "feed_forward.experts", ("down_proj",), Layout(transposed=True)),
)
_GPT_OSS = (
    FusedExperts(
        "mlp.experts.gate_up_proj",
        "mlp.experts",
        ("gate_proj", "up_proj"),
        Layout(transposed=True, interleaved=True),
        "mlp.experts.gate_up_proj_bias",
    ),
    FusedExperts(
        "mlp.experts.down_proj", "mlp.experts", ("down_proj",), Layout(transposed=True), "mlp.experts.down_proj_bias"
    ),
)
_QWEN3_VL_MOE = (
    FusedExperts(
        "mlp.experts.gate_up_proj", "mlp.experts", ("gate_proj", "up_proj"), Layout(transposed=True), computed=ROWS
    ),
    FusedExperts("mlp.experts.down_proj", "mlp.experts", ("down_proj",), Layout(transposed=True), computed=ROWS),
)
_QWEN3_5_MOE = (
    FusedExperts("mlp.experts.gate_up_proj", "mlp.experts", ("gate_proj", "up_proj")),
    FusedExperts("mlp.experts.down_proj", "mlp.experts", ("down_proj",)),
)
_BY_MODEL_TYPE = {
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "gpt_oss": _GPT_OSS,
    "qwen3_vl_moe": _QWEN3_VL_MOE,
    "qwen3_5_moe": _QWEN3_5_MOE,
    "qwen3_5_moe_text": _QWEN3_5_MOE,
}


def fused_experts(model_type: str | None) -> tuple[FusedExperts, ...]:
    """The 3-D tensors of experts of a model type, as in config.json; none for a family that stores every expert's linears apart."""
    return _BY_MODEL_TYPE.get(model_type or "", ())


def place_of(name: str, families: Sequence[FusedExperts]) -> Place | None:
    """Where the tensor of that name belongs, if it is a weight or a bias of an expert's linear."""
    for fused in families:
        linears = "|".join(map(re.escape, fused.linears))
        found = re.fullmatch(rf"(.*\.){re.escape(fused.module)}\.(\d+)\.({linears})\.(weight|bias)", name)
        if found and (found[4] == "weight" or fused.bias):
            return Place(fused, found[1], int(found[2]), fused.linears.index(found[3]), found[4])
    return None


def join_experts(tensors: Mapping[str, Tensor], families: Sequence[FusedExperts]) -> dict[str, Tensor]:
    """Tensors by their names as the family stores them, from tensors among which every expert's linears have names of their own.

    Raises KeyError naming an expert's tensor that is missing.
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
