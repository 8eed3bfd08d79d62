"""The command line: its frozen options, its help, what it prints, and what it imports."""

from __future__ import annotations

import inspect
import json
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from support.command_line import awqdist, model_files
from support.tiny_llama import NUM_LAYERS, Tiny
from typer.main import get_command

from awqdist import __version__, evaluate
from awqdist.cli.main import app

OPTIONS = {
    "quantize": {
        "MODEL": None,
        "OUTPUT": None,
        "--recipe": "default",
        "--calibration": "mit-han-lab/pile-val-backup::validation",
        "--num-samples": 128,
        "--seq-len": 512,
        "--device": "auto",
        "--format": "compressed-tensors",
        "--progress": "auto",
        "--seed": 0,
        "--chunk-tokens": 2048,
        "--snapshot-every": 8,
        "--overwrite": False,
        "--report": True,
        "--backend": "auto",
        "--num-workers": None,
        "--ray-address": None,
        "--max-restarts": 3,
        "--threads": None,
        "--offload": "cpu",
        "--offload-dir": None,
        "--cpu-memory": None,
        "--gpu-memory": None,
    },
    "watch": {"OUTPUT": None, "--progress": "auto", "--once": False},
    "plan": {
        "MODEL": None,
        "--recipe": "default",
        "--num-samples": 128,
        "--seq-len": 512,
        "--device": "auto",
        "--format": "compressed-tensors",
        "--chunk-tokens": 2048,
        "--workers": 1,
        "--offload": "cpu",
        "--cpu-memory": None,
        "--gpu-memory": None,
        "--profile": None,
        "--workers-per-machine": 1,
        "--simulate": False,
        "--times-from": None,
        "--chunk-seconds": None,
        "--search-seconds": None,
        "--read-seconds": None,
        "--write-seconds": None,
        "--transfer-seconds": None,
        "--json": False,
    },
    "mappings": {"MODEL": None, "--recipe": "default", "--json": False, "--as-recipe": False},
    "families": {"--markdown": False},
    "verify": {"OUTPUT": None, "--source": None, "--json": False},
    "eval": {
        "MODEL": None,
        "--text": None,
        "--against": None,
        "--max-tokens": 16384,
        "--window": 256,
        "--device": "auto",
        "--shard": "none",
        "--json": False,
    },
    "doctor": {
        "FOLDER": ".",
        "--build-nvme": False,
        "--profile": None,
        "--ray-address": None,
        "--json": False,
    },
    "demo": {"OUTPUT": "awqdist-demo"},
}


def test_commands_options_and_defaults_are_these() -> None:
    """Whoever changes the command line changes this table, on purpose."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    found = {
        name: {
            (p.opts[0] if p.param_type_name == "option" else p.name.upper()): _plain(p.default)
            for p in command.params
            if p.name != "help"
        }
        for name, command in commands.items()
    }
    assert found == OPTIONS


LIMITS = {
    "--backend": ("auto", "local", "ray", "torchrun"),
    "--chunk-seconds": 0,
    "--chunk-tokens": 1,
    "--format": ("compressed-tensors", "autoawq"),
    "--max-restarts": 0,
    "--max-tokens": 2,
    "--num-samples": 1,
    "--num-workers": 1,
    "--offload": ("cpu", "disk", "nvme"),
    "--progress": ("auto", "rich", "plain", "json"),
    "--read-seconds": 0,
    "--search-seconds": 0,
    "--seed": 0,
    "--seq-len": 8,
    "--shard": ("none", "auto", "zero3"),
    "--snapshot-every": 1,
    "--threads": 1,
    "--transfer-seconds": 0,
    "--window": 2,
    "--workers": 1,
    "--workers-per-machine": 1,
    "--write-seconds": 0,
}


def test_choices_and_smallest_values_of_options_are_these() -> None:
    """An option means the same in every command. Each value here was that of the options when they were written by hand."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for command in commands.values():
        for option in command.params:
            choices = get_args(option.type_descriptor.annotation)
            limit = choices if set(map(type, choices)) == {str} else option.min
            assert limit == LIMITS.get(option.opts[0]), option.opts[0]


def test_eval_has_the_defaults_of_the_function() -> None:
    parameters = inspect.signature(evaluate).parameters.values()
    defaults = {f"--{x.name.replace('_', '-')}": x.default for x in parameters if x.default is not x.empty}
    assert defaults.items() <= OPTIONS["eval"].items()


def _plain(default: object) -> object:
    value = getattr(default, "value", default)
    return str(value) if isinstance(value, Path) else value


@pytest.mark.parametrize("command", OPTIONS)
def test_the_help_of_every_command_has_an_example_and_a_word_on_every_option(command: str) -> None:
    outcome = awqdist(command, "--help")
    assert outcome.code == 0
    assert f"Example: awqdist {command}" in " ".join(outcome.stdout.split())
    for parameter in get_command(app).commands[command].params:  # type: ignore[attr-defined]
        assert parameter.help or parameter.name == "help", parameter.name


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_lists_all_commands(arguments: tuple[str, ...]) -> None:
    outcome = awqdist(*arguments)
    assert all(command in outcome.stdout + outcome.stderr for command in OPTIONS)
    assert "error" not in outcome.stderr


def test_the_version_is_shown() -> None:
    outcome = awqdist("--version")
    assert (outcome.code, outcome.stdout) == (0, f"{__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["quantize", "--help"], ["plan"]])
def test_help_imports_no_heavy_library(arguments: list[str]) -> None:
    script = (
        "import sys; from awqdist.cli.main import main; sys.argv = ['awqdist', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally: print('|', *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    loaded = set(done.stdout.rpartition("|")[2].split())
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "numpy", "plotly", "compressed_tensors"}


# quantize


def test_json_progress_tells_of_every_layer_in_lines_that_parse(tiny: Tiny, tmp_path: Path) -> None:
    outcome = awqdist("quantize", tiny.model, tmp_path / "output", *tiny.options())
    events = outcome.events
    assert events[0]["event"] == "RunStarted"
    assert events[0]["num_layers"] == NUM_LAYERS
    assert events[-1]["event"] == "RunFinished"
    assert outcome.count("LayerFinished") == NUM_LAYERS
    assert outcome.count("ChunkForwarded") == NUM_LAYERS * 2
    assert {event["stage"] for event in events if event["event"] == "StageStarted"} == {
        "read",
        "forward",
        "search",
        "check",
        "round",
        "write",
    }
    assert outcome.stderr == ""


def test_json_progress_is_json_for_every_parser(tiny: Tiny, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    outcome = awqdist("quantize", tiny.model, tmp_path / "output", *tiny.options("--num-samples", 1))
    for line in outcome.stdout.splitlines():
        json.loads(line, parse_constant=refuse)


def test_plain_progress_goes_to_stderr_and_the_table_to_stdout(tiny: Tiny, tmp_path: Path) -> None:
    outcome = awqdist("quantize", tiny.model, tmp_path / "output", *tiny.options("--progress", "plain"))
    assert outcome.stderr.count("layer ") >= NUM_LAYERS
    assert "finished in" in outcome.stderr
    assert "v_proj → o_proj" in outcome.stdout
    assert str(tmp_path / "output") in outcome.stdout


def test_a_report_is_written_unless_it_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    options = [option for option in tiny.options() if option != "--no-report"]
    assert awqdist("quantize", tiny.model, tmp_path / "with", *options).code == 0
    assert awqdist("quantize", tiny.model, tmp_path / "without", *tiny.options()).code == 0
    assert "<html" in (tmp_path / "with" / "report.html").read_text()
    assert not (tmp_path / "without" / "report.html").exists()


# plan and mappings


@pytest.fixture
def headers_only(tiny: Tiny, tmp_path: Path) -> Path:
    """The tiny model with a data section that is a hole: every tensor that is read is zero."""
    model = tmp_path / "headers"
    shutil.copytree(tiny.model, model)
    data = (model / "model.safetensors").read_bytes()
    length = 8 + struct.unpack("<Q", data[:8])[0]
    with (model / "model.safetensors").open("wb") as stream:
        stream.write(data[:length])
        stream.truncate(len(data))
    return model


@pytest.fixture
def no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("os.preadv", refuse)


@pytest.mark.usefixtures("no_tensors")
def test_plan_reads_no_tensors_and_counts_what_a_run_reads_and_writes(tiny: Tiny, headers_only: Path) -> None:
    outcome = awqdist("plan", headers_only, "--recipe", tiny.recipe, "--num-samples", 8, "--seq-len", 32, "--json")
    assert outcome.code == 0, outcome.stderr
    plan = json.loads(outcome.stdout)
    assert plan["architecture"] == "LlamaForCausalLM"
    assert [layer["layer"] for layer in plan["layers"]] == list(range(NUM_LAYERS))
    assert plan["ignored"] == ["lm_head"]
    assert not plan["inferred"]
    assert len(plan["layers"][0]["quantized"]) == 7
    assert len(plan["layers"][0]["mappings"]) == 4
    assert plan["estimate"]["read_bytes"] >= (tiny.model / "model.safetensors").stat().st_size * 0.98
    assert plan["estimate"]["activation_bytes"] == 8 * 32 * 64 * 2


@pytest.mark.usefixtures("no_tensors")
def test_mappings_reads_no_tensors_and_names_modules_as_on_disk(tiny: Tiny, headers_only: Path) -> None:
    outcome = awqdist("mappings", headers_only, "--recipe", tiny.recipe, "--json")
    layer = json.loads(outcome.stdout)["layers"][1]
    assert {
        "smooth_layer": "model.layers.1.self_attn.v_proj",
        "balance_layers": ["model.layers.1.self_attn.o_proj"],
    } in layer["mappings"]


@pytest.mark.usefixtures("no_tensors")
@pytest.mark.parametrize("command", ["plan", "mappings"])
def test_plan_and_mappings_show_a_table_of_all_layers(tiny: Tiny, headers_only: Path, command: str) -> None:
    outcome = awqdist(command, headers_only, "--recipe", tiny.recipe)
    assert outcome.code == 0
    assert f"0-{NUM_LAYERS - 1}" in outcome.stdout
    assert "self_attn.v_proj" in outcome.stdout
    assert "left in full precision: lm_head" in outcome.stdout


def test_a_mapping_that_is_skipped_is_shown_with_its_reason(tiny: Tiny, tmp_path: Path) -> None:
    text = tiny.recipe.read_text().replace("ignore: [lm_head]", "ignore: [lm_head, 're:.*o_proj']")
    (tmp_path / "recipe.yaml").write_text(text)
    outcome = awqdist("mappings", tiny.model, "--recipe", tmp_path / "recipe.yaml", "--json")
    skipped = json.loads(outcome.stdout)["layers"][0]["skipped"]
    assert len(skipped) == 1
    assert "o_proj" in skipped[0]["mapping"]
    assert skipped[0]["reason"]


def test_plan_and_mappings_write_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("plan", "mappings"):
        assert awqdist(command, tiny.model, "--recipe", tiny.recipe).code == 0
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["plan", "mappings"])
def test_plan_and_mappings_refuse_bad_input_in_one_line(tiny: Tiny, tmp_path: Path, command: str) -> None:
    assert "model folder not found" in awqdist(command, tmp_path / "nowhere").error_line()
    assert "group size 128 does not divide" in awqdist(command, tiny.model).error_line()


# eval


def test_eval_tells_perplexity_and_divergence_as_json(tiny: Tiny, undisturbed: Path) -> None:
    arguments = ("eval", undisturbed, "--text", tiny.text, "--max-tokens", 512, "--window", 32, "--device", "cpu")
    outcome = awqdist(*arguments, "--against", tiny.model, "--json")
    assert outcome.code == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    assert result["num_tokens"] == 512
    assert 1 < result["perplexity"] < math.inf
    assert 0 < result["kl"] < 0.1
    alone = json.loads(awqdist(*arguments, "--json").stdout)
    assert alone["kl"] is None
    assert alone["perplexity"] == pytest.approx(result["perplexity"])


def test_eval_tells_the_same_in_words(tiny: Tiny, undisturbed: Path) -> None:
    arguments = ("eval", undisturbed, "--text", tiny.text, "--max-tokens", 128, "--window", 32)
    outcome = awqdist(*arguments, "--against", tiny.model)
    assert "perplexity" in outcome.stdout
    assert "KL(float || quantized)" in outcome.stdout


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tiny, folder: ("eval", folder / "nowhere", "--text", tiny.text),
        lambda tiny, folder: ("eval", tiny.model, "--text", folder / "nowhere.txt"),
        lambda tiny, folder: ("eval", tiny.model, "--text", tiny.text, "--window", 100_000),
        lambda tiny, folder: ("eval", tiny.model, "--text", tiny.text, "--device", "gpu"),
        lambda tiny, folder: ("eval", tiny.model, "--text", tiny.text, "--device", "cuda:99"),
        lambda tiny, folder: ("eval", tiny.model),
    ],
)
def test_eval_refuses_bad_input_in_one_line(
    tiny: Tiny, tmp_path: Path, spoil: Callable[[Tiny, Path], tuple[object, ...]]
) -> None:
    awqdist(*spoil(tiny, tmp_path)).error_line()


# demo


def test_the_demo_quantizes_its_model_and_shows_the_perplexity_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = awqdist("demo")
    assert outcome.code == 0, outcome.stderr
    assert "before" in outcome.stdout
    assert "after" in outcome.stdout
    assert str(tmp_path / "awqdist-demo") in outcome.stdout
    assert "model.safetensors.index.json" in model_files(tmp_path / "awqdist-demo")
    assert (tmp_path / "awqdist-demo" / "report.html").is_file()


def test_the_demo_leaves_a_folder_alone_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert "not begun by awqdist" in awqdist("demo", tmp_path).error_line()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
