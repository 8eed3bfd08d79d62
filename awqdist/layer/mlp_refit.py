"""Corrects an MLP's down_proj for the rounding errors of gate and up, which compute its input.

Some rows of what the MLP reads are kept during calibration. Once gate and up are rounded, the MLP's own forward takes
these rows through the original and the rounded weights, and down_proj is fitted to the difference (`refit_correction`
in `quant/factor.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from awqdist.layer.plan import LayerPlan, Site
from awqdist.model.forward import with_buffers
from awqdist.quant.moments import Moments
from awqdist.quant.offload import HOST, HostMemory
from awqdist.quant.precision import low_precision_if_exact
from awqdist.recipe import Recipe

_MOST_ROWS, _LEAST_ROWS = 32, 4  # per input of down_proj: fewer would fit it to noise
_MOST_BITS = 4  # with more, rounding loses no more than the activations' own dtype does
_ELEMENTS_AT_ONCE = 1 << 20  # of down_proj's input


def num_kept_rows(num_inputs: int, num_tokens: int) -> int:
    """Returns how many rows of an MLP's input are kept for a down_proj of `num_inputs` inputs; 0 where there are too few tokens."""
    return min(num_tokens, _MOST_ROWS * num_inputs) if num_tokens >= _LEAST_ROWS * num_inputs else 0


def refitted_sites(plan: LayerPlan, recipe: Recipe, num_tokens: int) -> list[Site]:
    """Returns the sites whose linear is refitted: GPTQ rounds it to few bits, and there are tokens enough."""
    if recipe.rounding.method != "gptq":
        return []
    return [
        site
        for site in plan.sites
        if site.refit_in and num_kept_rows(site.num_inputs, num_tokens)
        if site.quantized and site.quantized[0].scheme and site.quantized[0].scheme.num_bits <= _MOST_BITS
    ]


class RowSample:
    """Keeps every k-th row of a stream, independent of chunk boundaries: at most `num_kept` of `num_rows`.

    kept_on: the device to keep them on; None for where they come from.
    """

    def __init__(self, num_kept: int, num_rows: int, kept_on: torch.device | None = None) -> None:
        self._step = max(1, -(-num_rows // num_kept))
        self._kept_on = kept_on
        self._num_seen = 0
        self._rows: list[Tensor] = []

    def add(self, activations: Tensor) -> None:
        """Adds rows (..., H) of any dtype."""
        flat = activations.detach().reshape(-1, activations.shape[-1])
        kept = flat[-self._num_seen % self._step :: self._step]
        self._num_seen += flat.shape[0]
        self._rows.append(kept.to(self._kept_on or kept.device, copy=True))

    def take(self) -> Tensor:
        """Returns the rows (m, H) and forgets them."""
        rows = torch.cat(self._rows)
        self._rows = []
        return rows


@dataclass(frozen=True, slots=True)
class RefitModule:
    """An MLP, its path in the layer, and the path of its last linear within it."""

    module: nn.Module
    path: str
    leaf: str

    @classmethod
    def of(cls, site: Site, layer: nn.Module) -> RefitModule:
        """Returns the module in `layer` that computes what the site's linear reads."""
        assert site.refit_in is not None
        return cls(layer.get_submodule(site.refit_in), site.refit_in, site.path.removeprefix(f"{site.refit_in}."))


@dataclass(frozen=True, slots=True)
class Refit:
    """What a refit is computed from. moments: of the input as rounded linears compute it; lost: Eᵀ, (I, O) float32."""

    moments: Moments
    lost: Tensor


class RefitMoments(Moments):
    """Keeps the moments of the input of a linear that is refitted. module_rows: is given what the MLP reads."""

    def __init__(
        self, shape: tuple[int, int], device: torch.device, host: HostMemory | None, module: RefitModule
    ) -> None:
        """shape: I, and how many tokens will be added in all."""
        super().__init__(*shape, device, host)
        self.module = module
        self.module_rows = RowSample(num_kept_rows(*shape), shape[1], HOST)
        self._device, self._host_memory = device, host

    def refit(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], scales: Tensor) -> Refit:
        """Takes the kept rows through the MLP, once with its original and once with its rounded linears.

        Args:
            before: the MLP's smoothed parameters, by name.
            after: the same with gate and up as they are rounded.
            scales: (H,), what the MLP's input is divided by.
        """
        self.release()
        rows = self.module_rows.take()
        moments = Moments(self.num_inputs, rows.shape[0], self._device, self._host_memory)
        lost = torch.zeros(self.num_inputs, before[f"{self.module.leaf}.weight"].shape[0], device=self._device)
        sides = [self._with_buffers(side, rows.dtype) for side in (before, after)]
        for part in rows.split(max(1, _ELEMENTS_AT_ONCE // self.num_inputs)):
            given = (part.to(self._device) / scales).to(rows.dtype)
            (_, exact), (inputs, rounded) = (self._last_product(side, given) for side in sides)
            with low_precision_if_exact(rows.dtype):
                lost.addmm_(inputs.float().T, exact.float().sub_(rounded))
            moments.add(inputs)
        return Refit(moments, lost)

    def _with_buffers(self, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        cast = {name: p.to(dtype) for name, p in parameters.items()}
        return with_buffers(self.module.module, cast, self._device)

    def _last_product(self, parameters: Mapping[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what the last linear reads (m, I) and computes (m, O) when the MLP reads rows (m, H)."""
        seen: list[Tensor] = []
        inner = self.module.module.get_submodule(self.module.leaf)
        hook = inner.register_forward_hook(lambda _, args, output: seen.extend([args[0], output]))
        try:
            with torch.no_grad():
                functional_call(self.module.module, dict(parameters), (rows.unsqueeze(0),))
        finally:
            hook.remove()
        return seen[0].flatten(0, 1), seen[1].flatten(0, 1)
