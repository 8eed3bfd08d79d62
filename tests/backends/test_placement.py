"""Which backend a run gets, and what its workers ask of a cluster."""

from __future__ import annotations

import pytest

from awqdist.backends.local import choose_backend
from awqdist.backends.remote_worker import allocate
from awqdist.errors import AwqdistError
from awqdist.run.device import launcher_value
from awqdist.settings import Placement

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which no launcher left anything."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def set_all(environment: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        environment.setenv(name, value)


def node(cpus: float = 0.0, gpus: float = 0.0) -> dict[str, float]:
    """Ray leaves out what a node has none of, and lists other resources beside."""
    found = {"CPU": cpus, "GPU": gpus, "memory": 1e9, "node:10.0.0.1": 1.0}
    return {name: value for name, value in found.items() if value}


@pytest.mark.parametrize(
    ("nodes", "num_workers", "device", "expected"),
    [
        pytest.param([node(64, 8)], None, "auto", (8, 8.0, True), id="one node of 8 GPUs"),
        pytest.param([node(64, 8), node(64, 8)], None, "auto", (16, 8.0, True), id="two nodes of 8 GPUs"),
        pytest.param([node(64, 8), node(16, 4)], None, "auto", (12, 4.0, True), id="the poorest node counts"),
        pytest.param([node(16), node(32, 4)], None, "auto", (4, 8.0, True), id="a head without GPUs"),
        pytest.param([node(64, 8)], 3, "auto", (3, 8.0, True), id="fewer workers than GPUs"),
        pytest.param([node(64, 8)], None, "cuda", (8, 8.0, True), id="cuda asked for"),
        pytest.param([node(4, 8)], None, "auto", (8, 1.0, True), id="fewer CPUs than GPUs"),
        pytest.param([node(64, 8)], None, "cpu", (1, 64.0, False), id="cpu asked for beside GPUs"),
        pytest.param([node(16)], None, "auto", (1, 16.0, False), id="one node without GPUs"),
        pytest.param([node(16), node(16), node(16)], None, "auto", (3, 16.0, False), id="a worker for every node"),
        pytest.param([node(0), node(8), node(8)], None, "auto", (2, 8.0, False), id="a head that is to do nothing"),
        pytest.param([node(16), node(4)], None, "auto", (2, 4.0, False), id="unequal nodes"),
        pytest.param([node(16)], 4, "auto", (4, 4.0, False), id="four workers on one node"),
        pytest.param([node(16), node(16)], 3, "auto", (3, 8.0, False), id="three workers on two nodes"),
        pytest.param([node(7)], 2, "auto", (2, 3.0, False), id="whole CPUs"),
        pytest.param([node(2)], 4, "cpu", (4, 0.5, False), id="more workers than CPUs"),
        pytest.param([node(2)], 3, "cpu", (3, 0.66, False), id="rounded down, or the last has no room"),
    ],
)
def test_a_cluster_is_divided_among_its_workers(
    nodes: list[dict[str, float]], num_workers: int | None, device: str, expected: tuple[int, float, bool]
) -> None:
    found = allocate(nodes, num_workers, device)
    assert (found.num_workers, found.cpus, found.on_gpu) == expected


@pytest.mark.parametrize("cpus", [[1.0], [2.0], [3.0, 3.0], [5.0, 9.0], [16.0, 16.0, 4.0]])
def test_all_workers_fit_on_the_nodes_at_once(cpus: list[float]) -> None:
    for num_workers in range(1, 40):
        share = allocate([node(count) for count in cpus], num_workers, "auto").cpus
        assert share > 0
        assert sum(int(count / share + 1e-9) for count in cpus) >= num_workers


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize("nodes", [[node(16)], [node(16), node(16)], []])
def test_cuda_on_a_cluster_without_a_gpu_is_refused(nodes: list[dict[str, float]], device: str) -> None:
    with pytest.raises(AwqdistError, match="no GPU; use --device cpu"):
        allocate(nodes, None, device)


@pytest.mark.parametrize("nodes", [[], [node()], [node(0.5)]])
def test_a_cluster_without_a_cpu_is_refused(nodes: list[dict[str, float]]) -> None:
    with pytest.raises(AwqdistError, match="no node with a CPU"):
        allocate(nodes, 1, "auto")


def test_a_worker_uses_at_least_one_thread_and_no_more_than_its_cpus() -> None:
    assert [allocate([node(cpus)], 2, "cpu").threads for cpus in (1, 2, 7, 16)] == [1, 1, 3, 8]


def test_ray_reserves_a_gpu_for_workers_that_need_one_only() -> None:
    assert allocate([node(16, 2)], None, "auto").bundle == {"CPU": 8.0, "GPU": 1.0}
    assert allocate([node(16, 2)], None, "cpu").bundle == {"CPU": 16.0}


def test_without_a_launcher_the_backend_is_local(launched: pytest.MonkeyPatch) -> None:
    assert choose_backend(Placement()) == "local"
    assert [launcher_value(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == [None] * 3


@pytest.mark.parametrize(("variables", "rank"), [(TORCHRUN, "5"), (SRUN, "3")], ids=["torchrun", "srun"])
def test_one_of_several_ranks_gets_the_torchrun_backend(
    launched: pytest.MonkeyPatch, variables: dict[str, str], rank: str
) -> None:
    set_all(launched, variables)
    assert choose_backend(Placement()) == "torchrun"
    assert launcher_value("RANK") == rank


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_the_only_rank_of_a_launcher_runs_locally(launched: pytest.MonkeyPatch, name: str) -> None:
    set_all(launched, {name: "1"})
    assert choose_backend(Placement()) == "local"


def test_what_torchrun_says_goes_before_what_srun_says(launched: pytest.MonkeyPatch) -> None:
    """srun starts one torchrun on every node, which starts the ranks."""
    set_all(launched, {**SRUN, **TORCHRUN})
    assert [launcher_value(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["5", "8", "1"]


@pytest.mark.parametrize("variables", [{}, TORCHRUN, SRUN], ids=["none", "torchrun", "srun"])
@pytest.mark.parametrize("backend", ["local", "ray", "torchrun"])
def test_a_backend_that_is_asked_for_is_given(
    launched: pytest.MonkeyPatch, variables: dict[str, str], backend: str
) -> None:
    set_all(launched, variables)
    assert choose_backend(Placement(backend)) == backend


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(AwqdistError, match="unknown backend 'dask'; use auto, local, ray, torchrun"):
        choose_backend(Placement("dask"))


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(AwqdistError, match="9 workers need one GPU each, the Ray cluster has 8"):
        allocate([{"CPU": 16.0, "GPU": 8.0}], 9, "auto")


def test_a_gpu_without_a_cpu_is_of_no_use() -> None:
    with pytest.raises(AwqdistError, match="no node with a GPU and a CPU"):
        allocate([{"GPU": 8.0}], None, "auto")
