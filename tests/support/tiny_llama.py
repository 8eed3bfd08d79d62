"""A tiny random Llama with tokenizer, text and recipe, for tests of everything around the algorithm."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NUM_LAYERS = 4
TEXT = "".join(
    f"the quick brown fox number {i} jumps over the lazy dog while {i * 7 % 13} ducks swim on the river {i * i}\n"
    for i in range(400)
)
RECIPE = """
default_stage:
  default_modifiers:
    AWQModifier: {n_grid: 4}
    GPTQModifier:
      ignore: [lm_head]
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, symmetric: false, strategy: group, group_size: 32}
"""


@dataclass(frozen=True)
class Tiny:
    """Paths of a model and of what is needed to quantize it. Tests must not change them: copy first."""

    model: Path
    text: Path
    recipe: Path

    def options(self, *more: object) -> tuple[object, ...]:
        """Options of a short run: 8 samples of 32 tokens, in 2 chunks, with a snapshot at every layer."""
        given = {
            "--recipe": self.recipe,
            "--calibration": self.text,
            "--num-samples": 8,
            "--seq-len": 32,
            "--chunk-tokens": 128,
            "--snapshot-every": 1,
            "--device": "cpu",
            "--progress": "json",
        }
        changed = dict(zip(more[::2], more[1::2], strict=True))
        return (*(part for pair in {**given, **changed}.items() for part in pair), "--no-report")


def write_tiny(folder: Path, num_layers: int) -> Tiny:
    """A model of so many layers, with what belongs to it."""
    (folder / "text.txt").write_text(TEXT)
    (folder / "recipe.yaml").write_text(RECIPE)
    model = folder / "model"
    write_tokenizer(model)
    write_llama(model, num_hidden_layers=num_layers, max_position_embeddings=128, initializer_range=0.1)
    return Tiny(model, folder / "text.txt", folder / "recipe.yaml")


def write_llama(folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **fields: Any) -> Path:
    """Writes a random Llama without a tokenizer. fields: those of its configuration that differ from the tiny one's."""
    torch.manual_seed(seed)
    tiny = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": NUM_LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    LlamaForCausalLM(LlamaConfig(**{**tiny, **heads, **fields})).to(dtype).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of 128 tokens that begins every text with <s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=128, special_tokens=["<s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
