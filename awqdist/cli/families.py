"""Prints the supported model families, as a table on a terminal or in markdown (`awqdist families`).

`--markdown` prints the table of awqdist/model/README.md; a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from awqdist.model.families import FAMILIES, Family
from awqdist.recipe import MappingPattern

COLUMNS = ("family", "classes", "smoothed", "tested with", "left as it is")
# Of norms, whose places the balance layers tell.
_PLACES = r"(input|pre|post|pre_feedforward|post_attention|pre_mlp|self_attn|final)_"


def show_families(*, markdown: bool) -> None:
    """Prints the table. markdown: as text for a README."""
    if markdown:
        print(families_markdown())
        return
    table = Table(title="Supported model families", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for family in FAMILIES:
        table.add_row(*_row(family))
    Console().print(table)


def families_markdown() -> str:
    """Returns the table with one line for each family."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *map(_row, FAMILIES)]
    return "\n".join(f"| {' | '.join(cell or '–' for cell in row)} |" for row in rows)


def smoothed(mappings: Sequence[MappingPattern]) -> str:
    """Returns mappings in short: `norm→qkv, v→o, norm→gate/up, up→down`."""
    return ", ".join(f"{_short(m.smooth_layer)}→{_joined(m.balance_layers)}" for m in mappings)


def _row(family: Family) -> tuple[str, ...]:
    architectures = ", ".join(family.architectures)
    return family.name, architectures, smoothed(family.mappings), ", ".join(family.tested), family.notes


def _joined(patterns: Sequence[str]) -> str:
    return re.sub("^q/k/v", "qkv", "/".join(map(_short, patterns)))


def _short(pattern: str) -> str:
    """Returns a module's own name without what most names share: `re:.*self_attn\\.gate_proj$` is `gate`."""
    name = re.split(r"\\\.|\.\*", pattern.removeprefix("re:").removesuffix("$"))[-1]
    name = re.sub(f"^{_PLACES}(?=layer_?norm)", "", re.sub("_proj(_with_mqa)?$", "", name))
    return re.sub("_?layer_?norm$", " norm", name).strip()
