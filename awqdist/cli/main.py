"""The command line. Commands are thin: they turn options into settings, call the package, and show what comes back.

Heavy libraries are imported inside the commands, so that `awqdist --help` answers at once.
"""

from __future__ import annotations

import gc
import signal
from pathlib import Path
from typing import Annotated

import typer

from awqdist.cli import options
from awqdist.cli.failures import clear_errors, interrupt
from awqdist.cli.options import Backend, Offload, OutputFormat, Progress, Shard

app = typer.Typer(
    name="awqdist",
    help="Quantizes large language models to 4 bit with AWQ, layer by layer, from checkpoint to checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command(epilog="Example: awqdist quantize meta-llama/Llama-3.1-8B ./llama-w4 --calibration text.txt")
def quantize(
    model: options.Model,
    output: Annotated[Path, typer.Argument(help="Folder for the result. The same command again resumes.")],
    recipe: options.RecipeOption = "default",
    calibration: Annotated[
        str, typer.Option(help="Text file, .jsonl with a text field, or hub dataset NAME[:CONFIG[:SPLIT]].")
    ] = options.DEFAULT_CALIBRATION,
    num_samples: options.NumSamples = 128,
    seq_len: options.SeqLen = 512,
    device: options.Device = "auto",
    format: options.Format = OutputFormat.compressed_tensors,
    progress: Annotated[Progress, typer.Option(help="How to show progress.")] = Progress.auto,
    seed: Annotated[int, typer.Option(min=0, help="Moves the places that samples are taken from.")] = 0,
    chunk_tokens: options.ChunkTokens = 2048,
    all_experts: options.AllExperts = False,
    snapshot_every: Annotated[int, typer.Option(min=1, help="Layers between snapshots of the activations.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that OUTPUT holds.")] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write OUTPUT/report.html.")] = True,
    backend: options.BackendName = Backend.auto,
    num_workers: options.NumWorkers = None,
    ray_address: options.RayAddress = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="Ray: how many lost workers are replaced.")] = 3,
    layers_per_block: options.LayersPerBlock = 1,
    threads: options.Threads = None,
    offload: options.OffloadLevel = Offload.cpu,
    offload_dir: options.OffloadDir = None,
    cpu_memory: options.CpuMemory = None,
    gpu_memory: options.GpuMemory = None,
) -> None:
    """Quantizes MODEL into OUTPUT. Killed or interrupted, the same command goes on where it stopped."""
    from awqdist.cli.commands import quantize_and_report
    from awqdist.settings import Placement, RunSettings

    settings = RunSettings(
        model=Path(model),
        output=output,
        device=device,
        format=format.value,
        num_samples=num_samples,
        sequence_length=seq_len,
        seed=seed,
        chunk_tokens=chunk_tokens,
        all_experts=all_experts,
        snapshot_every=snapshot_every,
        layers_per_block=layers_per_block,
        threads=threads,
        overwrite=overwrite,
        offload=offload.value,
        offload_dir=offload_dir,
        cpu_memory=cpu_memory,
        gpu_memory=gpu_memory,
    )
    placement = Placement(backend.value, num_workers, ray_address, max_restarts)
    quantize_and_report(settings, recipe, calibration, placement, progress=progress.value, report=report)


@app.command(epilog="Example: awqdist watch ./llama-w4")
def watch(
    output: Annotated[Path, typer.Argument(help="The output folder of a run, on this or another machine.")],
    progress: Annotated[Progress, typer.Option(help="How to show progress.")] = Progress.auto,
    once: Annotated[bool, typer.Option("--once", help="Show the present state and end.")] = False,
) -> None:
    """Shows a run that goes on elsewhere, until it has finished. Ending this does not end the run."""
    from awqdist.cli.watch import follow, show_now

    (show_now if once else follow)(output, progress.value)


@app.command(epilog="Example: awqdist plan meta-llama/Llama-3.1-8B --profile machine.json")
def plan(
    model: options.Described,
    recipe: options.RecipeOption = "default",
    num_samples: options.NumSamples = 128,
    seq_len: options.SeqLen = 512,
    device: options.Device = "auto",
    format: options.Format = OutputFormat.compressed_tensors,
    chunk_tokens: options.ChunkTokens = 2048,
    all_experts: options.AllExperts = False,
    workers: options.Workers = 1,
    layers_per_block: options.LayersPerBlock = 1,
    offload: options.OffloadLevel = Offload.cpu,
    cpu_memory: options.CpuMemory = None,
    gpu_memory: options.GpuMemory = None,
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
) -> None:
    """Shows what a run would read, hold and write, what it would leave out, and how long it would take. Reads no tensors."""
    from awqdist.plan.planning import load_machines, show_plan
    from awqdist.plan.simulation import SimulationOptions
    from awqdist.settings import RunSettings

    settings = RunSettings(
        model=Path(model),
        output=Path("."),
        device=device,
        format=format.value,
        num_samples=num_samples,
        sequence_length=seq_len,
        chunk_tokens=chunk_tokens,
        all_experts=all_experts,
        layers_per_block=layers_per_block,
        offload=offload.value,
        cpu_memory=cpu_memory,
        gpu_memory=gpu_memory,
    )
    seconds = (chunk_seconds, search_seconds, read_seconds, write_seconds, transfer_seconds)
    machines = load_machines(profile, workers_per_machine)
    show_plan(settings, recipe, SimulationOptions(workers, simulate, times_from, *seconds), machines, as_json=as_json)


@app.command(epilog="Example: awqdist mappings ./my-model --recipe awq")
def mappings(
    model: options.Described,
    recipe: options.RecipeOption = "default",
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
    device: options.Device = "auto",
    shard: options.ShardOption = Shard.none,
    as_json: options.Json = False,
) -> None:
    """Measures perplexity, and the divergence from the float model, through transformers."""
    from awqdist.cli.commands import show_evaluation

    limits, place = (max_tokens, window), (device, shard.value)
    show_evaluation(model, text, against=against, limits=limits, place=place, as_json=as_json)


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
