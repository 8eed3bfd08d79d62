"""Finds a model's folder, and reads its index in any source format: one entry per tensor of the model, in its own dtype.

A model is a folder, or a Hugging Face hub id, which is downloaded.

A source format is three functions (`SourceFormat`) and a line of `FORMATS`: the reader, plan and the warnings need no more. Known are

- FP8, w = q · s in float32, rounded once; s is a factor of a block of q, the name `weight_scale_inv` notwithstanding. Blocks are
  usually 128×128 (DeepSeek-V3: https://huggingface.co/deepseek-ai/DeepSeek-V3, inference/kernel.py, weight_dequant; Qwen3-FP8;
  compressed-tensors' strategy "block"), a row (its strategy "channel", FBGEMM) or the whole tensor.
- MXFP4 of gpt-oss's experts, w = q · 2^(s − 127), exactly (https://www.opencomputeproject.org/documents/
  ocp-microscaling-formats-mx-v1-0-spec-final-pdf). 32 values of a row share a scale of 8 bits, of which 255 means NaN. A value is a sign,
  two bits of exponent and one of mantissa; two lie in a byte, the first in the lower half.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awqdist.checkpoint.experts import FusedExperts, expert_entries, fused_experts, split_experts
from awqdist.checkpoint.index import CheckpointIndex, Packing, TensorEntry, holds_weights, read_index
from awqdist.errors import CheckpointError, first_line
from awqdist.recipe import matches

_DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]
MXFP4_BLOCK = 32  # values that share a scale
_STRIP_ELEMENTS = 1 << 18  # worked on at once: they stay in the processor's cache
_FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
_FP8_SCALES = ("_scale_inv", "_scale")  # behind the weight's name
_WEIGHT_SCALES = ("weight_scale_inv", "weight_scale")
_ACTIVATION_SCALES = ("input_scale", "activation_scale", "output_scale", "q_scale", "k_scale", "v_scale", "kv_scale")
_COMPRESSED_FP8 = ("float-quantized", "naive-quantized")
_MXFP4_VALUES, _MXFP4_SCALES = "_blocks", "_scales"
_MXFP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MODEL_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class Quantization:
    """What config.json declares about quantized weights."""

    format: str  # a key of FORMATS
    block: tuple[int, int] | None = None  # rows and columns that share a scale, where blocks have a declared size
    dtype: str = "BF16"  # what weights are dequantized to, by its name in safetensors
    unquantized: tuple[str, ...] = ()  # modules in full precision, by names or ends of names, or `re:` patterns

    def covers(self, module: str) -> bool:
        """Returns whether the linear `module`, by its on-disk name, is quantized."""
        return not any(
            matches(pattern, module) or module.endswith(f".{pattern}") or module.startswith(f"{pattern}.")
            for pattern in self.unquantized
        )


@dataclass(frozen=True, slots=True)
class SourceFormat:
    """One way to store quantized weights.

    Attributes:
        declared: from `quantization_config` and the whole config.json to what they declare; None if that is another format. Damaged
            fields may raise KeyError, TypeError, ValueError or AttributeError. The caller fills in dtype and unquantized modules.
        join: from an index of stored tensors to one in which each quantized weight is a single entry, whose Packing names the
            format and the tensors that belong to its values. Raises CheckpointError for tensors that do not fit each other.
        dequantize: from an entry, its stored values, and its packing's parts to the tensor in the entry's shape and dtype. The
            values come in the entry's shape if the packing's dtype is one of DTYPES, else as bytes (n,) uint8.
    """

    declared: Callable[[dict[str, Any], dict[str, Any]], Quantization | None]
    join: Callable[[CheckpointIndex, Quantization, Sequence[FusedExperts]], CheckpointIndex]
    dequantize: Callable[[TensorEntry, Tensor, list[Tensor]], Tensor]


def model_folder(model: str) -> Path:
    """Returns the folder of a model; a hub id is downloaded, or taken from the cache.

    Raises:
        CheckpointError: there is no such folder, and the hub does not provide it.
    """
    place = _local(model)
    if place is not None:
        if not place.is_dir():
            raise CheckpointError(f"{model} is a file; give the folder of a model")
        return place
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(model, allow_patterns=_DOWNLOADED))
        if not any(found.glob("*.safetensors")):  # many models hold both, and one is enough
            found = Path(snapshot_download(model, allow_patterns=[*_DOWNLOADED, "pytorch_model*.bin"]))
        return found
    except Exception as error:  # the hub client raises many kinds: offline, not found, gated, interrupted
        raise _not_provided(model, error) from None


def resolve_config(model: str) -> Path:
    """Returns what `plan` needs of a model: a folder that holds weights, otherwise its config.json alone.

    Args:
        model: a folder, a config.json, or a hub id, whose config.json is downloaded or taken from the cache.

    Raises:
        CheckpointError: there is no such model.
    """
    place = _local(model)
    if place is not None:
        if place.is_dir():
            file = place / "config.json"
            return file if file.is_file() and not holds_weights(place) else place
        if place.suffix != ".json":
            raise CheckpointError(f"{model} is a file; give the folder of a model, or a config.json")
        return place
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:
        raise _not_provided(model, error) from None


def _local(model: str) -> Path | None:
    """Returns the path of a model on this machine, or None for a hub id. Raises CheckpointError for anything else."""
    place = Path(model).expanduser()
    if place.exists():
        return place
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise CheckpointError(f"model folder not found: {model}; give an existing folder or a hub id such as org/name")
    return None


def _not_provided(model: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{model} is neither a folder here nor a model that the hub gives ({first_line(error)}); check the name and the network,"
        " or download it elsewhere and give its folder"
    )


def read_source(folder: Path) -> CheckpointIndex:
    """Returns the index of the model in `folder`, by headers only: weights dequantized, experts' linears apart.

    Raises:
        CheckpointError: the folder is incomplete, damaged, or quantized in a format that cannot be read.
    """
    index = read_index(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        config = None  # `read_config` reports it
    config = config if isinstance(config, dict) else {}
    families = fused_experts(config.get("model_type"))
    quantization = _quantization(config, folder)
    if quantization is not None:
        return split_experts(FORMATS[quantization.format].join(index, quantization, families), families)
    for entry in index.entries.values():
        if entry.dtype in _FP8_DTYPES:  # read as plain numbers they would be wrong
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} is FP8, but config.json has no quantization_config that says how it is"
                " scaled; download config.json again"
            )
    return split_experts(index, families)


def declared_quantization(file: Path) -> Quantization | None:
    """Returns what `file`, a config.json, says of quantized weights; None if there are none.

    Raises:
        CheckpointError: the file is not JSON, or declares a format that cannot be read.
    """
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is no readable JSON ({error}); give a model's config.json") from None
    return _quantization(config, file.parent)


def _quantization(config: dict[str, Any], folder: Path) -> Quantization | None:
    text = config.get("text_config")

    def field(key: str) -> Any:
        return config.get(key) or (text.get(key) if isinstance(text, dict) else None)

    declared = field("quantization_config") or field("compression_config")
    if not declared:
        return None
    dtype = _MODEL_DTYPES.get(str(field("dtype") or field("torch_dtype")).removeprefix("torch."), "BF16")
    method = kind = None
    if isinstance(declared, dict):
        method = declared.get("quant_method")
        kind = f"{method} {declared.get('format', '')}".strip()
        unquantized = declared.get("modules_to_not_convert") or declared.get("ignore") or ()
        for source_format in FORMATS.values():
            try:
                if found := source_format.declared(declared, config):
                    return replace(found, dtype=dtype, unquantized=tuple(map(str, unquantized)))
            except (KeyError, TypeError, ValueError, AttributeError):
                pass  # not what the format's own writers write
    raise CheckpointError(
        f"{folder} is already quantized, with {kind if method else 'an unknown method'} (quantization_config of config.json);"
        " of quantized sources only those with FP8 weights, and gpt-oss with experts in MXFP4, can be read; give the original"
    )


# --- FP8 ---


def dequantize_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Returns the weight times its scales, computed in float32, in `dtype` and of the weight's shape.

    Args:
        weight: (..., O, I) float8.
        scale: one value per block, of any floating dtype; the last blocks of a row or column may be cut off.
        block: rows and columns that share a scale.
        dtype: of the result.
    """
    rows, columns = weight.shape[-2:]
    flat = weight.reshape(prod(weight.shape[:-2]), rows, columns)  # (N, O, I)
    factors = scale.float().reshape(
        1 if scale.numel() == 1 else len(flat), -(-rows // block[0]), -(-columns // block[1])
    )
    factors = factors.expand(len(flat), -1, -1)  # (N, O / block, I / block)
    result = torch.empty(flat.shape, dtype=dtype, device=weight.device)
    step = max(1, _STRIP_ELEMENTS // max(columns, 1))
    for matrix, values, target in zip(flat, factors, result, strict=True):
        for start in range(0, rows, step):
            strip = slice(start, min(start + step, rows))
            row_blocks = torch.arange(strip.start, strip.stop, device=scale.device) // block[0]
            wide = values[row_blocks].repeat_interleave(block[1], dim=1)[:, :columns]  # (strip, I)
            target[strip] = _fp8_to_float32(matrix[strip]).mul_(wide)
    return result.reshape(weight.shape)


def _fp8_to_float32(stored: Tensor) -> Tensor:
    """Returns float8 values (n, I) as float32, exactly.

    An e4m3 is a float16 whose exponent lacks a bit: moved into its place, its bits are the value / 256, subnormal ones included. Only
    its NaN, of all ones, is a number there. torch's own conversion takes about three times as long.
    """
    if stored.dtype != torch.float8_e4m3fn:
        return stored.float()
    bits = stored.view(torch.int8).to(torch.int16)  # with the sign in the highest bit
    magnitude = bits.bitwise_left_shift(7).bitwise_and_(0x3FFF)
    is_nan = magnitude == 0x3F80
    halves = magnitude.bitwise_or_(bits.bitwise_and_(-0x8000)).view(torch.float16)
    return halves.float().mul_(256).masked_fill_(is_nan, torch.nan)


def _declared_fp8(declared: dict[str, Any], config: dict[str, Any]) -> Quantization | None:
    method = declared.get("quant_method")
    if method == "fp8":
        return Quantization("FP8", _pair(declared.get("weight_block_size")))
    if method == "fbgemm_fp8":
        return Quantization("FP8")
    if method != "compressed-tensors" or declared.get("format") not in _COMPRESSED_FP8:
        return None
    weights = [group["weights"] for group in declared["config_groups"].values()]
    for w in weights:
        known = w["strategy"] in ("tensor", "channel", "block") and bool(w.get("symmetric", True))
        if w["type"] != "float" or w["num_bits"] != 8 or not known:
            return None
    blocks = {_pair(w.get("block_structure")) for w in weights}
    return Quantization("FP8", blocks.pop()) if len(blocks) == 1 else None


def _pair(block: Any) -> tuple[int, int] | None:
    """Returns [128, 128] or "128x128" as numbers, and None as None. Raises ValueError for anything else."""
    if block is None:
        return None
    rows, columns = (int(n) for n in (block.split("x") if isinstance(block, str) else block))
    if rows < 1 or columns < 1:
        raise ValueError(block)
    return rows, columns


def _join_fp8(index: CheckpointIndex, quantization: Quantization, families: Sequence[FusedExperts]) -> CheckpointIndex:
    entries, scales = {}, set()
    for name, entry in index.entries.items():
        if entry.dtype not in _FP8_DTYPES:
            continue
        scale = next((index.entries[name + s] for s in _FP8_SCALES if name + s in index.entries), None)
        if scale is None:
            raise CheckpointError(
                f"{entry.file}: FP8 tensor {name} has no {name}{_FP8_SCALES[0]} or {name}{_FP8_SCALES[1]}"
            )
        packing = Packing("FP8", entry.dtype, (scale,), _fp8_block(entry, scale, quantization.block))
        entries[name] = replace(entry, dtype=quantization.dtype, packing=packing)
        scales.add(scale.name)
    left_out = []
    for name, entry in index.entries.items():
        if name in entries or name in scales:
            continue
        last = name.rpartition(".")[2]
        if last in _ACTIVATION_SCALES:
            left_out.append(name)
        elif last in _WEIGHT_SCALES:
            raise CheckpointError(f"{entry.file}: {name} scales no FP8 tensor of the checkpoint; download it again")
        else:
            entries[name] = entry
    ordered = {name: entries[name] for name in index.entries if name in entries}
    return CheckpointIndex(index.folder, ordered, tuple(left_out))


def _fp8_block(entry: TensorEntry, scale: TensorEntry, declared: tuple[int, int] | None) -> tuple[int, int]:
    """Returns the rows and columns of a weight (..., O, I) that share a scale. Raises CheckpointError if they do not fit."""
    if len(entry.shape) >= 2:
        *leading, rows, columns = entry.shape
        if prod(scale.shape) == 1:
            return max(rows, 1), max(columns, 1)
        if declared and list(scale.shape) == [*leading, -(-rows // declared[0]), -(-columns // declared[1])]:
            return declared
        if not declared and list(scale.shape) in ([*leading, rows, 1], [*leading, rows]):
            return 1, max(columns, 1)
    blocks = f"blocks of {declared[0]}×{declared[1]}" if declared else "one scale per tensor or row"
    raise CheckpointError(
        f"{entry.file}: {scale.name} has shape {scale.shape}, which does not fit {entry.name} of shape {entry.shape} with"
        f" {blocks} (quantization_config of config.json)"
    )


def _fp8_tensor(entry: TensorEntry, values: Tensor, parts: list[Tensor]) -> Tensor:
    assert entry.packing is not None
    return dequantize_fp8(values, parts[0], entry.packing.block, entry.torch_dtype)


# --- MXFP4 ---


def dequantize_mxfp4(stored: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the values (32·n,) in `dtype`.

    Args:
        stored: (16·n,) uint8, two values in each.
        scales: (n,) uint8, exponents.
        dtype: of the result.
    """
    values = torch.tensor([*_MXFP4_MAGNITUDES, *(-m for m in _MXFP4_MAGNITUDES)], device=stored.device)
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], 1)  # (256, 2): lower half first
    result = torch.empty(2 * stored.numel(), dtype=dtype, device=stored.device)
    step = _STRIP_ELEMENTS // (MXFP4_BLOCK // 2)
    for start in range(0, scales.numel(), step):
        exponents = scales[start : start + step].int()
        bits = torch.where(exponents == 0, 1 << 22, exponents << 23)  # of a float32; 2^(−127) is subnormal there
        factors = torch.where(exponents == 255, torch.nan, bits.view(torch.float32)).unsqueeze(1)
        strip = stored[start * MXFP4_BLOCK // 2 : (start + step) * MXFP4_BLOCK // 2]
        wide = pairs.index_select(0, strip.int()).view(-1, MXFP4_BLOCK)  # (blocks, 32)
        result[start * MXFP4_BLOCK : (start + step) * MXFP4_BLOCK] = wide.mul_(factors).flatten()
    return result


def _declared_mxfp4(declared: dict[str, Any], config: dict[str, Any]) -> Quantization | None:
    is_known = declared.get("quant_method") == "mxfp4" and fused_experts(config.get("model_type"))
    return Quantization("MXFP4") if is_known else None


def _join_mxfp4(
    index: CheckpointIndex, quantization: Quantization, families: Sequence[FusedExperts]
) -> CheckpointIndex:
    """Returns the index with experts' blocks (E, R, I / 32, 16) and scales (E, R, I / 32) as the linears of every expert."""
    entries: dict[str, TensorEntry] = {}
    for name, entry in index.entries.items():
        stored = next((name.removesuffix(e) for e in (_MXFP4_VALUES, _MXFP4_SCALES) if name.endswith(e)), None)
        fused = next((f for f in families if stored and f.leaf(stored) == "weight"), None)
        if stored is None or fused is None:
            entries[name] = entry
            continue
        missing = next((stored + e for e in (_MXFP4_VALUES, _MXFP4_SCALES) if stored + e not in index.entries), None)
        if missing:
            raise CheckpointError(f"{entry.file}: {name} is there, but not {missing}; download the checkpoint again")
        if name.endswith(_MXFP4_VALUES):
            values = _mxfp4_entry(stored, entry, index.entries[stored + _MXFP4_SCALES], quantization.dtype)
            rows = replace(fused, layout=replace(fused.layout, transposed=False))  # rows of blocks, never transposed
            entries.update(expert_entries(values, rows))
    return replace(index, entries=entries)


def _mxfp4_entry(name: str, blocks: TensorEntry, scales: TensorEntry, dtype: str) -> TensorEntry:
    """Returns the entry (E, R, I) of blocks (E, R, I / 32, 16) and scales (E, R, I / 32), both uint8."""
    are_bytes = blocks.dtype == scales.dtype == "U8"
    if not are_bytes or (*scales.shape, MXFP4_BLOCK // 2) != blocks.shape or len(blocks.shape) != 4:
        raise CheckpointError(
            f"{blocks.file}: {blocks.name} is {blocks.dtype} of shape {blocks.shape} and {scales.name} {scales.dtype} of shape"
            f" {scales.shape}; expected uint8 of (E, R, I / 32, 16) and (E, R, I / 32)"
        )
    shape = (*blocks.shape[:2], blocks.shape[2] * MXFP4_BLOCK)
    packing = Packing("MXFP4", "MXFP4", (scales,), (1, MXFP4_BLOCK))
    return TensorEntry(name, blocks.file, dtype, shape, blocks.start, blocks.stop, None, packing)


def _mxfp4_tensor(entry: TensorEntry, values: Tensor, parts: list[Tensor]) -> Tensor:
    return dequantize_mxfp4(values, parts[0].flatten(), entry.torch_dtype).reshape(entry.shape)


FORMATS = {
    "FP8": SourceFormat(_declared_fp8, _join_fp8, _fp8_tensor),
    "MXFP4": SourceFormat(_declared_mxfp4, _join_mxfp4, _mxfp4_tensor),
}
