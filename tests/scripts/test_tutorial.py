"""The tutorial: its notebook is what the page says, and runs from top to bottom."""

import json
import re
import runpy
from types import SimpleNamespace

import matplotlib
import pytest

from tests.processes import ROOT

tutorial = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "tutorial.py")))
PAGE = tutorial.PAGE.read_text()
NOTEBOOK = json.loads(tutorial.NOTEBOOK.read_text())


def test_the_notebook_is_what_the_page_makes_cell_for_cell():
    assert tutorial.notebook_of(PAGE) == NOTEBOOK, "docs/tutorial.md has changed: run make tutorial"


def test_a_cell_has_the_code_without_prompts_results_and_directives():
    session = ">>> x = 1\n>>> def f():\n...     return x\n...\n\n>>> f()  # doctest: +ELLIPSIS\n1\n\n"
    cells = tutorial.notebook_of(f"# Title\n\n```python\n{session}```\n\nEnd\n")["cells"]
    assert ["".join(cell["source"]) for cell in cells] == ["# Title", "x = 1\ndef f():\n    return x\n\nf()", "End"]


def test_links_of_the_notebook_exist_and_figures_are_left_to_its_cells():
    texts = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown"]
    links = [link for text in texts for link in re.findall(r"\]\(([^)]+)", text)]
    assert links
    assert not [link for link in links if link.endswith(".png") or not (ROOT / "examples" / link).exists()]


@pytest.mark.scripts
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    names, drawn = {}, []
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            drawn.append(names.pop("figure", None))
    names["plt"].close("all")
    drawn = [figure for figure in drawn if figure is not None]
    assert len(drawn) == PAGE.count("\n![")
    assert all(figure.axes for figure in drawn)
    assert max(names["gap"].history.to_dict()["step"]) == 170
    assert not list(tmp_path.iterdir())
