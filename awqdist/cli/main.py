"""The command line. Commands are thin: they turn options into settings, call the package, and show what comes back.

Heavy libraries are imported inside the commands, so that `awqdist --help` answers at once.
"""

from __future__ import annotations

import gc
import signal
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from awqdist.cli import options
from awqdist.cli.failures import clear_errors, interrupt
from awqdist.cli.options import options_from, settings_of
from awqdist.settings import DEFAULT_CALIBRATION, Placement, RunSettings

app = typer.Typer(
    name="awqdist",
    help="Quantizes large language models to 4 bit with AWQ, layer by layer, from checkpoint to checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


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
    output: Annotated[Path, typer.Argument(help="The output folder of a run, on this or another machine.")],
    progress: options.Progress = "auto",
    once: Annotated[bool, typer.Option("--once", help="Show the present state and end.")] = False,
) -> None:
    """Shows a run that goes on elsewhere, until it has finished. Ending this does not end the run."""
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
    from awqdist.plan.planning import load_machines, show_plan
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
    as_recipe: Annotated[bool, typer.Option("--as-recipe", help="Print a recipe that holds these mappings.")] = False,
) -> None:
    """Shows which layers smooth which linears, and every mapping that is skipped with its reason."""
    from awqdist.plan.mappings import show_mappings

    show_mappings(model, recipe, as_json=as_json, as_recipe=as_recipe)


@app.command(epilog="Example: awqdist verify ./llama-w4 --source meta-llama/Llama-3.1-8B")
def verify(
    output: Annotated[Path, typer.Argument(help="A finished output folder.")],
    source: Annotated[str | None, typer.Option(help="The original model: compares every weight.")] = None,
    as_json: options.Json = False,
) -> None:
    """Checks an output: hashes, index, config, every packed tensor; exit status 1 if anything is wrong."""
    from awqdist.cli.commands import show_verification

    show_verification(output, source, as_json=as_json)


@app.command("eval", epilog="Example: awqdist eval ./llama-w4 --against meta-llama/Llama-3.1-8B --text eval.txt")
def evaluate(
    model: options.Model,
    text: Annotated[Path, typer.Option(help="Text file to evaluate on.")],
    against: Annotated[str | None, typer.Option(help="The float model: adds KL(float || quantized) per token.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="How much of the text is read.")] = 16384,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    shard: Annotated[
        Literal["none", "auto", "zero3"],
        typer.Option(help="auto: over all GPUs of this process, then memory; zero3: over the ranks of a launcher."),
    ] = "none",
    as_json: options.Json = False,
) -> None:
    """Measures perplexity, and the divergence from the float model, through transformers."""
    from awqdist.cli.commands import show_evaluation

    options = {"against": against, "max_tokens": max_tokens, "window": window, "device": device, "shard": shard}
    show_evaluation(model, text, **options, as_json=as_json)


@app.command(epilog="Example: awqdist doctor ./llama-w4 --profile machine.json")
def doctor(
    folder: Annotated[Path, typer.Argument(help="OUTPUT, or a folder on the disk in question.")] = Path("."),
    build_nvme: Annotated[bool, typer.Option("--build-nvme", help="Compile DeepNVMe's operator first, once.")] = False,
    profile: Annotated[Path | None, typer.Option(help="Write the rates of this machine there, as JSON.")] = None,
    ray_address: options.RayAddress = None,
    as_json: options.Json = False,
) -> None:
    """Checks versions, devices, libraries, the folder's file system and Ray, and measures how fast all is; exit status 1 if any fails."""
    from awqdist.cli.doctor import examine

    examine(folder, build_nvme=build_nvme, profile=profile, ray_address=ray_address, as_json=as_json)


@app.command(epilog="Example: awqdist demo ./awqdist-demo")
def demo(
    output: Annotated[Path, typer.Argument(help="Folder for the result.")] = Path("awqdist-demo"),
) -> None:
    """Quantizes the small model that comes with awqdist and shows its perplexity before and after."""
    from awqdist.cli.commands import run_demo

    run_demo(output)


@app.command(epilog="Example: awqdist families --markdown")
def families(
    markdown: Annotated[bool, typer.Option("--markdown", help="The table as the README shows it.")] = False,
) -> None:
    """Shows the families of models that are known by name: what is smoothed in each, and what is left alone."""
    from awqdist.cli.families import show_families

    show_families(markdown=markdown)


def main() -> None:
    """Entry point of the `awqdist` command."""
    gc.disable()  # nothing that is imported becomes garbage: collecting meanwhile costs a second
    try:
        with clear_errors():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, interrupt)
            raise SystemExit(app(standalone_mode=False))
    finally:
        gc.freeze()  # nor is it worth collecting on the way out
