"""Sums up the records of a run by kind of mapping, for the page and for the table that is printed at the end of a run.

A model of 126 layers has some 500 mappings, a mixture of experts many thousands. What one wants to know is which kind of mapping helped
and which linear came out worst. So the indices of layers and experts become `*` (`pattern_of`), and what shares a pattern is one row.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from awqdist.layer.records import LinearRecord, MappingRecord, RunSummary
from awqdist.units import pattern_of, show_bytes, show_layers, show_number, show_percent, show_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class MappingRow:
    """All mappings of one pattern, or those of a single layer."""

    pattern: str
    layers: tuple[int, ...]
    num_mappings: int
    num_identity: int  # searches in which no smoothing was best
    num_nonfinite_candidates: int
    ratio: float | None  # median over the mappings that were smoothed
    error_before: float  # sums
    error_after: float

    @property
    def reduction(self) -> float | None:
        """Returns the share of the error that smoothing removed."""
        if self.error_before > 0 and math.isfinite(self.error_before) and math.isfinite(self.error_after):
            return 1 - self.error_after / self.error_before
        return None


def run_labels(summary: RunSummary) -> dict[str, str]:
    """Returns for the pattern of each module its shortest ending that no other shares: `up_proj`, or `experts.*.up_proj`."""
    patterns = {pattern_of(item.name): None for record in summary.layers for item in record.linears}
    for record in summary.layers:
        for item in record.mappings:
            patterns.update((pattern_of(name), None) for name in (item.smooth_layer, *item.balance_layers))
    parts = {pattern: pattern.split(".") for pattern in patterns}
    endings = Counter(".".join(names[-length:]) for names in parts.values() for length in range(1, len(names)))

    def shortest(pattern: str) -> str:
        for length in range(1, len(parts[pattern])):
            ending = parts[pattern][-length:]
            if ending[0] != "*" and endings[".".join(ending)] == 1:
                return ".".join(ending)
        return pattern

    return {pattern: shortest(pattern) for pattern in parts}


def mapping_label(mapping: MappingRecord, labels: dict[str, str]) -> str:
    """Returns `input_layernorm → q_proj, k_proj, v_proj`, where many experts are named once."""
    balance = dict.fromkeys(labels.get(pattern_of(name), pattern_of(name)) for name in mapping.balance_layers)
    smooth = pattern_of(mapping.smooth_layer)
    return f"{labels.get(smooth, smooth)} → {', '.join(balance)}"


def mapping_rows(summary: RunSummary, *, by_layer: bool = False) -> list[MappingRow]:
    """Returns a row for each pattern in the order of first appearance, or with `by_layer` for each layer and pattern."""
    labels = run_labels(summary)
    groups: dict[tuple[str, int | None], list[tuple[int, MappingRecord]]] = defaultdict(list)
    for record in summary.layers:
        for mapping in record.mappings:
            key = (mapping_label(mapping, labels), record.layer if by_layer else None)
            groups[key].append((record.layer, mapping))
    return [
        MappingRow(
            pattern=pattern,
            layers=tuple(dict.fromkeys(layer for layer, _ in members)),
            num_mappings=len(members),
            num_identity=sum(m.ratio is None for _, m in members),
            num_nonfinite_candidates=sum(m.num_nonfinite_candidates for _, m in members),
            ratio=finite_median(m.ratio for _, m in members),
            error_before=sum(m.error_before for _, m in members),
            error_after=sum(m.error_after for _, m in members),
        )
        for (pattern, _), members in groups.items()
    ]


def finite_median(values: Iterable[float | None]) -> float | None:
    """Returns the median of the numbers that are there and finite."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return median(finite) if finite else None


def worst_linears(summary: RunSummary, count: int) -> list[LinearRecord]:
    """Returns the linears with the largest relative errors as written; not-a-number is worst of all."""
    linears = [linear for record in summary.layers for linear in record.linears]
    return sorted(linears, key=lambda x: (math.isfinite(x.relative_error), -x.relative_error))[:count]


def skipped_rows(summary: RunSummary) -> list[tuple[str, str, tuple[int, ...]]]:
    """Returns rows of (mapping, reason, layers); layers that share mapping and reason are one row."""
    rows: dict[tuple[str, str], dict[int, None]] = defaultdict(dict)
    for record in summary.layers:
        for skipped in record.skipped:
            rows[pattern_of(skipped.mapping), pattern_of(skipped.reason)][record.layer] = None
    return [(mapping, reason, tuple(layers)) for (mapping, reason), layers in rows.items()]


def times_one_pass(summary: RunSummary) -> float | None:
    """Returns the run's time over that of one forward pass with reading and writing, shared by all workers."""
    total = summary.seconds.get("total")
    return total / summary.floor_seconds if total is not None and summary.floor_seconds > 0 else None


def summary_table(summary: RunSummary) -> RenderableType:
    """Returns what a person wants to read at the end of a run."""
    from rich.console import Group
    from rich.text import Text

    smoothing = _table("Smoothing by kind of mapping", "mapping", "identity", "ratio", "error before", "after", "less")
    for row in mapping_rows(summary):
        ratio = "identity" if row.ratio is None else f"{row.ratio:.2f}"
        errors = (show_number(row.error_before), show_number(row.error_after), show_percent(row.reduction))
        _add(smoothing, row.pattern, f"{row.num_identity} of {row.num_mappings}", ratio, *errors)
    worst = _table("Linears with the largest errors", "linear", "nearest", "written")
    for linear in worst_linears(summary, 5):
        _add(worst, linear.name, show_number(linear.relative_error_nearest), show_number(linear.relative_error))
    parts: list[RenderableType] = [smoothing, worst]
    if skipped := skipped_rows(summary):
        table = _table("Mappings not applied", "mapping", "reason", "layers", num_text=3)
        for mapping, reason, layers in skipped:
            _add(table, mapping, reason, show_layers(layers))
        parts.append(table)
    factor = times_one_pass(summary)
    one_pass = f"one forward pass with reading and writing ({show_seconds(summary.floor_seconds)})"
    over = "" if factor is None else f", {factor:.2f}x {one_pass}"
    parts.append(Text(f"\n{len(summary.layers)} layers in {show_seconds(summary.seconds.get('total'))}{over}"))
    read, source = sum(summary.bytes_read.values()), show_bytes(summary.source_bytes)
    sizes = f"{show_bytes(read)} read (source: {source}), {show_bytes(summary.output_bytes)} written"
    parts.append(Text(f"{sizes} to {summary.output}"))
    parts += [Text(f"warning: {message}", style="yellow") for message in summary.warnings]
    return Group(*parts)


def _table(title: str, *columns: str, num_text: int = 1) -> Table:
    """Returns an empty table whose first `num_text` columns hold text and whose others hold figures."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        if number < num_text:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def _add(table: Table, *cells: str) -> None:
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells))  # Text: a name with [brackets] is no markup
