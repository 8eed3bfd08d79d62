"""Collects the moments of a layer's inputs while the calibration chunks pass through it.

A site that all tokens reach is observed by a hook on its first linear. An expert's site is given the rows that the router sends to that
expert. Few tokens may reach an expert, so a sample of the block's tokens is sent through all of its experts after the last chunk: it is the
prior of what their inner linears read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from awqdist.errors import ModelError
from awqdist.layer.mlp_refit import RefitModule, RefitMoments, RowSample, refitted_sites
from awqdist.layer.plan import LayerPlan, Site
from awqdist.model.experts import ExpertWatch, run_all_experts
from awqdist.model.forward import Watch
from awqdist.quant.moments import Moments, max_rows
from awqdist.quant.offload import LayerDevice
from awqdist.recipe import Recipe

SAMPLED_ROWS = 256  # of a block's tokens, sent through all of its experts
_FEW_ROWS = 64  # the same where no linear is fitted to its Gram matrix


class Calibration:
    """The moments of one layer's inputs, by site.

    Args:
        plan: What is done to the layer.
        module: The decoder layer; None for lm_head.
        recipe: Decides what must be kept of an input.
        num_tokens: How many tokens will pass through.
        on: Where and how the layer is run.
    """

    def __init__(
        self, plan: LayerPlan, module: nn.Module | None, recipe: Recipe, num_tokens: int, on: LayerDevice
    ) -> None:
        matrices, of_experts = on.memory_of_matrices(), on.memory_of_experts()
        self._plan, fitted = plan, recipe.needs_gram
        num_sampled = SAMPLED_ROWS if fitted else _FEW_ROWS
        self._refitted: list[RefitMoments] = []
        self._samples: dict[Site, RowSample] = {}  # of the blocks' inputs
        self._priors: dict[Site, Moments] = {}  # of inner sites of experts
        blocks: dict[Site, Moments] = {}
        refitted = refitted_sites(plan, recipe, num_tokens)
        for site in (site for site in plan.sites if site.expert is None):
            shape = site.num_inputs, num_tokens
            if module is not None and site in refitted:
                self._refitted.append(RefitMoments(shape, on.device, matrices, RefitModule.of(site, module)))
                blocks[site] = self._refitted[-1]
            else:
                blocks[site] = Moments(*shape, on.device, matrices, exact=fitted)
        self.moments = dict(blocks)
        for site in plan.sites:
            if (expert := site.expert) is None:
                continue
            prior = blocks[expert.block]
            if expert.is_inner:
                self._samples[expert.block] = RowSample(num_sampled, num_tokens)
                prior = self._priors[site] = Moments(site.num_inputs, num_sampled, on.device, of_experts)
            num_experts = next(len(fused.parts) for fused in plan.experts if fused.name == expert.fused)
            most_rows = max_rows(num_experts, site.num_inputs, on.dtype.itemsize)
            self.moments[site] = Moments(
                site.num_inputs, num_tokens, on.device, of_experts, prior=prior, most_rows=most_rows
            )

    def watches(self) -> dict[str, Watch]:
        """What `forward_layer` calls with the inputs of modules, by their paths."""
        found: dict[str, Watch] = {}
        for site, moments in self.moments.items():
            if site.expert is None:
                sample = self._samples.get(site)
                found[site.path] = moments.add if sample is None else _both(moments.add, sample.add)
        return found | {refitted.module.path: refitted.module_rows.add for refitted in self._refitted}

    def expert_watches(self) -> dict[str, ExpertWatch]:
        """What `forward_layer` calls with the rows of experts, by fused parameters."""
        return {fused: partial(_add, sites) for fused, sites in _by_parameter(self.moments).items()}

    def finish(self, layer: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """Completes the priors after the last chunk.

        Args:
            layer: The decoder layer.
            parameters: What it was run with, by names in the layer.

        Raises:
            ModelError: Experts ran in another way than they are watched.
        """
        for fused, of_experts in _by_parameter(self.moments).items():
            if not any(moments.num_tokens for moments in of_experts.values()):
                raise ModelError(
                    f"{self._plan.label}: no token was seen on its way to the experts of {fused}; transformers computes"
                    " them in another way than one product for each expert, and this architecture is not supported yet"
                )
        for fused, priors in _by_parameter(self._priors).items():
            site = next(site for site in self._priors if site.expert and site.expert.fused == fused)
            module = fused.rpartition(".")[0]
            own = [parameter for parameter in self._plan.experts if parameter.module == module]
            assert site.expert is not None
            rows = self._samples[site.expert.block].take()  # (m, H)
            run_all_experts(layer, parameters, own, rows, partial(_add, priors))


def _by_parameter(sites: Mapping[Site, Moments]) -> dict[str, dict[int, Moments]]:
    """The moments of experts by fused parameter and expert."""
    found: dict[str, dict[int, Moments]] = {}
    for site, moments in sites.items():
        if site.expert is not None:
            found.setdefault(site.expert.fused, {})[site.expert.number] = moments
    return found


def _add(sites: Mapping[int, Moments], expert: int, rows: Tensor) -> None:
    if expert in sites:
        sites[expert].add(rows)


def _both(first: Callable[[Tensor], None], second: Callable[[Tensor], None]) -> Watch:
    def watch(activations: Tensor) -> None:
        first(activations)
        second(activations)

    return watch
