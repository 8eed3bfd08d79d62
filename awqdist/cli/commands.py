"""Runs the commands quantize, verify, eval and demo, and prints their results."""

from __future__ import annotations

import gc
import json
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from awqdist.api import quantize
from awqdist.backends.local import choose_backend
from awqdist.checkpoint.sources import model_folder
from awqdist.cli.progress import Kind, renderer
from awqdist.demo import calibration_text, demo_folder, evaluation_text
from awqdist.eval.evaluate import Evaluation, evaluate
from awqdist.layer.records import RunSummary
from awqdist.recipe import load_recipe
from awqdist.report.report import write_report
from awqdist.report.tables import summary_table
from awqdist.run.device import launcher_value
from awqdist.run.verify import verify
from awqdist.settings import Placement, RunSettings

_console = Console()


def quantize_and_report(
    settings: RunSettings,
    recipe: str,
    calibration: str,
    placement: Placement | None = None,
    *,
    progress: Kind = "auto",
    report: bool = True,
) -> RunSummary:
    """Quantizes, prints the table of the run, and writes report.html. Of several ranks only the first prints."""
    built = load_recipe(recipe)
    settings = replace(settings, model=model_folder(str(settings.model)))
    gc.enable()
    gc.freeze()
    placement = placement or Placement()
    is_leader = choose_backend(placement) != "torchrun" or launcher_value("RANK") == "0"
    with renderer(progress) if is_leader else nullcontext() as listen:
        summary = quantize(built, settings, calibration, listen=listen, placement=placement)
    if not is_leader:
        return summary
    if report:
        try:
            write_report(summary, settings.output)
        except OSError as error:  # the model is complete without it
            print(f"awqdist: warning: report.html was not written: {error.strerror or error}", file=sys.stderr)
    if progress != "json":
        _console.print(summary_table(summary))
        _console.print(f"Quantized model in [bold]{settings.output}[/bold]", soft_wrap=True)
    return summary


def show_verification(output: Path, source: str | None, *, as_json: bool) -> None:
    """Verifies an output and prints what is wrong with it; exit status 1 if anything is."""
    result = verify(output, model_folder(source) if source else None)
    errors = [linear.weight_error for linear in result.linears if linear.weight_error is not None]
    if as_json:
        print(json.dumps({"ok": result.ok, **asdict(result)}, indent=2))
    else:
        for problem in [*result.problems, *(f"{x.name}: {x.problem}" for x in result.linears if x.problem)]:
            _console.print(f"[red]problem[/red] {problem}", soft_wrap=True)
        if errors:
            table = Table("linear", "weight error", title="Largest relative weight errors against the source")
            for linear in sorted(result.linears, key=lambda x: -(x.weight_error or 0))[:5]:
                table.add_row(linear.name, f"{linear.weight_error:.4f}" if linear.weight_error is not None else "")
            _console.print(table)
        verdict = "[green]ok[/green]" if result.ok else "[red]not ok[/red]"
        mean = f", mean weight error {sum(errors) / len(errors):.4f}" if errors else ""
        _console.print(f"{verdict}: {result.num_files} files, {len(result.linears)} quantized linears{mean}")
    if not result.ok:
        raise SystemExit(1)


def show_evaluation(model: str, text: Path, *, as_json: bool, **options: Any) -> None:
    """Evaluates and prints the result. options: those of `evaluate`. Of several ranks only the first prints."""
    result = evaluate(model, text, **options)
    if options["shard"] == "zero3" and launcher_value("RANK") != "0":
        return
    if as_json:
        print(json.dumps(asdict(result), indent=2))
    else:
        _print_evaluation(result)


def run_demo(output: Path) -> None:
    """Quantizes the model that comes with awqdist, and evaluates the result."""
    settings = RunSettings(demo_folder(), output, num_samples=64, sequence_length=256, overwrite=True)
    quantize_and_report(settings, "default", str(calibration_text()))
    result = evaluate(output, evaluation_text(), against=demo_folder(), max_tokens=8192)
    _print_evaluation(result)
    _console.print(f"Report of the run: [bold]{output.resolve() / 'report.html'}[/bold]", soft_wrap=True)


def _print_evaluation(result: Evaluation) -> None:
    before = f"{result.against_perplexity:.2f} before, " if result.against_perplexity is not None else ""
    _console.print(
        f"perplexity {before}{result.perplexity:.2f}{' after' if before else ''}, {result.num_tokens} tokens"
    )
    if result.kl is not None and math.isfinite(result.kl):
        _console.print(f"KL(float || quantized) {result.kl:.6f} per token")
