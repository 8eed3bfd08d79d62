"""Who does which layer, and how long that takes: pure functions of numbers, used by every backend and by `plan --simulate`.

Layers are dealt to N workers like cards, in blocks: layer l belongs to worker (l / layers_per_block) mod N. C chunks flow through the layers; a
worker takes them through its layer as they arrive, passes each on at once, then searches the layer while the ring moves on.

Two orders are possible when chunks of a worker's next layer arrive while it still has a layer to search. "search": one layer after the
other, which holds one layer in memory. "forward": waiting chunks first, which keeps the other workers fed but holds two. The simulator
shows which is faster; they differ only where a worker's own work, C·t_chunk + t_search, is less than the way round the ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Order = Literal["search", "forward"]


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Measured or given times of one layer: `chunk` is one chunk's forward, `send` its way to the next worker."""

    chunk: float
    search: float
    read: float = 0.0
    write: float = 0.0
    send: float = 0.0


@dataclass(frozen=True, slots=True)
class Simulation:
    """busy: seconds of forwarding and searching, by worker; efficiency: speed-up over one worker, per worker."""

    makespan: float
    busy: tuple[float, ...]
    efficiency: float

    @property
    def utilisation(self) -> tuple[float, ...]:
        return tuple(seconds / self.makespan for seconds in self.busy)


def owner(layer: int, num_workers: int, layers_per_block: int = 1) -> int:
    """The worker that does a layer."""
    return layer // layers_per_block % num_workers


def layers_of(worker: int, num_layers: int, num_workers: int, layers_per_block: int = 1) -> tuple[int, ...]:
    """The layers of a worker, in the order in which it does them."""
    return tuple(layer for layer in range(num_layers) if owner(layer, num_workers, layers_per_block) == worker)


def simulate(
    num_layers: int,
    num_workers: int,
    num_chunks: int,
    seconds: StageSeconds,
    *,
    layers_per_block: int = 1,
    order: Order = "search",
) -> Simulation:
    """Plays a run through. Reading overlaps with the layer before; writing goes on in the background, one file at a time."""
    hands = [layers_of(worker, num_layers, num_workers, layers_per_block) for worker in range(num_workers)]
    arrivals: dict[int, list[float]] = {0: [0.0] * num_chunks}
    free = [0.0] * num_workers  # when a worker can begin something new
    written = [0.0] * num_workers
    loaded = [seconds.read] * num_workers  # when the next layer of a worker is in memory
    pending = [0.0] * num_workers  # search seconds that "forward" has put off
    for layer in range(num_layers):
        worker = owner(layer, num_workers, layers_per_block)
        outputs, clock = [], max(free[worker], loaded[worker])
        for arrival in arrivals.pop(layer):
            if arrival > clock and pending[worker]:  # nothing waits: go on searching
                done = min(pending[worker], arrival - clock) if order == "forward" else pending[worker]
                pending[worker] -= done
                clock += done
            clock = max(clock, arrival) + seconds.chunk
            outputs.append(clock + (seconds.send if num_workers > 1 else 0.0))
        arrivals[layer + 1] = outputs
        loaded[worker] = clock + seconds.read if layer != hands[worker][-1] else clock
        if order == "forward":
            clock += pending[worker]  # at most one layer may wait to be searched
            pending[worker] = seconds.search
            if layer == hands[worker][-1]:
                clock, pending[worker] = clock + seconds.search, 0.0
        else:
            clock += seconds.search
        free[worker] = clock
        written[worker] = max(written[worker], clock) + seconds.write
    makespan = max(written)
    per_layer = num_chunks * seconds.chunk + seconds.search
    alone = num_layers * per_layer + seconds.read + seconds.write
    busy = tuple(len(hand) * per_layer for hand in hands)
    return Simulation(makespan, busy, alone / (makespan * num_workers))
