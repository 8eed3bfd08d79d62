"""Who does which layer, and in which order. Pure: numbers in, steps out; no tensors, no clock, no processes.

Layers are dealt to workers like cards, in blocks of `layers_per_block`. Chunks of calibration activations go from layer to layer, so
from worker to worker; one worker does all of a layer, in a fixed order, so that the bytes do not depend on how many there are.

A worker searches a layer before it forwards its next one, although chunks may be waiting by then. In simulations
(`run/forecast/simulate.py`, L layers, N workers, C chunks) with blocks of one layer, forwarding first never ended earlier. With reading,
writing and sending hidden it ends at the same time, but min(t_search, (N − C)·t_chunk) later where L > N > C: the worker waits for a chunk
when it could search. Reading and writing slow it down, for two forwards or two writes follow each other without a search in between. And
it holds two layers and their statistics instead of one. It does end earlier, by up to t_search, where a resumed run left gaps: a layer that
is only forwarded waits for the search before it.

Blocks of B > 1 layers leave workers idle in either order, because a worker sends nothing before all but the last layer of a block are
forwarded and searched: N workers are at most B/(B − 1) times as fast as one, hardly more if forwarding goes first. Blocks pay only between
few workers on links much slower than computing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

StepKind = Literal["load", "receive", "forward", "send", "search", "write"]
Order = Literal["search first", "forward first"]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a worker.

    load: start reading the layer in the background; receive: wait for a chunk from the worker before; forward: take a chunk through
    the layer (the first one waits for the load); send: hand the chunk to the worker behind, without waiting; search: search scales
    and round; write: hand the layer's file to the background, once the write before it is done.
    """

    kind: StepKind
    layer: int
    chunk: int = -1  # of receive, forward and send


@dataclass(frozen=True, slots=True)
class Schedule:
    """Layers `first` to `stop` - 1 (lm_head counts as one), dealt to workers. forward_only: layers that an earlier run finished."""

    first: int
    stop: int
    num_workers: int
    num_chunks: int
    layers_per_block: int = 1
    forward_only: frozenset[int] = frozenset()

    def owner(self, layer: int) -> int:
        """The worker that does `layer`."""
        return (layer - self.first) // self.layers_per_block % self.num_workers

    def layers_of(self, worker: int) -> list[int]:
        return [layer for layer in range(self.first, self.stop) if self.owner(layer) == worker]

    def is_received(self, layer: int) -> bool:
        """Whether the inputs of `layer` come from another worker."""
        return layer > self.first and self.owner(layer - 1) != self.owner(layer)

    def is_sent(self, layer: int) -> bool:
        """Whether the outputs of `layer` go to another worker."""
        return layer + 1 < self.stop and self.is_received(layer + 1)

    def steps(self, worker: int, order: Order = "search first") -> Iterator[Step]:
        """All steps of `worker`, in order. The reading of a layer begins when the one before it is forwarded."""
        layers = self.layers_of(worker)
        pending: list[Step] = []  # search and write of the layer before, where forwarding goes first
        if layers:
            yield Step("load", layers[0])
        for place, layer in enumerate(layers):
            yield from self._forwards(layer)
            if place + 1 < len(layers):
                yield Step("load", layers[place + 1])
            yield from pending
            pending = [] if layer in self.forward_only else [Step("search", layer), Step("write", layer)]
            if order == "search first":
                yield from pending
                pending = []
        yield from pending

    def _forwards(self, layer: int) -> Iterator[Step]:
        for chunk in range(self.num_chunks):
            if self.is_received(layer):
                yield Step("receive", layer, chunk)
            yield Step("forward", layer, chunk)
            if self.is_sent(layer):
                yield Step("send", layer, chunk)
