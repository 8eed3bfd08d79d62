"""Gathers the statistics of a layer while chunks go through it: of every input site, and of every expert as tokens are routed to it.

With all experts asked for, each is given every token of its block beside what the router does; the layer's output stays the routed one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from awqdist.errors import ModelError
from awqdist.layer.mlp_refit import InnerStatistics, Owner
from awqdist.layer.plan import LayerTask, RoutedSite
from awqdist.layer.residency import Bench
from awqdist.layer.row_sample import RowSample
from awqdist.model.experts import ExpertWatch, FusedParameter, run_all_experts
from awqdist.model.forward import Watch
from awqdist.quant.experts import ExpertStatistics, SharedStatistics, max_rows
from awqdist.quant.stats import InputStatistics

SAMPLED_ROWS = 256  # of a block's tokens, sent through all of its experts as a prior of what their inner linears read
_FEW_ROWS = 64  # the same where no linear is fitted to its Gram matrix

Filled = InputStatistics | ExpertStatistics  # by the rows that go by
SiteStatistics = Filled | SharedStatistics


class Gathering:
    """The statistics of one layer, by the first linear of a site.

    token_chunks: what will go through, (B, L) each; on: where and how the layer is run; all_experts: whether each is given all tokens;
    owners: of inner linears that are to be fitted again once those before them are rounded, by the first linear of their site;
    fitted: whether linears will be fitted to their Gram matrices.
    """

    def __init__(
        self,
        task: LayerTask,
        experts: tuple[FusedParameter, ...],
        token_chunks: Sequence[Tensor],
        on: Bench,
        *,
        all_experts: bool = False,
        fitted: bool = True,
        owners: Mapping[str, Owner] | None = None,
    ) -> None:
        device, matrices, of_experts = on.device, on.residency.for_matrices(on.lend), on.residency.for_experts(on.lend)
        num_tokens = sum(tokens.numel() for tokens in token_chunks)
        self._task, self._experts, self._all_experts = task, experts, all_experts
        num_sampled = SAMPLED_ROWS if fitted else _FEW_ROWS
        kept = num_tokens if all_experts else num_sampled
        self._samples = {r.shared: RowSample(kept, num_tokens) for r in task.routed.values() if r.inner}
        self._priors: dict[str, InputStatistics] = {}  # of inner sites
        self._filled: dict[str, Filled] = {}
        self.statistics: dict[str, SiteStatistics] = {}
        for first in sorted((site[0] for site in task.sites), key=lambda path: path in task.routed):  # experts' last
            width = task.shapes[first][1]
            routed = task.routed.get(first)
            if routed is not None and all_experts and not routed.inner:
                self.statistics[first] = SharedStatistics(self._shared(routed))
                continue
            if owners and first in owners:
                self._filled[first] = InnerStatistics((width, num_tokens), device, matrices, owners[first])
            elif routed is None or all_experts:
                home = matrices if routed is None else of_experts
                self._filled[first] = InputStatistics(width, num_tokens, device, home, exact=fitted)
            else:
                prior = self._shared(routed)
                if routed.inner:
                    prior = self._priors[first] = InputStatistics(width, num_sampled, device, of_experts)
                most_rows = max_rows(self._num_experts(routed.fused), width, on.dtype.itemsize)
                self._filled[first] = ExpertStatistics(width, most_rows, prior, device, of_experts)
            self.statistics[first] = self._filled[first]

    def watches(self) -> dict[str, Watch]:
        """Whom `forward_layer` tells of the inputs of modules."""

        def watch(first: str) -> Watch:
            add, sample = self._filled[first].add, self._samples.get(first)
            return add if sample is None else _both(add, sample.add)

        of_sites = {first: watch(first) for first in self._filled if first not in self._task.routed}
        inner = [found for found in self._filled.values() if isinstance(found, InnerStatistics)]
        return of_sites | {found.owner.path: found.module_rows.add for found in inner}

    def expert_watches(self) -> dict[str, ExpertWatch]:
        """Whom `forward_layer` tells of the rows of experts."""
        if self._all_experts:
            return {}
        return {fused: partial(_add, sites) for fused, sites in self._by_parameter(self._filled).items()}

    def end_chunk(self, layer: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """After each chunk: takes its tokens through all experts, where that is asked for. parameters: what the layer was run with."""
        if self._all_experts:
            self._through_all_experts(layer, parameters, self._by_parameter(self._filled))

    def finish(self, layer: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """After the last chunk: completes the priors. parameters: what the layer was run with.

        Raises ModelError if experts ran otherwise than they are watched.
        """
        for fused, sites in self._by_parameter(self._filled).items():
            if not any(statistics.num_tokens for statistics in sites.values()):
                raise ModelError(
                    f"layer {self._task.layer}: no token was seen on its way to the experts of {fused}; transformers computes"
                    " them in another way than one product for each expert, and this architecture is not supported yet"
                )
        if not self._all_experts:
            self._through_all_experts(layer, parameters, self._by_parameter(self._priors))

    def _through_all_experts(
        self, layer: nn.Module, parameters: Mapping[str, Tensor], sites: dict[str, dict[int, Filled]]
    ) -> None:
        """Takes the rows that were sampled through every expert of their block, for the statistics of inner linears."""
        for module in dict.fromkeys(fused.module for fused in self._experts):
            own = [fused for fused in self._experts if fused.module == module]
            for inner in (sites[fused.name] for fused in own if fused.is_inner and fused.name in sites):
                shared = next(r.shared for r in self._task.routed.values() if r.fused in {f.name for f in own})
                rows = self._samples[shared].take()  # (m, H)
                for part in rows.split(SAMPLED_ROWS) if self._all_experts else [rows]:
                    run_all_experts(layer, parameters, own, part, partial(_add, inner))

    def _by_parameter(self, sites: Mapping[str, Filled]) -> dict[str, dict[int, Filled]]:
        """Statistics of routed sites by fused parameter and expert."""
        found: dict[str, dict[int, Filled]] = {}
        for first, routed in self._task.routed.items():
            if first in sites:
                found.setdefault(routed.fused, {})[routed.expert] = sites[first]
        return found

    def _shared(self, routed: RoutedSite) -> InputStatistics:
        """Those of all tokens that come to the block."""
        statistics = self._filled[routed.shared]
        assert isinstance(statistics, InputStatistics)
        return statistics

    def _num_experts(self, name: str) -> int:
        return next(len(fused.parts) for fused in self._experts if fused.name == name)


def _add(sites: Mapping[int, Filled], expert: int, rows: Tensor) -> None:
    if expert in sites:
        sites[expert].add(rows)


def _both(first: Callable[[Tensor], None], second: Callable[[Tensor], None]) -> Watch:
    def watch(activations: Tensor) -> None:
        first(activations)
        second(activations)

    return watch
