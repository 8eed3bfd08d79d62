"""Measures what a layer takes, by carrying out calibration, `quantize_layer` and the packing on tensors without data.

Since the code itself is measured, the figures cannot come apart from it. Two of the calibration chunks are enough: the
first one, and one that stands for those behind it. What is kept of the others is collected without running them. Tokens
are taken to spread evenly over experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from awqdist.layer.calibrate import Calibration
from awqdist.layer.meter import Kernels, Meter
from awqdist.layer.plan import LayerPlan
from awqdist.layer.quantize import TRIAL_TOKENS, Method, Trial
from awqdist.layer.work import LayerWork
from awqdist.model.forward import LayerCall
from awqdist.quant.offload import LayerDevice

STAGES = ("forward", "statistics", "search", "check", "round")


@dataclass(frozen=True, slots=True)
class Cost:
    """What one layer takes on one worker.

    loaded_bytes: its tensors; written_bytes: its file; device_bytes, host_bytes: the most that is held on the device and in
    host memory, the loaded tensors included (on a CPU the first is all there is); kernels: by stage of STAGES.
    """

    loaded_bytes: int
    written_bytes: int
    device_bytes: int
    host_bytes: int
    kernels: Mapping[str, Kernels]

    @property
    def flops(self) -> dict[str, int]:
        """Floating-point operations by stage."""
        return {stage: sum(k.flops * n for k, n in self.kernels[stage].items()) for stage in STAGES}


@dataclass(frozen=True, slots=True)
class MeasuredLayer:
    """What is measured.

    module: the decoder layer on the meta device, None for lm_head; tensors: shape and dtype by name in the layer; on: where it
    is worked on; make_method: how it is quantized, made of fake tensors; record: embeds token ids (B, L) as the run does, and
    returns the hidden states and the layer's further arguments; sequences: of every chunk; length: L; float32: names of
    parameters that are run in float32.
    """

    plan: LayerPlan
    module: nn.Module | None
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    on: LayerDevice
    make_method: Callable[[], Method]
    record: Callable[[Tensor], tuple[Tensor, LayerCall]]
    sequences: Sequence[int]
    length: int
    dtype: torch.dtype  # of chunks between layers
    float32: frozenset[str] = frozenset()
    experts_per_token: int = 1


def measure(layer: MeasuredLayer) -> Cost:
    """Measures one layer: memory exactly, operations as they are started."""
    num_experts = max((len(fused.parts) for fused in layer.plan.experts), default=1)
    with Meter(layer.experts_per_token / num_experts) as meter, torch.no_grad(), _even_routing(layer, meter):
        with meter.uncounted():
            method = layer.make_method()
            trial_hidden, trial_call = layer.record(_tokens(1, min(TRIAL_TOKENS, layer.length)))
            kept = {sequences: layer.record(_tokens(sequences, layer.length)) for sequences in set(layer.sequences)}
            trial_hidden = trial_hidden.to(layer.on.device)
        weights = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layer.tensors.items()}
        loaded_bytes = sum(tensor.nbytes for tensor in weights.values())
        meter.memory.peak = meter.memory.now.copy()
        num_tokens = sum(layer.sequences) * layer.length
        calibration = _Observed(Calibration(layer.plan, layer.module, method.recipe, num_tokens, layer.on), meter)
        work = LayerWork(layer.plan, layer.module, weights, layer.on, calibration, layer.float32)  # type: ignore[arg-type]
        del weights

        def forward(sequences: int) -> None:
            hidden, call = kept[sequences]
            if layer.module is None:
                work.observe(hidden.to(layer.on.device, layer.on.dtype))
            else:
                work.forward(hidden.to("cpu", layer.dtype), call)

        steady, *others = layer.sequences[1:] or [0]
        odd = [sequences for sequences in others if sequences != steady]
        forward(layer.sequences[0])
        if steady:
            with meter.uncounted():
                calibration.repeat(len(others) - len(odd), steady / layer.sequences[0])
            before = {stage: kernels.copy() for stage, kernels in meter.kernels.items()}
            forward(steady)
            for stage, kernels in meter.kernels.items():
                for kernel, count in (kernels - before.get(stage, Counter())).items():
                    kernels[kernel] += count * (len(others) - len(odd))
        for sequences in odd:
            forward(sequences)
        check = Trial(layer.module, trial_hidden, trial_call) if layer.module is not None else None
        result = work.quantize(method, check, meter.stage)
        with meter.stage("round"):
            packed = work.packed(result, method)
        device = layer.on.device.type
        return Cost(
            loaded_bytes=loaded_bytes,
            written_bytes=sum(tensor.nbytes for tensor in packed.values()),
            device_bytes=meter.memory.peak[device],
            host_bytes=meter.memory.peak["cpu"],
            kernels={stage: meter.total(stage) for stage in STAGES},
        )


class _Observed:
    """A calibration that counts as a stage of its own, and remembers what came in from the last chunk."""

    def __init__(self, calibration: Calibration, meter: Meter) -> None:
        self._calibration, self._meter = calibration, meter
        self._seen: dict[Any, tuple[Callable[[Tensor], None], tuple[torch.Size, torch.dtype, torch.device]]] = {}
        self.moments = calibration.moments

    def watches(self) -> dict[str, Callable[[Tensor], None]]:
        """Returns those of the calibration, observed."""
        return {path: partial(self._observe, path, watch) for path, watch in self._calibration.watches().items()}

    def expert_watches(self) -> dict[str, Callable[[int, Tensor], None]]:
        """Returns those of the calibration, observed."""
        return {
            fused: lambda expert, rows, fused=fused, watch=watch: self._observe(  # type: ignore[misc]
                (fused, expert), partial(watch, expert), rows
            )
            for fused, watch in self._calibration.expert_watches().items()
        }

    def finish(self, layer: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """Completes the priors of experts, which counts as collecting statistics."""
        with self._meter.stage("statistics"):
            self._calibration.finish(layer, parameters)

    def repeat(self, times: int, size: float) -> None:
        """Collects what `times` chunks more would bring, each `size` times as large as the last."""
        for watch, (shape, dtype, device) in self._seen.values():
            num_rows = round(shape[:-1].numel() * times * size)
            if num_rows:
                watch(torch.empty(1, num_rows, shape[-1], dtype=dtype, device=device))
        self._seen.clear()

    def _observe(self, key: object, watch: Callable[[Tensor], None], rows: Tensor) -> None:
        self._seen[key] = watch, (rows.shape, rows.dtype, rows.device)
        with self._meter.stage("statistics"):
            watch(rows)


def _tokens(sequences: int, length: int) -> Tensor:
    return torch.zeros(sequences, length, dtype=torch.int64)


@contextmanager
def _even_routing(layer: MeasuredLayer, meter: Meter) -> Iterator[None]:
    """Lets the routers of a layer choose all experts equally often."""

    def choose(module: nn.Module, args: tuple[Any, ...]) -> None:
        for value in args:
            if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32) and value.ndim == 2:
                num_rows, chosen = value.shape
                num = next(len(fused.parts) for fused in layer.plan.experts)
                meter.know(value, lambda: (torch.arange(num_rows * chosen) % num).view(num_rows, chosen))  # noqa: B023

    modules = {fused.module for fused in layer.plan.experts} if layer.module is not None else set()
    hooks = [layer.module.get_submodule(name).register_forward_pre_hook(choose) for name in modules]  # type: ignore[union-attr]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
