"""Which linears write to the residual stream, and which are the inner ones of a module: by the layer's own computation."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from support.tiny_models import tiny_checkpoint, tiny_model

from awqdist.checkpoint.index import read_index
from awqdist.model.skeleton import build_skeleton, read_config
from awqdist.model.structure import LayerStructure, trace_layers

ATTENTION = {"self_attn.o_proj"}
CASES = {
    "llama": ATTENTION | {"mlp.down_proj"},
    "granite": ATTENTION | {"mlp.down_proj"},  # times a number
    "cohere": ATTENTION | {"mlp.down_proj"},  # side by side
    "gpt-neox": {"attention.dense", "mlp.dense_4h_to_h"},
    "opt": {"self_attn.out_proj", "fc2"},
    "gemma3": set(),  # a norm stands between
    "olmo2": set(),
    "qwen2-moe": ATTENTION | {f"mlp.experts.{n}.down_proj" for n in range(8)},  # the shared expert is gated
    "deepseek-v3": ATTENTION | {"mlp.shared_experts.down_proj"} | {f"mlp.experts.{n}.down_proj" for n in range(8)},
}


def structure(family: str) -> LayerStructure:
    """Of the last layer."""
    with TemporaryDirectory() as folder:
        source = tiny_checkpoint(family, Path(folder))
        return trace_layers(build_skeleton(read_config(source), read_index(source).entries))[-1]


@pytest.mark.parametrize("family", CASES)
def test_what_is_added_to_the_output_as_it_is_is_found(family: str) -> None:
    assert structure(family).writers == CASES[family]


@pytest.mark.parametrize("family", ["llama", "granite", "gemma3"])
def test_the_layers_output_moves_with_a_bias_of_a_writer_and_otherwise_with_no_other(family: str) -> None:
    """The last linear of a layer: nothing reads it but the sum."""
    model = tiny_model(family)
    found = structure(family).writers
    layer = model.get_decoder().layers[-1]
    outputs: list[torch.Tensor] = []
    layer.register_forward_hook(
        lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    step = torch.linspace(-1, 1, model.config.get_text_config().hidden_size)
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        model(ids)
        layer.mlp.down_proj.register_forward_hook(lambda module, args, output: output + step)
        model(ids)
    moved = (outputs[1] - outputs[0]).reshape(-1, step.numel())
    parallel = torch.nn.functional.cosine_similarity(moved, step.expand_as(moved), dim=1)
    assert bool((parallel > 1 - 1e-4).all()) == ("mlp.down_proj" in found)


@pytest.mark.parametrize(
    ("family", "inner"),
    [
        ("llama", {"mlp.down_proj": "mlp"}),
        ("phi3", {"mlp.down_proj": "mlp"}),
        ("starcoder2", {"mlp.c_proj": "mlp"}),
        ("opt", {}),  # its linears lie in the layer itself
        ("mixtral", {}),  # experts
        ("deepseek-v3", {"mlp.shared_experts.down_proj": "mlp.shared_experts"}),
    ],
)
def test_inner_linears_are_those_of_modules_that_read_one_tensor(family: str, inner: dict[str, str]) -> None:
    assert structure(family).inner == inner
