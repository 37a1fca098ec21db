"""A hook of hatchling: README.md for a package index, where links to files of the repository lead nowhere."""

import pathlib
import re

from hatchling.metadata.plugin.interface import MetadataHookInterface

ELSEWHERE = r"\((?!https?:)[^)]*\)"


class Readme(MetadataHookInterface):
    """Without the pictures, and with the text of a link for the link."""

    def update(self, metadata: dict) -> None:
        """Set the field that pyproject.toml calls dynamic."""
        text = (pathlib.Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = re.sub(rf"!\[[^\]]*\]{ELSEWHERE}\n*", "", text)
        text = re.sub(rf"\[([^\]]*)\]{ELSEWHERE}", r"\1", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
