"""A model's folder as the source of a run, whatever it is stored in: one entry for every tensor of the model, in the model's own dtype.

Formats: safetensors, and torch's pickles. Weights that are quantized to FP8 are one entry together with their scales, and are dequantized
as they are read (see dequantize.py). Which tensors those are is told by their dtype and by the names of their scales; how large the
blocks are is told by `quantization_config` in config.json. Experts in MXFP4 are read likewise; any other quantized checkpoint is refused.
Where a tensor holds all experts of a block, the entries are the linears of each (see experts.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awqdist.checkpoint.dequantize import block_of
from awqdist.checkpoint.experts import join_mxfp4, split_experts
from awqdist.checkpoint.index import INDEX_FILE, SINGLE_FILE, CheckpointIndex, Packing, TensorEntry, read_index
from awqdist.checkpoint.pickled import holds_pickles, read_pickled_index
from awqdist.errors import CheckpointError
from awqdist.layouts import fused_experts
from awqdist.recipe import matches

_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")  # behind the weight's name
_OF_WEIGHTS = ("weight_scale_inv", "weight_scale")
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "output_scale", "q_scale", "k_scale", "v_scale", "kv_scale")
_COMPRESSED_FORMATS = ("float-quantized", "naive-quantized")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def read_source(folder: Path) -> CheckpointIndex:
    """Index of the model in `folder`, by headers only. Raises CheckpointError for whatever cannot be read."""
    index = _stored(folder)
    config = _config(folder)
    experts = fused_experts(config.get("model_type"))
    quantization = _first(config, "quantization_config") or _first(config, "compression_config")
    dtype = str(_first(config, "dtype") or _first(config, "torch_dtype")).removeprefix("torch.")
    if not quantization:
        _check_no_scales(index)
    elif experts and _method(quantization) == "mxfp4":
        index = join_mxfp4(index, experts, _DTYPES.get(dtype, "BF16"))
    else:
        index = _dequantized(index, _declared_block(folder, quantization), _DTYPES.get(dtype, "BF16"))
    return split_experts(index, experts)


def _stored(folder: Path) -> CheckpointIndex:
    """The tensors of the folder as they are stored."""
    has_safetensors = (folder / INDEX_FILE).is_file() or (folder / SINGLE_FILE).is_file()
    pickled = not has_safetensors and holds_pickles(folder)
    return read_pickled_index(folder) if pickled else read_index(folder)


def _config(folder: Path) -> dict[str, Any]:
    """config.json; empty if it cannot be read, which is told by those who need more of it."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _first(config: dict[str, Any], key: str) -> Any:
    """A field of the configuration, or of that of its text model."""
    text = config.get("text_config")
    return config.get(key) or (text.get(key) if isinstance(text, dict) else None)


def _declared_block(folder: Path, quantization: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the checkpoint has blocks. Raises CheckpointError unless it is one of FP8 weights."""
    method = _method(quantization)
    try:
        if method == "fp8":
            return _pair(quantization.get("weight_block_size"))
        if method == "fbgemm_fp8":
            return None
        if method == "compressed-tensors" and quantization.get("format") in _COMPRESSED_FORMATS:
            weights = [group["weights"] for group in quantization["config_groups"].values()]
            if weights and all(w["type"] == "float" and w["num_bits"] == 8 and _is_readable(w) for w in weights):
                (block,) = {_pair(w.get("block_structure")) for w in weights}
                return block
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # not what the format's own writers write
    kind = f"{method} {quantization.get('format', '')}".strip() if method else "an unknown method"
    raise CheckpointError(
        f"{folder} is already quantized, with {kind} (quantization_config of config.json); of quantized sources only those"
        " with FP8 weights, and gpt-oss with experts in MXFP4, can be read; give the original"
    )


def _method(quantization: Any) -> Any:
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def _is_readable(weights: dict[str, Any]) -> bool:
    return weights["strategy"] in ("tensor", "channel", "block") and bool(weights.get("symmetric", True))


def _pair(block: Any) -> tuple[int, int] | None:
    """[128, 128] or "128x128". Raises ValueError for anything else that is not None."""
    if block is None:
        return None
    rows, columns = (int(n) for n in (block.split("x") if isinstance(block, str) else block))
    if rows < 1 or columns < 1:
        raise ValueError(block)
    return rows, columns


def _check_no_scales(index: CheckpointIndex) -> None:
    """Raises CheckpointError for FP8 weights that config.json does not speak of: taken for plain numbers they would be wrong."""
    for entry in index.entries.values():
        if entry.dtype in _FP8:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} is FP8, but config.json has no quantization_config that says how it is"
                " scaled; download config.json again"
            )


def _dequantized(index: CheckpointIndex, declared: tuple[int, int] | None, dtype: str) -> CheckpointIndex:
    """The index with FP8 weights and their scales joined to entries of `dtype`."""
    entries, scales = {}, set()
    for name, entry in index.entries.items():
        if entry.dtype not in _FP8:
            continue
        scale = next((index.entries[name + s] for s in _SCALES if name + s in index.entries), None)
        if scale is None:
            raise CheckpointError(f"{entry.file}: FP8 tensor {name} has no {name}{_SCALES[0]} or {name}{_SCALES[1]}")
        entries[name] = _joined(entry, scale, declared, dtype)
        scales.add(scale.name)
    left_out = []
    for name, entry in index.entries.items():
        if name in entries or name in scales:
            continue
        last = name.rpartition(".")[2]
        if last in _OF_ACTIVATIONS:
            left_out.append(name)
        elif last in _OF_WEIGHTS:
            raise CheckpointError(f"{entry.file}: {name} scales no FP8 tensor of the checkpoint; download it again")
        else:
            entries[name] = entry
    ordered = {name: entries[name] for name in index.entries if name in entries}
    return CheckpointIndex(index.folder, ordered, tuple(left_out))


def _joined(entry: TensorEntry, scale: TensorEntry, declared: tuple[int, int] | None, dtype: str) -> TensorEntry:
    block = block_of(entry.shape, scale.shape, declared)
    if block is None:
        blocks = f"blocks of {declared[0]}×{declared[1]}" if declared else "one scale per tensor or row"
        raise CheckpointError(
            f"{entry.file}: {scale.name} has shape {scale.shape}, which does not fit {entry.name} of shape {entry.shape} with"
            f" {blocks} (quantization_config of config.json)"
        )
    packing = Packing(entry.dtype, scale, block)
    return TensorEntry(entry.name, entry.file, dtype, entry.shape, entry.start, entry.stop, entry.strides, packing)


@dataclass(frozen=True, slots=True)
class Quantization:
    """FP8, or experts in MXFP4, as config.json declares it. block: rows and columns that share a scale, where there are blocks; plain:
    modules that are not quantized, by names or ends of names, or `re:` patterns."""

    block: tuple[int, int] | None
    plain: tuple[str, ...] = ()
    is_mxfp4: bool = False

    def covers(self, module: str) -> bool:
        """Whether the linear `module`, by its on-disk name, is quantized."""
        return not any(
            matches(pattern, module) or module.endswith(f".{pattern}") or module.startswith(f"{pattern}.")
            for pattern in self.plain
        )


def declared_quantization(file: Path) -> Quantization | None:
    """What `file`, a config.json, says of quantized weights; None if they are plain. Raises CheckpointError for what cannot be read."""
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is no readable JSON ({error}); give a model's config.json") from None
    quantization = _first(config, "quantization_config") or _first(config, "compression_config")
    if not quantization:
        return None
    if _method(quantization) == "mxfp4" and fused_experts(config.get("model_type")):
        return Quantization(None, is_mxfp4=True)
    plain = quantization.get("modules_to_not_convert") or quantization.get("ignore") or ()
    return Quantization(_declared_block(file.parent, quantization), tuple(map(str, plain)))


def holds_weights(folder: Path) -> bool:
    """Whether there are any weights in `folder`, whole or not."""
    return (folder / INDEX_FILE).is_file() or any(folder.glob("*.safetensors")) or holds_pickles(folder)
