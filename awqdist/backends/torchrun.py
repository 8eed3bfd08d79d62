"""The torchrun backend: one worker in every rank of a launcher that sets the usual variables (torchrun, accelerate, deepspeed, srun).

Rank 0 is the leader and a worker as well. A rank that dies ends the others; the launcher may start all of them again, which is a
resumed run like any other.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore

from awqdist.backends.rank_store import Listener, RankStore, Teller, joined_ranks
from awqdist.backends.rank_transport import PATIENCE, RankTransport, edge_groups
from awqdist.backends.remote_worker import Introduction, agreed
from awqdist.backends.room import launcher_value
from awqdist.errors import AwqdistError
from awqdist.layer.records import RunSummary
from awqdist.recipe import Recipe
from awqdist.run.chunks import open_chunk_store
from awqdist.run.device import choose_device
from awqdist.run.events import Event, Listen, Message
from awqdist.run.job import Job, fingerprint, prepare, token_chunks, with_threads
from awqdist.run.lead import Lead
from awqdist.run.output import check_free
from awqdist.run.ring import Assignment, RingBroken, work
from awqdist.run.shared_folder import answer_token, check_answers, offer_token
from awqdist.settings import RunSettings

Begin = Callable[[], tuple[Job, Tensor]]


def run_torchrun(begin: Begin, recipe: Recipe, settings: RunSettings, listen: Listen) -> RunSummary:
    """Quantizes a model together with the other ranks, all of which call this, or goes on where an earlier run was interrupted.

    begin: checks the input and gives the job and the calibration samples (N, L); called by the leader only. Returns the same summary in all
    ranks. Raises AwqdistError in all of them if one fails.
    """
    ranks = joined_ranks()
    device = _device_of_rank(settings.device)

    def decide() -> tuple[int | None, Tensor, str]:
        _, samples = begin()
        check_free(settings.output)
        return with_threads(settings, _cores_of_rank()).threads, samples, offer_token(settings.output)

    with _process_group(ranks, device):
        threads, samples, token = ranks.share(decide) if ranks.is_leader else ranks.shared()
        torch.set_num_threads(threads or 1)
        job = prepare(recipe, replace(settings, threads=threads, device=str(device)))
        answer_token(settings.output, token, ranks.rank)
        introductions = ranks.gather(Introduction(os.uname().nodename, str(device), fingerprint(job, samples)))
        lead = ranks.is_leader
        summary = _lead(ranks, job, samples, introductions, token, listen) if lead else _follow(ranks, job, samples)
        ranks.leave()
        return summary


def _lead(
    ranks: RankStore, job: Job, samples: Tensor, introductions: list[Introduction], token: str, listen: Listen
) -> RunSummary:
    with ExitStack() as stack:

        def open_run() -> tuple[Lead, list[Assignment]]:
            check_answers(job.settings.output, token, range(ranks.num_ranks))
            agreed(introductions)
            lead = stack.enter_context(Lead(job, samples, listen))
            lead.begin("torchrun", ranks.num_ranks)
            return lead, lead.assignments(ranks.num_ranks)

        lead, assignments = ranks.share(open_run, lambda opened: opened[1])
        if assignments:
            with _transport(ranks, job, samples, assignments[0]) as transport:
                listener = Listener(ranks, lead.observe, transport.break_off)
                try:
                    work(job, samples, assignments[0], transport, lambda event: lead.tell(event, 0))
                    listener.wait()
                except RingBroken as broken:
                    listener.stop()
                    raise AwqdistError(listener.failure or _broken(broken)) from None
        return ranks.share(lead.finish)


def _follow(ranks: RankStore, job: Job, samples: Tensor) -> RunSummary:
    assignments: list[Assignment] = ranks.shared()
    if assignments:
        teller = Teller(ranks)

        def emit(event: Event) -> None:
            teller.tell(Message(event, ranks.rank, time.time()))

        try:
            with _transport(ranks, job, samples, assignments[ranks.rank]) as transport:
                work(job, samples, assignments[ranks.rank], transport, emit)
        except RingBroken as broken:
            teller.end(_broken(broken))
            raise AwqdistError(_broken(broken)) from None
        except BaseException as error:
            teller.end(str(error) or type(error).__name__)
            raise
        teller.end(None)
    summary: RunSummary = ranks.shared()
    return summary


def _broken(broken: RingBroken) -> str:
    return f"{broken}; finished layers are kept, the same command resumes"


@contextmanager
def _transport(ranks: RankStore, job: Job, samples: Tensor, assignment: Assignment) -> Iterator[RankTransport]:
    """All ranks come here together."""
    width = job.skeleton.model.config.get_text_config(decoder=True).hidden_size
    shapes = [(*tokens.shape, width) for tokens in token_chunks(job.settings, samples)]
    groups = edge_groups(ranks.num_ranks)
    store = open_chunk_store(job, ranks.num_ranks)  # the ring's own store warns
    transport = RankTransport(assignment, groups, shapes, job.skeleton.dtype, job.device, store)
    yield transport
    transport.close()


@contextmanager
def _process_group(ranks: RankStore, device: torch.device) -> Iterator[None]:
    """After a failure the group is left as it is: its threads may wait for ranks that are gone, until this process ends."""
    if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost") and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend, store = "nccl" if device.type == "cuda" else "gloo", PrefixStore("group", ranks.store)
    distributed.init_process_group(backend, timeout=PATIENCE, store=store, world_size=ranks.num_ranks, rank=ranks.rank)
    yield
    distributed.destroy_process_group()


def _device_of_rank(name: str) -> torch.device:
    """The GPU of this rank's number on its machine, where GPUs are meant. Raises AwqdistError if it is not there."""
    device = choose_device(name)
    if device.type == "cuda":
        device = choose_device(f"cuda:{launcher_value('LOCAL_RANK') or 0}")
        torch.cuda.set_device(device)
    return device


def _cores_of_rank() -> int:
    """This rank's share of the cores of its machine."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")  # torchrun, deepspeed, srun
    counts = [int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()]
    num_local = (counts or [int(launcher_value("WORLD_SIZE") or 1)])[0]
    return max(1, len(os.sched_getaffinity(0)) // num_local)
