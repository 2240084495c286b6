"""The documentation site: it builds without a warning, has every public name, and needs nothing from elsewhere."""

import importlib
import os
import re
import subprocess
from types import FunctionType

import pytest

import torch_klloss
from tests.processes import ROOT, output
from tests.test_packaging import PUBLIC

pytestmark = pytest.mark.scripts

BROKEN = """
INHERIT: {root}/mkdocs.yml
docs_dir: docs
site_dir: site
hooks: []
theme: mkdocs
nav: [index.md]
plugins: []
not_in_nav: ""
"""


def make(*arguments):
    command = ["make", "--no-print-directory", *arguments]
    alone = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}  # of a make that runs the tests
    return subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)


def build(config, site):
    # --quiet would make --strict pass: it counts the warnings that are shown
    return output("-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", site)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    assert build(ROOT / "mkdocs.yml", folder) == ""
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {str(path.relative_to(site)): path.read_text() for path in site.rglob("*.html")}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_module_has_a_page_with_every_public_name(pages, name):
    page = pages[f"reference/{name.removeprefix('torch_klloss.')}.html"]
    anchors = set(re.findall(r'id="([\w.]+)"', page))
    module = importlib.import_module(name)
    anchors |= {re.sub(r"(\.\w+)\1$", r"\1", anchor) for anchor in anchors}  # token_kl, in the module of its name
    described = {public for public in module.__all__ if isinstance(getattr(module, public), type | FunctionType)}
    assert {public for public in described if f"{name}.{public}" not in anchors} == set()


def test_the_reference_begins_with_the_names_of_the_package(pages):
    links = set(re.findall(r'href="\w+\.html#torch_klloss\.\w+\.(\w+)"', pages["reference/index.html"]))
    assert links == set(torch_klloss.__all__)


def test_examples_are_sessions_and_no_nested_quotes(pages):
    assert not [name for name, page in pages.items() if "<blockquote>" in page and name.startswith("reference/")]
    assert not [name for name, page in pages.items() if '<details class="example"' in page]
    assert sum(page.count("Examples:") for page in pages.values()) > 60


def test_the_gallery_links_every_example(pages):
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"quiet"}
    assert set(re.findall(r'href="examples/(\w+)\.html"', pages["gallery.html"])) == examples
    assert all(f"examples/{name}.html" in pages for name in examples)


def test_no_page_loads_anything_from_elsewhere(pages):
    loaded = {
        url for page in pages.values() for url in re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="([^"]*)"', page)
    }
    assert {url for url in loaded if "//" in url and not url.startswith("data:")} == set()


def test_every_figure_says_what_it_shows(pages):
    figures = [tag for page in pages.values() for tag in re.findall(r"<img[^>]*>", page)]
    assert len(figures) > 10
    assert all(len(re.findall(r'alt="(.+?)"', tag)[0]) > 20 for tag in figures)


def test_mathematics_is_typeset(pages):
    assert pages["index.html"].count("<math") == 2
    assert not [name for name, page in pages.items() if "arithmatex" in page]


def test_the_search_works_in_a_page_that_was_opened_as_a_file(site, pages):
    assert "EstimatorGap" in (site / "search" / "search_index.js").read_text()
    assert all("assets/iframe-worker.js" in page for page in pages.values())


def test_a_broken_link_is_an_error(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text(BROKEN.format(root=ROOT))
    page = tmp_path / "docs" / "index.md"
    page.write_text("# Title\n\n[itself](index.md#title)\n")
    assert build(tmp_path / "mkdocs.yml", tmp_path / "site") == ""
    for link in ("nowhere.md", "index.md#nowhere"):
        page.write_text(f"# Title\n\n[link]({link})\n")
        with pytest.raises(AssertionError, match=re.escape(link.partition("#")[2] or link)):
            build(tmp_path / "mkdocs.yml", tmp_path / "site")


def test_make_docs_without_the_group_says_what_to_do(tmp_path):
    process = make("docs", f"VENV={tmp_path}/none")
    assert process.returncode != 0
    assert process.stderr.startswith("make docs needs the group docs: ")
