"""Documentation: the files, links and names that it mentions exist."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *(ROOT / "docs").rglob("*.md"),
]
FOLDER = r"(?:torch_klloss|tests|benchmarks|examples|docs)/[\w./-]*\w"
FILE = r"\w+(?:/\w+)+\.(?:py|md|json|yaml|png)"
PATH = rf"(?<![\w./])(?!path/to/)(?:{FOLDER}|{FILE})"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def missing_paths(page: Path, text: str) -> set[str]:
    """Return the paths and links that exist neither in the repository nor in the package nor beside the page."""
    paths = {*re.findall(PATH, text), *re.findall(r"\]\(([^)#:]+)", text)}
    folders = ROOT, ROOT / "torch_klloss", page.parent
    return {path for path in paths if not any((folder / path).exists() for folder in folders)}


def missing_names(text: str) -> set[str]:
    return {name for name in re.findall(r"\btorch_klloss(?:\.\w+)+", text) if not exists(name)}


def exists(name: str) -> bool:
    """Return whether a dotted name is a module or an attribute of one."""
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute) or bool(importlib.import_module(name))
    except ImportError:
        return False


@every_page
def test_files_and_links_exist(page):
    assert not missing_paths(page, page.read_text())


@every_page
def test_names_of_the_library_exist(page):
    assert not missing_names(page.read_text())


@every_page
def test_examples_import_from_the_public_packages(page):
    assert not re.findall(r"(?:from|import) torch_klloss\.\w+\.\w+", page.read_text())


def test_a_missing_file_link_or_name_would_be_found():
    page = ROOT / "docs" / "page.md"
    assert (
        len(missing_paths(page, "`torch_klloss/structure.py`, [a page](nowhere.md), [a figure](figures/none.png)")) == 3
    )
    assert missing_names("`torch_klloss.tails.declare_tails`, `torch_klloss.AutoKL`") == {
        "torch_klloss.tails.declare_tails"
    }
