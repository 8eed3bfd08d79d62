"""Makes the options of commands from the settings dataclasses, and defines those that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from awqdist.settings import Option, Placement
from awqdist.units import parse_bytes

Command = TypeVar("Command", bound=Callable[..., None])
Settings = TypeVar("Settings")

Model = Annotated[str, typer.Argument(help="Folder of a transformers checkpoint, or a Hugging Face hub id.")]
ModelToPlan = Annotated[
    str, typer.Argument(help="Folder of a transformers checkpoint, a config.json, or a hub id. No weights are read.")
]
Recipe = Annotated[str, typer.Option(help="Preset (default, awq) or YAML file in llm-compressor's format.")]
Progress = Annotated[Literal["auto", "rich", "plain", "json"], typer.Option(help="How progress is shown.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def options_from(*settings: type, leave_out: Collection[str] = ()) -> Callable[[Command], Command]:
    """Replaces the `**values` of a command by one option for each field of the settings that carries an `Option`.

    Args:
        settings: Dataclasses such as `RunSettings`.
        leave_out: Names of fields that the command has no option for.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [x for x in signature.parameters.values() if x.kind is not inspect.Parameter.VAR_KEYWORD]
        made = [x for kind in settings for x in _parameters(kind) if x.name not in leave_out]
        command.__signature__ = signature.replace(parameters=[*own, *made])  # type: ignore[attr-defined]
        command.__annotations__ = {x.name: x.annotation for x in [*own, *made]}
        return command

    return decorate


def settings_of(kind: type[Settings], values: dict[str, Any], **more: Any) -> Settings:
    """Returns the settings from the values of the options that were made from their fields, and from `more`."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in names}, **more)


def _parameters(kind: type) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        option = next((x for x in getattr(hints[field.name], "__metadata__", ()) if isinstance(x, Option)), None)
        if option is None or field.default is MISSING:
            continue
        details: dict[str, Any] = {"parser": _bytes, "metavar": "BYTES"} if option.is_bytes else {"min": option.minimum}
        flag = f"--{option.name or field.name.replace('_', '-')}"  # given, so that a bool has no --no-…
        annotation: Any = Annotated[hints[field.name].__origin__, typer.Option(flag, help=option.help, **details)]
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation
        )


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


RayAddress = next(x.annotation for x in _parameters(Placement) if x.name == "ray_address")
Workers = Annotated[int, typer.Option(min=1, help="Number of workers.")]
ProfileFile = Annotated[
    Path | None,
    typer.Option("--profile", help="Predict times for the machine of this file, made by `awqdist doctor --profile`."),
]
WorkersPerMachine = Annotated[int, typer.Option(min=1, help="With --profile: workers that share a machine's disk.")]
Simulate = Annotated[bool, typer.Option("--simulate", help="Show how long a run takes, and where workers wait.")]
TimesFrom = Annotated[
    Path | None, typer.Option(help="Take times from the finished layers of this output folder; given times go first.")
]
ChunkSeconds = Annotated[float | None, typer.Option(min=0, help="Forwarding one chunk through one layer.")]
SearchSeconds = Annotated[float | None, typer.Option(min=0, help="Search, check and rounding of one layer.")]
ReadSeconds = Annotated[float | None, typer.Option(min=0, help="Reading one layer.")]
WriteSeconds = Annotated[float | None, typer.Option(min=0, help="Writing one layer.")]
TransferSeconds = Annotated[float | None, typer.Option(min=0, help="Sending one chunk from worker to worker.")]
