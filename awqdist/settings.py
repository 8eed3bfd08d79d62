"""The settings of a run: how it is carried out, while the recipe says what is done to the weights.

No setting changes the result, except `format`, the calibration samples and their chunks and, on a CPU, `threads`: libraries
sum in another order when there are more. Each field carries its default, its help text and its bound; the command line's options are made
from them (`awqdist.cli.options`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

DEFAULT_CALIBRATION = "mit-han-lab/pile-val-backup::validation"


@dataclass(frozen=True, slots=True)
class Option:
    """What the command line needs to know of a setting. name: of the option, where it is not the field's."""

    help: str
    minimum: int | None = None
    name: str | None = None
    is_bytes: bool = False  # is written as "1.5GB"


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The settings of one run. Memory is in bytes and counts for each worker; the help of each field stands in its type."""

    model: Annotated[Path, "Folder of the source checkpoint."]
    output: Annotated[Path, "Folder for the result."]
    device: Annotated[str, Option("Device of the workers: auto, cpu, cuda or cuda:N.")] = "auto"
    format: Annotated[Literal["compressed-tensors", "autoawq"], Option("Format of the quantized checkpoint.")] = (
        "compressed-tensors"
    )
    num_samples: Annotated[int, Option("Number of calibration samples.", minimum=1)] = 128
    sequence_length: Annotated[int, Option("Tokens per calibration sample.", minimum=8, name="seq-len")] = 512
    seed: Annotated[int, Option("Chooses the places of the text that samples are taken from.", minimum=0)] = 0
    chunk_tokens: Annotated[int, Option("Tokens that go through a layer at once.", minimum=1)] = 2048
    snapshot_every: Annotated[
        int, Option("Layers between two snapshots of the activations, from which a run resumes.", minimum=1)
    ] = 8
    threads: Annotated[
        int | None,
        Option(
            "CPU threads per worker. On a CPU the output's bytes depend on it. Default: those of the run that is resumed,"
            " else the cores that a worker can have.",
            minimum=1,
        ),
    ] = None
    overwrite: Annotated[bool, Option("Replace the model that OUTPUT holds.")] = False
    offload: Annotated[
        Literal["cpu", "disk", "nvme"], Option("Where activations beyond --cpu-memory go; nvme uses DeepNVMe.")
    ] = "cpu"
    offload_dir: Annotated[
        Path | None, Option("Folder for offloaded activations, on a fast disk. Default: OUTPUT/.awqdist.")
    ] = None
    cpu_memory: Annotated[
        int | None,
        Option(
            "Host memory per worker, such as 1.5GB. Default: no limit; with --offload disk or nvme no activations stay in memory.",
            is_bytes=True,
        ),
    ] = None
    gpu_memory: Annotated[
        int | None,
        Option(
            "GPU memory per worker, such as 40GB; what does not fit stays in host memory. Default: no limit.",
            is_bytes=True,
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the workers of a run live, and how many there are."""

    backend: Annotated[
        Literal["auto", "local", "ray", "torchrun"],
        Option("Where workers run; auto: torchrun under its launcher, else local."),
    ] = "auto"
    num_workers: Annotated[
        int | None,
        Option("Ray: number of workers. Default: one per GPU, or one per node if there is no GPU.", minimum=1),
    ] = None
    ray_address: Annotated[
        str | None, Option("Ray: address of the cluster. Default: this machine's cluster, else a new one.")
    ] = None
    max_restarts: Annotated[int, Option("Ray: how many lost workers are replaced.", minimum=0)] = 3
