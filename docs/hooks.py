"""Hooks of MkDocs: pictures of results are added to the site.

Pages link to them relative to the repository, which also works without MkDocs.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PICTURES = "benchmarks/results"


def on_files(files, config):
    """Adds the pictures of the benchmarks' results."""
    for picture in sorted((ROOT / PICTURES).glob("*/*.png")):
        if picture.parent.name != "latest":
            uri = picture.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links to those pictures, and drops the recipes of tables."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(rf"\]\((?:\.\./)+{PICTURES}/", f"]({up}{PICTURES}/", markdown)
    return re.sub(r"<!-- table\n.*?-->\n|<!-- /table -->", "", markdown, flags=re.DOTALL)
