"""What mkdocs is told beyond mkdocs.yml: the generated pages, the pages that lie outside docs/, and what to do with links to
files that are not on the site.
"""

from __future__ import annotations

import importlib.util
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

_spec = importlib.util.spec_from_file_location("generate", Path(__file__).with_name("generate.py"))
assert _spec is not None and _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = generate  # dataclasses look themselves up there
_spec.loader.exec_module(generate)

OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "experiments/README.md": "experiments.md",
    "experiments/recipes/README.md": "recipes.md",
    "requirements/README.md": "requirements.md",
}
"""Documents that lie beside what they describe -> their pages on the site."""
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)


class NoRawHtml(Extension):
    """``<g, h>`` is an inner product, not a tag."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.deregister("html_block")
        md.inlinePatterns.deregister("html")


@event_priority(100)
def on_config(config: Any) -> Any:
    """Before mkdocstrings copies the extensions for the docstrings."""
    config.markdown_extensions.append(NoRawHtml())
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that do not lie in docs/, and the pictures that they show."""
    for path, text in generate.pages().items():
        files.append(File.generated(config, path, content=text))
    for source, path in OUTSIDE.items():
        files.append(File.generated(config, path, content=(generate.ROOT / source).read_text(encoding="utf-8")))
    for source, path in [*OUTSIDE.items(), *((f"docs/{file.src_uri}", file.src_uri) for file in files)]:
        if path.endswith(".md") and (generate.ROOT / source).exists():
            for mark, _, target, _ in _LINK.findall((generate.ROOT / source).read_text(encoding="utf-8")):
                image = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
                if mark and not image.startswith("docs/") and files.get_file_from_path(image) is None:
                    files.append(File.generated(config, image, abs_src_path=str(generate.ROOT / image)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at pages of the site; of links to other files of the repository keep the text and the path."""
    uri = page.file.src_uri
    source = next((source for source, path in OUTSIDE.items() if path == uri), f"docs/{uri}")

    def replaced(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else path)
        if files.get_file_from_path(inside) is None:
            return f"{text} (`{path}`)" if text.strip("`") not in path else f"`{path}`"
        return f"{mark}[{text}]({os.path.relpath(inside, posixpath.dirname(uri) or '.')}{anchor or ''})"

    return _LINK.sub(replaced, _COMMENT.sub("", markdown))
