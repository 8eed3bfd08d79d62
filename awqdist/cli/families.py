"""Prints the supported model families, as a table on a terminal or in markdown (`awqdist families`).

`--markdown` prints the table of awqdist/model/README.md; a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from awqdist.model.families import FAMILIES, Family

_COLUMNS = ("family", "classes", "smoothed", "tested with", "left as it is")
# Of norms, whose places the balance layers tell.
_PLACES = r"(input|pre|post|pre_feedforward|post_attention|pre_mlp|self_attn|final)_"


def show_families(*, markdown: bool) -> None:
    """Prints the table, one line for each family. markdown: as text for a README."""
    rows = [_row(family) for family in FAMILIES]
    if markdown:
        lines = [_COLUMNS, tuple("---" for _ in _COLUMNS), *rows]
        print("\n".join(f"| {' | '.join(cell or '–' for cell in line)} |" for line in lines))
        return
    table = Table(title="Supported model families", title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _row(family: Family) -> tuple[str, ...]:
    """Returns the cells of a family, its mappings in short: `norm→qkv, v→o, norm→gate/up, up→down`."""
    smoothed = ", ".join(f"{_short(m.smooth_layer)}→{_joined(m.balance_layers)}" for m in family.mappings)
    return family.name, ", ".join(family.architectures), smoothed, ", ".join(family.tested), family.notes


def _joined(patterns: Sequence[str]) -> str:
    return re.sub("^q/k/v", "qkv", "/".join(map(_short, patterns)))


def _short(pattern: str) -> str:
    """Returns a module's own name without what most names share: `re:.*self_attn\\.gate_proj$` is `gate`."""
    name = re.split(r"\\\.|\.\*", pattern.removeprefix("re:").removesuffix("$"))[-1]
    name = re.sub(f"^{_PLACES}(?=layer_?norm)", "", re.sub("_proj(_with_mqa)?$", "", name))
    return re.sub("_?layer_?norm$", " norm", name).strip()
