"""The architectures that are known by name: what smooths what in each, and what is left alone.

An architecture that is not here is mapped from its structure (`inference.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from awqdist.model.patterns import (
    AFMOE,
    COHERE,
    DEEPSEEK,
    GEMMA2,
    GLM,
    GPT_NEOX,
    GPT_OSS,
    GRANITE_MOE,
    JAMBA,
    LFM2,
    LLAMA,
    MIXTRAL,
    NEMOTRON_H,
    OPT,
    PHI3,
    POST_NORM,
    QWEN_HYBRID,
    STARCODER2,
)
from awqdist.recipe import MappingPattern


@dataclass(frozen=True, slots=True)
class Family:
    """architectures: class names, as in config.json's `architectures`; left: which linears are not smoothed or not quantized, and why;
    kept: patterns of linears that stay in full precision unless a recipe's targets name them; tested: the tiny checkpoints of these
    classes that the tests quantize."""

    name: str
    architectures: tuple[str, ...]
    mappings: tuple[MappingPattern, ...]
    left: str = ""
    kept: tuple[str, ...] = ()
    tested: tuple[str, ...] = ()


_VISION = "vision tower: text is what it is calibrated on"
_DECAYS = "the small linears of decays and write strengths, whose errors add up in the state, stay in full precision"

FAMILIES = (
    Family("Llama", ("LlamaForCausalLM",), LLAMA, tested=("llama", "llama-mha")),
    Family("Mistral", ("MistralForCausalLM",), LLAMA, tested=("mistral",)),
    Family(
        "Mistral 3",
        ("Mistral3ForConditionalGeneration",),
        LLAMA,
        _VISION,
        tested=("mistral3",),
    ),
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
    Family(
        "OLMo 2, 3",
        ("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        POST_NORM,
        "qkv, gate and up are not smoothed: norms follow the blocks",
        tested=("olmo2", "olmo3"),
    ),
    Family(
        "Exaone 4",
        ("Exaone4ForCausalLM",),
        POST_NORM,
        "qkv, gate and up are not smoothed: norms follow the blocks",
        tested=("exaone4",),
    ),
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
    Family(
        "GPT-NeoX",
        ("GPTNeoXForCausalLM",),
        GPT_NEOX,
        "dense and dense_4h_to_h are not smoothed: fused rows lie interleaved, GELU is no multiple of its input",
        tested=("gpt-neox",),
    ),
    Family("Mixtral", ("MixtralForCausalLM",), MIXTRAL, "routers: they decide on experts", tested=("mixtral",)),
    Family("Qwen2-MoE", ("Qwen2MoeForCausalLM",), LLAMA, "routers, gates of shared experts", tested=("qwen2-moe",)),
    Family("Qwen3-MoE", ("Qwen3MoeForCausalLM",), LLAMA, "routers: they decide on experts", tested=("qwen3-moe",)),
    Family("OLMoE", ("OlmoeForCausalLM",), LLAMA, "routers: they decide on experts", tested=("olmoe",)),
    Family("GLM-4.5", ("Glm4MoeForCausalLM",), LLAMA, "routers: they decide on experts", tested=("glm4-moe",)),
    Family(
        "GLM-4.7-Flash",
        ("Glm4MoeLiteForCausalLM",),
        DEEPSEEK,
        "routers: they decide on experts",
        tested=("glm4.7-flash",),
    ),
    Family(
        "DeepSeek-V2", ("DeepseekV2ForCausalLM",), DEEPSEEK, "routers: they decide on experts", tested=("deepseek-v2",)
    ),
    Family(
        "DeepSeek-V3, R1, Kimi-K2",
        ("DeepseekV3ForCausalLM",),
        DEEPSEEK,
        "routers: they decide on experts; layers for multi-token prediction are copied",
        tested=("deepseek-v3", "kimi-k2", "deepseek-v3-no-q-lora"),
    ),
    Family(
        "GLM-5, DeepSeek-V3.2",
        ("GlmMoeDsaForCausalLM", "DeepseekV32ForCausalLM"),
        DEEPSEEK,
        "routers: they decide on experts; indexers: they decide on the tokens that are attended to",
        kept=(r"re:.*\.indexer\.",),
        tested=("glm5",),
    ),
    Family(
        "Qwen3-Next",
        ("Qwen3NextForCausalLM",),
        QWEN_HYBRID,
        f"routers, gates of shared experts; {_DECAYS}",
        kept=("re:.*in_proj_ba$",),
        tested=("qwen3-next",),
    ),
    Family(
        "Qwen3.5",
        ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
        QWEN_HYBRID,
        f"{_VISION}; {_DECAYS}",
        kept=("re:.*in_proj_[ab]$",),
        tested=("qwen3.5",),
    ),
    Family(
        "Qwen3.5-MoE",
        ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        QWEN_HYBRID,
        f"{_VISION}; routers, gates of shared experts; {_DECAYS}",
        kept=("re:.*in_proj_[ab]$",),
        tested=("qwen3.5-moe",),
    ),
    Family("LFM2", ("Lfm2ForCausalLM",), LFM2, tested=("lfm2",)),
    Family("LFM2-MoE", ("Lfm2MoeForCausalLM",), LFM2, "routers: they decide on experts", tested=("lfm2-moe",)),
    Family(
        "Jamba",
        ("JambaForCausalLM",),
        JAMBA,
        "routers: they decide on experts; Mamba's linears stay in full precision, as vLLM reads them",
        kept=(r"re:.*\.mamba\.",),
        tested=("jamba",),
    ),
    Family(
        "Nemotron-H",
        ("NemotronHForCausalLM",),
        NEMOTRON_H,
        "routers: they decide on experts",
        tested=("nemotron-h", "nemotron-h-moe"),
    ),
    Family("PhiMoE", ("PhimoeForCausalLM",), MIXTRAL, "routers: they decide on experts", tested=("phimoe",)),
    Family("MiniMax-M2", ("MiniMaxM2ForCausalLM",), MIXTRAL, "routers: they decide on experts", tested=("minimax-m2",)),
    Family(
        "Ernie 4.5 MoE",
        ("Ernie4_5_MoeForCausalLM",),
        LLAMA,
        "routers: they decide on experts",
        tested=("ernie4.5-moe",),
    ),
    Family(
        "HunYuan MoE", ("HunYuanMoEV1ForCausalLM",), LLAMA, "routers: they decide on experts", tested=("hunyuan-moe",)
    ),
    Family(
        "GraniteMoE",
        ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
        GRANITE_MOE,
        "routers: they decide on experts",
        tested=("granitemoe", "granitemoe-shared"),
    ),
    Family(
        "Llama 4",
        ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
        LLAMA,
        f"routers: they decide on experts; {_VISION}",
        tested=("llama4", "llama4-vision"),
    ),
    Family(
        "gpt-oss",
        ("GptOssForCausalLM",),
        GPT_OSS,
        "routers: they decide on experts; down_proj is not smoothed: what it reads is (up + 1) · gate · σ(1.702 · gate), with up clamped",
        tested=("gpt-oss",),
    ),
    Family(
        "Qwen3-VL-MoE",
        ("Qwen3VLMoeForConditionalGeneration",),
        LLAMA,
        f"routers: they decide on experts; {_VISION}",
        tested=("qwen3-vl-moe",),
    ),
    Family("AFMoE", ("AfmoeForCausalLM",), AFMOE, "routers: they decide on experts", tested=("afmoe",)),
)
