"""The weights of a checkpoint as the float32 that they mean, read one at a time: plain, in FP8, or in the pack-quantized format.

What is packed is unpacked by our own reader of the format, so that what is evaluated is what vLLM and SGLang load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awqdist.checkpoint.index import read_index
from awqdist.checkpoint.reader import read_tensor
from awqdist.checkpoint.sources import read_source
from awqdist.errors import CheckpointError
from awqdist.export.formats import CompressedTensorsFormat
from awqdist.recipe import WeightScheme

_KINDS = ("packed", "scale", "zero_point", "shape")


class FloatWeights:
    """names: of the tensors, as if none was packed. Raises CheckpointError for a checkpoint that cannot be read.

    quantization: what config.json says of it, if anything.
    """

    def __init__(self, folder: Path, quantization: dict[str, Any] | None) -> None:
        packed = (quantization or {}).get("format") == "pack-quantized"
        self._scheme = _scheme(folder, quantization) if quantization and packed else None
        self._entries = (read_index(folder) if packed else read_source(folder)).entries
        ends = tuple(f".weight_{kind}" for kind in _KINDS[1:]) if packed else ()
        kept = (name for name in self._entries if not name.endswith(ends or ("\0",)))
        self.names = [name.replace(".weight_packed", ".weight") if packed else name for name in kept]

    def read(self, name: str) -> Tensor:
        """The tensor: float32 if it is floating, of the shape that the model has it in."""
        if name in self._entries:
            tensor = read_tensor(self._entries[name])
            return tensor.float() if tensor.is_floating_point() else tensor
        assert self._scheme is not None
        kinds = [f"weight_{kind}" for kind in _KINDS if f"{name}_{kind}" in self._entries]
        module = name.removesuffix("weight")
        parts = {kind: read_tensor(self._entries[module + kind]) for kind in kinds}
        return CompressedTensorsFormat().unpack(parts, self._scheme).dequantize().to(torch.float32)


def _scheme(folder: Path, quantization: dict[str, Any]) -> WeightScheme:
    schemes = {
        WeightScheme(w["num_bits"], w["symmetric"], w.get("group_size") or -1)
        for w in (group["weights"] for group in quantization["config_groups"].values())
    }
    if len(schemes) != 1:
        raise CheckpointError(f"model {folder}: packed linears of {len(schemes)} kinds cannot be evaluated")
    return schemes.pop()
