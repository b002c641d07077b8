"""Which code made a result. A fork changes it, and an old result then says so.

A record holds a digest of each file of model/ and toss/, and of the script that made it. Comments,
docstrings and layout do not count, and every version of Python gives the same.
"""

import ast
from collections.abc import Sequence
from functools import cache
from typing import Any

from toss.workbench.results import text_hash
from toss.workbench.runfile import ROOT

# What makes a stage.
SCRIPTS = {
    "degraded": "train.py",
    "utility": "train.py",
    "scores": "score.py",
    "methods": "select.py",
}
# Of a syntax tree: what versions of Python differ in, or what says nothing.
IGNORED = ("ctx", "kind", "type_comment", "type_params")


def script_of(stage: str) -> str:
    return SCRIPTS[stage.partition("/")[0]]


def digests(others: Sequence[str]) -> dict[str, str]:
    """The digest of each file of model/ and toss/, without their folders, and of these others."""
    return read_all() | {name: digest(name) for name in others}


@cache
def read_all() -> dict[str, str]:
    """Take the digest of every file that may count now, before anyone edits it."""
    for name in SCRIPTS.values():
        digest(name)
    files = sorted([*ROOT.glob("model/*.py"), *ROOT.glob("toss/*.py")])
    names = [file.relative_to(ROOT).as_posix() for file in files]
    return {name: digest(name) for name in names}


@cache
def digest(name: str) -> str:
    """The digest of a file; "" if there is no such file."""
    file = ROOT / name
    if not file.is_file():
        return ""
    return text_hash(outline(ast.parse(file.read_text(encoding="utf-8"))))[:16]


def outline(value: Any) -> Any:
    """A syntax tree as lists, without docstrings."""
    if isinstance(value, list):
        return [outline(item) for item in value if not is_docstring(item)]
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = [type(value).__name__]
    for name, part in ast.iter_fields(value):
        if isinstance(value, ast.JoinedStr):  # Python 3.12 may add empty texts to an f-string
            part = [item for item in part if getattr(item, "value", None) != ""]
        if part is not None and part != [] and name not in IGNORED:
            fields.append([name, outline(part)])
    return fields


def is_docstring(node: Any) -> bool:
    """True for a text that is a statement, which does nothing."""
    text = node.value if isinstance(node, ast.Expr) else None
    return isinstance(text, ast.Constant) and isinstance(text.value, str)
