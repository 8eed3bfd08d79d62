"""Mappings of an architecture that nobody described: proposed from its structure, kept if they preserve its function.

Every norm that feeds linears is a candidate, and so is every pair of linears whose widths fit. A candidate stays if scaling by random
factors, with random weights, leaves the layer's output unchanged: that is what a mapping means. One layer of each structure is tried, in
float32, on eight tokens.
"""

from __future__ import annotations

import torch

from awqdist.errors import ModelError
from awqdist.model.forward import with_buffers
from awqdist.model.mapping import HeadShape, ResolvedMapping, connect
from awqdist.model.preserve import preserves_function
from awqdist.model.skeleton import Skeleton
from awqdist.model.structure import LayerStructure, random_parameters, trial_calls


def infer_mappings(skeleton: Skeleton, structure: LayerStructure, layer: int) -> tuple[ResolvedMapping, ...]:
    """Mappings of decoder layer `layer`. Raises ModelError if the layer has none that preserve its function."""
    config = skeleton.model.config.get_text_config(decoder=True)
    module, heads = skeleton.layers[layer], HeadShape.of(config)
    device = torch.device("cpu")
    call = trial_calls(skeleton)[layer]
    parameters = with_buffers(module, random_parameters(module), device)
    hidden = torch.randn(1, 8, config.hidden_size, generator=torch.Generator().manual_seed(1))
    found: list[ResolvedMapping] = []
    for candidate in _candidates(structure, heads):
        taken = any(candidate.balance == mapping.balance for mapping in found)
        if not taken and preserves_function(module, parameters, [candidate], hidden, call):
            found.append(candidate)
    if not found:
        raise ModelError(
            f"{skeleton.architecture}: no mapping known, and none found in its layers that preserves their function; "
            "give AWQModifier mappings in the recipe, or leave AWQModifier out to round without smoothing"
        )
    return tuple(found)


def _candidates(structure: LayerStructure, heads: HeadShape) -> list[ResolvedMapping]:
    """Norms in front of sites first; then linears, the nearest in front of a site first."""
    candidates = []
    order = list(structure.linears)
    for site in structure.sites:
        if site[0] in structure.site_norms:
            smooths = [structure.site_norms[site[0]]]
        else:
            smooths = [path for path in reversed(order[: order.index(site[0])]) if path not in site]
        outcomes = [connect(structure, smooth, site, heads) for smooth in smooths]
        candidates += [outcome for outcome in outcomes if isinstance(outcome, ResolvedMapping)]
    return candidates
