"""What feeds what inside one decoder layer, found by running it on the meta device: no weights, no arithmetic.

Linears that are given the same tensor form an *input site*; a norm whose output is that tensor is the site's norm. Tensors are
recognised by their storage, so views count as the same tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from awqdist.model.forward import LayerCall, forward_layer, record_calls, with_buffers
from awqdist.model.skeleton import Skeleton

_TRACE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class LayerStructure:
    """Module paths are within the layer."""

    linears: dict[str, tuple[int, int]]  # path -> (O, I), in the order in which they run
    sites: tuple[tuple[str, ...], ...]  # linears that read one tensor
    site_norms: dict[str, str]  # first linear of a site -> path of the norm whose output the site reads
    norms: dict[str, bool]  # every norm with a weight -> whether it multiplies by (1 + weight)

    def site_of(self, linear: str) -> tuple[str, ...]:
        return next(site for site in self.sites if linear in site)


def trace_layers(skeleton: Skeleton) -> list[LayerStructure]:
    """Structure of every layer; layers of equal shape are traced once."""
    calls = trial_calls(skeleton)
    known: dict[tuple[Any, ...], LayerStructure] = {}
    structures = []
    for layer, call in zip(skeleton.layers, calls, strict=True):
        signature: tuple[Any, ...] = tuple((path, type(module)) for path, module in layer.named_modules())
        signature += tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
        if signature not in known:
            known[signature] = _trace(layer, call, skeleton.model.config.get_text_config(decoder=True).hidden_size)
        structures.append(known[signature])
    return structures


def trial_calls(skeleton: Skeleton) -> list[LayerCall]:
    """Calls of all layers for one sequence of 8 tokens, without reading a weight: parameters are zeros that take no memory."""
    zeros = {
        name: torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape)
        for name, parameter in skeleton.decoder.named_parameters()
        if name in skeleton.outside_names()
    }
    token_ids = torch.zeros(1, _TRACE_TOKENS, dtype=torch.long)
    return record_calls(skeleton, with_buffers(skeleton.decoder, zeros, torch.device("cpu")), token_ids)[1]


def _trace(layer: nn.Module, call: LayerCall, hidden_size: int) -> LayerStructure:
    readers: dict[tuple[int, int, int], list[str]] = {}  # tensor -> linears that read it
    produced: dict[tuple[int, int, int], str] = {}  # tensor -> norm that made it
    alive: list[Tensor] = []  # storages stay distinct only while they live
    handles = []

    def on_linear(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            alive.append(args[0])
            readers.setdefault(_identity(args[0]), []).append(path)

        return hook

    def on_norm(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            alive.append(output)
            produced[_identity(output)] = path

        return hook

    norms = dict(_norms(layer))
    for path, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(on_linear(path)))
        elif path in norms:
            handles.append(module.register_forward_hook(on_norm(path)))
    try:
        _run_on_meta(layer, call, hidden_size)
    finally:
        for handle in handles:
            handle.remove()
    sites = tuple(tuple(site) for site in readers.values())
    linears = {path: _shape(layer.get_submodule(path)) for site in sites for path in site}
    site_norms = {site[0]: produced[key] for key, site in readers.items() if key in produced}
    return LayerStructure(linears, sites, site_norms, {path: has_unit_offset(norm) for path, norm in norms.items()})


def _run_on_meta(layer: nn.Module, call: LayerCall, hidden_size: int) -> None:
    meta = torch.device("meta")
    parameters: dict[str, Tensor] = {name: p.detach() for name, p in layer.named_parameters()}
    dtype = next(iter(parameters.values())).dtype
    buffers = {name: buffer.to(meta) for name, buffer in layer.named_buffers()}
    hidden = torch.empty(1, _TRACE_TOKENS, hidden_size, dtype=dtype, device=meta)
    forward_layer(layer, {**parameters, **buffers}, hidden, call.cast(meta, dtype))


def _norms(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.ndim == 1:
            yield path, module


def has_unit_offset(norm: nn.Module) -> bool:
    """Whether a norm multiplies by (1 + weight), as Gemma's and Qwen3-Next's do: with a weight of zero it still lets something through."""
    zeros = {name: torch.zeros(parameter.shape) for name, parameter in norm.named_parameters()}
    trial = torch.linspace(-1.0, 2.0, zeros["weight"].shape[0]).unsqueeze(0)
    with torch.no_grad():
        output: Tensor = functional_call(norm, zeros, (trial,))
    return bool(output.abs().max() > 0)


def _shape(linear: nn.Module) -> tuple[int, int]:
    assert isinstance(linear, nn.Linear)
    return linear.out_features, linear.in_features


def _identity(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel()


def random_parameters(layer: nn.Module, seed: int = 0) -> Mapping[str, Tensor]:
    """Float32 parameters of plausible size for a numerical trial of a layer whose weights are not at hand."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, parameter in layer.named_parameters():
        scale = 0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        parameters[name] = torch.randn(parameter.shape, generator=generator) * scale
    return parameters
