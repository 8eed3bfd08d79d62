"""Tiny random checkpoints of every decoder family, written by transformers itself, so with the names of published checkpoints.

Widths fit groups of 32. Norm weights are far from 1 (or from 0, where the norm multiplies by 1 + weight), biases far from 0, and some
channels are outliers: whatever forgets one of them shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from support import tiny_hybrids

VOCABULARY = 160
GROUP_SIZE = 32
WINDOW = 8  # of sliding-window layers
_LINES = """
the quick brown fox jumps over the lazy dog and the dog sleeps on while the fox runs down to the river
a tiny model reads a tiny text and a tiny text is all that it needs to tell one channel from another
every consumer of a smoothed tensor is compensated or else the function of the layer is not the same
seven grey geese flew over forty fields before the first frost fell and the far farms froze
""".strip().splitlines()


def tiny_text(num_lines: int = 400) -> str:
    """Text in which no line comes twice, so that calibration samples differ."""
    return "\n".join(f"{_LINES[i % 4]} {_LINES[i * 7 % 4][i % 23 :]} {i * i}" for i in range(num_lines))


def families() -> list[str]:
    """Names of all dense families, as `tiny_checkpoint` takes them."""
    return [name for name in _CONFIGS if name not in (*_MOE, *tiny_hybrids.ALIKE)]


def moe_families() -> list[str]:
    """Names of all families with mixtures of experts."""
    return list(_MOE)


def alike_families() -> list[str]:
    """Names of families with the layers of one among `families` or `moe_families`, under another class."""
    return list(tiny_hybrids.ALIKE)


def architecture(family: str) -> str:
    """The class of a family in transformers."""
    return _CONFIGS[family][0]


def fused_families() -> list[str]:
    """Names of those among them whose checkpoints hold all experts of a block in one tensor."""
    return list(_FUSED)


def tiny_checkpoint(
    family: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    shard_bytes: int = 10**9,
    **changes: Any,
) -> Path:
    """A random checkpoint and tokenizer in `folder`. changes: fields of the text configuration that are to differ."""
    model = tiny_model(family, dtype, seed=seed, **changes)
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    if family in _PUBLISHED_TRANSPOSED:
        transpose_experts(folder)
    tiny_tokenizer().save_pretrained(folder)
    if family == "qwen3-next":
        file = folder / "model.safetensors"
        save_file({**load_file(file), **tiny_hybrids.multi_token_prediction()}, file)
    if family in _PUBLISHED:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, **_PUBLISHED[family]}))
    return folder


def transpose_experts(folder: Path) -> None:
    """Swaps the last two dimensions of all tensors of experts."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        turned = {
            name: tensor.mT.contiguous() if tensor.ndim == 3 and ".experts." in name else tensor
            for name, tensor in tensors.items()
        }
        save_file(turned, file, {"format": "pt"})


def tiny_model(family: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of a family, in evaluation mode."""
    kind, make = _CONFIGS[family]
    config = make(**changes)
    model = getattr(transformers, kind)(config).eval()
    randomize(model, seed)
    return model.to(dtype)


def randomize(model: PreTrainedModel, seed: int = 0) -> None:
    """Gives every parameter random values of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
                parameter.copy_(parameter + 0.3 * noise)  # transformers leaves it at 1, or at 0 for (1 + w) norms
                parameter[3::17] += 2.0  # outliers
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * noise)
            elif name.endswith(("gate.weight", "router.weight", "wg.weight")):
                parameter.copy_(3 * noise * parameter[0].numel() ** -0.5)  # decided routing
            elif parameter.ndim == 3:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 8, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(tiny_text(40).splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_HEADS = {"head_dim": 16}
_WIDE_HEADS = {"head_dim": 32}  # q has more rows than the hidden states have channels
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}


def _text(config: str, **fields: Any) -> Callable[..., PretrainedConfig]:
    def make(**changes: Any) -> PretrainedConfig:
        merged = {**_TEXT, **fields, **changes}
        return getattr(transformers, config)(**{k: v for k, v in merged.items() if v is not None})

    return make


def _hybrids(found: tiny_hybrids.Hybrids) -> dict[str, tuple[str, Callable[..., PretrainedConfig]]]:
    return {family: (kind, _text(config, **fields)) for family, (kind, config, fields) in found.items()}


def _vision(config: str, text: dict[str, Any], vision: dict[str, Any]) -> Callable[..., PretrainedConfig]:
    def make(**changes: Any) -> PretrainedConfig:
        merged = {**_TEXT, **text, **changes}
        special = {
            f"{kind}_token_id": VOCABULARY - 1 - i
            for i, kind in enumerate(("image", "video", "vision_start", "vision_end"))
        }
        tied = merged["tie_word_embeddings"]
        return getattr(transformers, config)(
            text_config=merged, vision_config=vision, tie_word_embeddings=tied, **special
        )

    return make


def _mistral3(**changes: Any) -> PretrainedConfig:
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14}
    text = {"model_type": "mistral", **_TEXT, **_HEADS, "sliding_window": None, **changes}
    return transformers.Mistral3Config(
        vision_config=vision,
        text_config=text,
        image_token_index=VOCABULARY - 1,
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def _gemma3(**changes: Any) -> PretrainedConfig:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "vision_use_head": False}
    text = {**_TEXT, **_HEADS, **_MIXED, "query_pre_attn_scalar": 16, "tie_word_embeddings": True, **changes}
    return transformers.Gemma3Config(
        vision_config=vision,
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=VOCABULARY - 3,
        eoi_token_index=VOCABULARY - 2,
        image_token_index=VOCABULARY - 1,
        tie_word_embeddings=text["tie_word_embeddings"],
    )


_IMAGE_TOKENS = {"image_token_id": VOCABULARY - 1, "video_token_id": VOCABULARY - 2}
_IMAGE_TOKENS |= {"vision_start_token_id": VOCABULARY - 3, "vision_end_token_id": VOCABULARY - 4}
_QWEN_VISION = {"depth": 1, "num_heads": 2, "hidden_size": 32, "intermediate_size": 48, "patch_size": 14}
_DEEPSTACK = {"out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INTERLEAVED_MROPE = {"rope_parameters": {**_MROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True}}


def _qwen_vl(kind: str, vision: dict[str, Any], **fields: Any) -> Callable[..., PretrainedConfig]:
    """kind: the start of the configuration's name."""

    def make(**changes: Any) -> PretrainedConfig:
        text = {**_TEXT, **fields, **changes}
        return getattr(transformers, f"{kind}Config")(
            vision_config={**_QWEN_VISION, **vision},
            text_config=text,
            tie_word_embeddings=text["tie_word_embeddings"],
            **_IMAGE_TOKENS,
        )

    return make


def _llama4(**changes: Any) -> PretrainedConfig:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 32}
    vision |= {"projector_input_dim": 32, "projector_output_dim": 32}
    text = {**_TEXT, **_LLAMA4, **changes}
    return transformers.Llama4Config(
        vision_config=vision,
        text_config=text,
        boi_token_index=VOCABULARY - 3,
        eoi_token_index=VOCABULARY - 2,
        image_token_index=VOCABULARY - 1,
    )


_GEMMA = {**_HEADS, "tie_word_embeddings": True}
_GEMMA2 = {**_GEMMA, **_MIXED, "query_pre_attn_scalar": 16}
_NO_KV_HEADS = {"num_key_value_heads": None}

# family -> (class in transformers, maker of its configuration)
_CONFIGS: dict[str, tuple[str, Callable[..., PretrainedConfig]]] = {
    "llama": ("LlamaForCausalLM", _text("LlamaConfig")),
    "llama-mha": ("LlamaForCausalLM", _text("LlamaConfig", num_key_value_heads=4, attention_bias=True, mlp_bias=True)),
    "mistral": ("MistralForCausalLM", _text("MistralConfig", sliding_window=WINDOW, **_WIDE_HEADS)),
    "mistral3": ("Mistral3ForConditionalGeneration", _mistral3),
    "qwen2": (
        "Qwen2ForCausalLM",
        _text("Qwen2Config", use_sliding_window=True, max_window_layers=1, sliding_window=WINDOW),
    ),
    "qwen3": ("Qwen3ForCausalLM", _text("Qwen3Config", **_WIDE_HEADS)),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        _qwen_vl(
            "Qwen2VL", {"embed_dim": 32, "hidden_size": 64}, rope_parameters={**_MROPE, "mrope_section": [2, 3, 3]}
        ),
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        _qwen_vl("Qwen2_5_VL", {"out_hidden_size": 64}, rope_parameters={**_MROPE, "mrope_section": [2, 3, 3]}),
    ),
    "qwen3-vl": (
        "Qwen3VLForConditionalGeneration",
        _qwen_vl("Qwen3VL", _DEEPSTACK, **_INTERLEAVED_MROPE, **_WIDE_HEADS),
    ),
    "granite": (
        "GraniteForCausalLM",
        _text(
            "GraniteConfig",
            embedding_multiplier=3.0,
            logits_scaling=2.0,
            residual_multiplier=0.7,
            attention_multiplier=0.3,
        ),
    ),
    "seed-oss": ("SeedOssForCausalLM", _text("SeedOssConfig", attention_bias=True, **_WIDE_HEADS)),
    "smollm3": ("SmolLM3ForCausalLM", _text("SmolLM3Config", no_rope_layers=[1, 0])),
    "olmo": ("OlmoForCausalLM", _text("OlmoConfig")),
    "olmo2": ("Olmo2ForCausalLM", _text("Olmo2Config")),
    "olmo3": ("Olmo3ForCausalLM", _text("Olmo3Config", **_MIXED)),
    "exaone4": ("Exaone4ForCausalLM", _text("Exaone4Config", **_MIXED)),
    "phi3": ("Phi3ForCausalLM", _text("Phi3Config", sliding_window=WINDOW)),
    "gemma": ("GemmaForCausalLM", _text("GemmaConfig", **_GEMMA)),
    "gemma2": ("Gemma2ForCausalLM", _text("Gemma2Config", **_GEMMA2)),
    "gemma3": ("Gemma3ForCausalLM", _text("Gemma3TextConfig", **_GEMMA2)),
    "gemma3-vision": ("Gemma3ForConditionalGeneration", _gemma3),
    "cohere": ("CohereForCausalLM", _text("CohereConfig", tie_word_embeddings=True, use_qk_norm=True)),
    "cohere2": ("Cohere2ForCausalLM", _text("Cohere2Config", tie_word_embeddings=True, **_MIXED)),
    "starcoder2": (
        "Starcoder2ForCausalLM",
        _text("Starcoder2Config", use_bias=True, sliding_window=WINDOW, tie_word_embeddings=True),
    ),
    "glm": ("GlmForCausalLM", _text("GlmConfig", attention_bias=True, **_HEADS)),
    "glm4": ("Glm4ForCausalLM", _text("Glm4Config", attention_bias=True, **_HEADS)),
    "opt": (
        "OPTForCausalLM",
        _text("OPTConfig", ffn_dim=128, word_embed_proj_dim=64, tie_word_embeddings=True, **_NO_KV_HEADS),
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", _text("GPTNeoXConfig", use_parallel_residual=True, **_NO_KV_HEADS)),
    **_hybrids(tiny_hybrids.DENSE),
    **{family: (kind, _vision(*rest)) for family, (kind, *rest) in tiny_hybrids.VISION.items()},
}

_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
_ROUTED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LLAMA4 = {
    **_EXPERTS,
    **_HEADS,
    "intermediate_size": 64,
    "intermediate_size_mlp": 128,
    "num_hidden_layers": 4,
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [1, 0, 1, 1],
    "attention_chunk_size": WINDOW,
}
_DEEPSEEK = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
_YARN = {
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
}


def _without_q_lora(config: PretrainedConfig) -> PretrainedConfig:
    config.q_lora_rank = None
    return config


_CLASSES = {
    "mixtral": ("MixtralForCausalLM", _text("MixtralConfig", **_EXPERTS)),
    "qwen2-moe": ("Qwen2MoeForCausalLM", _text("Qwen2MoeConfig", shared_expert_intermediate_size=96, **_ROUTED)),
    "qwen3-moe": ("Qwen3MoeForCausalLM", _text("Qwen3MoeConfig", norm_topk_prob=True, **_ROUTED, **_WIDE_HEADS)),
    "olmoe": ("OlmoeForCausalLM", _text("OlmoeConfig", num_experts=8, num_experts_per_tok=2)),
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        _text("DeepseekV2Config", **{**_DEEPSEEK, "topk_method": "group_limited_greedy"}),
    ),
    "deepseek-v3": ("DeepseekV3ForCausalLM", _text("DeepseekV3Config", **_DEEPSEEK)),
    "kimi-k2": (
        "DeepseekV3ForCausalLM",
        _text("DeepseekV3Config", **{**_DEEPSEEK, "n_group": 1, "topk_group": 1, "num_hidden_layers": 2}),
    ),
    "deepseek-v3-no-q-lora": (
        "DeepseekV3ForCausalLM",
        lambda **changes: _without_q_lora(_text("DeepseekV3Config", **_DEEPSEEK)(**changes)),
    ),
    "glm4-moe": (
        "Glm4MoeForCausalLM",
        _text(
            "Glm4MoeConfig",
            attention_bias=True,
            use_qk_norm=True,
            **{k: _DEEPSEEK[k] for k in list(_DEEPSEEK)[2:9]},
            **_HEADS,
        ),
    ),
    "phimoe": ("PhimoeForCausalLM", _text("PhimoeConfig", attention_bias=True, **_EXPERTS)),
    "ernie4.5-moe": (
        "Ernie4_5_MoeForCausalLM",
        _text("Ernie4_5_MoeConfig", moe_num_experts=8, moe_k=2, moe_num_shared_experts=1, moe_intermediate_size=64),
    ),
    "minimax-m2": ("MiniMaxM2ForCausalLM", _text("MiniMaxM2Config", **_EXPERTS, **_HEADS)),
    "hunyuan-moe": ("HunYuanMoEV1ForCausalLM", _text("HunYuanMoEV1Config", num_experts=8, moe_topk=2, **_HEADS)),
    "afmoe": (
        "AfmoeForCausalLM",
        _text("AfmoeConfig", num_dense_layers=1, num_shared_experts=1, sliding_window=WINDOW, **_ROUTED, **_HEADS),
    ),
    "glm4.7-flash": (
        "Glm4MoeLiteForCausalLM",
        _text("Glm4MoeLiteConfig", **{k: v for k, v in _DEEPSEEK.items() if k != "first_k_dense_replace"}),
    ),
    **_hybrids(tiny_hybrids.MOE),
    **{family: (kind, _vision(*rest)) for family, (kind, *rest) in tiny_hybrids.VISION_MOE.items()},
    "granitemoe": ("GraniteMoeForCausalLM", _text("GraniteMoeConfig", residual_multiplier=0.7, **_EXPERTS)),
    "granitemoe-shared": (
        "GraniteMoeSharedForCausalLM",
        _text("GraniteMoeSharedConfig", shared_intermediate_size=96, **_EXPERTS),
    ),
    "llama4": ("Llama4ForCausalLM", _text("Llama4TextConfig", **_LLAMA4)),
    "llama4-vision": ("Llama4ForConditionalGeneration", _llama4),
    "qwen3-vl-moe": (
        "Qwen3VLMoeForConditionalGeneration",
        _qwen_vl(
            "Qwen3VLMoe", _DEEPSTACK, **{**_ROUTED, "moe_intermediate_size": 96}, **_INTERLEAVED_MROPE, **_WIDE_HEADS
        ),
    ),
    "gpt-oss": ("GptOssForCausalLM", _text("GptOssConfig", sliding_window=WINDOW, **_EXPERTS, **_HEADS, **_YARN)),
}
# family -> what its publisher's config.json has beside, or in place of, what transformers writes
_PUBLISHED: dict[str, dict[str, Any]] = {
    "kimi-k2": {
        "model_type": "kimi_k2",
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
    }
}
_FUSED = ("granitemoe", "granitemoe-shared", "llama4", "llama4-vision", "gpt-oss", "qwen3-vl-moe")
_PUBLISHED_TRANSPOSED = ("qwen3-vl-moe",)  # transformers reads them so, and writes them as it computes with them
_MOE = tuple(_CLASSES)
_CONFIGS |= _CLASSES | _hybrids(tiny_hybrids.ALIKE)
