"""Times the stages of a layer and tells the world when one begins and ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from awqdist.layer.records import STAGES
from awqdist.run.events import Emit, StageEnded, StageStarted


class Stopwatch:
    """Seconds by stage, of one layer."""

    def __init__(self, layer: int, device: torch.device, emit: Emit) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._layer, self._device, self._emit = layer, device, emit

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage that is done in one go."""
        self._emit(StageStarted(self._layer, name))
        before = self.seconds[name]
        with self.piece(name):
            yield
        self._emit(StageEnded(self._layer, name, self.seconds[name] - before))

    @contextmanager
    def piece(self, name: str) -> Iterator[None]:
        """Times a piece of a stage, of which nobody is told."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[name] += time.perf_counter() - start
