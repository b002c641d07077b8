"""Which code made a result. A fork changes it, and an old result then says so.

A record holds a digest of each file, or of each function, that computed its result and nothing
else. Comments, docstrings and layout do not count, and every version of Python gives the same.
"""

import ast
from functools import cache
from typing import Any

from toss.workbench.results import text_hash
from toss.workbench.runfile import ROOT

# A part is a file, or FILE:NAME with what that uses of the same file. Files count with all that
# they import of model/ and toss/, but for these: they compute nothing.
PLUMBING = ("model.io.", "model.hub.", "toss.methods.", "toss.workbench.")
# How checkpoints, adapters and rows are read; of the plumbing, json_lines alone counts.
SHARED = ["model/checkpoint.py", "model/peft.py", "model/io.py:json_lines"]
TRAINING_CODE = ["toss/training.py", "toss/config.py:TrainConfig", *SHARED]
SCORING_CODE = ["toss/scoring.py", *SHARED]
PARTS = {
    "degraded": ["train.py", *TRAINING_CODE],
    "utility": ["train.py", *TRAINING_CODE],
    "scores": ["score.py", *SCORING_CODE],
    "method": ["select.py", "toss/selection.py", *TRAINING_CODE],
    "pro": ["select.py", "toss/selection.py", *TRAINING_CODE, *SCORING_CODE],
    "rival": [
        "toss/selection.py",
        "toss/methods.py:Candidates",
        "toss/methods.py:mean_of_row",
        *TRAINING_CODE,
        *SCORING_CODE,
    ],
    "evaluation": ["model/generate.py", "data/refusals.py", *SCORING_CODE],
}
# Of a syntax tree: what versions of Python differ in, or what says nothing.
IGNORED = ("ctx", "kind", "type_comment", "type_params")


def parts_of(stage: str, settings: dict[str, Any]) -> list[str]:
    """What computes a stage of the scripts."""
    if not stage.startswith("methods/"):
        return PARTS[stage]
    parts = list(PARTS["pro" if settings.get("pro") else "method"])
    from toss.methods import METHODS  # imports torch

    method = METHODS.get(settings["method"])
    function = method.choose if method else None
    if function is not None:
        module = str(function.__module__).replace(".", "/")
        parts.append(f"{module}.py:{getattr(function, '__name__', '')}")
    return parts


def digests(parts: list[str]) -> dict[str, str]:
    """A digest for each part, and for each file that they import."""
    waiting = list(parts)
    found = {}
    while waiting:
        part = waiting.pop(0)
        if part not in found:
            found[part] = digest(part)
            if ":" not in part:
                waiting += imports(part)
    return found


def read_all() -> None:
    """Take the digest of every file now, before anyone edits it."""
    parsed("toss/methods.py")
    for parts in PARTS.values():
        digests(parts)


@cache
def digest(part: str) -> str:
    """The digest of a file, or of a function in it; "" if there is no such file."""
    name, _, function = part.partition(":")
    if not (ROOT / name).is_file():
        return ""
    tree = parsed(name)
    body = without_docstring(tree.body)
    if function:
        body = reachable(tree, function) or body
    return text_hash([outline(node) for node in body])[:16]


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


@cache
def imports(name: str) -> list[str]:
    """The files of model/ and toss/ that a file imports, without PLUMBING."""
    if not (ROOT / name).is_file():
        return []
    modules = set()
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    files = []
    for module in sorted(modules):
        file = module.replace(".", "/") + ".py"
        if module == "toss.config":
            file = "toss/config.py:TrainConfig"
        elif f"{module}.".startswith(PLUMBING) or not (ROOT / file).is_file():
            continue
        if module.startswith(("model.", "toss.")):
            files.append(file)
    return files


def reachable(tree: ast.Module, function: str) -> list[ast.AST]:
    """The definition of a name, and those in the same file that it uses, in their order."""
    definitions: dict[str, list[ast.AST]] = {}
    for node in tree.body:
        for name in defined_names(node):
            definitions.setdefault(name, []).append(node)
    used = set()
    waiting = [function]
    while waiting:
        name = waiting.pop()
        if name in definitions and name not in used:
            used.add(name)
            for definition in definitions[name]:
                for node in ast.walk(definition):
                    if isinstance(node, ast.Name):
                        waiting.append(node.id)
    return [node for node in tree.body if used.intersection(defined_names(node))]


def defined_names(node: ast.AST) -> list[str]:
    """The names that a statement at the top of a file defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return []


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
