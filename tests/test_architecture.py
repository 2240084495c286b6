"""The layout of the package: imports go one way, as CONTRIBUTING.md states it, and never in a circle."""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torch_klloss"
MOST_ROOMS = 21  # at the top of the package


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module):
    """Return the entry at the top of the package that a module lies in."""
    return [*module.split("."), "__init__"][1]


def imports_of(source, module):
    """Return the modules of the library that a source imports, inside of functions and for types alone too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "torch_klloss"} - {module}


@cache
def every_import():
    return {module: imports_of(path.read_text(), module) for module, path in MODULES.items()}


def stated_order():
    """Return the floor of every room, as CONTRIBUTING.md lists them."""
    (line,) = re.findall(r"Imports go one way: `([^`]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    floors = [floor.split(", ") for floor in re.sub(r"\s+", " ", line).split(" → ")]
    return {room: number for number, floor in enumerate(floors) for room in floor}


def imports_back_up(imports, floor_of):
    """Return the imports that do not go down from one floor to another."""
    return [
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in sorted(others)
        if room_of(module) != room_of(other) and floor_of[room_of(other)] >= floor_of[room_of(module)]
    ]


def test_every_import_goes_down_the_order_that_contributing_states():
    assert imports_back_up(every_import(), stated_order()) == []


def test_an_import_back_up_would_be_noticed():
    wrong = {"torch_klloss.numerics.special": {"torch_klloss.losses"}, "torch_klloss.losses": {"torch_klloss.methods"}}
    assert imports_back_up(wrong, stated_order()) == ["torch_klloss.numerics.special imports torch_klloss.losses"]


def test_the_order_names_every_room():
    rooms = {room_of(module) for module in MODULES}
    assert rooms - stated_order().keys() == {"audit"}  # which only says where the package is now


def test_there_is_no_circle_of_imports():
    """Packages count as their __init__.py, which may import what lies below it."""
    TopologicalSorter(every_import()).prepare()


def test_a_circle_would_be_noticed():
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()


def test_the_top_of_the_package_is_one_look():
    rooms = {room_of(module) for module in MODULES}
    assert len(rooms) <= MOST_ROOMS, sorted(rooms)


def test_the_tree_in_contributing_has_every_package():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (tree,) = re.findall(r"```text\n(torch_klloss/\n.*?)```", text, re.DOTALL)
    packages = {path.parent.name for path in PACKAGE.rglob("__init__.py")} - {"torch_klloss"}
    assert {name for name in packages if f"{name}/" not in tree} == set()


@pytest.mark.parametrize("module", ["torch_klloss.audit", "torch_klloss.audit.mistakes"])
def test_the_old_path_of_the_auditing_package_says_where_it_is_now(module):
    import importlib

    import torch_klloss

    with pytest.raises(ImportError, match=r"its package is torch_klloss\.auditing"):
        importlib.import_module(module)
    assert callable(torch_klloss.audit)
