"""Lists the architectures that are known by name: what smooths what in each, and which linears stay as they are.

Patterns end in `$` and name the last part of on-disk modules. Under grouped-query attention v -> o is smoothed with one scale per key/value
channel. A mapping that the structure of a layer contradicts is skipped with its reason.

To add a family, add a line to FAMILIES; an architecture that is not here is mapped from its structure (`inference.py`).
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
    notes: str = ""  # which linears are not smoothed or not quantized, and why
    full_precision: tuple[str, ...] = ()  # linears that stay so unless a recipe's targets name them
    tested: tuple[str, ...] = ()  # the tiny checkpoints of these classes that the tests quantize


def _mapping(smooth: str, *balance: str) -> MappingPattern:
    return MappingPattern(f"re:.*{smooth}$", tuple(f"re:.*{name}$" for name in balance))


_QKV = ("q_proj", "k_proj", "v_proj")
_VALUE_TO_OUTPUT = _mapping("v_proj", "o_proj")
_UP_TO_DOWN = _mapping("up_proj", "down_proj")
_TAIL = (_VALUE_TO_OUTPUT, _UP_TO_DOWN)

LLAMA = (_mapping("input_layernorm", *_QKV), _mapping("post_attention_layernorm", "gate_proj", "up_proj"), *_TAIL)
GEMMA2 = (_mapping("input_layernorm", *_QKV), _mapping("pre_feedforward_layernorm", "gate_proj", "up_proj"), *_TAIL)
POST_NORM = _TAIL  # Olmo2 and its kin normalise outputs: nothing in front of the projections can be divided
COHERE = (_mapping("input_layernorm", *_QKV, "gate_proj", "up_proj"), *_TAIL)
PHI3 = (
    _mapping("input_layernorm", "qkv_proj"),
    _mapping("qkv_proj", "o_proj"),
    _mapping("post_attention_layernorm", "gate_up_proj"),
    _mapping("gate_up_proj", "down_proj"),
)
GLM = (
    _mapping("input_layernorm", *_QKV),
    _VALUE_TO_OUTPUT,
    _mapping("post_attention_layernorm", "gate_up_proj"),
    _mapping("gate_up_proj", "down_proj"),
)
STARCODER2 = (_mapping("input_layernorm", *_QKV), _VALUE_TO_OUTPUT, _mapping("post_attention_layernorm", "c_fc"))
_FC1_TO_FC2 = _mapping("fc1", "fc2")  # ReLU passes positive scales
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
    _mapping("post_attention_layernorm", "gate_proj", "up_proj"),
    _UP_TO_DOWN,
)
MIXTRAL = (
    _mapping("input_layernorm", *_QKV),
    _mapping("post_attention_layernorm", "w1", "w3"),
    _VALUE_TO_OUTPUT,
    _mapping("w3", "w2"),
)
AFMOE = (
    _mapping("input_layernorm", *_QKV, r"self_attn\.gate_proj"),
    _mapping("pre_mlp_layernorm", r"mlp\..*gate_proj", r"mlp\..*up_proj"),
    _VALUE_TO_OUTPUT,
    _UP_TO_DOWN,
)
GRANITE_MOE = (*MIXTRAL, _mapping("input_linear", "output_linear"))  # the latter two of a shared expert
GPT_OSS = (*LLAMA[:2], _VALUE_TO_OUTPUT)

QWEN_HYBRID = (
    _mapping("input_layernorm", *_QKV, "in_proj_qkvz", "in_proj_qkv"),
    _mapping(r"linear_attn\.norm", "out_proj"),
    _mapping("post_attention_layernorm", "gate_proj", "up_proj"),
    *_TAIL,
)
LFM2 = (
    _mapping("operator_norm", *_QKV, "in_proj"),
    _mapping("in_proj", "out_proj"),
    _mapping("v_proj", "out_proj"),
    _mapping("ffn_norm", "w1", "w3"),
    _mapping("w3", "w2"),
)
JAMBA = (
    _mapping("input_layernorm", *_QKV, "in_proj"),
    _mapping("pre_ff_layernorm", "gate_proj", "up_proj"),
    *_TAIL,
)
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
_CLAMPED = "down_proj is not smoothed: what it reads is (up + 1) · gate · σ(1.702 · gate), with up clamped"

FAMILIES = (
    Family("Llama", ("LlamaForCausalLM",), LLAMA, tested=("llama", "llama-mha")),
    Family("Mistral", ("MistralForCausalLM",), LLAMA, tested=("mistral",)),
    Family("Mistral 3", ("Mistral3ForConditionalGeneration",), LLAMA, _VISION, tested=("mistral3",)),
    Family("Qwen2", ("Qwen2ForCausalLM",), LLAMA, tested=("qwen2",)),
    Family("Qwen3", ("Qwen3ForCausalLM",), LLAMA, tested=("qwen3",)),
    Family(
        "Qwen2-VL, Qwen2.5-VL",
        ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
        LLAMA,
        _VISION,
        tested=("qwen2-vl", "qwen2.5-vl"),
    ),
    Family("Qwen3-VL", ("Qwen3VLForConditionalGeneration",), LLAMA, _VISION, tested=("qwen3-vl",)),
    Family("Granite", ("GraniteForCausalLM",), LLAMA, tested=("granite",)),
    Family("Seed-OSS", ("SeedOssForCausalLM",), LLAMA, tested=("seed-oss",)),
    Family("SmolLM3", ("SmolLM3ForCausalLM",), LLAMA, tested=("smollm3",)),
    Family("OLMo", ("OlmoForCausalLM",), LLAMA, tested=("olmo",)),
    Family("OLMo 2, 3", ("Olmo2ForCausalLM", "Olmo3ForCausalLM"), POST_NORM, _POST_NORMS, tested=("olmo2", "olmo3")),
    Family("Exaone 4", ("Exaone4ForCausalLM",), POST_NORM, _POST_NORMS, tested=("exaone4",)),
    Family("Phi-3", ("Phi3ForCausalLM",), PHI3, tested=("phi3",)),
    Family("Gemma", ("GemmaForCausalLM",), LLAMA, tested=("gemma",)),
    Family("Gemma 2", ("Gemma2ForCausalLM",), GEMMA2, tested=("gemma2",)),
    Family(
        "Gemma 3",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        GEMMA2,
        _VISION,
        tested=("gemma3", "gemma3-vision"),
    ),
    Family("Cohere", ("CohereForCausalLM", "Cohere2ForCausalLM"), COHERE, tested=("cohere", "cohere2")),
    Family(
        "StarCoder2",
        ("Starcoder2ForCausalLM",),
        STARCODER2,
        "c_proj is not smoothed: GELU is no multiple of its input",
        tested=("starcoder2",),
    ),
    Family("GLM-4", ("GlmForCausalLM", "Glm4ForCausalLM"), GLM, tested=("glm", "glm4")),
    Family("OPT", ("OPTForCausalLM",), OPT, "fc2 is not smoothed where the activation is not ReLU", tested=("opt",)),
    Family("GPT-NeoX", ("GPTNeoXForCausalLM",), GPT_NEOX, _FUSED_BY_HEAD, tested=("gpt-neox",)),
    Family("Mixtral", ("MixtralForCausalLM",), MIXTRAL, _ROUTERS, tested=("mixtral",)),
    Family("Qwen2-MoE", ("Qwen2MoeForCausalLM",), LLAMA, _GATES, tested=("qwen2-moe",)),
    Family("Qwen3-MoE", ("Qwen3MoeForCausalLM",), LLAMA, _ROUTERS, tested=("qwen3-moe",)),
    Family("OLMoE", ("OlmoeForCausalLM",), LLAMA, _ROUTERS, tested=("olmoe",)),
    Family("GLM-4.5", ("Glm4MoeForCausalLM",), LLAMA, _ROUTERS, tested=("glm4-moe",)),
    Family("GLM-4.7-Flash", ("Glm4MoeLiteForCausalLM",), DEEPSEEK, _ROUTERS, tested=("glm4.7-flash",)),
    Family("DeepSeek-V2", ("DeepseekV2ForCausalLM",), DEEPSEEK, _ROUTERS, tested=("deepseek-v2",)),
    Family(
        "DeepSeek-V3, R1, Kimi-K2",
        ("DeepseekV3ForCausalLM",),
        DEEPSEEK,
        f"{_ROUTERS}; layers for multi-token prediction are copied",
        tested=("deepseek-v3", "kimi-k2", "deepseek-v3-no-q-lora"),
    ),
    Family(
        "GLM-5, DeepSeek-V3.2",
        ("GlmMoeDsaForCausalLM", "DeepseekV32ForCausalLM"),
        DEEPSEEK,
        f"{_ROUTERS}; indexers: they decide on the tokens that are attended to",
        full_precision=(r"re:.*\.indexer\.",),
        tested=("glm5",),
    ),
    Family(
        "Qwen3-Next",
        ("Qwen3NextForCausalLM",),
        QWEN_HYBRID,
        f"{_GATES}; {_DECAYS}",
        full_precision=("re:.*in_proj_ba$",),
        tested=("qwen3-next",),
    ),
    Family(
        "Qwen3.5",
        ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
        QWEN_HYBRID,
        f"{_VISION}; {_DECAYS}",
        full_precision=("re:.*in_proj_[ab]$",),
        tested=("qwen3.5",),
    ),
    Family(
        "Qwen3.5-MoE",
        ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        QWEN_HYBRID,
        f"{_VISION}; {_GATES}; {_DECAYS}",
        full_precision=("re:.*in_proj_[ab]$",),
        tested=("qwen3.5-moe",),
    ),
    Family("LFM2", ("Lfm2ForCausalLM",), LFM2, tested=("lfm2",)),
    Family("LFM2-MoE", ("Lfm2MoeForCausalLM",), LFM2, _ROUTERS, tested=("lfm2-moe",)),
    Family(
        "Jamba",
        ("JambaForCausalLM",),
        JAMBA,
        f"{_ROUTERS}; Mamba's linears stay in full precision, as vLLM reads them",
        full_precision=(r"re:.*\.mamba\.",),
        tested=("jamba",),
    ),
    Family("Nemotron-H", ("NemotronHForCausalLM",), NEMOTRON_H, _ROUTERS, tested=("nemotron-h", "nemotron-h-moe")),
    Family("PhiMoE", ("PhimoeForCausalLM",), MIXTRAL, _ROUTERS, tested=("phimoe",)),
    Family("MiniMax-M2", ("MiniMaxM2ForCausalLM",), MIXTRAL, _ROUTERS, tested=("minimax-m2",)),
    Family("Ernie 4.5 MoE", ("Ernie4_5_MoeForCausalLM",), LLAMA, _ROUTERS, tested=("ernie4.5-moe",)),
    Family("HunYuan MoE", ("HunYuanMoEV1ForCausalLM",), LLAMA, _ROUTERS, tested=("hunyuan-moe",)),
    Family(
        "GraniteMoE",
        ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
        GRANITE_MOE,
        _ROUTERS,
        tested=("granitemoe", "granitemoe-shared"),
    ),
    Family(
        "Llama 4",
        ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
        LLAMA,
        f"{_ROUTERS}; {_VISION}",
        tested=("llama4", "llama4-vision"),
    ),
    Family("gpt-oss", ("GptOssForCausalLM",), GPT_OSS, f"{_ROUTERS}; {_CLAMPED}", tested=("gpt-oss",)),
    Family(
        "Qwen3-VL-MoE",
        ("Qwen3VLMoeForConditionalGeneration",),
        LLAMA,
        f"{_ROUTERS}; {_VISION}",
        tested=("qwen3-vl-moe",),
    ),
    Family("AFMoE", ("AfmoeForCausalLM",), AFMOE, _ROUTERS, tested=("afmoe",)),
)

_MAPPINGS = {architecture: family.mappings for family in FAMILIES for architecture in family.architectures}
_FULL_PRECISION = {name: family.full_precision for family in FAMILIES for name in family.architectures}


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
    return _FULL_PRECISION.get(architecture, ())
