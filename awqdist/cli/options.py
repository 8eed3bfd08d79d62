"""What options of the command line may be: choices, and the options of `awqdist plan` that a simulation is made from."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


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


class OutputFormat(StrEnum):
    compressed_tensors = "compressed-tensors"
    autoawq = "autoawq"


Workers = Annotated[int, typer.Option(min=1, help="Workers that the layers are dealt to.")]
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
