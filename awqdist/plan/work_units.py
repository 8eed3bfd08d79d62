"""What the arithmetic of a layer is counted in."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

from awqdist.layer.plan import LayerPlan
from awqdist.run.job import Job

Product = Literal[
    "layer", "attention", "statistics", "exact", "rough", "factor"
]  # which dtype a matrix product is carried out in
Stage = Literal["forward", "statistics", "search", "check", "round"]
STAGES: tuple[Stage, ...] = ("forward", "statistics", "search", "check", "round")


@dataclass(slots=True)
class Work:
    """flops: by kind of product; values: float32 numbers that elementwise operations read or write; operations: started."""

    flops: dict[Product, float] = field(default_factory=lambda: defaultdict(float))
    values: float = 0.0
    operations: float = 0.0

    def add(
        self, *, product: Product = "exact", flops: float = 0.0, values: float = 0.0, operations: float = 0.0
    ) -> None:
        self.flops[product] += flops
        self.values += values
        self.operations += operations

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())


@dataclass(frozen=True, slots=True)
class Unit:
    """Quantized linears that read the same rows: ΣO, I, and the tokens that these rows are; how many such units there are alike."""

    rows: int
    columns: int
    linears: int
    tokens: int
    is_expert: bool
    count: int = 1


def attention_width(job: Job, task: LayerPlan) -> int:
    """Values of queries and of outputs that a token has over all heads of its layer."""
    config = job.skeleton.model.config.get_text_config(decoder=True)
    if task.kind == "head":
        return 0
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    each = int(getattr(config, "head_dim", 0) or config.hidden_size // max(heads, 1))
    nope, rope, value = (
        int(getattr(config, n, 0) or 0) for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    return heads * ((nope + rope + value) if nope else 2 * each)
