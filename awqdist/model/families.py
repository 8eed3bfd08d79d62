"""The architectures that are known by name: what smooths what in each, and what is left alone.

Patterns end in `$` and name the last part of on-disk modules. Under grouped-query attention v -> o is smoothed with one scale per
key/value channel. A mapping that the structure of a layer contradicts is skipped with its reason; an architecture that is not here is
mapped from its structure (`inference.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from awqdist.recipe import MappingPattern


@dataclass(frozen=True, slots=True)
class Family:
    """architectures: class names, as in config.json's `architectures`; left: which linears are not smoothed or not quantized, and why;
    tested: the tiny checkpoints of these classes that the tests quantize."""

    name: str
    architectures: tuple[str, ...]
    mappings: tuple[MappingPattern, ...]
    left: str = ""
    tested: tuple[str, ...] = ()


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
FC1_TO_FC2 = _mapping("fc1", "fc2")  # ReLU passes positive scales
OPT = (
    _mapping("self_attn_layer_norm", *_QKV),
    _mapping("v_proj", "out_proj"),
    _mapping("final_layer_norm", "fc1"),
    FC1_TO_FC2,
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
_GRANITE_MOE = (*_MIXTRAL, _mapping("input_linear", "output_linear"))  # the latter two of a shared expert
_GPT_OSS = (*_LLAMA[:2], _VALUE_TO_OUTPUT)

_VISION = "vision tower: text is what it is calibrated on"

FAMILIES = (
    Family("Llama", ("LlamaForCausalLM",), _LLAMA, tested=("llama", "llama-mha")),
    Family("Mistral", ("MistralForCausalLM",), _LLAMA, tested=("mistral",)),
    Family(
        "Mistral 3",
        ("Mistral3ForConditionalGeneration",),
        _LLAMA,
        _VISION,
        tested=("mistral3",),
    ),
    Family("Qwen2", ("Qwen2ForCausalLM",), _LLAMA, tested=("qwen2",)),
    Family("Qwen3", ("Qwen3ForCausalLM",), _LLAMA, tested=("qwen3",)),
    Family(
        "Qwen2-VL, Qwen2.5-VL",
        ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
        _LLAMA,
        _VISION,
        tested=("qwen2-vl", "qwen2.5-vl"),
    ),
    Family("Qwen3-VL", ("Qwen3VLForConditionalGeneration",), _LLAMA, _VISION, tested=("qwen3-vl",)),
    Family("Granite", ("GraniteForCausalLM",), _LLAMA, tested=("granite",)),
    Family("Seed-OSS", ("SeedOssForCausalLM",), _LLAMA, tested=("seed-oss",)),
    Family("SmolLM3", ("SmolLM3ForCausalLM",), _LLAMA, tested=("smollm3",)),
    Family("OLMo", ("OlmoForCausalLM",), _LLAMA, tested=("olmo",)),
    Family(
        "OLMo 2, 3",
        ("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        _POST_NORM,
        "qkv, gate and up are not smoothed: norms follow the blocks",
        tested=("olmo2", "olmo3"),
    ),
    Family(
        "Exaone 4",
        ("Exaone4ForCausalLM",),
        _POST_NORM,
        "qkv, gate and up are not smoothed: norms follow the blocks",
        tested=("exaone4",),
    ),
    Family("Phi-3", ("Phi3ForCausalLM",), _PHI3, tested=("phi3",)),
    Family("Gemma", ("GemmaForCausalLM",), _LLAMA, tested=("gemma",)),
    Family("Gemma 2", ("Gemma2ForCausalLM",), _GEMMA2, tested=("gemma2",)),
    Family(
        "Gemma 3",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        _GEMMA2,
        _VISION,
        tested=("gemma3", "gemma3-vision"),
    ),
    Family("Cohere", ("CohereForCausalLM", "Cohere2ForCausalLM"), _COHERE, tested=("cohere", "cohere2")),
    Family(
        "StarCoder2",
        ("Starcoder2ForCausalLM",),
        _STARCODER2,
        "c_proj is not smoothed: GELU is no multiple of its input",
        tested=("starcoder2",),
    ),
    Family("GLM-4", ("GlmForCausalLM", "Glm4ForCausalLM"), _GLM, tested=("glm", "glm4")),
    Family("OPT", ("OPTForCausalLM",), OPT, "fc2 is not smoothed where the activation is not ReLU", tested=("opt",)),
    Family(
        "GPT-NeoX",
        ("GPTNeoXForCausalLM",),
        _GPT_NEOX,
        "dense and dense_4h_to_h are not smoothed: fused rows lie interleaved, GELU is no multiple of its input",
        tested=("gpt-neox",),
    ),
    Family("Mixtral", ("MixtralForCausalLM",), _MIXTRAL, "routers: they decide on experts", tested=("mixtral",)),
    Family("Qwen2-MoE", ("Qwen2MoeForCausalLM",), _LLAMA, "routers, gates of shared experts", tested=("qwen2-moe",)),
    Family("Qwen3-MoE", ("Qwen3MoeForCausalLM",), _LLAMA, "routers: they decide on experts", tested=("qwen3-moe",)),
    Family("OLMoE", ("OlmoeForCausalLM",), _LLAMA, "routers: they decide on experts", tested=("olmoe",)),
    Family("GLM-4.5", ("Glm4MoeForCausalLM",), _LLAMA, "routers: they decide on experts", tested=("glm4-moe",)),
    Family(
        "GLM-4.7-Flash",
        ("Glm4MoeLiteForCausalLM",),
        _DEEPSEEK,
        "routers: they decide on experts",
        tested=("glm4.7-flash",),
    ),
    Family(
        "DeepSeek-V2", ("DeepseekV2ForCausalLM",), _DEEPSEEK, "routers: they decide on experts", tested=("deepseek-v2",)
    ),
    Family(
        "DeepSeek-V3, R1",
        ("DeepseekV3ForCausalLM",),
        _DEEPSEEK,
        "routers: they decide on experts; layers for multi-token prediction are copied",
        tested=("deepseek-v3", "deepseek-v3-no-q-lora"),
    ),
    Family("PhiMoE", ("PhimoeForCausalLM",), _MIXTRAL, "routers: they decide on experts", tested=("phimoe",)),
    Family(
        "MiniMax-M2", ("MiniMaxM2ForCausalLM",), _MIXTRAL, "routers: they decide on experts", tested=("minimax-m2",)
    ),
    Family(
        "Ernie 4.5 MoE",
        ("Ernie4_5_MoeForCausalLM",),
        _LLAMA,
        "routers: they decide on experts",
        tested=("ernie4.5-moe",),
    ),
    Family(
        "HunYuan MoE", ("HunYuanMoEV1ForCausalLM",), _LLAMA, "routers: they decide on experts", tested=("hunyuan-moe",)
    ),
    Family(
        "GraniteMoE",
        ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
        _GRANITE_MOE,
        "routers: they decide on experts",
        tested=("granitemoe", "granitemoe-shared"),
    ),
    Family(
        "Llama 4",
        ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
        _LLAMA,
        f"routers: they decide on experts; {_VISION}",
        tested=("llama4", "llama4-vision"),
    ),
    Family(
        "gpt-oss",
        ("GptOssForCausalLM",),
        _GPT_OSS,
        "routers: they decide on experts; down_proj is not smoothed: what it reads is (up + 1) · gate · σ(1.702 · gate), with up clamped",
        tested=("gpt-oss",),
    ),
    Family(
        "Qwen3-VL-MoE",
        ("Qwen3VLMoeForConditionalGeneration",),
        _LLAMA,
        f"routers: they decide on experts; {_VISION}",
        tested=("qwen3-vl-moe",),
    ),
    Family("AFMoE", ("AfmoeForCausalLM",), _AFMOE, "routers: they decide on experts", tested=("afmoe",)),
)
