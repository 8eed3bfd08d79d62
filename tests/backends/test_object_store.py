"""Ray's object store holds the chunks on their way, not those that wait: ten times its size goes through it without touching the disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.rings import Ring, Run, ray_cluster
from support.tiny_llama import RECIPE, Tiny, write_llama, write_tokenizer

NUM_SAMPLES, SEQ_LEN, HIDDEN = (
    2000,
    256,
    1024,
)  # 1.05 GB of bfloat16 activations at every boundary; the store holds 0.1 GB


@pytest.mark.slow
@pytest.mark.ray
def test_activations_of_ten_times_the_object_store_flow_through_it_without_spilling(tmp_path: Path) -> None:
    wide = write_wide(tmp_path)
    with ray_cluster() as cluster:
        cluster.add_node(num_cpus=2)
        command = Ring("ray", 2, address=cluster.address).command(
            wide, tmp_path / "output", "--num-samples", NUM_SAMPLES, "--seq-len", SEQ_LEN, "--chunk-tokens", 2048
        )
        with Run(command, tmp_path) as launched:
            assert launched.process.wait(900) == 0
        ask = [sys.executable, "-m", "ray.scripts.scripts", "memory", "--stats-only", "--address", cluster.address]
        stats = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    assert "Plasma memory usage" in stats
    assert "Spilled" not in stats, stats


def write_wide(folder: Path) -> Tiny:
    """A model with wide activations and little else."""
    write_tokenizer(folder / "model")
    lines = (
        f"the quick brown fox number {i} jumps over the lazy dog while {i * 7 % 13} ducks swim\n" for i in range(60000)
    )
    (folder / "text.txt").write_text("".join(lines))
    (folder / "recipe.yaml").write_text(RECIPE)
    sizes = {"hidden_size": HIDDEN, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": SEQ_LEN}
    write_llama(folder / "model", **sizes)
    return Tiny(folder / "model", folder / "text.txt", folder / "recipe.yaml")
