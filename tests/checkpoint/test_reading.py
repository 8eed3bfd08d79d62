"""Each worker reads what it needs of the source once, and tells how many bytes that was. Under GPTQ all ask lm_head what counts; a worker
that also quantizes it reads it again, as the layer that it is."""

from __future__ import annotations

import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.tiny_llama import NUM_LAYERS, RECIPE, Tiny
from torch import Tensor

from awqdist.checkpoint.index import CheckpointIndex
from awqdist.plan.memory import assign, estimate
from awqdist.recipe import load_recipe
from awqdist.run.events import Event, SourceRead
from awqdist.run.job import prepare
from awqdist.run.schedule import Schedule
from awqdist.run.worker import Assignment, run_worker
from awqdist.settings import RunSettings

SAMPLES = torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(0))
NUM_WORKERS, NUM_CHUNKS = 2, 2


class CountingReader:
    """Counts the bytes that are read of each tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, index: CheckpointIndex) -> None:
        self._entries = index.entries.values()
        self._preadv = os.preadv
        self.num_bytes: Counter[str] = Counter()
        monkeypatch.setattr(os, "preadv", self._counted)

    def _counted(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = self._preadv(descriptor, buffers, offset)
        file = os.readlink(f"/proc/self/fd/{descriptor}")
        for entry in self._entries:
            if os.fspath(entry.file) == file and entry.start <= offset < entry.stop:
                self.num_bytes[entry.name] += count
        return count


class Channel:
    """The transport between workers in threads of one process."""

    def __init__(self) -> None:
        self._chunks: dict[tuple[int, int], Tensor] = {}
        self._changed = threading.Condition()

    def send(self, layer: int, chunk: int, hidden: Tensor) -> None:
        with self._changed:
            self._chunks[layer, chunk] = hidden
            self._changed.notify_all()

    def receive(self, layer: int, chunk: int) -> Tensor:
        with self._changed:
            assert self._changed.wait_for(lambda: (layer, chunk) in self._chunks, 60)
            return self._chunks.pop((layer, chunk))

    def check(self) -> None:
        """Nobody is lost."""


def test_a_worker_of_a_ring_reads_its_layers_once_and_what_is_in_no_layer_once(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("[lm_head]", "[]"))
    (tmp_path / "output" / ".awqdist").mkdir(parents=True)
    settings = RunSettings(
        tiny.model, tmp_path / "output", device="cpu", num_samples=8, sequence_length=32, chunk_tokens=128
    )
    jobs = [prepare(load_recipe(str(recipe)), settings) for _ in range(NUM_WORKERS)]  # as in processes of their own
    job = jobs[0]
    schedule = Schedule(0, NUM_LAYERS + 1, NUM_WORKERS, NUM_CHUNKS)
    counted, channel, told = CountingReader(monkeypatch, job.index), Channel(), Counter[int]()

    def one(worker: int) -> None:
        def emit(event: Event) -> None:
            if isinstance(event, SourceRead):
                told[worker] += event.num_bytes

        run_worker(jobs[worker], SAMPLES, Assignment(worker, schedule, {}, None), channel, emit)

    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        list(pool.map(one, range(NUM_WORKERS)))
    outside = set(job.skeleton.outside_names().values())
    assert {"model.embed_tokens.weight", "model.norm.weight"} == outside
    times = Counter(name for name in job.index.entries if name not in outside)
    times += Counter([*outside, "lm_head.weight"] * NUM_WORKERS)
    assert counted.num_bytes == {name: entry.num_bytes * times[name] for name, entry in job.index.entries.items()}
    assert dict(told) == {dealt.worker: dealt.read_bytes for dealt in assign(job, estimate(job), schedule)}
