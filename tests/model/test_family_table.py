"""The table of families, on a terminal and in awqdist/model/README.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from support.command_line import awqdist
from support.tiny_models import architecture, families, moe_families

from awqdist.model.families import FAMILIES

README = Path(__file__).parents[2] / "awqdist" / "model" / "README.md"


def test_the_readme_shows_what_the_command_prints() -> None:
    block = README.read_text(encoding="utf-8").partition("<!-- families -->\n")[2].partition("<!-- /families -->")[0]

    assert block == awqdist("families", "--markdown").stdout


def test_the_table_on_a_terminal_names_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")

    shown = awqdist("families").stdout

    assert all(name in shown for family in FAMILIES for name in (family.name, *family.architectures))


def test_every_family_is_tested_with_the_tiny_checkpoints_of_its_classes() -> None:
    tiny = {name: architecture(name) for name in (*families(), *moe_families())}

    for family in FAMILIES:
        assert set(family.tested) == {name for name, kind in tiny.items() if kind in family.architectures}, family.name
    assert {name for family in FAMILIES for name in family.tested} == set(tiny)


def test_a_class_is_in_one_family_and_transformers_has_it() -> None:
    classes = [name for family in FAMILIES for name in family.architectures]

    assert len(classes) == len(set(classes))
    assert all(hasattr(transformers, name) for name in classes)
