"""The list in docs/devices.md of the pairs that need float64, from the registry."""

from __future__ import annotations

from tests.closed_forms.test_registered_pairs import TYPES
from tests.processes import ROOT
from torch_klloss.closed_forms.registry import _RULES, structural

PAGE = ROOT / "docs" / "devices.md"
MARKS = "<!-- list: begin -->\n", "<!-- list: end -->\n"


def text() -> str:
    """Return the list, in Markdown."""
    native, narrow = set[str](), set[str]()
    for q, p in TYPES:
        if q is p and (q, p) in _RULES and _RULES[q, p] is not structural:
            (narrow if _RULES[q, p].needs_float64 else native).add(q.__name__)
    lines = [
        f"- on the device: {', '.join(sorted(native)) or 'none'}",
        f"- of copies on the CPU: {', '.join(sorted(narrow)) or 'none'}",
    ]
    return "\n".join(lines) + "\n"


def write() -> None:
    """Write the list into the page."""
    before, rest = PAGE.read_text().split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + text() + MARKS[1] + rest.split(MARKS[1])[1])


def written() -> str:
    """Return the list of the page."""
    return PAGE.read_text().split(MARKS[0])[1].split(MARKS[1])[0]
