"""The documents: what they name exists, README.md stays short, and nothing refers to papers outside the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAPERS = re.compile(r"\b(DESIGN|PEERS)\b|\b(HOUSE|STYLE|GPU)\.md\b")
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(#[^)\s]+)?\)")
NAMED_FILE = re.compile(r"(?<![\w/.{}$:-])((?:[\w.-]+/)*[\w-]+\.(?:py|sh|j2|sbatch|toml))(?![\w/])")


def files(*suffixes: str) -> list[Path]:
    """The repository's files of these kinds, without environments and builds."""
    found = [path for path in ROOT.rglob("*") if path.suffix in suffixes and path.is_file()]
    hidden = (".venv", "build", "dist", ".git", ".mypy_cache", ".ruff_cache", ".pytest_cache")
    return sorted(path for path in found if not set(path.relative_to(ROOT).parts) & set(hidden))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


DOCUMENTS = files(".md")


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_has_at_most_180_lines_of_at_most_100_columns() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 180
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(document: Path) -> None:
    broken = []
    for target, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        path = (document.parent / target).resolve() if target else document
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(target + anchor)
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_scripts_and_modules_that_are_named_exist(document: Path) -> None:
    """A name may be relative to the document's folder, the repository, the package or the tests.

    README.md's map names files by their folder's line.
    """
    places = [document.parent, ROOT, ROOT / "awqdist", ROOT / "tests"]
    if document == ROOT / "README.md":
        places += (ROOT / "awqdist").iterdir()
    names = NAMED_FILE.findall(document.read_text(encoding="utf-8"))
    missing = [name for name in names if not any((place / name).is_file() for place in places)]
    assert missing == []


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in files(".py") if "awqdist" in path.parts}), ids=name_of
)
def test_every_folder_of_the_package_says_what_it_is_for(folder: Path) -> None:
    if folder in (ROOT / "awqdist", ROOT / "awqdist/demo"):  # described in README.md
        return
    text = (folder / "README.md").read_text(encoding="utf-8")
    modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert [name for name in modules if name not in text] == [], "each file has a line"


def test_nothing_refers_to_papers_that_are_not_in_the_repository() -> None:
    kinds = (".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".j2", ".sbatch")
    found = {name_of(path) for path in files(*kinds) if PAPERS.search(path.read_text(encoding="utf-8"))}
    assert found - {name_of(Path(__file__).resolve())} == set()
