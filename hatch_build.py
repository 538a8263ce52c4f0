"""The description on a package index: the README without the links that lead nowhere from there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Description(MetadataHookInterface):
    """
    Turn relative links into their words and the path that they lead to in the source distribution.

    Once the project has a public address, let them lead there instead.
    """

    def update(self, metadata: dict[str, Any]) -> None:
        """Give the readme, which `dynamic` in pyproject.toml leaves to this."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = re.sub(r"\[?!\[[^\]]*\]\([^)]*\)(\]\([^)]*\))?\n*", "", text)  # badges and pictures
        text = re.sub(r"\[([^\]]+)\]\((?!https?:)([^)]+)\)", _words, text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def _words(link: re.Match[str]) -> str:
    return link[1] if link[2].rstrip("/") in link[1] else f"{link[1]} (`{link[2]}`)"
