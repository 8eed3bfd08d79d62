"""The Python API as the issue has it, and what it takes as model and as calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from support.command_line import awqdist, model_files
from support.tiny_llama import NUM_LAYERS, Tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from awqdist import (
    AwqdistError,
    AWQMapping,
    AWQModifier,
    GPTQModifier,
    QuantizationArgs,
    QuantizationModifier,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
    RunSettings,
    load_recipe,
    oneshot,
    quantize,
    register_mappings,
)
from awqdist.layer.records import RunSummary
from awqdist.model import families

SIZES = {"num_calibration_samples": 8, "max_seq_length": 32, "chunk_tokens": 128, "device": "cpu"}


def scheme(group_size: int = 32) -> QuantizationScheme:
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=4,
            type=QuantizationType.INT,
            dynamic=False,
            symmetric=False,
            strategy=QuantizationStrategy.GROUP,
            group_size=group_size,
        ),
    )


def gptq_recipe() -> list[Any]:
    """The recipe of the tiny fixture, in objects."""
    return [AWQModifier(n_grid=4), GPTQModifier(ignore=["lm_head"], config_groups={"group_0": scheme()})]


def layers(output: Path) -> dict[str, bytes]:
    return {name: data for name, data in model_files(output).items() if name.endswith(".safetensors")}


def smoothed(summary: RunSummary) -> set[tuple[str, tuple[str, ...]]]:
    """Smooth and balance layers of layer 0, by their last names."""
    return {
        (m.smooth_layer.rpartition(".")[2], tuple(name.rpartition(".")[2] for name in m.balance_layers))
        for m in summary.layers[0].mappings
    }


ALL_MAPPINGS = {
    ("input_layernorm", ("q_proj", "k_proj", "v_proj")),
    ("v_proj", ("o_proj",)),
    ("post_attention_layernorm", ("gate_proj", "up_proj")),
    ("up_proj", ("down_proj",)),
}


@pytest.fixture
def in_memory(tiny: Tiny) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny.model)
    return model


def test_the_example_of_the_issue_runs_as_written(tiny: Tiny, tmp_path: Path) -> None:
    recipe = [
        AWQModifier(bits=4, symmetric=False),
        QuantizationModifier(
            ignore=["lm_head"],
            config_groups={
                "group_0": QuantizationScheme(
                    targets=["Linear"],
                    weights=QuantizationArgs(
                        num_bits=4,
                        type=QuantizationType.INT,
                        dynamic=False,
                        symmetric=False,
                        strategy=QuantizationStrategy.GROUP,
                        group_size=32,
                    ),
                )
            },
        ),
    ]
    summary = oneshot(
        model=str(tiny.model),
        dataset=str(tiny.text),
        recipe=recipe,
        output_dir=str(tmp_path / "output"),
        num_calibration_samples=8,
        max_seq_length=32,
    )
    assert smoothed(summary) == ALL_MAPPINGS
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    assert loaded.config.quantization_config.quant_method == "compressed-tensors"
    logits = loaded(torch.tensor([[0, 5, 6, 7]])).logits
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("end", ["", "$"])
def test_the_mappings_of_the_issue_run_as_written(tiny: Tiny, tmp_path: Path, end: str) -> None:
    modifier = AWQModifier(
        mappings=[
            AWQMapping(f"re:.*input_layernorm{end}", [f"re:.*q_proj{end}", f"re:.*k_proj{end}", f"re:.*v_proj{end}"]),
            AWQMapping(f"re:.*v_proj{end}", [f"re:.*o_proj{end}"]),
            AWQMapping(f"re:.*post_attention_layernorm{end}", [f"re:.*gate_proj{end}", f"re:.*up_proj{end}"]),
            AWQMapping(f"re:.*up_proj{end}", [f"re:.*down_proj{end}"]),
        ],
        n_grid=4,
    )
    recipe = [modifier, GPTQModifier(ignore=["lm_head"], config_groups={"group_0": scheme()})]
    summary = oneshot(tiny.model, tiny.text, recipe, tmp_path / "given", **SIZES)
    assert smoothed(summary) == ALL_MAPPINGS
    oneshot(tiny.model, tiny.text, gptq_recipe(), tmp_path / "default", **SIZES)
    assert layers(tmp_path / "given") == layers(tmp_path / "default")


def test_the_api_and_the_command_line_write_the_same_bytes(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    oneshot(tiny.model, tiny.text, gptq_recipe(), tmp_path / "objects", **SIZES)
    assert model_files(tmp_path / "objects") == model_files(undisturbed)
    settings = RunSettings(
        tiny.model, tmp_path / "settings", num_samples=8, sequence_length=32, chunk_tokens=128, device="cpu"
    )
    quantize(load_recipe(tiny.recipe), settings, tiny.text)
    assert model_files(tmp_path / "settings") == model_files(undisturbed)


def test_a_model_in_memory_gives_the_same_tensors_and_stays_as_it_was(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, in_memory: PreTrainedModel
) -> None:
    before = {name: tensor.clone() for name, tensor in in_memory.state_dict().items()}
    config = in_memory.config.to_dict()
    oneshot(in_memory, str(tiny.text), tiny.recipe, tmp_path / "output", **SIZES)
    assert layers(tmp_path / "output") == layers(undisturbed)
    assert in_memory.config.to_dict() == config
    assert in_memory.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in in_memory.state_dict().items())
    assert (tmp_path / "output" / "tokenizer.json").is_file()


def test_a_model_in_memory_without_a_name_needs_a_tokenizer_for_texts_only(
    tiny: Tiny, undisturbed: Path, tmp_path: Path, in_memory: PreTrainedModel
) -> None:
    in_memory.config._name_or_path = ""
    with pytest.raises(AwqdistError, match="give tokenizer="):
        oneshot(in_memory, tiny.text, tiny.recipe, tmp_path / "refused", **SIZES)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    oneshot(in_memory, tiny.text, tiny.recipe, tmp_path / "texts", tokenizer=tokenizer, **SIZES)
    assert layers(tmp_path / "texts") == layers(undisturbed)
    summary = oneshot(in_memory, [list(range(2, 34))] * 8, tiny.recipe, tmp_path / "ids", **SIZES)
    assert summary.num_calibration_samples == 8
    assert not (tmp_path / "ids" / "tokenizer.json").exists()


def test_a_model_in_memory_resumes(tiny: Tiny, tmp_path: Path, in_memory: PreTrainedModel) -> None:
    output = tmp_path / "output"
    oneshot(in_memory, tiny.text, tiny.recipe, output, **SIZES)
    whole = model_files(output)
    (output / "model.safetensors.index.json").unlink()
    (output / "model-layer-00002.safetensors").unlink()
    oneshot(in_memory, tiny.text, tiny.recipe, output, **SIZES)
    assert model_files(output) == whole


def test_one_text_may_come_as_file_list_or_dataset(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    text = tiny.text.read_text()
    sources = [text], (text,), datasets.Dataset.from_dict({"text": [text], "more": [1]}), tiny.text
    for number, source in enumerate(sources):
        oneshot(tiny.model, source, tiny.recipe, tmp_path / str(number), **SIZES)
        assert model_files(tmp_path / str(number)) == model_files(undisturbed)


def test_token_ids_may_come_as_lists_tensors_or_dataset(tiny: Tiny, tmp_path: Path) -> None:
    ids = torch.randint(2, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    sources: list[Any] = [
        ids.tolist(),
        list(ids),
        [ids.flatten().tolist()],
        datasets.Dataset.from_dict({"input_ids": ids.tolist()}),
        datasets.Dataset.from_dict({"input_ids": ids.tolist(), "text": ["words"] * 8}),
    ]
    for number, source in enumerate(sources):
        oneshot(tiny.model, source, tiny.recipe, tmp_path / str(number), **SIZES)
        assert layers(tmp_path / str(number)) == layers(tmp_path / "0")


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ([], "is empty"),
        ([""], "is empty"),
        ([[]], "too short"),
        ([[1, 2, 3]], "too short"),
        ([[1] * 300, [128] * 10], None),  # the out-of-range token lies behind what is needed
        ([[1] * 31 + [128]] * 8, "the model knows 0 to 127"),
        ([[1] * 31 + [-1]] * 8, "the model knows 0 to 127"),
        (["words", 5], "mixes"),
        ([5, 6], "neither texts nor"),
        ([{"text": "words"}], "neither texts nor"),
        ([None], "neither texts nor"),
        (datasets.Dataset.from_dict({"content": ["words"]}), 'needs a column "text"'),
        (datasets.Dataset.from_dict({"text": [None]}), "neither texts nor"),
        (42, 'needs a column "text"'),
        ("nowhere.txt", "not found"),
        (Path("nowhere"), "nowhere"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_refused(tiny: Tiny, tmp_path: Path, dataset: Any, words: str | None) -> None:
    if words is None:
        oneshot(tiny.model, dataset, tiny.recipe, tmp_path / "output", **SIZES)
        return
    with pytest.raises(AwqdistError, match=words):
        oneshot(tiny.model, dataset, tiny.recipe, tmp_path / "output", **SIZES)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "sizes", [{"num_calibration_samples": 0}, {"max_seq_length": 0}, {"max_seq_length": 1}, {"chunk_tokens": 0}]
)
def test_sizes_that_cannot_be_are_refused(tiny: Tiny, tmp_path: Path, sizes: dict[str, int]) -> None:
    if "chunk_tokens" in sizes:  # at least one sample goes through at a time
        oneshot(tiny.model, tiny.text, tiny.recipe, tmp_path / "output", **{**SIZES, **sizes})
        return
    with pytest.raises(AwqdistError):
        oneshot(tiny.model, tiny.text, tiny.recipe, tmp_path / "output", **{**SIZES, **sizes})
    assert not (tmp_path / "output").exists()


def test_errors_come_as_one_class(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(AwqdistError, match="model folder not found"):
        oneshot(tmp_path / "nowhere", tiny.text, tiny.recipe, tmp_path / "output")
    with pytest.raises(AwqdistError, match="model folder not found"):
        quantize(load_recipe(tiny.recipe), RunSettings(tmp_path / "nowhere", tmp_path / "output"), tiny.text)


def test_every_event_reaches_the_listener(tiny: Tiny, tmp_path: Path) -> None:
    events: list[str] = []
    settings = RunSettings(tiny.model, tmp_path / "output", num_samples=8, sequence_length=32, device="cpu")
    quantize(
        load_recipe(tiny.recipe),
        settings,
        tiny.text,
        listen=lambda message: events.append(type(message.event).__name__),
    )
    assert events[0] == "RunStarted"
    assert events[-1] == "RunFinished"
    assert events.count("LayerFinished") == NUM_LAYERS


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test registers is forgotten afterwards."""
    monkeypatch.setattr(families, "_MAPPINGS", dict(families._MAPPINGS))


@pytest.mark.usefixtures("own_registry")
def test_registered_mappings_are_the_default_of_their_architecture(tiny: Tiny, tmp_path: Path) -> None:
    register_mappings("LlamaForCausalLM", [AWQMapping("re:.*up_proj$", ["re:.*down_proj$"])])
    summary = oneshot(tiny.model, tiny.text, gptq_recipe(), tmp_path / "output", **SIZES)
    assert smoothed(summary) == {("up_proj", ("down_proj",))}


@pytest.mark.usefixtures("own_registry")
def test_a_run_with_other_registered_mappings_is_not_resumed(tiny: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "output"
    oneshot(tiny.model, tiny.text, gptq_recipe(), output, **SIZES)
    (output / "model.safetensors.index.json").unlink()
    register_mappings("LlamaForCausalLM", [AWQMapping("re:.*up_proj$", ["re:.*down_proj$"])])
    with pytest.raises(AwqdistError, match="mappings: "):
        oneshot(tiny.model, tiny.text, gptq_recipe(), output, **SIZES)


def test_a_finished_output_needs_overwrite(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    assert awqdist("quantize", tiny.model, tmp_path / "output", *tiny.options()).code == 0
    with pytest.raises(AwqdistError, match="overwrite"):
        oneshot(tiny.model, tiny.text, gptq_recipe(), tmp_path / "output", **SIZES)
    oneshot(tiny.model, tiny.text, gptq_recipe(), tmp_path / "output", overwrite=True, **SIZES)
    assert model_files(tmp_path / "output") == model_files(undisturbed)


def test_calibrating_all_experts_is_accepted_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="moe_calibrate_all_experts is not needed"), pytest.raises(AwqdistError):
        oneshot(str(tmp_path / "none"), ["text"], output_dir=tmp_path / "out", moe_calibrate_all_experts=True)
