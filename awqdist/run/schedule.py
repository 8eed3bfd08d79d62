"""Which worker does which layer, and in which order it takes its steps. Pure: numbers in, steps out; no tensors, no processes.

Layers are assigned to workers in turn. Chunks of calibration activations pass from layer to layer, so from worker to worker. One
worker does all of a layer, in a fixed order, so the bytes do not depend on the number of workers. README.md tells why a worker
searches a layer before it forwards the next one, and why it does not take blocks of layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

StepKind = Literal["load", "receive", "forward", "send", "search", "write"]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a worker.

    load: starts to read the layer in the background. receive: waits for a chunk from the worker before. forward: runs the layer on
    a chunk; the first one waits for the load. send: hands the chunk to the next worker, without waiting. search: chooses scales and
    rounds. write: hands the layer's file to the background, once the write before it is done.
    """

    kind: StepKind
    layer: int
    chunk: int = -1  # of receive, forward and send


@dataclass(frozen=True, slots=True)
class Schedule:
    """Assigns layers `first` to `stop` - 1 (lm_head counts as one) to workers. forward_only: layers that an earlier run finished."""

    first: int
    stop: int
    num_workers: int
    num_chunks: int
    forward_only: frozenset[int] = frozenset()

    def owner(self, layer: int) -> int:
        """Returns the worker that does `layer`."""
        return (layer - self.first) % self.num_workers

    def layers_of(self, worker: int) -> list[int]:
        """Returns the layers of a worker, in order."""
        return list(range(self.first + worker, self.stop, self.num_workers))

    def is_received(self, layer: int) -> bool:
        """Returns whether the inputs of `layer` come from another worker."""
        return layer > self.first and self.num_workers > 1

    def is_sent(self, layer: int) -> bool:
        """Returns whether the outputs of `layer` go to another worker."""
        return layer + 1 < self.stop and self.num_workers > 1

    def steps(self, worker: int) -> Iterator[Step]:
        """Yields all steps of `worker`. Reading a layer begins when the one before it has been forwarded."""
        layers = self.layers_of(worker)
        if layers:
            yield Step("load", layers[0])
        for place, layer in enumerate(layers):
            for chunk in range(self.num_chunks):
                if self.is_received(layer):
                    yield Step("receive", layer, chunk)
                yield Step("forward", layer, chunk)
                if self.is_sent(layer):
                    yield Step("send", layer, chunk)
            if place + 1 < len(layers):
                yield Step("load", layers[place + 1])
            if layer not in self.forward_only:
                yield Step("search", layer)
                yield Step("write", layer)
