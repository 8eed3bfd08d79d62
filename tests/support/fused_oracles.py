"""Slow, independent ways between checkpoints that hold all experts of a block in one tensor, and a tensor for every expert's linear."""

from __future__ import annotations

import re
from collections import defaultdict

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
_GRANITE, _HALVES, _GPT_OSS = (
    ("granitemoe", "granitemoeshared"),
    ("llama4", "llama4_text", "qwen3_vl_moe"),
    ("gpt_oss",),
)


def apart(tensors: Tensors) -> Tensors:
    """The tensors of a checkpoint, with a name for the weight (O, I) and the bias (O,) of every expert's linear."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        parts = _parts(name, tensor)
        found |= {name: tensor} if parts is None else {key: part.contiguous() for key, part in parts.items()}
    return found


def _parts(name: str, tensor: Tensor) -> Tensors | None:
    module, _, leaf = name.rpartition(".experts.")
    if name.endswith(".block_sparse_moe.input_linear.weight"):  # (E, 2I, H)
        experts = name.removesuffix(".input_linear.weight") + ".experts"
        pairs = [(expert[: len(expert) // 2], expert[len(expert) // 2 :]) for expert in tensor]
        return {
            f"{experts}.{e}.{w}.weight": p
            for e, pair in enumerate(pairs)
            for w, p in zip(("w1", "w3"), pair, strict=True)
        }
    if name.endswith(".block_sparse_moe.output_linear.weight"):  # (E, H, I)
        experts = name.removesuffix(".output_linear.weight") + ".experts"
        return {f"{experts}.{e}.w2.weight": expert for e, expert in enumerate(tensor)}
    if leaf == "down_proj":  # (E, I, H)
        return {f"{module}.experts.{e}.down_proj.weight": expert.T for e, expert in enumerate(tensor)}
    if leaf == "down_proj_bias":  # (E, H)
        return {f"{module}.experts.{e}.down_proj.bias": expert for e, expert in enumerate(tensor)}
    if leaf == "gate_up_proj" and (module.endswith("feed_forward") or ".language_model." in module):  # (E, H, 2I)
        half = tensor.shape[2] // 2
        halves = {"gate_proj": tensor[:, :, :half], "up_proj": tensor[:, :, half:]}
    elif leaf in ("gate_up_proj", "gate_up_proj_bias"):  # (E, H, 2I), (E, 2I)
        halves = {"gate_proj": tensor[..., 0::2], "up_proj": tensor[..., 1::2]}
    else:
        return None
    kind = "bias" if leaf.endswith("bias") else "weight"
    return {
        f"{module}.experts.{e}.{k}.{kind}": x.T if x.ndim == 2 else x
        for k, h in halves.items()
        for e, x in enumerate(h)
    }


def together(tensors: Tensors, model_type: str) -> Tensors:
    """The tensors of a checkpoint as the model type stores them; as they are, if it stores every expert's linears apart."""
    if model_type not in (*_GRANITE, *_HALVES, *_GPT_OSS):
        return tensors
    found = dict(tensors)
    blocks: dict[str, dict[tuple[str, int], Tensor]] = defaultdict(dict)
    for name in tensors:
        match = re.fullmatch(r"(.*)\.experts\.(\d+)\.(.*)", name)
        if match:
            blocks[match[1]][match[3], int(match[2])] = found.pop(name)
    for block, parts in blocks.items():
        stacks = {leaf: torch.stack([parts[leaf, e] for e in range(8)]) for leaf in {leaf for leaf, _ in parts}}
        if model_type in _GRANITE:
            found[f"{block}.input_linear.weight"] = torch.cat([stacks["w1.weight"], stacks["w3.weight"]], 1)
            found[f"{block}.output_linear.weight"] = stacks["w2.weight"]
            continue
        gate, up = stacks["gate_proj.weight"].mT, stacks["up_proj.weight"].mT  # (E, H, I)
        gate_up = torch.stack([gate, up], 3).flatten(2) if model_type in _GPT_OSS else torch.cat([gate, up], 2)
        found[f"{block}.experts.gate_up_proj"] = gate_up
        found[f"{block}.experts.down_proj"] = stacks["down_proj.weight"].mT
        if model_type in _GPT_OSS:
            biases = torch.stack([stacks["gate_proj.bias"], stacks["up_proj.bias"]], 2)  # (E, I, 2)
            found[f"{block}.experts.gate_up_proj_bias"] = biases.flatten(1)
            found[f"{block}.experts.down_proj_bias"] = stacks["down_proj.bias"]
    return found
