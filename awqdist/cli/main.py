"""Defines the commands of `awqdist`, and turns every expected failure into one line and an exit status.

Heavy libraries are imported inside the commands, so that `awqdist --help` answers at once.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from awqdist.cli import options
from awqdist.cli.options import options_from, settings_of
from awqdist.errors import AwqdistError
from awqdist.settings import DEFAULT_CALIBRATION, Placement, RunSettings

app = typer.Typer(
    name="awqdist",
    help="Quantizes large language models to 4 bit with AWQ and GPTQ, layer by layer, from checkpoint to checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(asked: bool) -> None:
    if asked:
        from awqdist import __version__

        print(__version__)
        raise typer.Exit()


@app.callback()
def _awqdist(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: awqdist quantize meta-llama/Llama-3.1-8B ./llama-w4 --calibration text.txt")
@options_from(RunSettings, Placement)
def quantize(
    model: options.Model,
    output: Annotated[Path, typer.Argument(help="Folder for the result. The same command again resumes.")],
    recipe: options.Recipe = "default",
    calibration: Annotated[
        str, typer.Option(help="Text file, .jsonl with a text field, or hub dataset NAME[:CONFIG[:SPLIT]].")
    ] = DEFAULT_CALIBRATION,
    progress: options.Progress = "auto",
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write OUTPUT/report.html.")] = True,
    **values: Any,
) -> None:
    """Quantizes MODEL into OUTPUT. If it is interrupted or killed, the same command resumes it."""
    from awqdist.cli.commands import quantize_and_report

    settings = settings_of(RunSettings, values, model=Path(model), output=output)
    placement = settings_of(Placement, values)
    quantize_and_report(settings, recipe, calibration, placement, progress=progress, report=report)


@app.command(epilog="Example: awqdist watch ./llama-w4")
def watch(
    output: Annotated[Path, typer.Argument(help="The output folder of a run.")],
    progress: options.Progress = "auto",
    once: Annotated[bool, typer.Option("--once", help="Show the present state and exit.")] = False,
) -> None:
    """Follows a running job from any machine that can read OUTPUT. Ending this does not end the run."""
    from awqdist.cli.watch import follow, show_now

    (show_now if once else follow)(output, progress)


@app.command(epilog="Example: awqdist plan meta-llama/Llama-3.1-8B --profile machine.json")
@options_from(RunSettings, leave_out=("seed", "snapshot_every", "threads", "overwrite", "offload_dir"))
def plan(
    model: options.ModelToPlan,
    recipe: options.Recipe = "default",
    workers: options.Workers = 1,
    profile: options.ProfileFile = None,
    workers_per_machine: options.WorkersPerMachine = 1,
    simulate: options.Simulate = False,
    times_from: options.TimesFrom = None,
    chunk_seconds: options.ChunkSeconds = None,
    search_seconds: options.SearchSeconds = None,
    read_seconds: options.ReadSeconds = None,
    write_seconds: options.WriteSeconds = None,
    transfer_seconds: options.TransferSeconds = None,
    as_json: options.Json = False,
    **values: Any,
) -> None:
    """Predicts what a run reads, holds and writes, and how long it takes. Reads no tensors."""
    from awqdist.plan.show import load_machines, show_plan
    from awqdist.plan.simulation import SimulationOptions

    settings = settings_of(RunSettings, values, model=Path(model), output=Path("."))
    seconds = (chunk_seconds, search_seconds, read_seconds, write_seconds, transfer_seconds)
    machines = load_machines(profile, workers_per_machine)
    show_plan(settings, recipe, SimulationOptions(workers, simulate, times_from, *seconds), machines, as_json=as_json)


@app.command(epilog="Example: awqdist mappings ./my-model --recipe awq")
def mappings(
    model: options.ModelToPlan,
    recipe: options.Recipe = "default",
    as_json: options.Json = False,
    as_recipe: Annotated[bool, typer.Option("--as-recipe", help="Print a recipe with these mappings.")] = False,
) -> None:
    """Shows which layers smooth which linears, and why a mapping is skipped."""
    from awqdist.plan.mappings import show_mappings

    show_mappings(model, recipe, as_json=as_json, as_recipe=as_recipe)


@app.command(epilog="Example: awqdist verify ./llama-w4 --source meta-llama/Llama-3.1-8B")
def verify(
    output: Annotated[Path, typer.Argument(help="A finished output folder.")],
    source: Annotated[str | None, typer.Option(help="The original model, to compare every weight with.")] = None,
    as_json: options.Json = False,
) -> None:
    """Checks hashes, index, config and every packed tensor of an output. Exit status 1 if anything is wrong."""
    from awqdist.cli.commands import show_verification

    show_verification(output, source, as_json=as_json)


@app.command("eval", epilog="Example: awqdist eval ./llama-w4 --against meta-llama/Llama-3.1-8B --text eval.txt")
def evaluate(
    model: options.Model,
    text: Annotated[Path, typer.Option(help="Text file to evaluate on.")],
    against: Annotated[
        str | None, typer.Option(help="The float model, to measure KL(float || quantized) per token.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text that are read.")] = 16384,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    shard: Annotated[
        Literal["none", "auto", "zero3"],
        typer.Option(help="auto: over all GPUs of this process, then memory; zero3: over the ranks of a launcher."),
    ] = "none",
    as_json: options.Json = False,
) -> None:
    """Measures perplexity and the KL divergence from the float model, with transformers."""
    from awqdist.cli.commands import show_evaluation

    options = {"against": against, "max_tokens": max_tokens, "window": window, "device": device, "shard": shard}
    show_evaluation(model, text, **options, as_json=as_json)


@app.command(epilog="Example: awqdist doctor ./llama-w4 --profile machine.json")
def doctor(
    folder: Annotated[Path, typer.Argument(help="OUTPUT, or a folder on the disk in question.")] = Path("."),
    build_nvme: Annotated[bool, typer.Option("--build-nvme", help="Compile DeepNVMe's operator first.")] = False,
    profile: Annotated[Path | None, typer.Option(help="Write this machine's throughput to this file, as JSON.")] = None,
    ray_address: options.RayAddress = None,
    as_json: options.Json = False,
) -> None:
    """Checks the environment and measures its throughput. Exit status 1 if a check fails."""
    from awqdist.doctor.health import examine

    examine(folder, build=build_nvme, profile=profile, ray_address=ray_address, as_json=as_json)


@app.command(epilog="Example: awqdist demo ./awqdist-demo")
def demo(
    output: Annotated[Path, typer.Argument(help="Folder for the result.")] = Path("awqdist-demo"),
) -> None:
    """Quantizes the small model that comes with awqdist and shows its perplexity before and after."""
    from awqdist.cli.commands import run_demo

    run_demo(output)


@app.command(epilog="Example: awqdist families --markdown")
def families(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in markdown.")] = False,
) -> None:
    """Lists the supported model families, what is smoothed in each, and what stays in full precision."""
    from awqdist.cli.families import show_families

    show_families(markdown=markdown)


class _Interrupted(BaseException):
    """Is raised by a signal that asks for the end. It is not a KeyboardInterrupt, which typer would answer itself."""


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turns expected failures, wrong usage and signals into one line and an exit status: 2, or 128 + the signal's number."""
    try:
        yield
    except AwqdistError as error:
        typer.echo(f"awqdist: error: {error}", err=True)
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun shows it in its table of failures
            Path(file).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
        raise SystemExit(2) from None
    except PermissionError as error:
        typer.echo(f"awqdist: error: {error.strerror}: {error.filename}; choose a place that you may use", err=True)
        raise SystemExit(2) from None
    except typer.TyperException as error:
        if error.format_message():
            typer.echo(f"awqdist: error: {error.format_message()}", err=True)
        raise SystemExit(error.exit_code) from None
    except _Interrupted as signalled:
        number = int(signalled.args[0])
        typer.echo("awqdist: interrupted; finished layers are kept, the same command resumes", err=True)
        raise SystemExit(128 + number) from None


def _interrupt(number: int, frame: Any) -> None:
    raise _Interrupted(number)


def main() -> None:
    """Runs the command line and exits with its status."""
    gc.disable()  # imports make no garbage, and collecting during them costs a second
    try:
        with _clear_errors():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, _interrupt)
            raise SystemExit(app(standalone_mode=False))
    finally:
        gc.freeze()  # collecting at exit is not worth its time
