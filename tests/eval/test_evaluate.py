"""Perplexity and KL against a slow oracle, on random models of two layers."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.command_line import awqdist
from support.family_oracles import dequantized_checkpoint, read_all, recipe, token_ids
from support.tiny_llama import write_llama
from support.tiny_models import tiny_checkpoint, tiny_text
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from awqdist import oneshot
from awqdist.errors import CheckpointError, NumericalError
from awqdist.eval.evaluate import EvaluationError, evaluate
from awqdist.eval.weights import FloatWeights

WINDOW = 16
TEXT = "the quick brown fox jumps over the lazy dog and the dog sleeps on while the fox runs to the river\n" * 12


def make_model(folder: Path, *, seed: int = 0, vocabulary: int = 64, words: str = TEXT) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(words.splitlines(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    sizes = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    write_llama(folder, dtype=torch.float32, seed=seed, initializer_range=0.3, **sizes, **heads)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def slow_distributions(model: str, *, max_tokens: int) -> list[tuple[int, list[float]]]:
    """(next token, probabilities) of every predicted position: one prefix at a time, softmax in plain Python."""
    network = LlamaForCausalLM.from_pretrained(model)
    ids = PreTrainedTokenizerFast.from_pretrained(model).encode(TEXT, add_special_tokens=False)[:max_tokens]
    predictions = []
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        for end in range(start + 1, start + WINDOW):
            with torch.no_grad():
                logits = network(torch.tensor([ids[start:end]])).logits[0, -1].tolist()
            total = sum(math.exp(logit) for logit in logits)
            predictions.append((ids[end], [math.exp(logit) / total for logit in logits]))
    return predictions


def test_perplexity_equals_a_slow_oracle(model: str, text: Path) -> None:
    predictions = slow_distributions(model, max_tokens=70)
    expected = math.exp(-sum(math.log(probs[token]) for token, probs in predictions) / len(predictions))
    result = evaluate(model, text, max_tokens=70, window=WINDOW, device="cpu")
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert (result.num_tokens, result.window) == (64, WINDOW)
    assert result.kl is None
    assert result.against_perplexity is None


def test_kl_equals_a_slow_oracle_in_the_direction_from_the_float_model(
    model: str, other_model: str, text: Path
) -> None:
    quantized, full = (slow_distributions(name, max_tokens=160) for name in (model, other_model))
    terms = [
        sum(p * math.log(p / q) for p, q in zip(p_full, p_quantized, strict=True))
        for (_, p_quantized), (_, p_full) in zip(quantized, full, strict=True)
    ]
    result = evaluate(model, text, against=other_model, max_tokens=160, window=WINDOW, device="cpu")
    assert result.kl == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    alone = evaluate(other_model, text, max_tokens=160, window=WINDOW, device="cpu")
    assert result.against_perplexity == pytest.approx(alone.perplexity, rel=1e-6)


def test_kl_of_a_model_against_itself_is_zero(model: str, text: Path) -> None:
    result = evaluate(model, text, against=model, window=WINDOW, device="cpu")
    assert result.kl == 0.0
    assert result.perplexity == result.against_perplexity


def test_a_text_shorter_than_max_tokens_is_read_to_its_last_whole_window(model: str, text: Path) -> None:
    num_tokens = len(PreTrainedTokenizerFast.from_pretrained(model).encode(TEXT, add_special_tokens=False))
    assert num_tokens % WINDOW != 0
    assert evaluate(model, text, window=WINDOW, device="cpu").num_tokens == num_tokens // WINDOW * WINDOW


def test_a_text_that_is_missing_empty_or_not_text_is_refused(model: str, tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    refusals = ((tmp_path / "none.txt", "no such file"), (empty, "empty"), (binary, "UTF-8"), (tmp_path, "readable"))
    for file, reason in refusals:
        with pytest.raises(EvaluationError, match=reason) as refused:
            evaluate(model, file, device="cpu")
        assert str(file) in str(refused.value)


def test_a_text_shorter_than_one_window_is_refused_with_both_lengths(model: str, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("fox")
    with pytest.raises(EvaluationError, match=r"tokens, too few for one window of 256"):
        evaluate(model, short, device="cpu")


def test_a_window_that_predicts_nothing_or_exceeds_the_tokens_is_refused(model: str, text: Path) -> None:
    for window, max_tokens in ((1, 64), (65, 64)):
        with pytest.raises(EvaluationError, match="2 <= window <= max_tokens"):
            evaluate(model, text, window=window, max_tokens=max_tokens)


def test_a_model_folder_that_is_missing_or_holds_no_model_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        evaluate(str(tmp_path / "none"), text)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        evaluate(str(tmp_path), text)


def test_models_with_different_vocabularies_are_not_compared(model: str, text: Path, tmp_path: Path) -> None:
    different = make_model(tmp_path / "different", words=TEXT[::-1])
    with pytest.raises(EvaluationError, match=r"vocabularies differ: .* 64 tokens and .* 64, and '.+' is number"):
        evaluate(model, text, against=different, window=WINDOW)


def change_tensors(folder: str, copy: Path, change: str) -> str:
    network = LlamaForCausalLM.from_pretrained(folder)
    state = network.state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "drop":
        del state[name]
    else:
        state[name][0, 0] = math.nan
    network.save_pretrained(copy, state_dict=state)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(copy)
    return str(copy)


def test_a_checkpoint_that_lacks_a_tensor_is_refused_and_not_filled_at_random(
    model: str, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, first model\.layers\.1\.mlp\.up_proj\.weight"):
        evaluate(change_tensors(model, tmp_path / "lacking", "drop"), text, window=WINDOW)


def test_a_model_that_is_not_finite_is_named(model: str, text: Path, tmp_path: Path) -> None:
    damaged = change_tensors(model, tmp_path / "damaged", "spoil")
    with pytest.raises(NumericalError, match=r"damaged: its loss on .* is nan"):
        evaluate(model, text, against=damaged, window=WINDOW, device="cpu")


def test_a_model_spread_over_all_that_there_is_gives_the_same(model: str, other_model: str, text: Path) -> None:
    alone, spread = (
        evaluate(model, text, against=other_model, window=WINDOW, shard=shard) for shard in ("none", "auto")
    )
    assert (spread.perplexity, spread.kl) == (alone.perplexity, alone.kl)


def test_zero3_without_a_launcher_is_refused_and_so_is_a_device_with_it(model: str, text: Path) -> None:
    command = ("eval", model, "--text", text, "--shard", "zero3")
    assert "torchrun --nproc-per-node N -m awqdist eval" in awqdist(*command).error_line()
    assert "leave out --device cpu" in awqdist(*command, "--device", "cpu").error_line()


def pack(source: Path, output: Path, *, symmetric: bool = False) -> None:
    samples, chosen = token_ids(4).tolist(), recipe(symmetric=symmetric)
    sizes = {"num_calibration_samples": 4, "max_seq_length": 32}
    oneshot(model=source, dataset=samples, recipe=chosen, output_dir=output, **sizes)


@pytest.mark.slow
@pytest.mark.torchrun
@pytest.mark.parametrize("family", ["llama", "gemma", "deepseek-v3"])
def test_zero3_over_two_ranks_gives_what_one_process_gives(family: str, tmp_path: Path) -> None:
    """A packed model against its float model: tied embeddings, fused experts, a router's bias, windows that leave one rank no batch."""
    source, text = tiny_checkpoint(family, tmp_path / "source"), tmp_path / "text.txt"
    text.write_text(tiny_text(60))
    pack(source, tmp_path / "packed")
    command = ["-m", "awqdist", "eval", tmp_path / "packed", "--against", source, "--text", text, "--json"]
    command += ["--max-tokens", 32 * 24, "--window", 32]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2]
    found = []
    for before, after in (([sys.executable], []), (launcher, ["--shard", "zero3"])):
        done = subprocess.run(list(map(str, [*before, *command, *after])), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0]["num_tokens"] == found[1]["num_tokens"] == 32 * 24
    for figure in ("perplexity", "against_perplexity", "kl"):
        assert found[1][figure] == pytest.approx(found[0][figure], rel=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_are_read_as_what_a_packed_checkpoint_means(symmetric: bool, tmp_path: Path) -> None:
    source, packed = tiny_checkpoint("llama", tmp_path / "source"), tmp_path / "packed"
    pack(source, packed, symmetric=symmetric)
    expected = read_all(dequantized_checkpoint(packed, tmp_path / "float"))
    weights = FloatWeights(packed, json.loads((packed / "config.json").read_text())["quantization_config"])
    assert sorted(weights.names) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights.read(name), tensor.float())
