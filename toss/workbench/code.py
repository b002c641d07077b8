"""Which code made a result. A fork changes it, and an old result then says so.

A record holds a digest of each file, or of each function, that computed its result and nothing
else. Comments, docstrings and layout do not count, and every version of Python gives the same.
"""

import ast
import hashlib
import json
from functools import cache
from typing import Any

from toss.methods import METHODS
from toss.workbench.runfile import ROOT

MODEL = """transformer packed lora products fused sharding config checkpoint peft tokenizer
    template""".split()
SHARED = [f"model/{name}.py" for name in MODEL]
SHARED += [f"toss/{name}.py" for name in ("rows", "tokens", "loss", "parallel")]
TRAINING = [*SHARED, "toss/training.py", "toss/config.py"]
SCORING = [*SHARED, "toss/scoring.py"]
PARTS = {
    "degraded": ["train.py", *TRAINING],
    "utility": ["train.py", *TRAINING],
    "scores": ["score.py", *SCORING],
    "method": ["select.py", *TRAINING, "toss/selection.py"],
    "pro": ["select.py", *TRAINING, "toss/selection.py", "toss/scoring.py"],
    "rival": [*TRAINING, "toss/selection.py", "toss/scoring.py"],
    "evaluation": [*SCORING, "model/generate.py"],
}
# Of a syntax tree: what versions of Python differ in, or what says nothing.
IGNORED = ("ctx", "kind", "type_comment", "type_params")


def parts_of(stage: str, settings: dict[str, Any]) -> list[str]:
    """What computes a stage of the scripts."""
    if not stage.startswith("methods/"):
        return PARTS[stage]
    parts = list(PARTS["pro" if settings.get("pro") else "method"])
    function = METHODS.get(settings["method"])
    if function is not None:
        module = str(function.__module__).replace(".", "/")
        parts.append(f"{module}.py:{function.__name__}")
    return parts


def digests(parts: list[str]) -> dict[str, str]:
    """A digest for each part: a file, or FILE:FUNCTION with what that uses of the same file."""
    return {part: digest(part) for part in parts}


def read_all() -> None:
    """Take the digest of every file now, before anyone edits it."""
    parsed("toss/methods.py")
    for parts in PARTS.values():
        digests(parts)


@cache
def digest(part: str) -> str:
    """The digest of a file, or of a function in it."""
    name, _, function = part.partition(":")
    if not (ROOT / name).is_file():
        return ""
    tree = parsed(name)
    body = reachable(tree, function) if function else without_docstring(tree.body)
    text = json.dumps([outline(node) for node in body])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def reachable(tree: ast.Module, function: str) -> list[ast.AST]:
    """The definition of a function, and those in the same file that it uses, in their order."""
    definitions = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = node
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            definitions[node.targets[0].id] = node
    used = set()
    waiting = [function]
    while waiting:
        name = waiting.pop()
        if name in definitions and name not in used:
            used.add(name)
            for node in ast.walk(definitions[name]):
                if isinstance(node, ast.Name):
                    waiting.append(node.id)
    return [node for name, node in definitions.items() if name in used]


def outline(value: Any) -> Any:
    """A syntax tree as lists, without docstrings."""
    if isinstance(value, list):
        return [outline(item) for item in value]
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = [type(value).__name__]
    for name, part in ast.iter_fields(value):
        if name == "body" and isinstance(part, list):
            part = without_docstring(part)
        if isinstance(value, ast.JoinedStr):  # Python 3.12 may add empty texts to an f-string
            part = [item for item in part if getattr(item, "value", None) != ""]
        if part is not None and part != [] and name not in IGNORED:
            fields.append([name, outline(part)])
    return fields


def without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        if isinstance(first.value.value, str):
            return body[1:]
    return body
