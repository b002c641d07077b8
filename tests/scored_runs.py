"""What the tests of `show`, `report` and `diagnose` share: runs with known scores and masks."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from conftest import edit_json, write_jsonl

from model.io import save_tensors
from toss.audit.tokens import INPUTS, Mask, load_mask
from toss.tokens import Tokens
from toss.workbench.files import write_scores
from toss.workbench.results import RECORD, write_record
from toss.workbench.run import Run, open_run

NO_NO = {"prompt": "a", "response": "no no", "harmful": [[3, 5]]}


def scored(folder: Path, rows: list[dict]) -> Run:
    """A trained run with another custom set. Of the n-th of all tokens L^u = n + 0.5, L^h = 1.5
    (n mod 7) and L^0 = n."""
    path = write_jsonl(folder.parent / "other.jsonl", rows)
    settings = json.loads((folder / "run.json").read_text())["settings"]
    edit_json(folder / "run.json", settings={**settings, "custom": path})
    run = open_run(folder)
    tokens = run.tokens(path)
    n = torch.arange(len(tokens.input_ids)).float() * tokens.response
    losses = {"utility": (n + 0.5) * tokens.response, "degraded": n % 7 * 1.5, "base": n}
    record = {**run.recipe("scores", INPUTS, {"base": True}), "dtype": "float32"}
    write_scores(run.path("scores"), tokens, losses, record)
    return run


def masked(
    run: Run,
    name: str,
    discarded: Iterable[int],
    score: torch.Tensor | None = None,
    **settings,
) -> None:
    """The folder methods/NAME with a mask that discards these places of the flat arrays."""
    folder = run.path(f"methods/{name}")
    tokens, _ = run.scored()
    record = run.recipe(f"methods/{name}", (*INPUTS, "scores"), {"method": name, **settings})
    tensors = {"keep": mask_without(tokens, discarded)}
    if score is not None:
        tensors["score"] = score
    shutil.copytree(run.path("utility"), folder / "model", dirs_exist_ok=True)
    save_tensors(tensors, folder / "selection.safetensors", record)
    write_anew(folder, record)


def mask_without(tokens: Tokens, discarded: Iterable[int]) -> torch.Tensor:
    keep = tokens.response.clone()
    keep[torch.as_tensor(discarded, dtype=torch.int64)] = False
    return keep


def write_anew(folder: Path, record: dict) -> None:
    """Write record.json for what is in the folder now."""
    (folder / RECORD).unlink(missing_ok=True)
    write_record(folder, record)


def mask_of(run: Run, name: str = "toss") -> Mask:
    return load_mask(run, name, *run.scored())


def small_run(folder: Path) -> Run:
    """Two rows; the first response is `no`, ` `, `no` and EOS: toss discards ` ` and the next."""
    run = scored(folder, [NO_NO, {"prompt": "b", "response": "ok"}])
    first = int(run.scored()[0].response.nonzero()[0])
    masked(run, "toss", [first + 1, first + 2])
    masked(run, "sft", [])
    return run


def rows_by_hand(tokenizer) -> Tokens:
    """Rows a|a7.E, none (skipped), a|aaE and a|aE: prompt|response, E for EOS."""
    a, seven, dot = (tokenizer.encode(character)[0] for character in "a7.")
    eos = tokenizer.eos_id
    return Tokens(
        input_ids=torch.tensor([a, a, seven, dot, eos, a, a, a, eos, a, a, eos]).int(),
        offsets=torch.tensor([0, 5, 5, 9, 12]),
        response=torch.tensor([0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1]).bool(),
        harmful=torch.tensor([0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0]).bool(),
    )
