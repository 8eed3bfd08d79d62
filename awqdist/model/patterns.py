"""Patterns of what smooths what, for the kinds of layers that families are made of.

Patterns end in `$` and name the last part of on-disk modules. Under grouped-query attention v -> o is smoothed with one scale per
key/value channel. A mapping that the structure of a layer contradicts is skipped with its reason.
"""

from __future__ import annotations

from awqdist.recipe import MappingPattern


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
FC1_TO_FC2 = _mapping("fc1", "fc2")  # ReLU passes positive scales
OPT = (
    _mapping("self_attn_layer_norm", *_QKV),
    _mapping("v_proj", "out_proj"),
    _mapping("final_layer_norm", "fc1"),
    FC1_TO_FC2,
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
