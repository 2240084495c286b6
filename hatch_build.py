"""Hook of the build: the README of a package has absolute links, as a package index needs them.

The release sets PROJECT_URL, such as https://github.com/OWNER/torch_klloss. Without it the links stay relative.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<image>!?)(?P<text>\[[^]]*\])\((?!https?:|#)(?P<path>[^)]+)\)")


def with_absolute_links(markdown: str, url: str, tag: str) -> str:
    """Return a page whose links and figures lead to the files of a tag in the repository."""

    def absolute(found: re.Match[str]) -> str:
        kind = "raw" if found["image"] else "blob"
        return f"{found['image']}{found['text']}({url}/{kind}/{tag}/{found['path']})"

    return LINK.sub(absolute, markdown)


class Hook(MetadataHookInterface):
    """The hook that hatchling finds in this file."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the README, and the address of the project if it is known."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if url := os.environ.get("PROJECT_URL", "").rstrip("/"):
            text = with_absolute_links(text, url, f"v{metadata['version']}")
            metadata["urls"] = {"Repository": url}
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
