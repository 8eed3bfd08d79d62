"""Works on one layer: takes the calibration chunks through it, then quantizes it. Tensors in, tensors out.

A run does this with the layer's weights, and `measure` with fake ones, so that what is measured is what is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from awqdist.errors import NumericalError
from awqdist.layer.calibrate import Calibration
from awqdist.layer.plan import LayerPlan
from awqdist.layer.quantize import LayerResult, Method, Tell, Trial, quantize_layer
from awqdist.model.experts import FusedParameter, fuse_experts, made_experts
from awqdist.model.forward import LayerCall, forward_layer, with_buffers
from awqdist.quant.offload import LayerDevice, OffloadedTensors, release_host_memory


class LayerWork:
    """One layer under way: `forward` for every chunk in order, then `quantize`.

    Args:
        plan: What is done to the layer.
        module: The decoder layer on the meta device; None for lm_head.
        weights: The layer's tensors in host memory, in the checkpoint's dtype, by their names in the layer.
        on: Where the layer is worked on, in which dtype it is run, and what of it stays in host memory.
        calibration: What collects the moments of its inputs; None for a layer that is only forwarded.
        float32: Names of the parameters that are run in float32 whatever the dtype.
    """

    def __init__(
        self,
        plan: LayerPlan,
        module: nn.Module | None,
        weights: Mapping[str, Tensor],
        on: LayerDevice,
        calibration: Calibration | None,
        float32: frozenset[str] = frozenset(),
    ) -> None:
        self.plan, self._module, self._on, self._calibration = plan, module, on, calibration
        of_experts = {f"{path}.weight" for fused in plan.experts for parts in fused.parts for path in parts}
        offloaded = of_experts if on.on_host.experts else set()
        placed = {name: tensor if name in offloaded else tensor.to(on.device) for name, tensor in weights.items()}
        self._weights = OffloadedTensors(placed, offloaded, on.to_device)
        self._working: dict[str, Tensor] = {}  # what the layer is run with, without experts in host memory
        if module is not None:
            converted = {
                name: tensor.to(torch.float32 if name in float32 else on.dtype)
                for name, tensor in placed.items()
                if name not in offloaded
            }
            fused = fuse_experts(() if on.on_host.experts else plan.experts, converted)
            self._working = with_buffers(module, fused, on.device)

    def forward(self, chunk: Tensor, call: LayerCall) -> Tensor:
        """Takes a chunk (B, L, H) in host memory through the layer. Returns its output in host memory, in the same dtype."""
        assert self._module is not None, "lm_head is not run"
        hidden = chunk.to(self._on.device, self._on.dtype)
        watches = self._calibration.watches() if self._calibration else {}
        routed = self._calibration.expert_watches() if self._calibration else {}
        with self._complete() as working:
            output = forward_layer(
                self._module, working, hidden, call.cast(self._on.device, self._on.dtype), watches, routed
            )
        return output.to("cpu", chunk.dtype)

    def observe(self, inputs: Tensor) -> None:
        """Collects the moments of what lm_head reads, (B, L, H), which is not run."""
        assert self._calibration is not None
        self._calibration.watches()[self.plan.sites[0].path](inputs)

    def quantize(self, method: Method, check: Trial | None, tell: Tell) -> LayerResult:
        """Quantizes the layer, after all chunks.

        Raises:
            NumericalError: An input is not finite, a matrix cannot be factorised, or smoothing changes the function.
        """
        assert self._calibration is not None, "a layer that was only forwarded has no moments"
        for site, found in self._calibration.moments.items():
            if not found.is_finite():
                raise NumericalError(
                    f"{self.plan.label}: the input of {site.path} is not finite on the calibration text; check the weights, or"
                    " convert the model to a wider dtype; the layers before it are kept"
                )
        if self.plan.experts and self._module is not None:
            with self._complete() as working:
                self._calibration.finish(self._module, working)
        self._working = {}
        release_host_memory()
        return quantize_layer(self.plan, self._weights, self._calibration.moments, method, check, tell)

    def packed(self, result: LayerResult, method: Method) -> dict[str, Tensor]:
        """Returns the tensors of the layer's file, in host memory, by on-disk names."""
        tensors = {self.plan.tensors[name]: tensor for name, tensor in result.parameters.items()}
        for path, weight in result.weights.items():
            for kind, tensor in method.layout.pack(weight.to(self._on.device)).items():
                tensors[f"{self.plan.disk_module(path)}.{kind}"] = tensor
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    @contextmanager
    def _complete(self) -> Iterator[dict[str, Tensor]]:
        """Gives what the layer is run with. Experts in host memory come to the device when tokens come to them."""
        if not self._on.on_host.experts:
            yield self._working
            return

        def make(fused: FusedParameter, expert: int) -> Tensor:
            parts = [self._weights[f"{path}.weight"] for path in fused.parts[expert]]
            return torch.cat(parts).to(self._on.dtype)  # (R, I)

        with made_experts(self.plan.experts, make, self._on.device) as stand_ins:
            yield {**self._working, **stand_ins}
