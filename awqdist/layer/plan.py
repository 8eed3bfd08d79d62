"""What is done to one layer: its linears, the inputs that they share, and the mappings that are smoothed.

The types are frozen and built once, before any tensor is read (`run/layer_plans.py`). Sites are the keys of all that is gathered and found
of a layer. On-disk names are left out of comparisons, so that layers of one kind have equal sites.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from awqdist.layer.records import SkippedMapping
from awqdist.model.experts import FusedParameter
from awqdist.model.mapping import ResolvedMapping
from awqdist.recipe import WeightScheme


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear of the layer. path: within the layer; shape: (O, I); scheme: None if it stays in full precision; disk_name: its module's
    name in the checkpoint."""

    path: str
    shape: tuple[int, int]
    scheme: WeightScheme | None
    disk_name: str = field(compare=False, repr=False)  # layers of one kind are alike

    @property
    def weight(self) -> str:
        """The name of the weight within the layer."""
        return f"{self.path}.weight"


@dataclass(frozen=True, slots=True)
class Expert:
    """Which expert a site belongs to. fused: the 3-D parameter whose slice `number` reads the rows; block: the site that reads all tokens
    of the block; is_inner: whether the rows are computed within the expert, as down_proj's are."""

    number: int
    fused: str
    block: Site
    is_inner: bool


@dataclass(frozen=True, slots=True)
class Site:
    """An input that one or more linears share.

    expert: None where all tokens of the layer arrive; refit_in: the module whose rounded linears compute this input, if its linear is to
    be corrected for their errors; to_residual: whether the output is added to the residual stream as it is.
    """

    linears: tuple[Linear, ...]
    expert: Expert | None = None
    refit_in: str | None = None
    to_residual: bool = False

    @property
    def path(self) -> str:
        """The path of the first linear, which names the site."""
        return self.linears[0].path

    @property
    def num_inputs(self) -> int:
        """I, the number of channels."""
        return self.linears[0].shape[1]

    @property
    def quantized(self) -> tuple[Linear, ...]:
        """The linears that are quantized."""
        return tuple(linear for linear in self.linears if linear.scheme is not None)


@dataclass(frozen=True)
class LayerPlan:
    """What is done to one decoder layer, or to lm_head as the layer behind the last.

    linears: all of the layer, in the order in which they run; sites: those that calibration looks at, experts before the site of their
    block; mappings: those that are smoothed; experts: the fused parameters; tensors: parameter within the layer -> on-disk name.
    """

    index: int
    kind: Literal["decoder", "head"]
    linears: tuple[Linear, ...]
    sites: tuple[Site, ...]
    mappings: tuple[ResolvedMapping, ...] = ()
    skipped: tuple[SkippedMapping, ...] = ()
    experts: tuple[FusedParameter, ...] = ()
    tensors: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        """What messages call the layer."""
        return "lm_head" if self.kind == "head" else f"layer {self.index}"

    @cached_property
    def quantized(self) -> tuple[Linear, ...]:
        """The linears that are quantized, in the order in which they run."""
        return tuple(linear for linear in self.linears if linear.scheme is not None)

    @cached_property
    def by_path(self) -> dict[str, Linear]:
        """All linears by their paths."""
        return {linear.path: linear for linear in self.linears}

    @cached_property
    def site_of(self) -> dict[str, Site]:
        """The site of every linear that is in one, by the linear's path."""
        return {linear.path: site for site in self.sites for linear in site.linears}

    def sites_of(self, mapping: ResolvedMapping) -> tuple[Site, ...]:
        """The sites that read what a mapping smooths, in the order of its balance layers; without experts that the recipe ignores."""
        return tuple(dict.fromkeys(self.site_of[path] for path in mapping.balance if path in self.site_of))

    def disk_module(self, path: str) -> str:
        """The on-disk name of the module (a linear or a norm) at `path`."""
        return self.tensors[f"{path}.weight"].removesuffix(".weight")
