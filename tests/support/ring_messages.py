"""The messages of a run that never was: a ring of workers with a clock of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from awqdist.layer.records import LayerRecord, LinearRecord, MappingRecord
from awqdist.run import events as ev
from awqdist.run.events import Message, encode, log_file

EPOCH = 1_700_000_000.0
GIB = 2**30


def write_log(output: Path, messages: Iterable[Message], tail: bytes = b"") -> Path:
    """Appends messages, all of them, to the log of an output folder; then `tail`. Returns the log."""
    file = log_file(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as stream:
        stream.write(b"".join(map(encode, messages)) + tail)
    return file


def mapping_record(layer: int = 0) -> MappingRecord:
    at = f"model.layers.{layer}"
    return MappingRecord(f"{at}.norm", (f"{at}.mlp.down_proj",), 0.5, True, 2.0, 1.0, 0)


def layer_record(layer: int, relative_error: float = 0.0045) -> LayerRecord:
    """A layer whose down_proj came out worst."""
    at = f"model.layers.{layer}.mlp"
    quiet = LinearRecord(f"{at}.up_proj", (8, 8), 4, 8, False, 0.002, 0.001, 0.0, 0)
    worst = LinearRecord(f"{at}.down_proj", (8, 8), 4, 8, False, 0.0123, relative_error, 0.1, 0)
    seconds = {"read": 0.3, "forward": 10.0, "search": 2.0}
    return LayerRecord(layer, "f", 9, "0", 0, 1e-6, (mapping_record(layer),), (quiet, worst), (), (), seconds, 1024)


def ring(*, num_workers: int = 4, num_layers: int = 16, num_chunks: int = 8, begins: float = EPOCH) -> list[Message]:
    """A whole run. A chunk takes 1 s, a search 10 s, a check 1 s, a round 3 s, a read 4 s, a write 2 s; 5 s of start come first, and
    3 s of merging last. Layers are dealt to the workers like cards, and chunks go from layer to layer."""
    free = [begins + 5.0] * num_workers
    told: list[Message] = []
    arrived = [begins + 5.0] * num_chunks  # of the chunks, at the layer's worker
    for worker in range(num_workers):
        layers = tuple(range(worker, num_layers, num_workers))
        host = f"node-{worker // 2}"
        told.append(Message(ev.WorkerStarted(host, f"cuda:{worker % 2}", layers), worker, begins + 1))
        told.append(Message(ev.WorkerStatus(3 * GIB + worker, 40 * GIB, 90 + worker), worker, begins + 2))
        told += _stage(worker, worker, "read", begins + 1, 4.0)
    for layer in range(num_layers):
        worker = layer % num_workers
        clock = max(free[worker], arrived[0])
        told.append(Message(ev.StageStarted(layer, "forward"), worker, clock))
        for chunk in range(num_chunks):
            clock = max(clock, arrived[chunk]) + 1.0
            arrived[chunk] = clock
            told.append(Message(ev.ChunkForwarded(layer, chunk, num_chunks, 2048, 1.0), worker, clock))
        if layer + num_workers < num_layers:
            told += _stage(worker, layer + num_workers, "read", clock, 4.0)
        for stage, seconds in (("search", 10.0), ("check", 1.0), ("round", 3.0)):
            told += _stage(worker, layer, stage, clock, seconds)
            clock += seconds
        told.append(Message(ev.MappingSearched(layer, mapping_record(layer)), worker, clock - 4.0))
        told += _stage(worker, layer, "write", clock, 2.0)
        told.append(Message(ev.LayerFinished(layer, layer_record(layer)), worker, clock + 2.0))
        free[worker] = clock
    ends = max(free) + 5.0
    run = ev.RunStarted("org/tiny", "/out", "cuda", num_layers, 0, 2048 * num_chunks, num_workers, "ray")
    end = ev.RunFinished("/out", ends - begins, 30.0, GIB)
    middle = sorted(told, key=lambda message: message.time)
    return [Message(run, None, begins), *middle, Message(end, None, ends)]


def _stage(worker: int, layer: int, stage: str, begins: float, seconds: float) -> Iterator[Message]:
    yield Message(ev.StageStarted(layer, stage), worker, begins)
    yield Message(ev.StageEnded(layer, stage, seconds), worker, begins + seconds)
