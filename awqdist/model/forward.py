"""Runs the decoder one layer at a time, with parameters handed in and nothing modified.

`record_calls` runs the model's own forward with every decoder layer replaced by a recorder: out come the first layer's input and, for every
layer, the further arguments that the model gives it (rotary embeddings, the mask of its kind). `forward_layer` then runs one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from inspect import signature
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map

from awqdist.errors import CalibrationError
from awqdist.model.experts import ExpertWatch, WatchedExperts
from awqdist.model.skeleton import Skeleton

Parameters = Mapping[str, Tensor]
Watch = Callable[[Tensor], None]
# transformers uses them wherever they are installed; GPUs only
_KERNEL_PACKAGES = ("causal_conv1d", "fla", "mamba_ssm")
_kernels_lock = Lock()
_num_without_kernels = 0
_is_exporting = torch.compiler.is_exporting


@dataclass(frozen=True, slots=True)
class LayerCall:
    """The arguments of one decoder layer besides its hidden states, for `num_sequences` sequences."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_sequences: int

    def cast(self, device: torch.device, dtype: torch.dtype, batch: int | None = None) -> LayerCall:
        """Returns the call on `device`, floating tensors in `dtype`; with `batch`, for the first `batch` sequences only."""

        def convert(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if batch is not None and value.ndim > 1 and value.shape[0] == self.num_sequences:
                value = value[:batch]
            return value.to(device, dtype if value.is_floating_point() else None)

        return LayerCall(
            tree_map(convert, self.args),
            tree_map(convert, self.kwargs),
            min(self.num_sequences, batch or self.num_sequences),
        )

    def equals(self, other: LayerCall) -> bool:
        """Returns whether both calls have the same arguments, tensors compared by value."""
        ours, our_spec = tree_flatten((self.args, self.kwargs))
        theirs, their_spec = tree_flatten((other.args, other.kwargs))
        return our_spec == their_spec and all(
            (isinstance(b, Tensor) and torch.equal(a, b)) if isinstance(a, Tensor) else (a is b or a == b)
            for a, b in zip(ours, theirs, strict=True)
        )


class _AllLayersSeen(Exception):
    """Ends the recording run before the final norm, whose weight is not needed."""


def record_calls(skeleton: Skeleton, outside: Parameters, input_ids: Tensor) -> tuple[Tensor, list[LayerCall]]:
    """Returns the first layer's hidden states (B, L, H), and the call of every layer.

    Args:
        outside: parameters and buffers of the decoder that are in no layer, by their names in the decoder.
        input_ids: (B, L) int64.

    Raises:
        CalibrationError: sequences are too long for a layer to be run by itself (see `_beside_states`).
    """
    calls: list[LayerCall] = []
    first: list[Tensor] = []
    beside = _beside_states(skeleton, input_ids)
    as_tuple = bool(beside)

    def recorder(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal as_tuple
        if not calls:
            first.append(hidden_states)
        calls.append(LayerCall(args, kwargs, input_ids.shape[0]))
        if len(calls) == skeleton.num_layers:
            raise _AllLayersSeen
        # some models take output[0] of what a layer returns: then a bare tensor has lost its batch dimension
        as_tuple = as_tuple or hidden_states.ndim < first[0].ndim
        return (first[0], *beside) if as_tuple else first[0]

    with _layers_replaced(skeleton, recorder), torch.no_grad(), suppress(_AllLayersSeen):
        functional_call(skeleton.decoder, dict(outside), (input_ids,), {"use_cache": False})
    return first[0], calls


def _beside_states(skeleton: Skeleton, input_ids: Tensor) -> tuple[Tensor, ...]:
    """Returns what a layer returns besides its hidden states: under sparse attention, the tokens that are attended to.

    A layer without an indexer takes them from the one before, and run by itself cannot know them. While no sample is longer than what
    an indexer chooses they are all tokens; longer samples of a model with such layers raise CalibrationError.
    """
    if "prev_topk_indices" not in signature(type(skeleton.layers[0]).forward).parameters:
        return ()
    config, (num_sequences, length) = skeleton.model.config.get_text_config(decoder=True), input_ids.shape
    if length > config.index_topk and "shared" in config.indexer_types:
        raise CalibrationError(
            f"{skeleton.architecture}: some layers attend to the {config.index_topk} tokens that the layer before has chosen, which is"
            f" not supported for samples of {length} tokens; lower --seq-len to {config.index_topk}"
        )
    positions = torch.arange(length, dtype=torch.int32, device=input_ids.device)
    return (positions.expand(num_sequences, length, -1),)


def forward_layer(
    layer: nn.Module,
    parameters: Parameters,
    hidden: Tensor,
    call: LayerCall,
    watches: Mapping[str, Watch] | None = None,
    expert_watches: Mapping[str, ExpertWatch] | None = None,
) -> Tensor:
    """Returns the output hidden states (B, L, H) of one layer.

    Args:
        layer: the decoder layer; nothing in it is modified.
        parameters: by names in the layer, experts fused.
        hidden: (B, L, H) in their dtype.
        call: the layer's further arguments.
        watches: module path within the layer -> function that is given the input of that module.
        expert_watches: the same for fused parameters, expert by expert.
    """
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(_without_kernels(hidden.device))
        if expert_watches:
            watched = {name: (parameters[name], watch) for name, watch in expert_watches.items()}
            stack.enter_context(WatchedExperts(watched))
        for path, watch in (watches or {}).items():
            hook = partial(lambda watch, module, args: watch(args[0]), watch)
            stack.callback(layer.get_submodule(path).register_forward_pre_hook(hook).remove)
        output = functional_call(layer, dict(parameters), (hidden, *call.args), call.kwargs)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def with_buffers(module: nn.Module, parameters: Parameters, device: torch.device) -> dict[str, Tensor]:
    """Returns `parameters` and the module's own buffers, which no checkpoint holds, on `device`."""
    buffers = {name: buffer.to(device) for name, buffer in module.named_buffers() if buffer.device.type != "meta"}
    return {**buffers, **parameters}


def without_embeddings(skeleton: Skeleton, outside: Parameters) -> dict[str, Tensor]:
    """Returns `outside` with zeros for the token embeddings, which take no memory: `head_inputs` does not need them."""
    embeddings = skeleton.decoder.get_input_embeddings().weight  # type: ignore[operator]
    names = {name for name, parameter in skeleton.decoder.named_parameters() if parameter is embeddings}
    return {n: tensor.new_zeros(()).expand(tensor.shape) if n in names else tensor for n, tensor in outside.items()}


def head_inputs(skeleton: Skeleton, outside: Parameters, input_ids: Tensor, hidden: Tensor) -> Tensor:
    """Returns what lm_head reads (B, L, H), by the decoder's own forward with all layers passed over.

    Args:
        outside: parameters and buffers of the decoder that are in no layer.
        input_ids: (B, L) int64.
        hidden: (B, L, H), the output of the last layer.
    """
    beside = _beside_states(skeleton, input_ids)

    def final(output: Any) -> Tensor:
        with _layers_replaced(skeleton, lambda *args, **kwargs: output), torch.no_grad():
            result = functional_call(skeleton.decoder, dict(outside), (input_ids,), {"use_cache": False})
        return result[0]  # type: ignore[no-any-return]

    states = final((hidden, *beside) if beside else hidden)
    return states if states.ndim == hidden.ndim else final((hidden,))  # a decoder that takes output[0] of its layers


@contextmanager
def _layers_replaced(skeleton: Skeleton, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces every decoder layer's forward: an attribute of the instance hides the method until it is deleted."""
    with ExitStack() as stack:
        for layer in skeleton.layers:
            layer.forward = forward
            stack.callback(delattr, layer, "forward")
        yield


@contextmanager
def _without_kernels(device: torch.device) -> Iterator[None]:
    """Makes transformers use its own torch code in place of kernels for GPUs, if `device` is the CPU or meta.

    transformers falls back to it while a model is exported, and asks torch whether one is. Threads may be within this side by side.
    """
    global _num_without_kernels
    if device.type == "cuda" or not any(find_spec(package) for package in _KERNEL_PACKAGES):
        yield
        return
    with _kernels_lock:
        _num_without_kernels += 1
        torch.compiler.is_exporting = lambda: True
    try:
        yield
    finally:
        with _kernels_lock:
            _num_without_kernels -= 1
            if not _num_without_kernels:
                torch.compiler.is_exporting = _is_exporting
