"""Gathers the statistics of a layer while chunks go through it: of every input site, and of every expert as tokens are routed to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from awqdist.errors import ModelError
from awqdist.model.conversion import FusedParameter
from awqdist.model.forward import ExpertWatch, Watch, run_all_experts
from awqdist.quant.experts import ExpertStatistics, max_rows
from awqdist.quant.stats import InputStatistics
from awqdist.run.plan import LayerTask
from awqdist.run.residency import Bench

SAMPLED_ROWS = 256  # of a block's tokens, sent through all of its experts as a prior of what their inner linears read

SiteStatistics = InputStatistics | ExpertStatistics


@dataclass(slots=True)
class _Sample:
    """Rows of a block's input, evenly spaced over the chunks."""

    rows_per_chunk: int
    rows: list[Tensor] = field(default_factory=list)

    def add(self, activations: Tensor) -> None:
        """activations: (..., H)."""
        flat = activations.detach().reshape(-1, activations.shape[-1])
        step = max(1, flat.shape[0] // self.rows_per_chunk)
        self.rows.append(flat[::step][: self.rows_per_chunk].clone())


class Gathering:
    """The statistics of one layer, by the first linear of a site. num_tokens: of all chunks; on: where and how the layer is run."""

    def __init__(
        self, task: LayerTask, experts: tuple[FusedParameter, ...], num_tokens: int, num_chunks: int, on: Bench
    ) -> None:
        device, matrices, rows = on.device, on.residency.for_matrices(on.lend), on.residency.for_experts(on.lend)
        self._task, self._experts = task, experts
        self._samples = {r.shared: _Sample(-(-SAMPLED_ROWS // num_chunks)) for r in task.routed.values() if r.inner}
        self._priors: dict[str, InputStatistics] = {}  # of inner sites
        self.statistics: dict[str, SiteStatistics] = {}
        for first in sorted((site[0] for site in task.sites), key=lambda path: path in task.routed):  # experts' last
            width = task.shapes[first][1]
            routed = task.routed.get(first)
            if routed is None:
                self.statistics[first] = InputStatistics(width, num_tokens, device, matrices)
                continue
            prior = self.statistics[routed.shared]
            if routed.inner:
                prior = self._priors[first] = InputStatistics(width, SAMPLED_ROWS, device, rows)
            assert isinstance(prior, InputStatistics)
            most_rows = max_rows(self._num_experts(routed.fused), width, on.dtype.itemsize)
            self.statistics[first] = ExpertStatistics(width, most_rows, prior, device, rows)

    def watches(self) -> dict[str, Watch]:
        """Whom `forward_layer` tells of the inputs of modules."""

        def watch(first: str) -> Watch:
            add, sample = self.statistics[first].add, self._samples.get(first)
            return add if sample is None else _both(add, sample.add)

        return {first: watch(first) for first in self.statistics if first not in self._task.routed}

    def expert_watches(self) -> dict[str, ExpertWatch]:
        """Whom `forward_layer` tells of the rows of experts."""
        return {fused: partial(_add, sites) for fused, sites in self._by_parameter(self.statistics).items()}

    def finish(self, layer: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """After the last chunk: completes the priors. parameters: what the layer was run with.

        Raises ModelError if experts ran otherwise than they are watched.
        """
        for fused, sites in self._by_parameter(self.statistics).items():
            if not any(statistics.num_tokens for statistics in sites.values()):
                raise ModelError(
                    f"layer {self._task.layer}: no token was seen on its way to the experts of {fused}; transformers computes"
                    " them in another way than one linear for each expert, and this architecture is not supported yet"
                )
        inner = self._by_parameter(self._priors)
        for module in dict.fromkeys(fused.module for fused in self._experts):
            own = [fused for fused in self._experts if fused.module == module]
            for sites in (inner[fused.name] for fused in own if fused.name in inner):
                shared = next(r.shared for r in self._task.routed.values() if r.fused in {f.name for f in own})
                rows = torch.cat(self._samples.pop(shared).rows)  # (m, H)
                run_all_experts(layer, parameters, own, rows, partial(_add, sites))

    def _by_parameter(self, sites: Mapping[str, SiteStatistics]) -> dict[str, dict[int, SiteStatistics]]:
        """Statistics of routed sites by fused parameter and expert."""
        found: dict[str, dict[int, SiteStatistics]] = {}
        for first, routed in self._task.routed.items():
            if first in sites:
                found.setdefault(routed.fused, {})[routed.expert] = sites[first]
        return found

    def _num_experts(self, name: str) -> int:
        return next(len(fused.parts) for fused in self._experts if fused.name == name)


def _add(sites: Mapping[int, SiteStatistics], expert: int, rows: Tensor) -> None:
    if expert in sites:
        sites[expert].add(rows)


def _both(first: Callable[[Tensor], None], second: Callable[[Tensor], None]) -> Watch:
    def watch(activations: Tensor) -> None:
        first(activations)
        second(activations)

    return watch
