"""Builds a model without its weights: a transformers model on the meta device, and the names of its parts on disk.

The skeleton is never filled and never modified: layers run through `torch.func.functional_call` with parameters handed in. Buffers
(rotary frequencies, embedding multipliers) are computed for real, since no checkpoint holds them.

Names in the model are *unfused* wherever tensors are meant: experts have a name each, as on disk (`names.py`). No code from a model's
folder is ever run; model types that are another's under a new name are read as what they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from awqdist.errors import CheckpointError, ModelError, first_line
from awqdist.model.experts import FusedParameter
from awqdist.model.names import float32_names, match_names

_SAME_AS = {"kimi_k2": "deepseek_v3"}  # Moonshot: its own type only marks weights of other shapes


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device, and where its parts are on disk."""

    model: PreTrainedModel
    decoder: nn.Module  # the model's text stack
    layers: nn.ModuleList
    prefix: str  # the name of `layers` in `model`
    on_disk: dict[str, str]  # parameter or buffer by its unfused name in `model` -> name on disk
    unknown: tuple[str, ...]  # on-disk names that `model` does not have
    fused: tuple[FusedParameter, ...]  # the experts of all layers, by names in `model`
    float32: frozenset[str]  # what is computed in float32 whatever the dtype, by names in `model`

    @property
    def architecture(self) -> str:
        """Returns the class name of the model."""
        return type(self.model).__name__

    @property
    def num_layers(self) -> int:
        """Returns the number of decoder layers."""
        return len(self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype that the model computes in."""
        return self.model.dtype

    def layer_names(self, layer: int) -> dict[str, str]:
        """Returns the map of parameter name within decoder layer `layer` -> on-disk name."""
        start = f"{self.prefix}.{layer}."
        return {name.removeprefix(start): disk for name, disk in self.on_disk.items() if name.startswith(start)}

    def layer_experts(self, layer: int) -> tuple[FusedParameter, ...]:
        """Returns the fused parameters of decoder layer `layer`, by names within it."""
        start = f"{self.prefix}.{layer}."
        return tuple(fused.within(start) for fused in self.fused if fused.name.startswith(start))

    def layer_float32(self, layer: int) -> frozenset[str]:
        """Returns the names within decoder layer `layer` of what is computed in float32 whatever the dtype."""
        start = f"{self.prefix}.{layer}."
        return frozenset(name.removeprefix(start) for name in self.float32 if name.startswith(start))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of all parameters and buffers that a checkpoint may hold, by their unfused names."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        return shapes | {name: shape for fused in self.fused for name, shape in fused.shapes().items()}

    def outside_names(self) -> dict[str, str]:
        """Returns the map of parameter name within the decoder -> on-disk name, for what is in no decoder layer."""
        start = self.prefix.rpartition(".")[0]
        start = f"{start}." if start else ""
        return {
            name.removeprefix(start): disk
            for name, disk in self.on_disk.items()
            if name.startswith(start) and not name.startswith(f"{self.prefix}.")
        }

    @property
    def head_weight(self) -> str:
        """Returns the name of the weight that logits are made with, tied or not; "" where there is none."""
        head = self.model.get_output_embeddings()
        return next((f"{name}.weight" for name, module in self.model.named_modules() if module is head), "")

    def linears(self) -> dict[str, tuple[int, int]]:
        """Returns the shapes (O, I) of all linears of the model, by their names in it."""
        return {
            name: (module.out_features, module.in_features)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        }

    def disk_module(self, name: str) -> str:
        """Returns the on-disk name of a module with a weight; its own name where the weight is tied to another."""
        return self.on_disk.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")


def load_config(model: str | Path, **options: Any) -> PretrainedConfig:
    """Returns the configuration of a folder or hub id. Raises what transformers raises: OSError, ValueError and others."""
    config: PretrainedConfig = _renamed(model, **options) or AutoConfig.from_pretrained(
        model, trust_remote_code=False, **options
    )
    return config


def load_tokenizer(model: str | Path) -> Any:
    """Returns the tokenizer of a folder or hub id. Raises CheckpointError if there is none that loads."""
    try:
        try:
            config = _renamed(model)
        except OSError:  # tokenizers need no config.json
            config = None
        return AutoTokenizer.from_pretrained(model, config=config, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a missing or broken tokenizer
        raise CheckpointError(
            f"no tokenizer can be loaded from {model} ({first_line(error)}); put its files next to the model"
        ) from None


def _renamed(model: str | Path, **options: Any) -> PretrainedConfig | None:
    """Returns the configuration of a model type that is another's under a new name; None for all other types."""
    fields, _ = PretrainedConfig.get_config_dict(model, **options)
    kind = fields.get("model_type")
    if kind not in _SAME_AS or kind in CONFIG_MAPPING:
        return None
    fields = {name: value for name, value in fields.items() if name != "auto_map"}
    config: PretrainedConfig = CONFIG_MAPPING[_SAME_AS[kind]].from_dict({**fields, "model_type": _SAME_AS[kind]})
    return config


def read_config(place: Path) -> PretrainedConfig:
    """Returns the model's configuration, without what it says of the source's quantization, which the reader undoes.

    Args:
        place: a model's folder, or a config.json.

    Raises:
        CheckpointError: there is no config.json, or transformers does not know it.
    """
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        raise CheckpointError(f"{place} has no config.json; give the folder of a model")
    try:
        config = load_config(file, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a broken or unknown configuration
        raise CheckpointError(f"{file}: transformers cannot read it: {first_line(error)}") from None
    for fields in (config, config.get_text_config(decoder=True)):
        if hasattr(fields, "quantization_config"):
            del fields.quantization_config
    return config


def build_skeleton(config: PretrainedConfig, disk_names: Iterable[str]) -> Skeleton:
    """Builds the meta model of `config` and ties the checkpoint's names to it.

    Raises:
        ModelError: transformers cannot build the model, or its decoder layers cannot be found.
        CheckpointError: the checkpoint lacks a parameter.
    """
    model = build_model(config)
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    found = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if not found:
        raise ModelError(f"{type(model).__name__}: no list of {num_layers} decoder layers found in its text model")
    prefix = next(name for name, module in model.named_modules() if module is found[0])
    decoder = model.get_submodule(prefix.rpartition(".")[0])  # get_decoder() of Llama-4 is the whole model
    on_disk, fused, unknown = match_names(model, disk_names)
    present = on_disk.keys() | {name for parameter in fused for name in parameter.names}
    tied = model.all_tied_weights_keys
    required = (name for name, _ in model.named_parameters(remove_duplicate=False) if name not in tied)
    missing = [name for name in required if name not in present]
    if missing:
        raise CheckpointError(f"the checkpoint lacks the tensor for {missing[0]} ({len(missing)} missing in all)")
    if fused:
        model.set_experts_implementation("eager")  # one product per expert, which `forward.py` can watch
    return Skeleton(model, decoder, found[0], prefix, on_disk, unknown, fused, float32_names(model))


def build_model(config: PretrainedConfig) -> PreTrainedModel:
    """Returns transformers' model of `config` on the meta device, with its buffers computed.

    Raises:
        ModelError: transformers cannot build it.
    """
    names = getattr(config, "architectures", None) or []
    kind: Any = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), AutoModelForCausalLM)
    dtype = getattr(config, "dtype", None) or config.get_text_config(decoder=True).dtype or torch.float32
    build = getattr(kind, "_from_config", None) or kind.from_config
    try:
        with init_empty_weights(include_buffers=False), _ParametersOnMeta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build(config, dtype=dtype).eval()  # type: ignore[no-any-return]
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(
            f"transformers cannot build {', '.join(names) or config.model_type}: {first_line(error)}"
        ) from None


class _ParametersOnMeta(TorchFunctionMode):
    """Makes matrices and 3-D tensors on meta from the start; accelerate moves them later, and 128 experts are 43 GB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.zeros, torch.ones, torch.empty, torch.randn):
            size = args[0] if len(args) == 1 and isinstance(args[0], Sequence) else args
            if len(size) == 3 or (func is torch.empty and len(size) == 2):
                return func(*args, **{**(kwargs or {}), "device": "meta"})
        return func(*args, **(kwargs or {}))
