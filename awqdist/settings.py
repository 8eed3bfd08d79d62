"""How a run is carried out, as opposed to what is done to the weights (the recipe). No setting here changes the result, except
`format`, the calibration samples and their chunks, `all_experts` and, on a CPU, `threads`: libraries sum in another order when there are
more."""

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
    all_experts: bool = False  # every expert is calibrated on all tokens of its layer, not on those that are sent to it
    snapshot_every: int = 8  # layers between two snapshots of the boundary activations
    layers_per_block: int = 1  # consecutive layers that one worker does
    threads: int | None = (
        None  # of a worker; None: those of the run that is resumed, else as many as there are cores for it
    )
    overwrite: bool = False
    offload: str = "cpu"  # where chunks lie that do not fit cpu_memory: "cpu", "disk" or "nvme"
    offload_dir: Path | None = None  # None: a folder in the output's state folder
    gpu_memory: int | None = (
        None  # bytes of the device for a worker: what has no room there lies in host memory; None: all has room
    )
    cpu_memory: int | None = None  # bytes of host memory for a worker; None: all chunks in memory, or, offloaded, none


@dataclass(frozen=True, slots=True)
class Placement:
    """Where workers run. backend: "local", "ray", "torchrun", or "auto": torchrun where its variables are set, else local."""

    backend: str = "auto"
    num_workers: int | None = None  # of Ray; None: one for every GPU, or one for every node without any
    ray_address: str | None = None  # None: the cluster that this machine belongs to, else one of its own
    max_restarts: int = 3  # how many lost workers are replaced (Ray)
