"""The examples in the docstrings of the Python API run as they are written."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import awqdist


@pytest.mark.parametrize("function", [awqdist.quantize, awqdist.oneshot, awqdist.evaluate], ids=lambda f: f.__name__)
def test_the_example_runs_as_it_is_written(
    function: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (found,) = (
        test for test in doctest.DocTestFinder(recurse=False).find(function, function.__name__) if test.examples
    )
    lines: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(found, out=lines.append)
    assert result.failed == 0, "".join(lines)


@pytest.mark.parametrize("function", [awqdist.quantize, awqdist.oneshot, awqdist.evaluate], ids=lambda f: f.__name__)
def test_the_docstring_names_every_argument(function: Callable[..., Any]) -> None:
    assert function.__doc__
    for part in ("Args:", "Returns:", "Raises:", "Example:"):
        assert part in function.__doc__
    for name in function.__annotations__:
        assert name == "return" or f" {name}: " in function.__doc__ or f"**{name}: " in function.__doc__, name


def test_the_version_is_that_of_the_installed_package() -> None:
    assert awqdist.__version__.split(".")[0].isdigit()
