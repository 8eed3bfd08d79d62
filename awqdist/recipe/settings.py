"""How a run is carried out, as opposed to what is done to the weights (the recipe). No setting here changes the result, except
`format` and the calibration samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunSettings:
    """model: folder of the source checkpoint; output: folder to write; device: "auto", "cpu", "cuda", "cuda:1"."""

    model: Path
    output: Path
    device: str = "auto"
    format: str = "compressed-tensors"
    num_samples: int = 128
    sequence_length: int = 512
    seed: int = 0
    chunk_tokens: int = 2048  # how many tokens go through a layer at once
    snapshot_every: int = 8  # layers between two snapshots of the boundary activations
    overwrite: bool = False
