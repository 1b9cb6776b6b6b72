"""Hooks of MkDocs: the site gets files of the repository that are not in docs/.

Links are relative to the repository, so that they also work without MkDocs.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PICTURES = "benchmarks/results"
INCLUDE = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


def on_files(files, config):
    """Adds the pictures of the benchmarks' results."""
    for picture in sorted((ROOT / PICTURES).glob("*/*.png")):
        if picture.parent.name != "latest":
            uri = picture.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Includes files, points links to the site, and drops the recipes of tables."""
    markdown = INCLUDE.sub(lambda name: (ROOT / name[1]).read_text().replace("](docs/", "]("), markdown)
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(rf"\]\((?:\.\./)+{PICTURES}/", f"]({up}{PICTURES}/", markdown)
    return re.sub(r"<!-- table\n.*?-->\n|<!-- /table -->", "", markdown, flags=re.DOTALL)
