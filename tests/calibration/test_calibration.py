"""From text to samples: no padding, evenly taken, with the special tokens that the model expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_llama import TEXT, Tiny
from transformers import AutoTokenizer

from awqdist.calibration.text import is_text, load_calibration, samples_of_text
from awqdist.errors import CalibrationError


@pytest.fixture(scope="module")
def tokenizer(tiny: Tiny) -> Any:
    return AutoTokenizer.from_pretrained(tiny.model)


def test_samples_have_the_asked_for_shape_and_begin_with_the_special_token(tokenizer: Any, tiny: Tiny) -> None:
    samples = load_calibration(tiny.text, tokenizer, 10, 20)
    assert samples.shape == (10, 20)
    assert samples.dtype == torch.long
    assert (samples[:, 0] == tokenizer.bos_token_id).all()
    assert (samples[:, 1:] != tokenizer.bos_token_id).all()


def test_a_tokenizer_without_special_tokens_gives_samples_without(tokenizer: Any) -> None:
    class Bare:
        bos_token_id = eos_token_id = None

        def __call__(self, text: Any, **options: Any) -> Any:
            return tokenizer(text, **{**options, "add_special_tokens": False})

    samples = samples_of_text(TEXT, Bare(), 4, 16)
    assert samples.shape == (4, 16)
    assert (samples != tokenizer.bos_token_id).all()


def test_samples_are_taken_evenly_over_the_text(tokenizer: Any) -> None:
    samples = samples_of_text(TEXT, tokenizer, 4, 16)
    for number, sample in enumerate(samples):
        piece = TEXT[number * (len(TEXT) // 4) :][:400]
        ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
        assert sample[1:].tolist() == ids[:15]


def test_a_text_that_is_just_long_enough_is_used_to_its_end(tokenizer: Any) -> None:
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    num_samples = len(ids) // 15
    samples = samples_of_text(TEXT, tokenizer, num_samples, 16)
    assert samples[:, 1:].flatten().tolist() == ids[: num_samples * 15]
    with pytest.raises(CalibrationError, match=f"it has {len(ids)} tokens"):
        samples_of_text(TEXT, tokenizer, num_samples + 1, 16)


def test_seeds_move_the_samples_and_zero_does_not(tokenizer: Any) -> None:
    samples = [samples_of_text(TEXT, tokenizer, 4, 16, seed=seed) for seed in (0, 0, 1, 1, 2)]
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[2], samples[3])
    assert not torch.equal(samples[0], samples[2])
    assert not torch.equal(samples[2], samples[4])


def test_token_ids_of_the_right_length_stay_as_they_are() -> None:
    rows = [list(range(i, i + 8)) for i in range(5)]
    assert load_calibration(rows, None, 5, 8).tolist() == rows
    assert load_calibration(rows, None, 3, 8).tolist() == rows[:3]
    assert load_calibration(rows, None, 4, 10).flatten().tolist() == [token for row in rows for token in row]
    with pytest.raises(CalibrationError, match="40 tokens, 6 samples of 8 need 48"):
        load_calibration(rows, None, 6, 8)


def test_texts_and_token_ids_are_told_apart() -> None:
    assert is_text("file.txt")
    assert is_text(Path("file"))
    assert is_text(["a", "b"])
    assert not is_text([[1, 2]])
    assert not is_text([torch.ones(3)])


def test_hub_names_reach_the_hub_with_configuration_and_split(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Stream:
        def take(self, count: int) -> list[dict[str, str]]:
            asked.append(count)
            return [{"text": TEXT}]

    def load_dataset(*args: Any, **options: Any) -> Stream:
        asked.append((args, options))
        return Stream()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name, expected in {
        "some/text": (("some/text", None), "train"),
        "some/text:large": (("some/text", "large"), "train"),
        "some/text:large:test": (("some/text", "large"), "test"),
        "some/text::validation": (("some/text", None), "validation"),
    }.items():
        asked.clear()
        assert load_calibration(name, tokenizer, 3, 16).shape == (3, 16)
        assert asked == [(expected[0], {"split": expected[1], "streaming": True}), 24]


def test_a_hub_dataset_without_a_text_column_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def take(self, count: int) -> list[dict[str, str]]:
            return [{"content": TEXT}]

    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: Stream())
    with pytest.raises(CalibrationError, match="text"):
        load_calibration("some/text", tokenizer, 3, 16)


def test_lines_of_other_systems_are_read(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "unix.txt").write_bytes(TEXT.encode())
    (tmp_path / "windows.txt").write_bytes(TEXT.replace("\n", "\r\n").encode("utf-8-sig"))
    samples = [load_calibration(tmp_path / name, tokenizer, 4, 16) for name in ("unix.txt", "windows.txt")]
    assert torch.equal(samples[0][0], samples[1][0])


def test_a_file_without_a_suffix_is_read(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    assert load_calibration("words", tokenizer, 2, 16).shape == (2, 16)
