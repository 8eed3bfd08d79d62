"""Make the demo model: a Llama of 1.7 million weights, trained on the documentation inside Python itself.

What: ``python tests/support/train_demo.py OUTPUT_FOLDER`` writes a folder that ``from_pretrained`` loads, and in it
the texts ``calibration.txt`` and ``evaluation.txt``. The defaults are those of the stored model.

Why: only trained weights have a perplexity that quantization can make worse. A model inside the package needs
no network, and its text comes with every Python: the documentation strings of the standard library, found by
parsing its sources (no module is run for them), and the help topics of ``pydoc``.

What not: it is no useful language model, and how much it loses to quantization says little about large ones.
Another computer will not give the same bytes: other releases of Python have other text (the stored model is
from 3.11), and other releases of torch round differently.

Held out: the hash of a documentation string alone decides whether it may be trained on. Since the standard
library repeats itself, a held-out one that shares a long line with the training text is in neither text.
The tokenizer, too, sees the training text only.
"""

import argparse
import ast
import hashlib
import math
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.optimization import get_cosine_schedule_with_warmup


@dataclass(frozen=True)
class Recipe:
    """All numbers that the stored model was made with."""

    steps: int = 1500
    seed: int = 0
    vocabulary: int = 1024
    window: int = 256  # tokens in one sequence
    batch: int = 16  # sequences in one step
    peak_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    held_out_percent: int = 8  # of the documentation strings, before the repeated ones are left out
    long_line: int = 40  # characters from which a line counts as evidence of a copy
    calibration_bytes: int = 250_000
    calibration_longest: int = 4_000  # characters, so that no single document fills the calibration text


RECIPE = Recipe()
BOS, EOS, SEPARATOR = "<s>", "</s>", "\n\n"
TESTS = frozenset({"test", "tests", "idle_test"})
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings() -> Iterator[str]:
    """Yield the documentation strings of the standard library, in the order of its files, with repeats."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or TESTS.intersection(parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources have escapes that the parser warns of
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED):
                yield (ast.get_docstring(node) or "").strip()


def long_lines(document: str) -> set[str]:
    """Return the lines of a document that are long enough to tell where they come from."""
    return {line.strip() for line in document.splitlines() if len(line.strip()) >= RECIPE.long_line}


def is_held_out(document: str) -> bool:
    """Tell from the hash of a document alone whether it must stay out of the training text."""
    return int(hashlib.sha256(document.encode()).hexdigest(), 16) % 100 < RECIPE.held_out_percent


def collect() -> tuple[list[str], list[str]]:
    """Return the documents for training and those for evaluation, without repeats."""
    found = [text for text in dict.fromkeys(docstrings()) if text and text.isascii()]
    training = [text for text in found if not is_held_out(text)]
    training += [text.strip() for _, text in sorted(topics.items()) if text.isascii()]
    everything = SEPARATOR.join(training)
    held_out = [text for text in found if is_held_out(text) and long_lines(text)]
    return training, [text for text in held_out if not any(line in everything for line in long_lines(text))]


def calibration_part(training: list[str], seed: int) -> list[str]:
    """Choose documents of the training text at random, about as many bytes as the recipe says."""
    chosen, left = list[str](), RECIPE.calibration_bytes
    for text in random.Random(seed).sample(training, len(training)):
        if long_lines(text) and len(text) <= min(left, RECIPE.calibration_longest):
            chosen.append(text)
            left -= len(text) + len(SEPARATOR)
    return chosen


def train_tokenizer(training: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; it can encode any text, and adds no token of its own accord."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=RECIPE.vocabulary, special_tokens=[BOS, EOS], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(training, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def token_stream(documents: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.Tensor:
    """Encode the shuffled documents as one row; each ends, by a toss, in a blank line or in the end token."""
    dice = random.Random(seed)
    shuffled = dice.sample(documents, len(documents))
    text = "".join(document + dice.choice((SEPARATOR, EOS + BOS)) for document in shuffled)
    return torch.tensor(tokenizer(BOS + text, verbose=False)["input_ids"])


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model; every width is a multiple of 128, the usual group of 4-bit weights."""
    config = LlamaConfig(
        vocab_size=RECIPE.vocabulary,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def fit(model: LlamaForCausalLM, stream: torch.Tensor, steps: int) -> None:
    """Train the model in place on windows of the stream, each window at a random offset."""
    optimizer = torch.optim.AdamW(model.parameters(), RECIPE.peak_rate, weight_decay=RECIPE.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, RECIPE.warmup_steps, steps)
    windows = stream.unfold(0, RECIPE.window, 1)
    model.train()
    for step in range(1, steps + 1):
        batch = windows[torch.randint(len(windows), (RECIPE.batch,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """Return the perplexity per token over the full windows of a text."""
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = tokens[: len(tokens) // RECIPE.window * RECIPE.window].view(-1, RECIPE.window)
    losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    return math.exp(sum(losses) / len(losses))


def make(folder: Path, steps: int, seed: int) -> None:
    """Collect the text, train, and write the model and its texts into the folder."""
    torch.manual_seed(seed)
    training, evaluation = collect()
    tokenizer = train_tokenizer(training)
    stream = token_stream(training, tokenizer, seed)
    model = new_model(tokenizer)
    print(f"{model.num_parameters()} weights, {len(training)} documents, {len(stream)} tokens", flush=True)
    fit(model, stream, steps)
    model = model.bfloat16().eval()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    tokenizer.save_pretrained(folder)
    calibration = calibration_part(training, seed)
    (folder / "calibration.txt").write_text(SEPARATOR.join(calibration) + "\n", encoding="ascii")
    (folder / "evaluation.txt").write_text(SEPARATOR.join(evaluation) + "\n", encoding="ascii")
    print(f"perplexity on held-out text: {perplexity(model, tokenizer, SEPARATOR.join(evaluation)):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python tests/support/train_demo.py", description="Make the demo model.")
    parser.add_argument("output_folder", type=Path)
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--seed", type=int, default=RECIPE.seed)
    arguments = parser.parse_args()
    make(arguments.output_folder, arguments.steps, arguments.seed)
