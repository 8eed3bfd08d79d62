"""Configurations and tokenizers by transformers, without the code that some models bring along.

A few publishers give an architecture that transformers has a model type of their own, and code to go with it. Such types are read as what
they are; no code from a model's folder is ever run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig

_SAME_AS = {"kimi_k2": "deepseek_v3"}  # Moonshot: its own type only marks weights of other shapes


def load_config(model: str | Path, **options: Any) -> PretrainedConfig:
    """The configuration of a folder or hub id. Raises what transformers raises: OSError and ValueError, but others too."""
    config: PretrainedConfig = _renamed(model, **options) or AutoConfig.from_pretrained(
        model, trust_remote_code=False, **options
    )
    return config


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a folder or hub id. Raises what transformers raises."""
    try:
        config = _renamed(model)
    except OSError:  # tokenizers need no config.json
        config = None
    return AutoTokenizer.from_pretrained(model, config=config, trust_remote_code=False)


def _renamed(model: str | Path, **options: Any) -> PretrainedConfig | None:
    """The configuration of a model type that is another's under a new name; None for all other types."""
    fields, _ = PretrainedConfig.get_config_dict(model, **options)
    kind = fields.get("model_type")
    if kind not in _SAME_AS or kind in CONFIG_MAPPING:
        return None
    fields = {name: value for name, value in fields.items() if name != "auto_map"}
    config: PretrainedConfig = CONFIG_MAPPING[_SAME_AS[kind]].from_dict({**fields, "model_type": _SAME_AS[kind]})
    return config
