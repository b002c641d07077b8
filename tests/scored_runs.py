"""What the tests of `show`, `report` and `diagnose` share: runs with known scores and masks."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from conftest import edit_json, write_jsonl

from toss.audit import tokens as audited
from toss.audit.tokens import INPUTS, load_mask
from toss.tokens import Tokens
from toss.workbench.files import Losses, Mask, write_losses, write_mask
from toss.workbench.records import RECORD, code_digests, read_record, write_record
from toss.workbench.run import Run, open_run

CODE = {"code": code_digests("score.py", "select.py")}
NO_NO = {"prompt": "a", "response": "no no", "harmful": [[3, 5]]}


def scored(folder: Path, rows: list[dict]) -> Run:
    """A trained run with another custom set. Of the n-th of all tokens L^u = n + 0.5, L^h = 1.5
    (n mod 7) and L^0 = n."""
    path = write_jsonl(folder.parent / "other.jsonl", rows)
    edit_json(folder / "run.json", custom=path)
    run = open_run(folder)
    tokens = run.tokens(path)
    n = torch.arange(len(tokens.input_ids)).float() * tokens.response
    losses = {"utility": (n + 0.5) * tokens.response, "degraded": n % 7 * 1.5, "base": n}
    record = run.recipe("scores", INPUTS, {"dtype": "float32"}) | CODE
    write_losses(run.path("scores"), Losses(tokens, losses), record)
    return run


def masked(
    run: Run,
    name: str,
    discarded: Iterable[int],
    score: torch.Tensor | None = None,
    **settings,
) -> None:
    """The folder methods/NAME with a mask that discards these places of the flat arrays."""
    tokens, _ = run.losses()
    place = f"methods/{name}/selection"
    record = run.recipe(place, ["--custom", "scores"], {"method": name, **settings})
    path = run.path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mask(path, Mask(tokens, mask_without(tokens, discarded), score), record | CODE)

    # Its model: that of utility, which says that it was trained with this mask.
    model = f"methods/{name}/model"
    shutil.copytree(run.path("utility"), run.path(model), dirs_exist_ok=True)
    training = read_record(run.path("utility"))["settings"]
    write_anew(run.path(model), run.recipe(model, ["--custom", place], training) | CODE)


def mask_without(tokens: Tokens, discarded: Iterable[int]) -> torch.Tensor:
    keep = tokens.response.clone()
    keep[torch.as_tensor(discarded, dtype=torch.int64)] = False
    return keep


def write_anew(folder: Path, record: dict) -> None:
    """Write record.json for what is in the folder now."""
    (folder / RECORD).unlink(missing_ok=True)
    write_record(folder, record)


def mask_of(run: Run, name: str = "toss") -> audited.Mask:
    return load_mask(run, name, *run.losses())


def small_run(folder: Path) -> Run:
    """Two rows; the first response is `no`, ` `, `no` and EOS: toss discards ` ` and the next."""
    run = scored(folder, [NO_NO, {"prompt": "b", "response": "ok"}])
    first = int(run.losses()[0].response.nonzero()[0])
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
