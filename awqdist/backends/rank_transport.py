"""Chunks from rank to rank. Every edge of the ring has a process group of its own, one thread that sends on it and one that receives,
so that nothing waits behind anything else and what was sent first comes first. Chunks travel as bytes: gloo does not know bfloat16."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from awqdist.backends.inbox import Inbox
from awqdist.offload.store import Store
from awqdist.run.ring import Assignment

PATIENCE = timedelta(
    days=30
)  # a neighbour may search for hours; the launcher sees to it that a dead one is no neighbour
_Outgoing = tuple[int, int, Tensor]


class RankTransport:
    """The transport of one rank for one assignment.

    groups: of all edges, by the rank at which they begin; shapes: (B, L, H) of every chunk; dtype: of the activations; store: for
    chunks that wait, closed with the transport.
    """

    def __init__(
        self,
        assignment: Assignment,
        groups: Sequence[ProcessGroup | None],
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        store: Store,
    ) -> None:
        self._rank, self._schedule = assignment.worker, assignment.schedule
        self._groups, self._shapes, self._dtype, self._device = groups, shapes, dtype, device
        self._inbox = Inbox(store)
        self._outbox: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self.receive, self.check, self.break_off = self._inbox.take, self._inbox.check, self._inbox.break_off
        self._threads = [
            threading.Thread(target=self._guarded, args=(f,), daemon=True) for f in (self._send_all, self._receive_all)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, layer: int, chunk: int, hidden: Tensor) -> None:
        """The schedule of the neighbour says which chunk comes next, so that only its bytes need to be sent."""
        self._outbox.put(hidden)

    def close(self) -> None:
        """Waits until everything is sent; everything was received."""
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()
        self._inbox.close()

    def _send_all(self) -> None:
        peer, group = (self._rank + 1) % self._schedule.num_workers, self._groups[self._rank]
        while (hidden := self._outbox.get()) is not None:
            data = hidden.contiguous().view(torch.uint8).to(self._device)
            distributed.send(data, peer, group)

    def _receive_all(self) -> None:
        peer = (self._rank - 1) % self._schedule.num_workers
        group = self._groups[peer]
        for step in self._schedule.steps(self._rank):
            if step.kind == "receive":
                *batch, width = self._shapes[step.chunk]
                data = torch.empty(*batch, width * self._dtype.itemsize, dtype=torch.uint8, device=self._device)
                distributed.recv(data, peer, group)
                self._inbox.put(step.layer, step.chunk, data.cpu().view(self._dtype))

    def _guarded(self, function: object) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            function()  # type: ignore[operator]
        except Exception as error:  # whatever the process group raises: no chunk will come any more
            self._inbox.break_off(f"a neighbour of rank {self._rank} is gone: {str(error).splitlines()[0]}")


def edge_groups(num_ranks: int) -> list[ProcessGroup | None]:
    """A process group for the edge from every rank to the next. All ranks call it."""
    if num_ranks == 1:
        return [None]
    return [distributed.new_group([rank, (rank + 1) % num_ranks], timeout=PATIENCE) for rank in range(num_ranks)]
