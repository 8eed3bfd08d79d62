"""Measures perplexity and the KL divergence between a quantized model and its float model on a text. README.md has the formulas.

The text is cut into windows that do not overlap, each read by itself: the first token of a window is context only. Weights are loaded as
float32, whatever the checkpoint stores, so that what is measured is the weights and not the arithmetic.
"""

from __future__ import annotations

import io
import math
import re
import time
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from awqdist.errors import AwqdistError, CheckpointError, NumericalError, first_line
from awqdist.eval.sharded import Ranks, join_ranks, load_sharded
from awqdist.eval.weights import has_packed_experts, load_dequantized
from awqdist.model.skeleton import load_config, load_tokenizer
from awqdist.run.device import choose_device

Shard = Literal["none", "auto", "zero3"]
WINDOWS_PER_BATCH = 8
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")  # `owner/name`, or a bare `name`


class EvaluationError(AwqdistError):
    """The text cannot be used, or the two models cannot be compared."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` measured. `kl` and `against_perplexity` are None where there was no model to compare with."""

    perplexity: float
    kl: float | None  # nats per predicted token
    against_perplexity: float | None
    num_tokens: int  # that were read; (window − 1) / window of them were predicted
    window: int
    seconds: float


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    against: str | Path | None = None,
    max_tokens: int = 16384,
    window: int = 256,
    device: str = "auto",
    shard: Shard = "none",
) -> Evaluation:
    """Measures the perplexity of `model` on a text and, with `against`, KL(against ‖ model) per predicted token.

    Args:
        model: Folder or hub id of anything that transformers loads, quantized or not.
        text: A UTF-8 text file.
        against: The float model to compare with. Both must have the same vocabulary.
        max_tokens: How many tokens from the beginning of the text are read.
        window: Tokens per window. Of each, all but the first are predicted.
        device: "cpu", "cuda", "cuda:N", or "auto": the first CUDA device, else the CPU.
        shard: "auto" spreads each model over all GPUs of this process, then over memory and disk; "zero3" spreads it over the
            ranks of a launcher, which all get the result.

    Returns:
        Perplexity, KL in nats, number of tokens, time in seconds.

    Raises:
        EvaluationError: The text is missing, empty or too short, or the models cannot be compared.
        CheckpointError: A model cannot be loaded, or its checkpoint lacks tensors.
        NumericalError: The loss of a model is not finite.

    Example:
        >>> from awqdist import evaluate
        >>> from awqdist.demo import demo_folder, evaluation_text
        >>> result = evaluate(demo_folder(), evaluation_text(), max_tokens=1024, device="cpu")
        >>> result.num_tokens
        1024
        >>> 1 < result.perplexity < 100
        True
    """
    started = time.perf_counter()
    if not 2 <= window <= max_tokens:
        raise EvaluationError(f"window is {window} and max_tokens {max_tokens}: expected 2 <= window <= max_tokens")
    if shard != "none" and device != "auto":
        raise EvaluationError(f"--shard {shard} uses all devices that there are; leave out --device {device}")
    text, place = Path(text), choose_device(device)
    content = _read(text)
    names = [str(model)] if against is None else [str(model), str(against)]
    tokenizers = [_load_tokenizer(name) for name in names]
    _refuse_different_vocabularies(names, tokenizers)
    windows = _windows(tokenizers[0], content, text, max_tokens=max_tokens, window=window)
    ranks = join_ranks() if shard == "zero3" else Ranks()
    local = all(Path(name).is_dir() for name in names)
    with redirect_stderr(io.StringIO()) if local else nullcontext():  # a progress bar for each of five steps of loading
        models = [
            load_sharded(n, ranks) if shard == "zero3" else _load_model(n, place, spread=shard == "auto") for n in names
        ]
        losses, divergence = _mean_scores(models, windows, ranks)
    for name, loss in zip(names, losses, strict=True):
        if not math.isfinite(loss):
            raise NumericalError(f"model {name}: its loss on {text} is {loss}; look for damaged weights")
    return Evaluation(
        perplexity=_perplexity(losses[0]),
        kl=divergence,
        against_perplexity=None if against is None else _perplexity(losses[1]),
        num_tokens=windows.numel(),
        window=window,
        seconds=time.perf_counter() - started,
    )


def _read(text: Path) -> str:
    try:
        content = text.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise EvaluationError(f"text {text}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"text {text}: not a readable UTF-8 text file ({error})") from None
    if not content.strip():
        raise EvaluationError(f"text {text}: the file is empty; give a text to measure on")
    return content


def _windows(tokenizer: Any, content: str, text: Path, *, max_tokens: int, window: int) -> Tensor:
    """Returns the first tokens of the text as windows (num_windows, window), int64, CPU. What fills no window is left out."""
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    num_windows = len(ids) // window
    if num_windows == 0:
        raise EvaluationError(
            f"text {text}: {len(ids)} tokens, too few for one window of {window}; "
            "give a longer text or a smaller window"
        )
    return torch.tensor(ids[: num_windows * window]).view(num_windows, window)


def _mean_scores(models: list[Any], windows: Tensor, ranks: Ranks) -> tuple[list[float], float | None]:
    """Returns the mean loss per predicted token of each model and, with two models, the mean KL(second ‖ first).

    windows: (num_windows, window) int64, CPU. Sums are float64, distributions float32 and of one window at a time. Ranks
    take the batches in turn. A rank that has none left runs the last one again, because the others need it, and does not count it.
    """
    losses = [0.0 for _ in models]
    divergence = 0.0
    batches = windows.split(WINDOWS_PER_BATCH)
    with torch.no_grad():
        for index in range(ranks.number, -(-len(batches) // ranks.count) * ranks.count, ranks.count):
            batch = batches[min(index, len(batches) - 1)]
            logits = [model(batch.to(model.device), use_cache=False).logits for model in models]  # each (B, window, V)
            for row, ids in enumerate(batch if index < len(batches) else ()):
                log_probs = [logit[row, :-1].float().log_softmax(-1) for logit in logits]  # each (window − 1, V)
                for number, log_prob in enumerate(log_probs):
                    chosen = log_prob.gather(-1, ids[1:, None].to(log_prob.device))  # (window − 1, 1)
                    losses[number] -= chosen.sum(dtype=torch.float64).item()
                if len(models) == 2:
                    quantized, full = log_probs
                    divergence += (full.exp() * (full - quantized.to(full.device))).sum(dtype=torch.float64).item()
    num_predicted = windows.shape[0] * (windows.shape[1] - 1)
    *means, divergence = (total / num_predicted for total in ranks.totals([*losses, divergence]))
    return means, divergence if len(models) == 2 else None


def _perplexity(mean_loss: float) -> float:
    """Returns exp(mean_loss), or infinity where a broken model is off by more than e^709."""
    return math.exp(mean_loss) if mean_loss < 709 else math.inf


def _refuse_different_vocabularies(names: list[str], tokenizers: list[Any]) -> None:
    """Raises EvaluationError unless all models cut text into the same tokens: KL compares probabilities token by token."""
    first, *others = [tokenizer.get_vocab() for tokenizer in tokenizers]
    for name, vocabulary in zip(names[1:], others, strict=True):
        if vocabulary != first:
            token = min(token for token, _ in first.items() ^ vocabulary.items())
            raise EvaluationError(
                f"vocabularies differ: {names[0]} has {len(first)} tokens and {name} {len(vocabulary)}, and "
                f"{token!r} is number {first.get(token)} in the one and {vocabulary.get(token)} in the other; "
                "compare models that share a vocabulary"
            )


def _load_tokenizer(name: str) -> Any:
    if not Path(name).is_dir() and not HUB_ID.fullmatch(name):
        raise CheckpointError(f"model {name}: no such folder")
    return load_tokenizer(name)


def _load_model(name: str, device: torch.device, *, spread: bool) -> Any:
    """Returns the model in float32, ready to run. Refuses a checkpoint that leaves weights unset."""
    options: dict[str, Any] = {"device_map": "auto"} if spread else {}
    try:
        config = load_config(name)
        text_only = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING  # Mistral3 is not: it sees, but reads text all the same
        loader: Any = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
        if has_packed_experts(Path(name), config):
            model, loaded = load_dequantized(Path(name), config, **options)
        else:
            model, loaded = loader.from_pretrained(
                name, config=config, dtype=torch.float32, output_loading_info=True, **options
            )
        missing = sorted(loaded["missing_keys"])
        if missing:  # transformers would go on with random numbers in their place
            raise CheckpointError(f"model {name}: the checkpoint lacks {len(missing)} tensors, first {missing[0]}")
        return model.eval() if spread else model.to(device).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"model {name}: could not be loaded: {first_line(error)}") from None
