"""Amounts of arithmetic, by what decides how long it takes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

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
