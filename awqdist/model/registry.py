"""The mappings of each known architecture.

Patterns end in `$` and name the last part of on-disk modules. Under grouped-query attention v -> o is smoothed with one scale per
key/value channel. A mapping that the structure of a layer contradicts is skipped with its reason; an architecture that is not here is
mapped from its structure (`inference.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from awqdist.recipe import MappingPattern

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _mapping(smooth: str, *balance: str) -> MappingPattern:
    return MappingPattern(f"re:.*{smooth}$", tuple(f"re:.*{name}$" for name in balance))


_QKV = ("q_proj", "k_proj", "v_proj")
_VALUE_TO_OUTPUT = _mapping("v_proj", "o_proj")
_UP_TO_DOWN = _mapping("up_proj", "down_proj")
_TAIL = (_VALUE_TO_OUTPUT, _UP_TO_DOWN)

_LLAMA = (_mapping("input_layernorm", *_QKV), _mapping("post_attention_layernorm", "gate_proj", "up_proj"), *_TAIL)
_GEMMA2 = (_mapping("input_layernorm", *_QKV), _mapping("pre_feedforward_layernorm", "gate_proj", "up_proj"), *_TAIL)
_POST_NORM = _TAIL  # Olmo2 and its kin normalise outputs: nothing in front of the projections can be divided
_COHERE = (_mapping("input_layernorm", *_QKV, "gate_proj", "up_proj"), *_TAIL)
_PHI3 = (
    _mapping("input_layernorm", "qkv_proj"),
    _mapping("qkv_proj", "o_proj"),
    _mapping("post_attention_layernorm", "gate_up_proj"),
    _mapping("gate_up_proj", "down_proj"),
)
_GLM = (
    _mapping("input_layernorm", *_QKV),
    _VALUE_TO_OUTPUT,
    _mapping("post_attention_layernorm", "gate_up_proj"),
    _mapping("gate_up_proj", "down_proj"),
)
_STARCODER2 = (_mapping("input_layernorm", *_QKV), _VALUE_TO_OUTPUT, _mapping("post_attention_layernorm", "c_fc"))
_FC1_TO_FC2 = _mapping("fc1", "fc2")  # ReLU passes positive scales
_OPT = (
    _mapping("self_attn_layer_norm", *_QKV),
    _mapping("v_proj", "out_proj"),
    _mapping("final_layer_norm", "fc1"),
    _FC1_TO_FC2,
)
_GPT_NEOX = (
    _mapping("input_layernorm", "query_key_value"),  # v -> dense: the fused rows are interleaved by head, left alone
    _mapping("post_attention_layernorm", "dense_h_to_4h"),
)

# A mapping's whole site is compensated whatever it lists: routers, shared experts and their gates among it. `up_proj -> down_proj`
# pairs each expert's own; a layer without experts takes the same patterns.
_DEEPSEEK = (
    _mapping("input_layernorm", "q_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    _mapping("q_a_layernorm", "q_b_proj"),
    _mapping("kv_a_layernorm", "kv_b_proj"),
    _mapping("kv_b_proj", "o_proj"),
    _mapping("post_attention_layernorm", "gate_proj", "up_proj"),
    _UP_TO_DOWN,
)
_MIXTRAL = (
    _mapping("input_layernorm", *_QKV),
    _mapping("post_attention_layernorm", "w1", "w3"),
    _VALUE_TO_OUTPUT,
    _mapping("w3", "w2"),
)
_AFMOE = (
    _mapping("input_layernorm", *_QKV, r"self_attn\.gate_proj"),
    _mapping("pre_mlp_layernorm", r"mlp\..*gate_proj", r"mlp\..*up_proj"),
    _VALUE_TO_OUTPUT,
    _UP_TO_DOWN,
)

_REGISTRY: dict[str, tuple[MappingPattern, ...]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Mistral3ForConditionalGeneration": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GraniteForCausalLM": _LLAMA,
    "SeedOssForCausalLM": _LLAMA,
    "SmolLM3ForCausalLM": _LLAMA,
    "OlmoForCausalLM": _LLAMA,
    "Olmo2ForCausalLM": _POST_NORM,
    "Olmo3ForCausalLM": _POST_NORM,
    "Exaone4ForCausalLM": _POST_NORM,
    "Phi3ForCausalLM": _PHI3,
    "GemmaForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA2,
    "Gemma3ForConditionalGeneration": _GEMMA2,
    "CohereForCausalLM": _COHERE,
    "Cohere2ForCausalLM": _COHERE,
    "Starcoder2ForCausalLM": _STARCODER2,
    "GlmForCausalLM": _GLM,
    "Glm4ForCausalLM": _GLM,
    "OPTForCausalLM": _OPT,
    "GPTNeoXForCausalLM": _GPT_NEOX,
    "MixtralForCausalLM": _MIXTRAL,
    "Qwen2MoeForCausalLM": _LLAMA,
    "Qwen3MoeForCausalLM": _LLAMA,
    "OlmoeForCausalLM": _LLAMA,
    "Glm4MoeForCausalLM": _LLAMA,
    "DeepseekV2ForCausalLM": _DEEPSEEK,
    "DeepseekV3ForCausalLM": _DEEPSEEK,
    "Glm4MoeLiteForCausalLM": _DEEPSEEK,
    "PhimoeForCausalLM": _MIXTRAL,
    "MiniMaxM2ForCausalLM": _MIXTRAL,
    "Ernie4_5_MoeForCausalLM": _LLAMA,
    "HunYuanMoEV1ForCausalLM": _LLAMA,
    "AfmoeForCausalLM": _AFMOE,
}


def register_mappings(architecture: str, mappings: Sequence[MappingPattern]) -> None:
    """Adds or replaces the mappings of an architecture (a class name, as in config.json's `architectures`)."""
    _REGISTRY[architecture] = tuple(mappings)


def registered_mappings(architecture: str, config: PretrainedConfig) -> tuple[MappingPattern, ...] | None:
    """The mappings of an architecture under its text configuration, or None if it is not known."""
    mappings = _REGISTRY.get(architecture)
    if (
        mappings is _OPT and config.activation_function != "relu"
    ):  # Galactica has GELU, which is no multiple of its input
        return tuple(mapping for mapping in mappings if mapping != _FC1_TO_FC2)
    return mappings


def registered_architectures() -> tuple[str, ...]:
    return tuple(_REGISTRY)
