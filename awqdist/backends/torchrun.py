"""The torchrun backend: one worker in every rank of a launcher that sets the usual variables (torchrun, accelerate, deepspeed, srun).

Rank 0 is the leader and a worker as well. A rank that dies takes the others with it; the launcher may start all of them again, and the run
is resumed like any other.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from socket import gethostname

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore

from awqdist.backends.ranks import PATIENCE, MessageReceiver, MessageSender, RankStore, RankTransport, joined_ranks
from awqdist.backends.remote_worker import WorkerInfo, agreed_fingerprint
from awqdist.errors import AwqdistError
from awqdist.layer.records import RunSummary
from awqdist.recipe import Recipe
from awqdist.run.chunks import open_chunk_store, store_budget
from awqdist.run.device import choose_device, launcher_value
from awqdist.run.events import Event, Listen, Message
from awqdist.run.job import Job, fingerprint, prepare, token_chunks, with_threads
from awqdist.run.leader import Leader
from awqdist.run.output import answer_token, check_answers, check_free, offer_token
from awqdist.run.worker import Assignment, RingBroken, run_worker
from awqdist.settings import RunSettings

Begin = Callable[[], tuple[Job, Tensor]]


def run_torchrun(begin: Begin, recipe: Recipe, settings: RunSettings, listen: Listen) -> RunSummary:
    """Quantizes a model together with the other ranks, all of which call this, or resumes an interrupted run.

    Args:
        begin: checks the input and returns the job and the calibration samples (N, L) int64; called by the leader only.
        listen: called with every message, by the leader only.

    Returns:
        The same summary in all ranks.

    Raises:
        AwqdistError: in all ranks, if one of them fails.
    """
    ranks = joined_ranks()
    device = choose_device(settings.device)
    if device.type == "cuda":  # the GPU with this rank's number on its machine
        device = choose_device(f"cuda:{launcher_value('LOCAL_RANK') or 0}")
        torch.cuda.set_device(device)

    def decide() -> tuple[int | None, Tensor, str]:
        _, samples = begin()
        check_free(settings.output)
        return with_threads(settings, _cores_of_rank()).threads, samples, offer_token(settings.output)

    with _process_group(ranks, device):
        threads, samples, token = ranks.share(decide) if ranks.is_leader else ranks.shared()
        torch.set_num_threads(threads or 1)
        job = prepare(recipe, replace(settings, threads=threads, device=str(device)))
        answer_token(settings.output, token, ranks.rank)
        workers = ranks.gather(WorkerInfo(gethostname(), str(device), fingerprint(job, samples)))
        lead = ranks.is_leader
        summary = _lead(ranks, job, samples, workers, token, listen) if lead else _follow(ranks, job, samples)
        ranks.leave()
        return summary


def _lead(
    ranks: RankStore, job: Job, samples: Tensor, workers: list[WorkerInfo], token: str, listen: Listen
) -> RunSummary:
    with ExitStack() as stack:

        def open_run() -> tuple[Leader, list[Assignment]]:
            check_answers(job.settings.output, token, range(ranks.num_ranks))
            agreed_fingerprint(workers)
            lead = stack.enter_context(Leader(job, samples, listen))
            lead.begin("torchrun", ranks.num_ranks)
            return lead, lead.assignments(ranks.num_ranks)

        lead, assignments = ranks.share(open_run, lambda opened: opened[1])
        if assignments:
            with _transport(job, samples, assignments[0]) as transport:
                receiver = MessageReceiver(ranks, lead.observe, transport.break_off)
                try:
                    run_worker(job, samples, assignments[0], transport, lambda event: lead.tell(event, 0))
                    receiver.wait()
                except RingBroken as broken:
                    receiver.stop()
                    raise AwqdistError(receiver.failure or _resumable(broken)) from None
        return ranks.share(lead.finish)


def _follow(ranks: RankStore, job: Job, samples: Tensor) -> RunSummary:
    assignments: list[Assignment] = ranks.shared()
    if assignments:
        sender = MessageSender(ranks)

        def emit(event: Event) -> None:
            sender.send(Message(event, ranks.rank, time.time()))

        try:
            with _transport(job, samples, assignments[ranks.rank]) as transport:
                run_worker(job, samples, assignments[ranks.rank], transport, emit)
        except RingBroken as broken:
            sender.end(_resumable(broken))
            raise AwqdistError(_resumable(broken)) from None
        except BaseException as error:
            sender.end(str(error) or type(error).__name__)
            raise
        sender.end(None)
    summary: RunSummary = ranks.shared()
    return summary


def _resumable(broken: RingBroken) -> str:
    return f"{broken}; finished layers are kept, the same command resumes"


@contextmanager
def _transport(job: Job, samples: Tensor, assignment: Assignment) -> Iterator[RankTransport]:
    """Opens the transport of an assignment; all ranks call it together. After a failure it is left as it is."""
    width = job.skeleton.model.config.get_text_config(decoder=True).hidden_size
    shapes = [(*tokens.shape, width) for tokens in token_chunks(job.settings, samples)]
    store = open_chunk_store(job, store_budget(job, assignment.schedule.num_workers))
    transport = RankTransport(assignment, shapes, job.skeleton.dtype, job.device, store)
    yield transport
    transport.close()


@contextmanager
def _process_group(ranks: RankStore, device: torch.device) -> Iterator[None]:
    """Opens the default process group. After a failure it is left as it is: its threads may wait forever for ranks that died."""
    if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost") and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend, store = "nccl" if device.type == "cuda" else "gloo", PrefixStore("group", ranks.store)
    distributed.init_process_group(backend, timeout=PATIENCE, store=store, world_size=ranks.num_ranks, rank=ranks.rank)
    yield
    distributed.destroy_process_group()


def _cores_of_rank() -> int:
    """Returns this rank's share of the cores of its machine."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")  # torchrun, deepspeed, srun
    counts = [int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()]
    num_local = (counts or [int(launcher_value("WORLD_SIZE") or 1)])[0]
    return max(1, len(os.sched_getaffinity(0)) // num_local)
