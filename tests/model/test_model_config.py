"""Models whose publishers gave them a type, a tokenizer class and code of their own: read by what transformers knows, no code is run."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from support.family_oracles import recipe, token_ids
from support.tiny_models import tiny_checkpoint, tiny_text, tiny_tokenizer
from transformers import DeepseekV3Config

from awqdist import oneshot
from awqdist.errors import CheckpointError
from awqdist.eval.evaluate import evaluate
from awqdist.model.skeleton import load_tokenizer, read_config


@pytest.fixture
def kimi(tmp_path: Path) -> Path:
    """A checkpoint with the fields of Kimi-K2's config.json and tokenizer_config.json, less the Python files that they speak of."""
    source = tiny_checkpoint("kimi-k2", tmp_path / "source")
    own = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    }
    edit(source / "tokenizer_config.json", **own)
    return source


@pytest.fixture(autouse=True)
def _nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask on the terminal whether to run a model's code."""

    def asked(prompt: str = "") -> str:
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr(builtins, "input", asked)


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_kimi_k2_is_read_as_deepseek_v3(kimi: Path) -> None:
    config = read_config(kimi)

    assert type(config) is DeepseekV3Config
    assert (config.model_type, config.n_group, config.architectures) == ("deepseek_v3", 1, ["DeepseekV3ForCausalLM"])


def test_a_tokenizer_with_a_class_of_its_own_is_read_from_its_files(kimi: Path) -> None:
    text = "the quick brown fox"

    assert load_tokenizer(kimi)(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


def test_kimi_k2_keeps_its_config_and_can_be_evaluated(kimi: Path, tmp_path: Path) -> None:
    oneshot(
        model=str(kimi),
        dataset=token_ids(4).tolist(),
        recipe=recipe(8),
        output_dir=tmp_path / "output",
        num_calibration_samples=4,
        max_seq_length=32,
        device="cpu",
    )

    expected, found = (json.loads((folder / "config.json").read_text()) for folder in (kimi, tmp_path / "output"))
    assert found.pop("quantization_config")["format"] == "pack-quantized"
    assert found == expected
    assert found["model_type"] == "kimi_k2"
    (tmp_path / "text.txt").write_text(tiny_text(40))
    evaluation = evaluate(str(tmp_path / "output"), tmp_path / "text.txt", against=str(kimi), max_tokens=256, window=32)
    assert evaluation.kl is not None
    assert 0 < evaluation.kl < 0.01


def test_a_type_that_only_its_own_code_knows_is_refused_in_one_line(kimi: Path) -> None:
    edit(kimi / "config.json", model_type="kimi_k9")

    with pytest.raises(CheckpointError, match=r"config\.json: transformers cannot read it: .*custom code") as error:
        read_config(kimi)
    assert "\n" not in str(error.value)
