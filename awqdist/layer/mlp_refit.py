"""Inner linears of a module, such as an MLP's down_proj: what they read once the linears before them are rounded.

Rows of what the module reads are kept. When its outer linears are rounded, the module's own forward takes the rows through them as they
were and as they are, and the inner linear is fitted to the difference (`quant/factor.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from awqdist.layer.plan import LayerPlan, Site
from awqdist.layer.row_sample import RowSample
from awqdist.model.forward import with_buffers
from awqdist.quant.lending import HOST, HostMemory
from awqdist.quant.moments import Moments
from awqdist.quant.precision import exact_for
from awqdist.recipe import Recipe

_MOST_ROWS, _LEAST_ROWS = 32, 4  # per input of the inner linear: from fewer, it would be fitted to what is by chance
_MOST_BITS = 4  # with more, rounding loses no more than the activations' own dtype does
_AT_ONCE = 1 << 20  # elements of the inner linear's input


def num_kept_rows(num_inputs: int, num_tokens: int) -> int:
    """How many rows of a module's input are kept for an inner linear of that many inputs; 0 where there are too few tokens."""
    return min(num_tokens, _MOST_ROWS * num_inputs) if num_tokens >= _LEAST_ROWS * num_inputs else 0


@dataclass(frozen=True, slots=True)
class Owner:
    """A module that reads one tensor, its path in the layer, and that of its inner linear in the module."""

    module: nn.Module
    path: str
    leaf: str

    @classmethod
    def of(cls, site: Site, layer: nn.Module) -> Owner:
        """The module in `layer` that computes what the site's linear reads."""
        assert site.refit_in is not None
        return cls(layer.get_submodule(site.refit_in), site.refit_in, site.path.removeprefix(f"{site.refit_in}."))


@dataclass(frozen=True, slots=True)
class Refitting:
    """What an inner linear is fitted to. statistics: of its input as it comes from rounded linears; lost: Eᵀ, (I, O) float32."""

    statistics: Moments
    lost: Tensor


def refitted_sites(plan: LayerPlan, recipe: Recipe, num_tokens: int) -> list[Site]:
    """The sites of inner linears that GPTQ will round to few bits and refit; none where there are too few tokens for it."""
    if recipe.rounding.method != "gptq":
        return []
    return [
        site
        for site in plan.sites
        if site.refit_in and num_kept_rows(site.num_inputs, num_tokens)
        if site.quantized and site.quantized[0].scheme and site.quantized[0].scheme.num_bits <= _MOST_BITS
    ]


class InnerStatistics(Moments):
    """Statistics of the input of an inner linear. module_rows: is told of what the module reads."""

    def __init__(self, shape: tuple[int, int], device: torch.device, host: HostMemory | None, owner: Owner) -> None:
        """shape: I, and how many tokens will be added in all."""
        super().__init__(*shape, device, host)
        self.owner = owner
        self.module_rows = RowSample(num_kept_rows(*shape), shape[1], HOST)
        self._device, self._room = device, host

    def refitting(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], scales: Tensor) -> Refitting:
        """Takes the rows through the module, once. before, after: the module's smoothed parameters, with its outer linears as they were
        and rounded; scales (H,): what divides the module's input."""
        self.release()
        rows = self.module_rows.take()
        statistics = Moments(self.num_inputs, rows.shape[0], self._device, self._room)
        lost = torch.zeros(self.num_inputs, before[f"{self.owner.leaf}.weight"].shape[0], device=self._device)
        sides = [self._working(side, rows.dtype) for side in (before, after)]
        for part in rows.split(max(1, _AT_ONCE // self.num_inputs)):
            given = (part.to(self._device) / scales).to(rows.dtype)
            (_, exact), (inputs, rounded) = (self._inner_product(side, given) for side in sides)
            with exact_for(rows.dtype):
                lost.addmm_(inputs.float().T, exact.float().sub_(rounded))
            statistics.add(inputs)
        return Refitting(statistics, lost)

    def _working(self, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return with_buffers(self.owner.module, {name: p.to(dtype) for name, p in parameters.items()}, self._device)

    def _inner_product(self, parameters: Mapping[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the inner linear reads (m, I), and makes of it (m, O), when the module reads rows (m, H)."""
        seen: list[Tensor] = []
        inner = self.owner.module.get_submodule(self.owner.leaf)
        hook = inner.register_forward_hook(lambda _, args, output: seen.extend([args[0], output]))
        try:
            with torch.no_grad():
                functional_call(self.owner.module, dict(parameters), (rows.unsqueeze(0),))
        finally:
            hook.remove()
        return seen[0].flatten(0, 1), seen[1].flatten(0, 1)
