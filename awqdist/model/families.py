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
    kept: patterns of linears that stay in full precision unless a recipe's targets name them."""

    name: str
    architectures: tuple[str, ...]
    mappings: tuple[MappingPattern, ...]
    left: str = ""
    kept: tuple[str, ...] = ()


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

_QWEN_HYBRID = (
    _mapping("input_layernorm", *_QKV, "in_proj_qkvz", "in_proj_qkv"),
    _mapping(r"linear_attn\.norm", "out_proj"),
    _mapping("post_attention_layernorm", "gate_proj", "up_proj"),
    *_TAIL,
)
_DECAYS = "the small linears of decays and write strengths, whose errors add up in the state, stay in full precision"
_LFM2 = (
    _mapping("operator_norm", *_QKV, "in_proj"),
    _mapping("in_proj", "out_proj"),
    _mapping("v_proj", "out_proj"),
    _mapping("ffn_norm", "w1", "w3"),
    _mapping("w3", "w2"),
)
_JAMBA = (
    _mapping("input_layernorm", *_QKV, "in_proj"),
    _mapping("pre_ff_layernorm", "gate_proj", "up_proj"),
    *_TAIL,
)
_NEMOTRON_H = (
    _mapping(r"layers\.\d+\.norm", *_QKV, "in_proj", "up_proj"),
    _mapping(r"mixer\.norm", "out_proj"),
    *_TAIL,
)

FAMILIES = (
    Family("Llama", ("LlamaForCausalLM",), _LLAMA),
    Family("Mistral", ("MistralForCausalLM",), _LLAMA),
    Family(
        "Mistral 3", ("Mistral3ForConditionalGeneration",), _LLAMA, "vision tower: text is what it is calibrated on"
    ),
    Family("Qwen2", ("Qwen2ForCausalLM",), _LLAMA),
    Family("Qwen3", ("Qwen3ForCausalLM",), _LLAMA),
    Family("Granite", ("GraniteForCausalLM",), _LLAMA),
    Family("Seed-OSS", ("SeedOssForCausalLM",), _LLAMA),
    Family("SmolLM3", ("SmolLM3ForCausalLM",), _LLAMA),
    Family("OLMo", ("OlmoForCausalLM",), _LLAMA),
    Family(
        "OLMo 2, 3",
        ("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        _POST_NORM,
        "qkv, gate and up are not smoothed: norms follow the blocks",
    ),
    Family(
        "Exaone 4", ("Exaone4ForCausalLM",), _POST_NORM, "qkv, gate and up are not smoothed: norms follow the blocks"
    ),
    Family("Phi-3", ("Phi3ForCausalLM",), _PHI3),
    Family("Gemma", ("GemmaForCausalLM",), _LLAMA),
    Family("Gemma 2", ("Gemma2ForCausalLM",), _GEMMA2),
    Family(
        "Gemma 3",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        _GEMMA2,
        "vision tower: text is what it is calibrated on",
    ),
    Family(
        "Cohere",
        ("CohereForCausalLM", "Cohere2ForCausalLM"),
        _COHERE,
    ),
    Family(
        "StarCoder2",
        ("Starcoder2ForCausalLM",),
        _STARCODER2,
        "c_proj is not smoothed: GELU is no multiple of its input",
    ),
    Family(
        "GLM-4",
        ("GlmForCausalLM", "Glm4ForCausalLM"),
        _GLM,
    ),
    Family("OPT", ("OPTForCausalLM",), OPT, "fc2 is not smoothed where the activation is not ReLU"),
    Family(
        "GPT-NeoX",
        ("GPTNeoXForCausalLM",),
        _GPT_NEOX,
        "dense and dense_4h_to_h are not smoothed: fused rows lie interleaved, GELU is no multiple of its input",
    ),
    Family("Mixtral", ("MixtralForCausalLM",), _MIXTRAL, "routers: they decide on experts"),
    Family("Qwen2-MoE", ("Qwen2MoeForCausalLM",), _LLAMA, "routers, gates of shared experts"),
    Family("Qwen3-MoE", ("Qwen3MoeForCausalLM",), _LLAMA, "routers: they decide on experts"),
    Family("OLMoE", ("OlmoeForCausalLM",), _LLAMA, "routers: they decide on experts"),
    Family("GLM-4.5", ("Glm4MoeForCausalLM",), _LLAMA, "routers: they decide on experts"),
    Family("GLM-4.7-Flash", ("Glm4MoeLiteForCausalLM",), _DEEPSEEK, "routers: they decide on experts"),
    Family("DeepSeek-V2", ("DeepseekV2ForCausalLM",), _DEEPSEEK, "routers: they decide on experts"),
    Family(
        "DeepSeek-V3, R1, Kimi-K2",
        ("DeepseekV3ForCausalLM",),
        _DEEPSEEK,
        "routers: they decide on experts; layers for multi-token prediction are copied",
    ),
    Family(
        "GLM-5, DeepSeek-V3.2",
        ("GlmMoeDsaForCausalLM", "DeepseekV32ForCausalLM"),
        _DEEPSEEK,
        "routers: they decide on experts; indexers: they decide on the tokens that are attended to",
        kept=(r"re:.*\.indexer\.",),
    ),
    Family(
        "Qwen3-Next",
        ("Qwen3NextForCausalLM",),
        _QWEN_HYBRID,
        f"routers, gates of shared experts; {_DECAYS}",
        kept=("re:.*in_proj_ba$",),
    ),
    Family(
        "Qwen3.5",
        ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
        _QWEN_HYBRID,
        f"vision tower: text is what it is calibrated on; {_DECAYS}",
        kept=("re:.*in_proj_[ab]$",),
    ),
    Family(
        "Qwen3.5-MoE",
        ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        _QWEN_HYBRID,
        f"vision tower: text is what it is calibrated on; routers, gates of shared experts; {_DECAYS}",
        kept=("re:.*in_proj_[ab]$",),
    ),
    Family("LFM2", ("Lfm2ForCausalLM",), _LFM2),
    Family("LFM2-MoE", ("Lfm2MoeForCausalLM",), _LFM2, "routers: they decide on experts"),
    Family(
        "Jamba",
        ("JambaForCausalLM",),
        _JAMBA,
        "routers: they decide on experts; Mamba's linears stay in full precision, as vLLM reads them",
        kept=(r"re:.*\.mamba\.",),
    ),
    Family("Nemotron-H", ("NemotronHForCausalLM",), _NEMOTRON_H, "routers: they decide on experts"),
    Family("PhiMoE", ("PhimoeForCausalLM",), _MIXTRAL, "routers: they decide on experts"),
    Family("MiniMax-M2", ("MiniMaxM2ForCausalLM",), _MIXTRAL, "routers: they decide on experts"),
    Family("Ernie 4.5 MoE", ("Ernie4_5_MoeForCausalLM",), _LLAMA, "routers: they decide on experts"),
    Family("HunYuan MoE", ("HunYuanMoEV1ForCausalLM",), _LLAMA, "routers: they decide on experts"),
    Family("AFMoE", ("AfmoeForCausalLM",), _AFMOE, "routers: they decide on experts"),
)
