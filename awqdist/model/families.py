"""Lists the architectures that are known by name: what smooths what in each, and which linears stay as they are.

Patterns end in `$` and name the last part of on-disk modules. Under grouped-query attention v -> o is smoothed with one scale per key/value
channel. A mapping that the structure of a layer contradicts is skipped with its reason.

To add a family, add a line to FAMILIES; an architecture that is not here is mapped from its structure (`infer_mappings`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from awqdist.recipe import MappingPattern

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models whose layers have the same mappings."""

    name: str
    architectures: tuple[str, ...]  # class names, as in config.json's `architectures`
    mappings: tuple[MappingPattern, ...]  # what smooths what, in the order in which they are tried
    notes: str  # which linears are not smoothed or not quantized, and why
    full_precision: tuple[str, ...]  # linears that stay so unless a recipe's targets name them
    tested: tuple[str, ...]  # the tiny checkpoints of these classes that the tests quantize


def _family(
    name: str, architectures: str, mappings: tuple[MappingPattern, ...], tested: str, notes: str = "", *precise: str
) -> Family:
    return Family(name, tuple(architectures.split()), mappings, notes, precise, tuple(tested.split()))


def _mapping(smooth: str, *balance: str) -> MappingPattern:
    return MappingPattern(f"re:.*{smooth}$", tuple(f"re:.*{name}$" for name in balance))


_QKV = ("q_proj", "k_proj", "v_proj")
_NORM_TO_QKV = _mapping("input_layernorm", *_QKV)
_NORM_TO_GATE_UP = _mapping("post_attention_layernorm", "gate_proj", "up_proj")
_VALUE_TO_OUTPUT = _mapping("v_proj", "o_proj")
_FC1_TO_FC2 = _mapping("fc1", "fc2")  # ReLU passes positive scales
_TAIL = (_VALUE_TO_OUTPUT, _mapping("up_proj", "down_proj"))
_FUSED_MLP = (_mapping("post_attention_layernorm", "gate_up_proj"), _mapping("gate_up_proj", "down_proj"))

LLAMA = (_NORM_TO_QKV, _NORM_TO_GATE_UP, *_TAIL)
GEMMA2 = (_NORM_TO_QKV, _mapping("pre_feedforward_layernorm", "gate_proj", "up_proj"), *_TAIL)
POST_NORM = _TAIL  # Olmo2 and its kin normalise outputs: nothing in front of the projections can be divided
COHERE = (_mapping("input_layernorm", *_QKV, "gate_proj", "up_proj"), *_TAIL)
PHI3 = (_mapping("input_layernorm", "qkv_proj"), _mapping("qkv_proj", "o_proj"), *_FUSED_MLP)
GLM = (_NORM_TO_QKV, _VALUE_TO_OUTPUT, *_FUSED_MLP)
STARCODER2 = (_NORM_TO_QKV, _VALUE_TO_OUTPUT, _mapping("post_attention_layernorm", "c_fc"))
OPT = (
    _mapping("self_attn_layer_norm", *_QKV),
    _mapping("v_proj", "out_proj"),
    _mapping("final_layer_norm", "fc1"),
    _FC1_TO_FC2,
)
GPT_NEOX = (
    _mapping("input_layernorm", "query_key_value"),  # v -> dense: the fused rows are interleaved by head, left alone
    _mapping("post_attention_layernorm", "dense_h_to_4h"),
)

# A mapping's whole site is compensated whatever it lists: routers, shared experts and their gates among it. `up_proj -> down_proj`
# pairs each expert's own; a layer without experts takes the same patterns.
DEEPSEEK = (
    _mapping("input_layernorm", "q_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    _mapping("q_a_layernorm", "q_b_proj"),
    _mapping("kv_a_layernorm", "kv_b_proj"),
    _mapping("kv_b_proj", "o_proj"),
    _NORM_TO_GATE_UP,
    _TAIL[1],
)
MIXTRAL = (_NORM_TO_QKV, _mapping("post_attention_layernorm", "w1", "w3"), _VALUE_TO_OUTPUT, _mapping("w3", "w2"))
AFMOE = (
    _mapping("input_layernorm", *_QKV, r"self_attn\.gate_proj"),
    _mapping("pre_mlp_layernorm", r"mlp\..*gate_proj", r"mlp\..*up_proj"),
    *_TAIL,
)
GRANITE_MOE = (*MIXTRAL, _mapping("input_linear", "output_linear"))  # the latter two of a shared expert
GPT_OSS = (_NORM_TO_QKV, _NORM_TO_GATE_UP, _VALUE_TO_OUTPUT)
QWEN_HYBRID = (
    _mapping("input_layernorm", *_QKV, "in_proj_qkvz", "in_proj_qkv"),
    _mapping(r"linear_attn\.norm", "out_proj"),
    _NORM_TO_GATE_UP,
    *_TAIL,
)
LFM2 = (
    _mapping("operator_norm", *_QKV, "in_proj"),
    _mapping("in_proj", "out_proj"),
    _mapping("v_proj", "out_proj"),
    _mapping("ffn_norm", "w1", "w3"),
    _mapping("w3", "w2"),
)
JAMBA = (_mapping("input_layernorm", *_QKV, "in_proj"), _mapping("pre_ff_layernorm", "gate_proj", "up_proj"), *_TAIL)
NEMOTRON_H = (
    _mapping(r"layers\.\d+\.norm", *_QKV, "in_proj", "up_proj"),
    _mapping(r"mixer\.norm", "out_proj"),
    *_TAIL,
)

_VISION = "vision tower: text is what it is calibrated on"
_ROUTERS = "routers: they decide on experts"
_GATES = "routers, gates of shared experts"
_DECAYS = "the small linears of decays and write strengths, whose errors add up in the state, stay in full precision"
_POST_NORMS = "qkv, gate and up are not smoothed: norms follow the blocks"
_FUSED_BY_HEAD = (
    "dense and dense_4h_to_h are not smoothed: fused rows lie interleaved, GELU is no multiple of its input"
)
_GELU = "c_proj is not smoothed: GELU is no multiple of its input"
_PREDICTION = f"{_ROUTERS}; layers for multi-token prediction are copied"
_INDEXERS = f"{_ROUTERS}; indexers: they decide on the tokens that are attended to"
_MAMBA = f"{_ROUTERS}; Mamba's linears stay in full precision, as vLLM reads them"
_CLAMPED = "down_proj is not smoothed: what it reads is (up + 1) · gate · σ(1.702 · gate), with up clamped"

FAMILIES = (
    _family("Llama", "LlamaForCausalLM", LLAMA, "llama llama-mha"),
    _family("Mistral", "MistralForCausalLM", LLAMA, "mistral"),
    _family("Mistral 3", "Mistral3ForConditionalGeneration", LLAMA, "mistral3", _VISION),
    _family("Qwen2", "Qwen2ForCausalLM", LLAMA, "qwen2"),
    _family("Qwen3", "Qwen3ForCausalLM", LLAMA, "qwen3"),
    _family(
        "Qwen2-VL, Qwen2.5-VL",
        "Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration",
        LLAMA,
        "qwen2-vl qwen2.5-vl",
        _VISION,
    ),
    _family("Qwen3-VL", "Qwen3VLForConditionalGeneration", LLAMA, "qwen3-vl", _VISION),
    _family("Granite", "GraniteForCausalLM", LLAMA, "granite"),
    _family("Seed-OSS", "SeedOssForCausalLM", LLAMA, "seed-oss"),
    _family("SmolLM3", "SmolLM3ForCausalLM", LLAMA, "smollm3"),
    _family("OLMo", "OlmoForCausalLM", LLAMA, "olmo"),
    _family("OLMo 2, 3", "Olmo2ForCausalLM Olmo3ForCausalLM", POST_NORM, "olmo2 olmo3", _POST_NORMS),
    _family("Exaone 4", "Exaone4ForCausalLM", POST_NORM, "exaone4", _POST_NORMS),
    _family("Phi-3", "Phi3ForCausalLM", PHI3, "phi3"),
    _family("Gemma", "GemmaForCausalLM", LLAMA, "gemma"),
    _family("Gemma 2", "Gemma2ForCausalLM", GEMMA2, "gemma2"),
    _family("Gemma 3", "Gemma3ForCausalLM Gemma3ForConditionalGeneration", GEMMA2, "gemma3 gemma3-vision", _VISION),
    _family("Cohere", "CohereForCausalLM Cohere2ForCausalLM", COHERE, "cohere cohere2"),
    _family("StarCoder2", "Starcoder2ForCausalLM", STARCODER2, "starcoder2", _GELU),
    _family("GLM-4", "GlmForCausalLM Glm4ForCausalLM", GLM, "glm glm4"),
    _family("OPT", "OPTForCausalLM", OPT, "opt", "fc2 is not smoothed where the activation is not ReLU"),
    _family("GPT-NeoX", "GPTNeoXForCausalLM", GPT_NEOX, "gpt-neox", _FUSED_BY_HEAD),
    _family("Mixtral", "MixtralForCausalLM", MIXTRAL, "mixtral", _ROUTERS),
    _family("Qwen2-MoE", "Qwen2MoeForCausalLM", LLAMA, "qwen2-moe", _GATES),
    _family("Qwen3-MoE", "Qwen3MoeForCausalLM", LLAMA, "qwen3-moe", _ROUTERS),
    _family("OLMoE", "OlmoeForCausalLM", LLAMA, "olmoe", _ROUTERS),
    _family("GLM-4.5", "Glm4MoeForCausalLM", LLAMA, "glm4-moe", _ROUTERS),
    _family("GLM-4.7-Flash", "Glm4MoeLiteForCausalLM", DEEPSEEK, "glm4.7-flash", _ROUTERS),
    _family("DeepSeek-V2", "DeepseekV2ForCausalLM", DEEPSEEK, "deepseek-v2", _ROUTERS),
    _family(
        "DeepSeek-V3, R1, Kimi-K2",
        "DeepseekV3ForCausalLM",
        DEEPSEEK,
        "deepseek-v3 kimi-k2 deepseek-v3-no-q-lora",
        _PREDICTION,
    ),
    _family(
        "GLM-5, DeepSeek-V3.2",
        "GlmMoeDsaForCausalLM DeepseekV32ForCausalLM",
        DEEPSEEK,
        "glm5",
        _INDEXERS,
        r"re:.*\.indexer\.",
    ),
    _family(
        "Qwen3-Next", "Qwen3NextForCausalLM", QWEN_HYBRID, "qwen3-next", f"{_GATES}; {_DECAYS}", "re:.*in_proj_ba$"
    ),
    _family(
        "Qwen3.5",
        "Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration",
        QWEN_HYBRID,
        "qwen3.5",
        f"{_VISION}; {_DECAYS}",
        "re:.*in_proj_[ab]$",
    ),
    _family(
        "Qwen3.5-MoE",
        "Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration",
        QWEN_HYBRID,
        "qwen3.5-moe",
        f"{_VISION}; {_GATES}; {_DECAYS}",
        "re:.*in_proj_[ab]$",
    ),
    _family("LFM2", "Lfm2ForCausalLM", LFM2, "lfm2"),
    _family("LFM2-MoE", "Lfm2MoeForCausalLM", LFM2, "lfm2-moe", _ROUTERS),
    _family("Jamba", "JambaForCausalLM", JAMBA, "jamba", _MAMBA, r"re:.*\.mamba\."),
    _family("Nemotron-H", "NemotronHForCausalLM", NEMOTRON_H, "nemotron-h nemotron-h-moe", _ROUTERS),
    _family("PhiMoE", "PhimoeForCausalLM", MIXTRAL, "phimoe", _ROUTERS),
    _family("MiniMax-M2", "MiniMaxM2ForCausalLM", MIXTRAL, "minimax-m2", _ROUTERS),
    _family("Ernie 4.5 MoE", "Ernie4_5_MoeForCausalLM", LLAMA, "ernie4.5-moe", _ROUTERS),
    _family("HunYuan MoE", "HunYuanMoEV1ForCausalLM", LLAMA, "hunyuan-moe", _ROUTERS),
    _family(
        "GraniteMoE",
        "GraniteMoeForCausalLM GraniteMoeSharedForCausalLM",
        GRANITE_MOE,
        "granitemoe granitemoe-shared",
        _ROUTERS,
    ),
    _family(
        "Llama 4",
        "Llama4ForCausalLM Llama4ForConditionalGeneration",
        LLAMA,
        "llama4 llama4-vision",
        f"{_ROUTERS}; {_VISION}",
    ),
    _family("gpt-oss", "GptOssForCausalLM", GPT_OSS, "gpt-oss", f"{_ROUTERS}; {_CLAMPED}"),
    _family("Qwen3-VL-MoE", "Qwen3VLMoeForConditionalGeneration", LLAMA, "qwen3-vl-moe", f"{_ROUTERS}; {_VISION}"),
    _family("AFMoE", "AfmoeForCausalLM", AFMOE, "afmoe", _ROUTERS),
)

_MAPPINGS = {architecture: family.mappings for family in FAMILIES for architecture in family.architectures}


def register_mappings(architecture: str, mappings: Sequence[MappingPattern]) -> None:
    """Adds or replaces the mappings of an architecture (a class name, as in config.json's `architectures`)."""
    _MAPPINGS[architecture] = tuple(mappings)


def registered_mappings(architecture: str, config: PretrainedConfig) -> tuple[MappingPattern, ...] | None:
    """Returns the mappings of an architecture under its text configuration, or None if it is not known."""
    mappings = _MAPPINGS.get(architecture)
    if mappings is OPT and config.activation_function != "relu":  # Galactica has GELU, no multiple of its input
        return tuple(mapping for mapping in mappings if mapping != _FC1_TO_FC2)
    return mappings


def full_precision_linears(architecture: str) -> tuple[str, ...]:
    """Returns patterns of linears that stay in full precision unless a recipe's targets name them."""
    return next((family.full_precision for family in FAMILIES if architecture in family.architectures), ())
