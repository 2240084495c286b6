"""Hooks of the documentation site: pages that lie outside of docs/, links to them, and mathematics as MathML.

mkdocs calls them (`hooks` in mkdocs.yml). Markdown stays as other readers of the repository need it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"benchmarks.md": "benchmarks/README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "quiet")

# Links of the repository, and what they are on the site.
_LINKS = (
    (r"\]\((?:\.\./)?benchmarks/README\.md", "](benchmarks.md"),
    (r"\]\((?:\.\./)?examples/(\w+)\.py", r"](examples/\1.md"),
    (r"\]\(\.\./examples/tutorial\.ipynb", "](examples/tutorial.ipynb"),
    (r"\]\((?:\.\./)?docs/", "]("),
    (r"\]\((?:\.\./)?CONTRIBUTING\.md", "](contributing.md"),
)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and figures that lie elsewhere in the repository, and a page of every example."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for figure in (ROOT / "benchmarks" / "figures").glob("*.png"):
        files.append(File.generated(config, f"benchmarks/figures/{figure.name}", abs_src_path=str(figure)))
    notebook = "examples/tutorial.ipynb"
    files.append(File.generated(config, notebook, abs_src_path=str(ROOT / notebook)))
    for example in EXAMPLES:
        files.append(File.generated(config, f"examples/{example.stem}.md", content=page_of(example)))
    return files


def page_of(example: Path) -> str:
    """Return the page of an example: what its docstring says, and its source."""
    source = example.read_text()
    tree = ast.parse(source)
    title, _, text = (ast.get_docstring(tree) or "").partition("\n")
    body = "\n".join(source.splitlines()[tree.body[0].end_lineno :]).strip()
    return f"# {example.stem}\n\n{title}\n{text}\n\n## Source\n\n```python\n{body}\n```\n"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links to pages of the site, and mark sessions of the interpreter as such, without doctest's directives."""
    if page.file.src_uri == "benchmarks.md":
        markdown = markdown.replace("](figures/", "](benchmarks/figures/")
    for pattern, link in _LINKS:
        markdown = re.sub(pattern, link, markdown)
    markdown = re.sub(r" *# doctest: \+\w+$", "", markdown, flags=re.MULTILINE)
    return markdown.replace("```python\n>>> ", "```pycon\n>>> ")


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    r"""Typeset \(…\) and \[…\], which Markdown's $…$ has become, without a script; let names of pairs break at ‖."""

    def typeset(found: re.Match[str]) -> str:
        tex = found["tex"].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return convert(tex, display="block" if found["open"] == "[" else "inline")

    html = re.sub(r"(<td>\w+‖)", r"\1<wbr>", html)
    return re.sub(
        r'<(span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</\1>', typeset, html, flags=re.DOTALL
    )
