"""Pages of the site that lie elsewhere: README, changelog, and all messages, read from the code.

The links in docs/ stay those that also work in the repository.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
STYLE = """/* Room for the program's lines of 100 columns, and no model's name broken in two. */
.md-grid { max-width: 76rem; }
.md-typeset table:not([class]) { font-size: .68rem; }
.md-typeset table:not([class]) th { min-width: 2.5rem; }
.md-typeset table:not([class]) th, .md-typeset table:not([class]) td { padding: .5em .8em; }
@media (min-width: 60em) { .md-typeset pre > code { white-space: pre-wrap; } }
.md-typeset table:not([class]) code { word-break: normal; overflow-wrap: normal; }
"""
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie beside docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\]\(docs/", "](", text).replace(
            "[Apache License 2.0](LICENSE)", "Apache License 2.0"
        )
        for other, target in PAGES.items():
            text = text.replace(f"]({other}", f"]({target}")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "messages.md", content=messages()))
    files.append(File.generated(config, "site.css", content=STYLE))
    return files


def messages() -> str:
    """Every message that an error of mecq can have, by exit code."""
    errors = ast.parse((ROOT / "mecq_cli" / "errors.py").read_text(encoding="utf-8"))
    classes = [node for node in errors.body if isinstance(node, ast.ClassDef)]
    found = sorted(set(_raised({node.name for node in classes})))
    lines = [
        "# All messages\n",
        "Every error that mecq raises, as the code has it; `…` stands for what depends on the "
        "case. What to do about the frequent ones is in [errors](errors.md).\n",
    ]
    for node in classes:
        own = [text for name, text in found if name == node.name]
        if own:
            lines += [f"\n## {node.name}\n", *(f"* `{text}`" for text in own)]
    return "\n".join(lines) + "\n"


def _raised(names: set[str]) -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "mecq_cli").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                text = _text(node.args[0])
                if node.func.id in names and text.strip("… "):
                    yield node.func.id, text.replace("`", "'")


def _text(node: ast.expr) -> str:
    """A message, with its variable parts as dots."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "…"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links from docs/ to what lies beside it."""
    for source, page in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return markdown
