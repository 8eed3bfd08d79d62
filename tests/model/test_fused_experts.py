"""Experts that share a tensor on disk: what is read of it, what each expert is sent, and what is refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.command_line import model_files
from support.family_oracles import dequantized_checkpoint, distance, load, logits, open_job, recipe, token_ids
from support.fused_checkpoints import SAMPLES, quantized, read_split, spoiled
from support.fused_oracles import Tensors, apart
from support.source_kinds import pickled, set_config
from support.tiny_models import fused_families, tiny_checkpoint, transpose_experts
from torch import Tensor, nn

from awqdist.checkpoint.sources import read_source
from awqdist.errors import AwqdistError, CheckpointError, ModelError
from awqdist.model.experts import fuse_experts
from awqdist.model.forward import forward_layer, record_calls, with_buffers
from awqdist.model.skeleton import build_skeleton, read_config

PROBE = token_ids(2, seed=1)
DOWN = "model.layers.1.mlp.experts.down_proj"


# What is read


@pytest.mark.parametrize("family", fused_families())
@pytest.mark.parametrize("stored", ["safetensors", "pickled"])
def test_every_byte_is_read_once_and_every_linear_is_that_part_of_its_tensor(
    family: str, stored: str, tmp_path: Path
) -> None:
    source = tiny_checkpoint(family, tmp_path / "source", torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    folder = pickled(source, tmp_path / "pickled") if stored == "pickled" else source

    index = read_source(folder)
    reading = read_split(index)

    expected = apart(tensors)
    assert reading.tensors.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(reading.tensors[name], tensor)] == []
    assert all(tensor.is_contiguous() for tensor in reading.tensors.values())
    assert reading.num_bytes == index.stored_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_a_pickled_tensor_of_experts_may_lie_in_any_order(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama4", tmp_path / "source", torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    turned = pickled(
        source,
        tmp_path / "pickled",
        change=lambda t: {n: x.mT.contiguous().mT if x.ndim == 3 else x for n, x in t.items()},
    )

    found = read_split(read_source(turned)).tensors
    assert [name for name, tensor in apart(tensors).items() if not torch.equal(found[name], tensor)] == []


# What an expert is sent


@pytest.mark.parametrize("family", ["granitemoe", "llama4", "gpt-oss"])
def test_an_expert_is_counted_the_tokens_that_its_router_sends_to_it(family: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(family, tmp_path / "source")
    summary = quantized(source, tmp_path / "output")

    seen: dict[int, list[Tensor]] = defaultdict(list)
    model = load(source)
    for number, layer in enumerate(model.model.layers):
        for router in [m for n, m in layer.named_modules() if n.endswith("router")]:
            router.register_forward_hook(lambda module, args, out, n=number: seen[n].append(chosen(module, args[0])))
    logits(model, SAMPLES)
    assert seen
    for layer, experts in seen.items():
        counts = torch.bincount(torch.cat(experts).flatten(), minlength=8).tolist()
        for inner in (False, True):
            sites = [s for s in summary.layers[layer].sites if s.expert is not None and is_down(s.linears) == inner]
            assert [site.num_tokens for site in sorted(sites, key=lambda s: s.expert or 0)] == counts


def silu_gated(x: Tensor, gate: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor]) -> Tensor:
    return torch.nn.functional.silu(x @ gate[0].T) * (x @ up[0].T)


def clamped(x: Tensor, gate: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor]) -> Tensor:
    g, u = (x @ gate[0].T + gate[1]).clamp(max=7), (x @ up[0].T + up[1]).clamp(-7, 7)
    return (u + 1) * g * torch.sigmoid(1.702 * g)


@pytest.mark.parametrize(
    ("family", "block", "linears", "inner"),
    [
        ("granitemoe", "block_sparse_moe", ("w1", "w3"), silu_gated),
        ("llama4", "feed_forward", ("gate_proj", "up_proj"), silu_gated),
        ("gpt-oss", "mlp", ("gate_proj", "up_proj"), clamped),
    ],
)
def test_whoever_watches_an_expert_is_told_the_rows_that_it_multiplies(
    family: str, block: str, linears: tuple[str, str], inner: Callable[..., Tensor], tmp_path: Path
) -> None:
    source = tiny_checkpoint(family, tmp_path / "source")
    index, cpu = read_source(source), torch.device("cpu")
    skeleton = build_skeleton(read_config(source), index.entries)
    tensors = read_split(index).tensors
    outside = {name: tensors[disk] for name, disk in skeleton.outside_names().items()}
    hidden, calls = record_calls(skeleton, with_buffers(skeleton.decoder, outside, cpu), PROBE)
    own = {name: tensors[disk] for name, disk in skeleton.layer_names(1).items()}
    parameters = with_buffers(skeleton.layers[1], fuse_experts(skeleton.layer_experts(1), own), cpu)
    told: dict[tuple[str, int], Tensor] = {}
    block_input: list[Tensor] = []

    def watch(name: str, expert: int, rows: Tensor) -> None:
        told[name.rpartition(".")[2], expert] = rows

    watches = {fused.name: partial(watch, fused.name) for fused in skeleton.layer_experts(1)}
    forward_layer(skeleton.layers[1], parameters, hidden, calls[1], {f"{block}.router": block_input.append}, watches)

    x, router = block_input[0].flatten(0, -2), parameters[f"{block}.router.weight"]
    scores = x @ router.T + parameters.get(f"{block}.router.bias", torch.zeros(8))
    for expert in range(8):
        sent = (scores.topk(2, -1).indices == expert).any(-1)
        rows = x[sent] * (torch.sigmoid(scores[sent, expert, None]) if family == "llama4" else 1)
        gate, up = (
            (own[f"{block}.experts.{expert}.{n}.weight"], own.get(f"{block}.experts.{expert}.{n}.bias"))
            for n in linears
        )
        found = told["gate_up_proj", expert]  # sent as the first choice, then as the second
        torch.testing.assert_close(found[found[:, 0].argsort()], rows[rows[:, 0].argsort()])
        torch.testing.assert_close(told["down_proj", expert], inner(found, gate, up), rtol=1e-4, atol=1e-5)


def chosen(router: nn.Module, tokens: Tensor) -> Tensor:
    """(T, top k): the experts of every token, by the weights of the router alone."""
    weight, bias = router.state_dict()["weight"], router.state_dict().get("bias", 0)
    return (tokens @ weight.T + bias).topk(2, -1).indices


def is_down(linears: tuple[str, ...]) -> bool:
    return linears[0].endswith(("down_proj", "w2"))


def test_experts_that_no_token_is_sent_to_are_fitted_to_all_tokens(tmp_path: Path) -> None:
    def only_three(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.router.bias"][:] = torch.tensor([0.0, 90, 0, 0, 90, 0, 0, 0])

    source = spoiled(tiny_checkpoint("gpt-oss", tmp_path / "source"), only_three)
    summary = quantized(source, tmp_path / "output")

    layer = summary.layers[1]
    tokens = {site.expert: site.num_tokens for site in layer.sites if site.expert is not None}
    assert tokens == {e: SAMPLES.numel() if e in (1, 4) else 0 for e in range(8)}
    assert any(w.startswith("model.layers.1.mlp.experts: 6 of 8 experts") for w in summary.warnings)
    experts = [linear for linear in layer.linears if ".experts." in linear.name]
    assert len(experts) == 24
    assert all(linear.relative_error < linear.relative_error_nearest for linear in experts)
    plain = dequantized_checkpoint(tmp_path / "output", tmp_path / "plain")
    assert distance(logits(load(plain), PROBE), logits(load(source), PROBE)) < 0.5


# What is refused


@pytest.mark.parametrize(
    ("family", "tensor", "place", "linear"),
    [
        ("granitemoe", "block_sparse_moe.input_linear.weight", (5, 3, 4), "block_sparse_moe.experts.5.w1.weight"),
        ("llama4", "feed_forward.experts.gate_up_proj", (5, 3, 100), "feed_forward.experts.5.up_proj.weight"),
        ("gpt-oss", "mlp.experts.gate_up_proj", (5, 3, 6), "mlp.experts.5.gate_proj.weight"),
        ("gpt-oss", "mlp.experts.gate_up_proj_bias", (5, 7), "mlp.experts.5.up_proj.bias"),
    ],
)
def test_nan_in_one_experts_slice_is_named(
    family: str, tensor: str, place: tuple[int, ...], linear: str, tmp_path: Path
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"model.layers.1.{tensor}"][place] = float("nan")

    source = spoiled(tiny_checkpoint(family, tmp_path / "source"), spoil)
    with pytest.raises(AwqdistError, match=rf"layer 1: tensor model.layers.1.{linear} holds 1 values that are NaN"):
        quantized(source, tmp_path / "output")
    assert (tmp_path / "output" / "model-layer-00000.safetensors").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"num_local_experts": 9},
            "config.json asks for 9 experts, and the checkpoint lacks down_proj.weight of expert 8",
        ),
        ({"num_local_experts": 6}, "config.json asks for 6 experts, and the checkpoint has"),
        ({"intermediate_size": 96}, "config.json asks for (64, 96)"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    source = tiny_checkpoint("gpt-oss", tmp_path / "source")
    set_config(source, **fields)
    with pytest.raises(CheckpointError) as refused:
        open_job(source, recipe())
    assert words in str(refused.value)


def test_a_missing_tensor_of_biases_is_named(tmp_path: Path) -> None:
    source = spoiled(tiny_checkpoint("gpt-oss", tmp_path / "source"), lambda t: t.pop(f"{DOWN}_bias"))
    with pytest.raises(
        CheckpointError, match=r"lacks the tensor for model\.layers\.1\.mlp\.experts\.0\.down_proj\.bias"
    ):
        open_job(source, recipe())


def test_qwen3_vl_moe_as_transformers_saves_it_gives_the_bytes_of_the_published_layout(tmp_path: Path) -> None:
    published = tiny_checkpoint("qwen3-vl-moe", tmp_path / "published")
    saved = tiny_checkpoint("qwen3-vl-moe", tmp_path / "saved")
    transpose_experts(saved)
    experts = "model.language_model.layers.1.mlp.experts"
    shapes = [load_file(s / "model.safetensors")[f"{experts}.gate_up_proj"].shape for s in (published, saved)]
    assert shapes == [(8, 64, 192), (8, 192, 64)]

    quantized(published, tmp_path / "from-published")
    quantized(saved, tmp_path / "from-saved")

    assert model_files(tmp_path / "from-published") == model_files(tmp_path / "from-saved")


def test_experts_of_a_family_that_is_not_known_to_share_a_tensor_are_refused(tmp_path: Path) -> None:
    config = transformers.GraniteMoeHybridConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        layer_types=["attention"],
        num_attention_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
    )
    transformers.GraniteMoeHybridForCausalLM(config).save_pretrained(tmp_path / "source")
    with pytest.raises(ModelError, match=r"input_linear\.weight is stored in another layout than .* not supported yet"):
        open_job(tmp_path / "source", recipe())
