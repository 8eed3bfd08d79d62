"""Slow, independent ways to the results that awqdist must give, for whole tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from awqdist import AWQModifier, QuantizationArgs, QuantizationModifier, QuantizationScheme, load_recipe
from awqdist.checkpoint.reader import read_tensors
from awqdist.checkpoint.sources import read_source
from awqdist.layer.plan import LayerPlan
from awqdist.model.experts import fuse_experts
from awqdist.model.forward import forward_layer, head_inputs, record_calls, with_buffers
from awqdist.model.mapping import ResolvedMapping, SmoothedParameters
from awqdist.model.skeleton import build_skeleton, read_config
from awqdist.recipe import Recipe
from awqdist.run.job import Job, prepare
from awqdist.settings import RunSettings
from support.fused_oracles import apart, together
from support.tiny_models import GROUP_SIZE, VOCABULARY

KINDS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
Choose = Callable[[LayerPlan, ResolvedMapping, dict[str, Tensor]], Tensor]


def recipe(
    bits: int = 4,
    *,
    ignore: tuple[str, ...] = ("lm_head",),
    targets: tuple[str, ...] = ("Linear",),
    symmetric: bool = False,
    **awq: Any,
) -> Recipe:
    """AWQ and rounding to nearest in groups of 32. awq: further fields of AWQModifier."""
    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=GROUP_SIZE, dynamic=False
    )
    groups = {"group_0": QuantizationScheme(targets=list(targets), weights=weights)}
    return load_recipe([AWQModifier(**awq), QuantizationModifier(ignore=list(ignore), config_groups=groups)])


def token_ids(num_samples: int, length: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY - 8, (num_samples, length), generator=generator)


def load(folder: Path, **options: Any) -> Any:
    """What transformers makes of a folder, by the class that config.json names, or by the Auto class where that is a test's own."""
    fields = json.loads((folder / "config.json").read_text())
    if fields["model_type"] == "kimi_k2":  # as its publisher advises for software that does not know the type
        options["config"] = transformers.DeepseekV3Config.from_dict({**fields, "model_type": "deepseek_v3"})
    kind = getattr(transformers, fields["architectures"][0], AutoModelForCausalLM)
    return kind.from_pretrained(folder, device_map="cpu", **options)


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def distance(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def read_all(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from its safetensors files; those of all experts of a block apart."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                assert name not in tensors, f"{name} is in two files"
                tensors[name] = opened.get_tensor(name)
    return apart(tensors)


def write_all(folder: Path, config: Path, tensors: dict[str, Tensor]) -> Path:
    """A float checkpoint in one file, with the configuration of another less its quantization, and its layout of experts."""
    folder.mkdir(parents=True)
    fields = json.loads((config / "config.json").read_text())
    fields.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(fields))
    stored = together(tensors, fields["model_type"])
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    return folder


def open_job(source: Path, chosen: Recipe) -> Job:
    return prepare(chosen, RunSettings(source, source.parent / "never-written", device="cpu"))


def smoothed_checkpoint(job: Job, folder: Path, choose: Choose) -> Path:
    """A float checkpoint in which every mapping of the plan is applied with the scales that `choose` gives, and nothing is rounded."""
    source = job.settings.model
    tensors = read_all(source)
    for task in job.plan.layers:
        original = {name: tensors[disk] for name, disk in task.tensors.items()}
        smoothed = SmoothedParameters(original)
        for mapping in task.mappings:
            smoothed.apply(mapping, choose(task, mapping, original))
        tensors.update({task.tensors[name]: tensor for name, tensor in smoothed.items()})
    return write_all(folder, source, tensors)


def site_inputs(job: Job, model: PreTrainedModel, samples: Tensor) -> dict[tuple[int, str], list[Tensor]]:
    """What every linear of the decoder layers is given in transformers' own forward, by layer and path."""
    inputs: dict[tuple[int, str], list[Tensor]] = {}
    handles = []
    for task in job.plan.layers:
        for path in task.by_path:
            seen = inputs[task.index, path] = []
            module = model.get_submodule(f"{job.skeleton.prefix}.{task.index}.{path}")
            handles.append(module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0])))
    logits(model, samples)
    for handle in handles:
        handle.remove()
    return inputs


def routing(model: Any, ids: Tensor) -> list[Tensor]:
    """The experts of every token, sorted, of every block that routes (T, top k)."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) == 1:  # Llama-4: rows of every expert in turn, zeros for tokens of others
            routed = args[0].unflatten(0, (module.num_experts, -1)).any(-1)  # (E, T)
            seen.append(routed.T.nonzero()[:, 1].unflatten(0, (routed.shape[1], -1)))
        else:
            seen.append(args[1].sort(-1).values)

    blocks = [m for n, m in model.named_modules() if n.endswith(".experts") and not isinstance(m, nn.ModuleList)]
    handles = [block.register_forward_pre_hook(hook) for block in blocks]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return seen


def dequantized_checkpoint(quantized: Path, folder: Path) -> Path:
    """A float checkpoint with the weights that a quantized one means, by the format's description alone."""
    scheme = json.loads((quantized / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    bits, tensors = scheme["weights"]["num_bits"], read_all(quantized)
    for name in [n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")]:
        parts = {kind: tensors.pop(f"{name}.{kind}") for kind in KINDS if f"{name}.{kind}" in tensors}
        tensors[f"{name}.weight"] = slow_weight(parts, bits).to(parts["weight_scale"].dtype)
    return write_all(folder, quantized, tensors)


def slow_weight(parts: dict[str, Tensor], bits: int) -> Tensor:
    """(O, I) float32: (code - zero point) · scale. Codes lie along the inputs and zero points along the outputs, lowest bits first."""
    num_outputs, num_inputs = (int(n) for n in parts["weight_shape"])
    scale = parts["weight_scale"].float().numpy()  # (O, G)
    codes = _unpacked(parts["weight_packed"].numpy(), bits, num_inputs)  # (O, I)
    zeros = np.full(scale.shape, 1 << (bits - 1))
    if "weight_zero_point" in parts:
        zeros = _unpacked(parts["weight_zero_point"].numpy().T, bits, num_outputs).T  # (O, G)
    group = num_inputs // scale.shape[1]
    weight = np.zeros((num_outputs, num_inputs), np.float32)
    for i in range(num_inputs):
        weight[:, i] = (codes[:, i] - zeros[:, i // group]) * scale[:, i // group]
    return torch.from_numpy(weight)


def _unpacked(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """(rows, count) codes of words (rows, ceil(count · bits / 32))."""
    per_word, unsigned = 32 // bits, words.astype(np.int64) & 0xFFFFFFFF
    columns = [(unsigned[:, i // per_word] >> (bits * (i % per_word))) & ((1 << bits) - 1) for i in range(count)]
    return np.stack(columns, 1)


def layer_by_layer(source: Path, ids: Tensor) -> list[Tensor]:
    """awqdist's own hidden states (B, L, H) on `ids` (B, L), as transformers gives them: before every layer, and behind the final norm."""
    index = read_source(source)
    skeleton = build_skeleton(read_config(source), index.entries)

    def read(names: dict[str, str]) -> dict[str, Tensor]:
        tensors = read_tensors([index.entries[disk] for disk in names.values()]).tensors
        return {name: tensors[disk] for name, disk in names.items()}

    cpu = torch.device("cpu")
    outside = with_buffers(skeleton.decoder, read(skeleton.outside_names()), cpu)
    hidden, calls = record_calls(skeleton, outside, ids)
    found = [hidden]
    for number, layer in enumerate(skeleton.layers):
        fused = fuse_experts(skeleton.layer_experts(number), read(skeleton.layer_names(number)))
        found.append(forward_layer(layer, with_buffers(layer, fused, cpu), found[-1], calls[number]))
    return [*found[:-1], head_inputs(skeleton, outside, ids, found[-1])]


def hidden_states(source: Path, ids: Tensor) -> tuple[Tensor, ...]:
    """The same by transformers' own forward."""
    with torch.no_grad():
        states: tuple[Tensor, ...] = load(source).eval()(input_ids=ids, output_hidden_states=True).hidden_states
    return states
