"""The same model stored in every way that a source may be stored in, beside its twin: plain safetensors of the same values.

The dequantizer here is the tests' own: it goes block by block, and knows nothing of the package's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.tiny_models import VOCABULARY, randomize, tiny_tokenizer

FP8 = torch.float8_e4m3fn
Tensors = dict[str, Tensor]
_COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed"}


def to_blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """weight: (O, I). Returns the stored values, (O, I) float8, and their scales, float32, one for each block, cut ones included."""
    rows, columns = weight.shape
    grid = -(-rows // block[0]), -(-columns // block[1])
    stored, scales = torch.empty(weight.shape, dtype=FP8), torch.empty(grid)
    for i, j in product(range(grid[0]), range(grid[1])):
        place = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
        scales[i, j] = weight[place].float().abs().max() / 448
        stored[place] = (weight[place].float() / scales[i, j]).to(FP8)
    return stored, scales


def from_blocks(stored: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(O, I) in `dtype`: the product in float32, rounded once."""
    weight = torch.empty(stored.shape, dtype=dtype)
    for i, j in product(range(scales.shape[0]), range(scales.shape[1])):
        place = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
        weight[place] = (stored[place].float() * scales[i, j].float()).to(dtype)
    return weight


def is_linear(name: str, tensor: Tensor) -> bool:
    return name.endswith("proj.weight") and tensor.ndim == 2


def fp8_pair(
    model: Path,
    folder: Path,
    config: dict[str, Any],
    *,
    block: tuple[int, int] | None = (128, 128),
    suffix: str = "weight_scale_inv",
    reshape: Callable[[Tensor], Tensor] = lambda scales: scales,
    more: Callable[[str], Tensors] = lambda module: {},
) -> tuple[Path, Path]:
    """The model in `model` with its linears in FP8, and its twin in plain bfloat16. block: None for one of the weight's size, 0 likewise
    for its rows or columns; reshape: of the scales, as they are stored; more: tensors stored with every linear."""
    source, twin = folder / "source", folder / "twin"
    for copy in (source, twin):
        shutil.copytree(model, copy)
    tensors = load_file(model / "model.safetensors")
    stored, plain = {}, {}
    for name, tensor in tensors.items():
        if not is_linear(name, tensor):
            stored[name] = plain[name] = tensor
            continue
        rows, columns = (block[0] or tensor.shape[0], block[1] or tensor.shape[1]) if block else tensor.shape
        values, scales = to_blocks(tensor, (rows, columns))
        written = reshape(scales)
        module = name.removesuffix(".weight")
        stored |= {name: values, f"{module}.{suffix}": written, **more(module)}
        plain[name] = from_blocks(values, written.reshape(scales.shape), (rows, columns), tensor.dtype)
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    save_file(plain, twin / "model.safetensors", {"format": "pt"})
    set_config(source, quantization_config=config)
    return source, twin


def dense_deepseek(folder: Path, **changes: Any) -> Path:
    """A random DeepSeek-V3 whose decoder layers are all dense, with multi-head latent attention."""
    config = transformers.DeepseekV3Config(
        vocab_size=VOCABULARY,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        first_k_dense_replace=changes["num_hidden_layers"],
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        **changes,
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    randomize(model)
    model.bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def set_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}, indent=2))


def pickled(model: Path, folder: Path, *, num_shards: int = 1, change: Callable[[Tensors], Any] = lambda t: t) -> Path:
    """A copy of the model as torch's pickles. change: of what is saved."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if num_shards == 1:
        torch.save(change(tensors), folder / "pytorch_model.bin")
        return folder
    file = "pytorch_model-{:05d}-of-{:05d}.bin"
    weight_map = {name: file.format(1 + i % num_shards, num_shards) for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        torch.save(change({n: t for n, t in tensors.items() if weight_map[n] == shard}), folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def sharded(model: Path, folder: Path) -> Path:
    """A copy of the model in two shards of safetensors, with tensors dealt to them in turn."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _compressed(strategy: str, **fields: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy, **fields}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {**_COMPRESSED, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def _power_of_two(scales: Tensor) -> Tensor:
    return scales.log2().ceil().exp2().to(torch.float8_e8m0fnu)


_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

# kind -> what `fp8_pair` is given
FP8_KINDS: dict[str, dict[str, Any]] = {
    "blocks": {"config": _BLOCKS},
    "small-blocks": {"config": {**_BLOCKS, "weight_block_size": [32, 64]}, "block": (32, 64)},
    "blocks-ue8m0": {"config": {**_BLOCKS, "scale_fmt": "ue8m0"}, "reshape": _power_of_two},
    "tensor": {
        "config": {"quant_method": "fp8", "activation_scheme": "static"},
        "block": None,
        "suffix": "weight_scale",
        "reshape": lambda scales: scales.reshape(()),
        "more": lambda module: {f"{module}.input_scale": torch.tensor(0.5)},
    },
    "channel": {
        "config": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        "block": (1, 0),
        "suffix": "weight_scale",
    },
    "compressed-channel": {
        "config": _compressed("channel"),
        "block": (1, 0),
        "suffix": "weight_scale",
        "reshape": lambda scales: scales.bfloat16(),
    },
    "compressed-tensor": {
        "config": _compressed("tensor"),
        "block": None,
        "suffix": "weight_scale",
        "reshape": lambda scales: scales.reshape(1).bfloat16(),
    },
    "compressed-block": {
        "config": _compressed("block", block_structure=[128, 128]),
        "suffix": "weight_scale",
    },
}


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """(…, 32·n) float64 of blocks (…, n, 16) and scales (…, n), both uint8: two values a byte, the first in the lower half."""
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = torch.tensor(magnitudes + [-m for m in magnitudes], dtype=torch.float64)
    codes = torch.stack([blocks % 16, blocks // 16], -1).flatten(-2)  # (…, n, 32)
    powers = torch.tensor([2.0 ** (s - 127) for s in range(255)] + [torch.nan], dtype=torch.float64)
    return (values[codes.long()] * powers[scales.long()].unsqueeze(-1)).flatten(-2)


def mxfp4_pair(model: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of a gpt-oss with random experts in MXFP4, as openai publishes it, and its twin in plain bfloat16."""
    source, twin = folder / "source", folder / "twin"
    generator = torch.Generator().manual_seed(0)
    stored, plain = {}, {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = plain[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        scales = torch.randint(121, 124, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        blocks = torch.randint(0, 256, (*scales.shape, 16), generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = from_mxfp4(blocks, scales).bfloat16().mT.contiguous()
    for copy, tensors in ((source, stored), (twin, plain)):
        shutil.copytree(model, copy)
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        set_config(copy, dtype=None)  # which is not named there either
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    set_config(source, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return source, twin
