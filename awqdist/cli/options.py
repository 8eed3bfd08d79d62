"""What options of the command line may be: choices, and the options of `awqdist plan` that a simulation is made from."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from awqdist.units import parse_bytes

DEFAULT_CALIBRATION = "mit-han-lab/pile-val-backup::validation"


class Progress(StrEnum):
    auto = "auto"
    rich = "rich"
    plain = "plain"
    json = "json"


class Backend(StrEnum):
    auto = "auto"
    local = "local"
    ray = "ray"
    torchrun = "torchrun"


class Offload(StrEnum):
    cpu = "cpu"
    disk = "disk"
    nvme = "nvme"


class Shard(StrEnum):
    none = "none"
    auto = "auto"
    zero3 = "zero3"


class OutputFormat(StrEnum):
    compressed_tensors = "compressed-tensors"
    autoawq = "autoawq"


Model = Annotated[str, typer.Argument(help="Folder of a transformers checkpoint, or a Hugging Face hub id.")]
ShardOption = Annotated[
    Shard,
    typer.Option(
        "--shard",
        help="auto: over all GPUs of this process, then memory; zero3: over the ranks of torchrun or deepspeed.",
    ),
]
Described = Annotated[
    str,
    typer.Argument(
        help="Folder of a transformers checkpoint, a config.json alone, or a hub id, of which no weights are read."
    ),
]
RecipeOption = Annotated[
    str, typer.Option(help="Preset name (default, awq) or YAML file, as llm-compressor writes it.")
]
NumSamples = Annotated[int, typer.Option(min=1, help="Calibration samples.")]
SeqLen = Annotated[int, typer.Option(min=8, help="Tokens per calibration sample.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Format = Annotated[OutputFormat, typer.Option(help="Layout of the quantized checkpoint.")]
ChunkTokens = Annotated[int, typer.Option(min=1, help="Tokens that go through a layer at once.")]
AllExperts = Annotated[
    bool, typer.Option("--all-experts", help="Calibrate every expert on all tokens, not on those that are sent to it.")
]
LayersPerBlock = Annotated[
    int, typer.Option(min=1, help="Consecutive layers that one worker does; only 1 keeps all workers busy.")
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
BackendName = Annotated[
    Backend, typer.Option("--backend", help="Where workers run. auto: torchrun under its launcher, else local.")
]
NumWorkers = Annotated[int | None, typer.Option(min=1, help="Ray: workers; one per GPU, or per node without any.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of a worker. On a CPU, bytes depend on it.")]
RayAddress = Annotated[str | None, typer.Option(help="Ray: address of the cluster; this machine's own if not given.")]
Workers = Annotated[int, typer.Option(min=1, help="Workers that the layers are dealt to.")]
ProfileFile = Annotated[
    Path | None,
    typer.Option(
        "--profile", help="Predict times for the machine of this file, as `awqdist doctor --profile` writes it."
    ),
]
WorkersPerMachine = Annotated[int, typer.Option(min=1, help="With --profile: workers that share a machine's disk.")]
Simulate = Annotated[bool, typer.Option("--simulate", help="Show how long a run takes, and where workers wait.")]
TimesFrom = Annotated[
    Path | None,
    typer.Option(help="Take the times from the finished layers of this output folder; times that are given go first."),
]
ChunkSeconds = Annotated[float | None, typer.Option(min=0, help="One chunk through one layer.")]
SearchSeconds = Annotated[float | None, typer.Option(min=0, help="Search, check and rounding of one layer.")]
ReadSeconds = Annotated[float | None, typer.Option(min=0, help="Reading one layer.")]
WriteSeconds = Annotated[float | None, typer.Option(min=0, help="Writing one layer.")]
TransferSeconds = Annotated[float | None, typer.Option(min=0, help="Sending one chunk from worker to worker.")]


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


OffloadLevel = Annotated[
    Offload,
    typer.Option("--offload", help="Where activations lie that do not fit --cpu-memory; nvme: through DeepNVMe."),
]
OffloadDir = Annotated[
    Path | None, typer.Option(help="Folder for what is offloaded, on a fast disk; in OUTPUT/.awqdist if not given.")
]
CpuMemory = Annotated[
    int | None,
    typer.Option(
        parser=_bytes,
        metavar="BYTES",
        help="Host memory of a worker, such as 1.5GB; without it all or, offloaded, none of it is for activations.",
    ),
]
GpuMemory = Annotated[
    int | None,
    typer.Option(
        parser=_bytes,
        metavar="BYTES",
        help="Memory of the GPU for a worker, such as 40GB; what has no room in it lies in host memory. All has room if not given.",
    ),
]
