"""Finds what feeds what inside one decoder layer, by running it on the meta device: no weights, no arithmetic.

Linears that are given the same tensor form an *input site*; a norm whose output is that tensor is the site's norm. Tensors are
recognised by their storage, so views count as the same tensor.

Routing depends on data, which the meta device has none of: a module of experts is passed over. The linears of its experts that read its
input belong to that input's site, whatever tokens each of them is sent; those within the experts are a site each. Where the module is
given the router's scores times its tokens (Llama-4), the site is the router's.

Some linears write to the residual stream: what they compute is added to the layer's output, and nothing else is done to it. Sums, views and
products with a number are followed from the linears' outputs on; a norm, a gate or an attention in between ends the trail.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from awqdist.errors import ModelError, first_line
from awqdist.model.experts import FusedParameter
from awqdist.model.forward import LayerCall, forward_layer, record_calls, with_buffers
from awqdist.model.skeleton import Skeleton

Identity = tuple[int, int, int]
_TRACE_TOKENS = 8
_SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_VIEWS = {
    *(torch.nn.functional.dropout, torch.dropout, Tensor.contiguous, Tensor.to, Tensor.type_as, Tensor.float),
    *(Tensor.view, Tensor.reshape, torch.reshape, Tensor.unsqueeze, Tensor.squeeze, Tensor.clone),
}


@dataclass(frozen=True, slots=True)
class RoutedLinears:
    """Linears of one expert that read the same rows: the slice `expert` of the fused parameter multiplies them."""

    linears: tuple[str, ...]
    fused: str
    expert: int


@dataclass(frozen=True, slots=True)
class LayerStructure:
    """What feeds what in one layer. Module paths are within the layer."""

    linears: dict[str, tuple[int, int]]  # path -> (O, I), in the order in which they run
    sites: tuple[tuple[str, ...], ...]  # linears that read one tensor
    site_norms: dict[str, str]  # first linear of a site -> path of the norm whose output the site reads
    norms: dict[str, bool]  # every norm with a weight -> whether it multiplies by (1 + weight)
    norm_widths: dict[str, int]  # the same norms -> how many weights they have
    routed: tuple[RoutedLinears, ...] = ()  # the linears of every expert
    gates: frozenset[str] = frozenset()  # linears that decide on experts: routers and gates of shared experts
    writers: frozenset[str] = frozenset()  # linears whose outputs are added to the residual stream as they are
    inner: dict[str, str] = field(default_factory=dict)  # first linear of a site -> the module that makes what it reads

    def site_of(self, linear: str) -> tuple[str, ...]:
        """Returns the site that a linear belongs to."""
        return next(site for site in self.sites if linear in site)


def trace_layers(skeleton: Skeleton) -> list[LayerStructure]:
    """Returns the structure of every layer; layers of equal shape are traced once.

    Raises:
        ModelError: a layer cannot run without data.
    """
    calls = trial_calls(skeleton)
    known: dict[tuple[Any, ...], LayerStructure] = {}
    structures = []
    hidden_size = skeleton.model.config.get_text_config(decoder=True).hidden_size
    for number, (layer, call) in enumerate(zip(skeleton.layers, calls, strict=True)):
        signature: tuple[Any, ...] = tuple((path, type(module)) for path, module in layer.named_modules())
        signature += tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
        if signature not in known:
            try:
                known[signature] = _trace(layer, call, hidden_size, skeleton.layer_experts(number))
            except RuntimeError as error:
                raise ModelError(
                    f"{skeleton.architecture}: layer {number} chooses by its data what it computes, in another way than transformers'"
                    f" modules of experts do, which is not supported yet ({first_line(error)})"
                ) from error
        structures.append(known[signature])
    return structures


def trial_calls(skeleton: Skeleton) -> list[LayerCall]:
    """Returns calls of all layers for one sequence of 8 tokens; parameters are zeros that take no memory."""
    outside = skeleton.outside_names()
    zeros = {
        name: torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape)
        for name, parameter in skeleton.decoder.named_parameters()
        if name in outside
    }
    token_ids = torch.zeros(1, _TRACE_TOKENS, dtype=torch.long)
    return record_calls(skeleton, with_buffers(skeleton.decoder, zeros, torch.device("cpu")), token_ids)[1]


def _trace(layer: nn.Module, call: LayerCall, hidden_size: int, experts: tuple[FusedParameter, ...]) -> LayerStructure:
    norms = dict(_norms_of(layer))
    shapes = {path: fused.part_shape for fused in experts for part in fused.parts for path in part}
    seen = _Trace()
    with ExitStack() as stack:
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear) or (experts and _is_router(module)):
                shapes[path] = _weight(module).shape[0], _weight(module).shape[1]
                stack.callback(module.register_forward_pre_hook(partial(seen.linear_reads, path)).remove)
                stack.callback(module.register_forward_hook(partial(seen.linears_write, [path])).remove)
            elif path in norms:
                stack.callback(module.register_forward_hook(partial(seen.norm_makes, path)).remove)
        for path in {fused.module for fused in experts}:
            module = layer.get_submodule(path)
            own = [fused for fused in experts if fused.module == path]
            module.forward = partial(seen.pass_over_experts, own)
            summed = [linear for fused in own if fused.is_inner for part in fused.parts for linear in part]
            stack.callback(module.register_forward_hook(partial(seen.linears_write, summed)).remove)
            stack.callback(delattr, module, "forward")
        stack.enter_context(seen)
        output = _run_on_meta(layer, call, hidden_size)
    sites = tuple(tuple(readers) for _, readers in seen.read.values())
    routed = tuple(RoutedLinears(part, f.name, e) for f in experts for e, part in enumerate(f.parts))
    return LayerStructure(
        linears={path: shapes[path] for site in sites for path in site},
        sites=sites,
        site_norms={site[0]: seen.norm[key] for key, site in zip(seen.read, sites, strict=True) if key in seen.norm},
        norms={path: _has_unit_offset(norm) for path, norm in norms.items()},
        norm_widths={path: _weight(norm).shape[0] for path, norm in norms.items()},
        routed=routed,
        gates=_gates(sites, shapes, experts),
        writers=seen.writers_of(output),
        inner=_inner_sites(layer, sites),
    )


class _Trace(TorchFunctionMode):
    """Notes which linears read a tensor and which norm made it, while a layer runs on the meta device.

    It follows the outputs of linears through sums, views and products with a number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[Identity, tuple[Tensor, list[str]]] = {}  # tensors that linears read, and those linears
        self.norm: dict[Identity, str] = {}  # by the tensor that it made
        self._writers: dict[Identity, frozenset[str]] = {}  # by a tensor, the linears whose outputs are its terms
        self._alive: list[Tensor] = []  # storages stay distinct only while they live

    def linear_reads(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Runs before a linear's forward."""
        self._is_read(args[0], [path])

    def norm_makes(self, path: str, module: nn.Module, args: Any, output: Tensor) -> None:
        """Runs after a norm's forward."""
        self._alive.append(output)
        self.norm[_identity(output)] = path

    def linears_write(self, paths: list[str], module: nn.Module, args: Any, output: Any) -> None:
        """Runs after the forward of a linear, or of a module that sums up the linears of those paths.

        A module that returns several tensors, as routers do, writes nothing.
        """
        if isinstance(output, Tensor):
            self._mark(output, frozenset(paths))

    def pass_over_experts(self, experts: list[FusedParameter], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stands in for the forward of a module of experts, and computes nothing.

        The module reads the tensor given, or if no linear reads that, what those beside it read.
        """
        path = experts[0].module
        parent = f"{path.rpartition('.')[0]}."
        beside = [tensor for tensor, readers in self.read.values() if any(r.startswith(parent) for r in readers)]
        source = hidden if _identity(hidden) in self.read or not beside else beside[-1]
        if source.shape[-1] != hidden.shape[-1]:
            raise ModelError(
                f"the experts of {path} read a projection of their own of {hidden.shape[-1]} channels"
                " (moe_latent_size), which is not supported yet"
            )
        for fused in experts:
            for part in fused.parts:
                self._is_read(torch.empty(1, device="meta") if fused.is_inner else source, part)
        return torch.empty_like(hidden)

    def writers_of(self, output: Tensor) -> frozenset[str]:
        """Returns the linears whose outputs are terms of `output`."""
        return self._writers.get(_identity(output), frozenset())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            scaled = func in _PRODUCTS and any(isinstance(value, Number) for value in args[:2])
            followed = args[:2] if func in _SUMS or scaled else args[:1] if func in _VIEWS else ()
            terms = (self.writers_of(term) for term in followed if isinstance(term, Tensor))
            self._mark(result, frozenset().union(*terms))
        return result

    def _is_read(self, tensor: Tensor, paths: Iterable[str]) -> None:
        self.read.setdefault(_identity(tensor), (tensor, []))[1].extend(paths)

    def _mark(self, tensor: Tensor, paths: frozenset[str]) -> None:
        if paths:
            self._alive.append(tensor)
            self._writers[_identity(tensor)] = paths


def _is_router(module: nn.Module) -> bool:
    """Returns whether a module has a weight matrix of its own and is no linear: transformers' routers."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _gates(
    sites: tuple[tuple[str, ...], ...], shapes: dict[str, tuple[int, int]], experts: tuple[FusedParameter, ...]
) -> frozenset[str]:
    """Returns linears beside experts that have one output per expert, or one: they decide, and stay in full precision."""
    gates = set()
    for fused in experts:
        site = next(site for site in sites if fused.parts[0][0] in site)
        beside = [path for path in site if not path.startswith(f"{fused.module}.")]
        gates |= {
            path for path in beside if shapes[path][0] in (1, len(fused.parts)) and re.search("gate|router", path)
        }
    return frozenset(path for path in gates if not path.endswith("gate_proj"))


def _inner_sites(layer: nn.Module, sites: tuple[tuple[str, ...], ...]) -> dict[str, str]:
    """Returns the second site of modules that read one tensor and have linears of two sites: gated MLPs, shared experts.

    The keys are the sites' linears, the values the modules.
    """
    found: dict[str, list[tuple[str, ...]]] = {}
    for site in sites:
        for path in dict.fromkeys(linear.rpartition(".")[0] for linear in site):
            found.setdefault(path, []).append(site)
    modules = dict(layer.named_modules())  # linears of fused experts are in none
    return {
        of_module[1][0]: path
        for path, of_module in found.items()
        if path and path in modules and len(of_module) == 2 and len(of_module[1]) == 1
        if len(inspect.signature(modules[path].forward).parameters) == 1
    }


def _run_on_meta(layer: nn.Module, call: LayerCall, hidden_size: int) -> Tensor:
    """Runs the layer in float32, so that a cast to it, as in routers, makes no new tensor."""
    meta, dtype = torch.device("meta"), torch.float32
    parameters: dict[str, Tensor] = {n: p.detach().to(meta, dtype) for n, p in layer.named_parameters()}
    buffers = {name: buffer.to(meta) for name, buffer in layer.named_buffers()}
    hidden = torch.empty(1, _TRACE_TOKENS, hidden_size, dtype=dtype, device=meta)
    return forward_layer(layer, {**parameters, **buffers}, hidden, call.cast(meta, dtype))


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _identity(tensor: Tensor) -> Identity:
    """Identifies a tensor by its storage: views of all of it are the same tensor."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel()


def _norms_of(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the norms with a weight per channel, by their paths in `layer`."""
    for path, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.ndim == 1:
            yield path, module


def final_norm(decoder: nn.Module) -> tuple[str, bool]:
    """Returns the path of the norm behind the layers, and whether it multiplies by (1 + weight); "" where there is none."""
    norms = [(path, norm) for path, norm in _norms_of(decoder) if "." not in path]
    return (norms[-1][0], _has_unit_offset(norms[-1][1])) if norms else ("", False)


def _has_unit_offset(norm: nn.Module) -> bool:
    """Returns whether a norm multiplies by (1 + weight), as Gemma's do: with a weight of zero its output is not zero."""
    zeros = {name: torch.zeros(parameter.shape) for name, parameter in norm.named_parameters()}
    trial = torch.linspace(-1.0, 2.0, zeros["weight"].shape[0]).unsqueeze(0)
    parameters = inspect.signature(norm.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    inputs = [trial for _ in required]  # some read a gate too
    with torch.no_grad():
        output: Tensor = functional_call(norm, zeros, tuple(inputs))
    return bool(output.abs().max() > 0)
