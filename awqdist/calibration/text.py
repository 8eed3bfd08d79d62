"""Turns calibration text into samples: token ids (N, L) without padding.

Samples are taken evenly over the whole text, so that a long file is covered and only the parts that are used are
tokenized. Each sample begins with the special tokens that the tokenizer puts in front of a text (BOS, for most models):
some models behave quite differently without them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awqdist.errors import CalibrationError, first_line

_TEXT_SUFFIXES = {".txt", ".text", ".md", ".json", ".jsonl", ".parquet", ".csv", ".gz"}
_CHARACTERS_PER_TOKEN = (6, 16)  # tokenized for a sample; the second where the first gave too few tokens


def load_calibration(source: Any, tokenizer: Any, num_samples: int, sequence_length: int, seed: int = 0) -> Tensor:
    """Returns token ids (num_samples, sequence_length), int64.

    Args:
        source: A text file (.txt and the like, or .jsonl with a "text" field), a hub dataset "NAME", "NAME:CONFIG" or
            "NAME:CONFIG:SPLIT", a datasets.Dataset, a list of texts, or a list of lists of token ids.
        tokenizer: The model's tokenizer. Token ids need none.
        num_samples: Number of samples.
        sequence_length: Tokens per sample, special tokens included.
        seed: Moves the places in a text that samples are taken from; 0 starts at its beginning.

    Raises:
        CalibrationError: If the source is missing, empty, too short, or holds something else.
    """
    if num_samples < 1 or sequence_length < 1:
        raise CalibrationError(
            f"cannot calibrate on {num_samples} samples of {sequence_length} tokens; both must be 1 or more"
        )
    where = "the calibration dataset"
    if isinstance(source, str | Path):
        where = str(source)
        text = _read_file(Path(source)) if _is_path(where) else "\n\n".join(_hub_texts(where, num_samples))
    else:
        rows = list(source) if isinstance(source, list | tuple) else _column(source)
        if rows and not isinstance(rows[0], str):
            return _samples_of_ids(rows, num_samples, sequence_length)
        if not all(isinstance(row, str) for row in rows):
            raise CalibrationError(
                f"{where} mixes texts with something else; give texts only, or lists of token ids only"
            )
        text = "\n\n".join(rows)
    return samples_of_text(text, tokenizer, num_samples, sequence_length, seed=seed, where=where)


def samples_of_text(
    text: str,
    tokenizer: Any,
    num_samples: int,
    sequence_length: int,
    *,
    seed: int = 0,
    where: str = "the calibration text",
) -> Tensor:
    """Returns samples taken evenly over `text`: token ids (num_samples, sequence_length), int64.

    Args:
        text: The whole text.
        tokenizer: The model's tokenizer.
        num_samples: Number of samples.
        sequence_length: Tokens per sample, special tokens included.
        seed: Moves the places that samples are taken from; 0 starts at the text's beginning.
        where: The name of the text in error messages.

    Raises:
        CalibrationError: If the text is empty or too short.
    """
    if not text.strip():
        raise CalibrationError(f"{where} is empty; give a text of at least {num_samples * sequence_length} tokens")
    ids = tokenizer("")["input_ids"]
    prefix = [i for i in ids if i != tokenizer.eos_token_id or i == tokenizer.bos_token_id]
    wanted = sequence_length - len(prefix)
    if wanted < 1:
        raise CalibrationError(
            f"samples of {sequence_length} tokens leave no room for text behind the {len(prefix)} special tokens; "
            "raise --seq-len"
        )
    if seed:
        start = random.Random(seed).randrange(len(text))
        text = f"{text[start:]}\n{text[:start]}"
    spacing = len(text) // num_samples
    for characters in _CHARACTERS_PER_TOKEN:
        length = min(spacing, wanted * characters)
        pieces = [text[i * spacing : i * spacing + length] for i in range(num_samples)]
        samples = [ids[:wanted] for ids in _tokenize(tokenizer, pieces)]
        if all(len(ids) == wanted for ids in samples):
            break
    else:  # a short text: tokenize it whole
        ids = _tokenize(tokenizer, [text])[0]
        if len(ids) < num_samples * wanted:
            raise CalibrationError(
                f"{where} is too short: it has {len(ids)} tokens, {num_samples} samples of {sequence_length} need"
                f" {num_samples * wanted}; give more text, or lower --num-samples or --seq-len"
            )
        samples = [ids[i * wanted : (i + 1) * wanted] for i in range(num_samples)]
    return torch.tensor([prefix + ids for ids in samples], dtype=torch.long)


def is_text(source: Any) -> bool:
    """Returns whether a calibration source is text, which needs a tokenizer. Otherwise it is token ids."""
    if isinstance(source, str | Path):
        return True
    if isinstance(source, list | tuple):
        return not source or isinstance(source[0], str)
    return "input_ids" not in (getattr(source, "column_names", None) or ())


def _samples_of_ids(rows: Iterable[Sequence[int]], num_samples: int, sequence_length: int) -> Tensor:
    """Joins lists of token ids and cuts them anew. Lists of the right length stay as they are."""
    try:
        stream = torch.tensor([int(token) for row in rows for token in row], dtype=torch.long)
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"the calibration dataset is neither texts nor lists of token ids ({error})") from None
    needed = num_samples * sequence_length
    if stream.numel() < needed:
        raise CalibrationError(
            f"the calibration dataset is too short: {stream.numel()} tokens, {num_samples} samples of {sequence_length}"
            f" need {needed}; give more, or lower num_calibration_samples or max_seq_length"
        )
    return stream[:needed].view(num_samples, sequence_length)


def _tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return encoded


def _is_path(source: str) -> bool:
    """Returns whether a source names a file: it exists, or no hub dataset can have that name."""
    path = Path(source)
    no_hub_name = path.suffix in _TEXT_SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1
    return path.exists() or no_hub_name


def _read_file(file: Path) -> str:
    if not file.exists():
        raise CalibrationError(f"calibration text not found: {file}; give a text file or a hub dataset")
    if file.is_dir():
        raise CalibrationError(f"{file} is a folder; give a text file or a hub dataset")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read calibration text {file}: {error}") from None
    if file.suffix != ".jsonl":
        return text
    try:
        return "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
    except (ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f'{file}: every line must be a JSON object with a "text" field ({error!r})') from None


def _hub_texts(name: str, num_samples: int) -> list[str]:
    """Streams eight texts per sample from a hub dataset, enough even where texts are short."""
    from datasets import load_dataset

    identifier, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        dataset = load_dataset(identifier, config or None, split=split or "train", streaming=True)
        return [row["text"] for row in dataset.take(8 * num_samples)]
    except Exception as error:  # the hub client raises many kinds: offline, not found, gated, no such split
        raise CalibrationError(
            f"calibration {name!r} is neither a local file nor a dataset that the hub can give ({first_line(error)}); "
            "give a text file"
        ) from None


def _column(dataset: Any) -> list[Any]:
    """Returns the "input_ids" or "text" column of a datasets.Dataset."""
    names = getattr(dataset, "column_names", None) or []
    column = next((name for name in ("input_ids", "text") if name in names), None)
    if column is None:
        raise CalibrationError(f'the calibration dataset needs a column "text" or "input_ids"; it has {names}')
    return list(dataset[column])
