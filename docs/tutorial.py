"""Make what is made of tutorial.md: the notebook, and the figures that its code draws.

python docs/tutorial.py              # writes examples/tutorial.ipynb
python docs/tutorial.py --figures    # and docs/figures/tutorial_*.png, by running the page
"""

from __future__ import annotations

import argparse
import doctest
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).with_suffix(".md")
NOTEBOOK = Path(__file__).parents[1] / "examples" / "tutorial.ipynb"

_CODE = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
_IMAGE = re.compile(r"^!\[[^\]]*\]\((.+?)\)\n+", re.MULTILINE)


class Part(NamedTuple):
    """A part of the page.

    Attributes:
        text: Markdown, or Python without prompts and results.
        is_code: which of the two.
    """

    text: str
    is_code: bool


def parts_of(page: str) -> list[Part]:
    """Return the parts of a page in order, code and the text between."""
    texts = _CODE.split(page)  # text, code, text, code, …
    parts = [Part(_source(text) if i % 2 else text.strip(), i % 2 == 1) for i, text in enumerate(texts)]
    return [part for part in parts if part.text]


def _source(session: str) -> str:
    """Return what is typed in a session of the interpreter; an empty line of it stays one."""
    statements = doctest.DocTestParser().parse(session)
    text = "".join(s.source if isinstance(s, doctest.Example) else "\n" * bool(s) for s in statements)
    return re.sub(r" *# doctest:.*", "", text).strip()


def notebook_of(page: str) -> dict[str, Any]:
    """Return the notebook of a page: a cell for every part, without results, and without the figures that these are."""
    cells = []
    for text, is_code in parts_of(_IMAGE.sub("", page)):
        cell: dict[str, Any] = {
            "cell_type": "code" if is_code else "markdown",
            "id": f"cell-{len(cells)}",
            "metadata": {},
            "source": (text if is_code else _linked(text)).splitlines(keepends=True),
        }
        cells.append(cell | ({"execution_count": None, "outputs": []} if is_code else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _linked(text: str) -> str:
    """Return the text with links as they are from the folder of the notebook."""
    text = re.sub(r"\]\((?!https?:|\.\./)", "](../docs/", text)
    return text.replace("](../examples/", "](")


def figures_of(page: str) -> Iterator[tuple[str, Any]]:
    """Run the page; yield the path of every figure, and the figure that the code before it has drawn."""
    names: dict[str, Any] = {}
    for text, is_code in parts_of(page):
        if is_code:
            exec(text, names)
        else:
            yield from ((path, names["figure"]) for path in _IMAGE.findall(f"{text}\n"))


def main() -> None:
    """Write the notebook, and the figures if that is asked for."""
    parser = argparse.ArgumentParser(description="Write the notebook of docs/tutorial.md.")
    parser.add_argument("--figures", action="store_true", help="run the page, and write its figures as well")
    args = parser.parse_args()
    page = PAGE.read_text()
    NOTEBOOK.write_text(json.dumps(notebook_of(page), indent=1, ensure_ascii=False) + "\n")
    for path, figure in figures_of(page) if args.figures else ():
        figure.savefig(PAGE.parent / path, dpi=200)


if __name__ == "__main__":
    main()
