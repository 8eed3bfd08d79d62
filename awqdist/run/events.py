"""What a worker tells the world while it works. Workers emit events and never print; renderers live with the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from awqdist.run.records import LayerRecord, MappingRecord


@dataclass(frozen=True, slots=True)
class RunStarted:
    model: str
    output: str
    device: str
    num_layers: int
    num_finished_layers: int  # by an earlier, interrupted run
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StageStarted:
    layer: int
    stage: str  # one of STAGES


@dataclass(frozen=True, slots=True)
class ChunkForwarded:
    layer: int
    chunk: int
    num_chunks: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class MappingSearched:
    layer: int
    mapping: MappingRecord


@dataclass(frozen=True, slots=True)
class LayerForwarded:
    """A layer that an earlier run had finished: only its outputs were computed again."""

    layer: int


@dataclass(frozen=True, slots=True)
class LayerFinished:
    layer: int
    record: LayerRecord


@dataclass(frozen=True, slots=True)
class Warned:
    message: str


@dataclass(frozen=True, slots=True)
class RunFinished:
    output: str
    seconds: float
    floor_seconds: float
    output_bytes: int


Event = (
    RunStarted | StageStarted | ChunkForwarded | MappingSearched | LayerForwarded | LayerFinished | Warned | RunFinished
)
Emit = Callable[[Event], None]
