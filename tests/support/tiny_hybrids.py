"""Tiny forms of families whose layers are not all of one kind (recurrent, convolutional, sparse attention), as `tiny_models` builds them.

Each has two layers or three: one of every kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ROUTED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
}
_MAMBA_2 = {
    "num_hidden_layers": None,  # transformers counts layers_block_type
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "head_dim": 16,
}
_SPARSE_ATTENTION = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "mlp_layer_types": ["dense", "sparse"],
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "index_topk": 8,
    "index_n_heads": 4,
    "index_head_dim": 16,
}
_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
}
_VISION |= {"num_position_embeddings": 16}

# family -> (class in transformers, class of its text configuration, fields of that)
Hybrids = dict[str, tuple[str, str, dict[str, Any]]]
DENSE: Hybrids = {
    "lfm2": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"], "tie_word_embeddings": True},
    ),
    "nemotron-h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {**_MAMBA_2, "layers_block_type": ["linear_attention", "mlp", "full_attention"]},
    ),
}
MOE: Hybrids = {
    "glm5": ("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", _SPARSE_ATTENTION),
    "qwen3-next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {**_DELTA_NET, **_ROUTED, "shared_expert_intermediate_size": 96},
    ),
    "lfm2-moe": (
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {**_ROUTED, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"], "tie_word_embeddings": True},
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
    ),
    "nemotron-h-moe": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **_MAMBA_2,
            "layers_block_type": ["linear_attention", "moe", "full_attention"],
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 96,
        },
    ),
}
# classes with the layers of another family, whose tests stand for theirs
ALIKE: Hybrids = {
    "deepseek-v3.2": (
        "DeepseekV32ForCausalLM",
        "DeepseekV32Config",
        {**_SPARSE_ATTENTION, "n_group": 4, "topk_group": 2},
    ),
    "qwen3.5-text": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", _DELTA_NET),
    "qwen3.5-moe-text": (
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        {**_DELTA_NET, **_ROUTED, "shared_expert_intermediate_size": 96},
    ),
}
# family -> (class in transformers, class of the whole configuration, fields of its text and of its vision configuration)
VISION: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "qwen3.5": ("Qwen3_5ForConditionalGeneration", "Qwen3_5Config", _DELTA_NET, _VISION),
}
VISION_MOE: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "qwen3.5-moe": (
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        {**_DELTA_NET, **_ROUTED, "shared_expert_intermediate_size": 96},
        _VISION,
    ),
}

# family -> regular expression of linears that stay in full precision beside routers and gates
FULL_PRECISION = {
    "glm5": r"self_attn\.indexer\.(wq_b|wk|weights_proj)",
    "qwen3-next": r"linear_attn\.in_proj_ba",
    "qwen3.5": r"linear_attn\.in_proj_[ab]",
    "qwen3.5-moe": r"linear_attn\.in_proj_[ab]",
    "jamba": r"mamba\.(in_proj|x_proj|out_proj)",
}
# family -> the same of linears whose input nothing can be divided out of, or that no quantized linear reads along with
UNSMOOTHED = {"jamba": FULL_PRECISION["jamba"], "gpt-oss": r"down_proj$"}


def multi_token_prediction() -> dict[str, Tensor]:
    """Some tensors of a head for further tokens, by the names of Qwen3-Next: no module of transformers has them."""
    generator = torch.Generator().manual_seed(9)
    shapes = {
        "mtp.fc.weight": (64, 128),
        "mtp.norm.weight": (64,),
        "mtp.layers.0.self_attn.q_proj.weight": (128, 64),
        "mtp.layers.0.mlp.experts.0.up_proj.weight": (64, 64),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
