"""The three stages that the scripts run: reference models, scores, selective fine-tuning."""

import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model import load_adapter, load_checkpoint, save_adapter, save_checkpoint
from model.errors import InputError
from model.files import file_beside, file_hash, made_from, read_json, save_tensors, written_beside
from model.lora import merge_adapter
from toss.base import ADAPTER, DTYPES, Base, reference_note
from toss.dataset import Tokens
from toss.parallel import rank
from toss.refinement import default_samples, refine
from toss.rows import Row, overlap, read_rows
from toss.run import Run, misfits
from toss.scoring import rounding_noise, score_under
from toss.selection import METHODS, UNSCORED, Candidates, choose, ranked_entries
from toss.settings import TRAINING, Settings
from toss.training import train


def train_references(settings: Settings) -> None:
    """Stage 1: theta^h and theta^u, two LoRA adapters trained from the base on D^h and D^u (the method, step 1)."""
    if not (settings.harmful and settings.utility):
        raise InputError(f"{settings.run} was begun without reference sets: give --model, --harmful and --utility")
    run = Run(settings)
    base = Base(run)
    paths = {"degraded": settings.harmful, "utility": settings.utility}
    rows = {role: read_rows(path) for role, path in paths.items()}
    warn_overlap("harmful and utility reference sets", rows["degraded"], rows["utility"])
    for role, path in paths.items():
        recipe = {**run.recipe(TRAINING, data_sha256=run.use(path)), "dtype": base.dtypes["train"]}
        if run.is_done(role, run.folder / role, recipe, ADAPTER):
            continue
        tokens = run.tokens(rows[role], path)
        cost = train(base.load("train"), tokens, torch.ones_like(tokens.response), settings, base.budget, role, base.log(role))
        save_adapter(base.model, run.out / role, reference_note(role, run, data_sha256=run.use(path)))
        run.finish(role, recipe, cost)
        report(role, run.folder / role, cost)


def score_custom(settings: Settings) -> None:
    """Stage 2: the losses of every response token of D^cus under both reference models (the method, step 2)."""
    run = Run(settings)
    if settings.custom is None:
        raise InputError("--custom is needed: the JSONL file whose tokens are to be scored")
    adapters = {"loss_utility": adapter_of(run, "utility"), "loss_degraded": adapter_of(run, "degraded")}
    base = Base(run)
    path = run.folder / "scores.safetensors"
    sources = {
        "custom_sha256": run.use(settings.custom),
        "utility_sha256": file_hash(adapters["loss_utility"] / "adapter_model.safetensors"),
        "degraded_sha256": file_hash(adapters["loss_degraded"] / "adapter_model.safetensors"),
    }
    recipe = {**run.recipe(("base",), **sources), "dtype": base.dtypes["score"]}
    if run.is_done("scores", path, recipe):
        return
    rows = read_rows(settings.custom)
    warn_references(run, "custom", rows)
    tokens = run.tokens(rows, settings.custom)
    del rows  # from here on the flat arrays are all that grows with the dataset
    losses, cost = score_under(base, tokens, {**adapters, **({"loss_base": None} if settings.base else {})})
    arrays = {name: getattr(tokens, name) for name in ("input_ids", "offsets", "response", "harmful")}
    note = {**run.identity, **sources, "tokens_sha256": tokens.fingerprint(), "dtype": cost["dtype"],
            "skipped": str(tokens.skipped), "cut": str(tokens.cut)}
    if rank() == 0:
        with file_beside(path) as file:
            save_tensors({**arrays, **losses}, file, note)
    cost = {**cost, "rows": tokens.rows, "skipped": tokens.skipped, "cut": tokens.cut}
    run.finish("scores", recipe, cost)
    report("scores", path, cost)
    if cost["dtype"] != "float32":
        print(rounding_noise(base, tokens, adapters, losses, settings.discard))
    S = (losses["loss_utility"] - losses["loss_degraded"])[tokens.response]
    print(f"S = L^u - L^h {spread(S)}")
    if S.std() < 0.01:
        print("note: the two references hardly differ, so S ranks almost nothing: train them at a higher --lr, or for more steps "
              "(--epochs, a smaller --batch-size)")


def spread(S: Tensor) -> str:
    """How the scores of the response tokens are spread, in words."""
    S = S.sort().values
    marks = {q: float(S[int(q / 100 * (len(S) - 1))]) for q in (1, 50, 90, 99)}
    return (f"over {len(S)} response tokens, in nats: mean {S.mean():.3f}, standard deviation {S.std():.3f}, "
            f"quantiles " + ", ".join(f"{q} % {mark:.2f}" for q, mark in marks.items()))


def finetune(settings: Settings) -> None:
    """Stages 3 to 5: mask the riskiest tokens (after TOSS-Pro's rounds where asked for) and fine-tune on the rest."""
    settings = named(settings)
    run = Run(settings)
    method, folder = settings.method, run.folder / "methods" / settings.name
    base = Base(run)
    tokens, losses, sources = scored_tokens(run, needed=method not in UNSCORED)
    entries = ranked_entries(tokens, settings.keep_eos, run.tokenizer.eos_id)
    if method == "mask":
        sources["mask_sha256"] = run.use(settings.mask)
    names = TRAINING + (() if method in ("sft", "mask") else ("discard", "keep_eos"))
    names += ("weight_utility", "weight_degraded") if method == "weighted" else ()
    recipe = {**run.recipe(names, method=method, **sources), "dtype": base.dtypes["train"]}
    if method == "toss-pro":
        k, reference = settings.pro_samples or default_samples(tokens), degraded_recipe(run)
        base.dtypes["score"] = made_from(run.folder / "scores.safetensors").get("dtype", base.dtypes["score"])
        recipe |= {"rounds": settings.pro, "samples": k, "reference": reference, "score_dtype": base.dtypes["score"],
                   "pro_train": settings.pro_train}
    parts = ("selection.safetensors", *(f"model/{name}" for name in ADAPTER))
    if not run.is_done(f"methods/{settings.name}", folder, recipe, parts):
        selection, how = selection_of(run, tokens, losses, entries)  # refused, if it must be, before anything is written
        with written_beside(run.out / "methods" / settings.name, whole=True) as beside:
            cost = {}
            if method == "toss-pro":
                harmful = degraded_data(run, reference)
                again = replace(settings, **reference["settings"])  # theta^h is trained as it was
                losses, cost["refining"] = refine(base, harmful, tokens, losses, entries, again, settings.pro, k, beside, sources)
                if rank() == 0:
                    sources["scores_sha256"] = file_hash(beside / f"round-{settings.pro}" / "scores.safetensors")
                selection, how = selection_of(run, tokens, losses, entries)
            keep = selection["keep"]
            note = {**run.identity, **sources, "method": method, **how, "tokens_sha256": tokens.fingerprint(),
                    "discarded": str(int((~keep).sum()))}
            if rank() == 0:
                save_tensors(selection, beside / "selection.safetensors", note)
            cost |= train(base.load("train"), tokens, keep, settings, base.budget, settings.name, base.log(settings.name))
            save_adapter(base.model, beside / "model", reference_note(method, run, **sources))
        run.finish(f"methods/{settings.name}", recipe, cost)
        report(settings.name, folder, cost)
        print(f"{settings.name}: {int((~keep).sum())} of {len(entries)} response tokens discarded, "
              f"{whole_rows(tokens, keep)} rows lost all of theirs")
    if settings.merge and rank() == 0:
        merge(base, folder / "model")


def named(settings: Settings) -> Settings:
    """The settings with the method that they amount to, and the name of its folder.

    `--method toss --pro T` is toss-pro, which has one round or more; --mask is the method mask, which is none of METHODS.
    The folder bears the method's name unless --name gives another; that of the method `base` is base-reference.
    """
    if settings.mask:
        settings = replace(settings, method="mask")
    elif settings.method not in METHODS:
        raise InputError(f"--method {settings.method!r} is unknown; there are {', '.join(METHODS)}")
    if settings.pro and settings.method not in ("toss", "toss-pro"):
        raise InputError("--pro goes with --method toss")
    if settings.method == "toss-pro" or settings.pro:
        settings = replace(settings, method="toss-pro", pro=settings.pro or 1)
    name = settings.name or {"base": "base-reference"}.get(settings.method, settings.method)
    if name in ("base", "degraded", "utility") or not re.fullmatch(r"[\w.=+-]*\w[\w.=+-]*", name):
        raise InputError(f"--name {name!r} cannot name a folder under methods/ (base, degraded and utility are models already)")
    return replace(settings, name=name)


def degraded_recipe(run: Run) -> dict:
    """How theta^h was trained, so that TOSS-Pro can train it again."""
    recipe = run.record.get("stages", {}).get("degraded", {}).get("recipe")
    if recipe is None:
        raise InputError(f"TOSS-Pro trains the degraded model again, but {run.file} does not know how it was trained: "
                         f"run train.py --run {run.folder}")
    return recipe


def degraded_data(run: Run, recipe: dict) -> Tokens:
    """D^h_0, which must still be the file that theta^h was trained on."""
    path = run.settings.harmful
    if run.use(path) != recipe["data_sha256"]:
        raise InputError(f"{path} is no longer the file that the degraded model was trained on")
    return run.tokens(read_rows(path), path)


def scored_tokens(run: Run, needed: bool) -> tuple[Tokens, dict[str, Tensor], dict[str, str]]:
    """The custom set's tokens and their losses from scores.safetensors, after checking what that was made from.

    Where no scores are there and none are needed, the custom file is tokenised now: the same ids, by the same code.
    """
    settings, path = run.settings, run.folder / "scores.safetensors"
    if settings.custom is None:
        raise InputError("--custom is needed: the JSONL file to fine-tune on")
    sources = {"custom_sha256": run.use(settings.custom)}
    if not path.exists():
        if needed:
            raise InputError(f"{path} is not there: run score.py --run {run.folder} first")
        rows = read_rows(settings.custom)
        warn_references(run, "custom", rows)
        return run.tokens(rows, settings.custom), {}, sources
    if needed:
        for role in ("utility", "degraded"):
            sources[f"{role}_sha256"] = file_hash(adapter_of(run, role) / "adapter_model.safetensors")
    run.check_made_from(path, **sources)
    try:
        tensors = load_file(path)
        response = tensors["response"].bool()
        harmful = tensors["harmful"].bool() if "harmful" in tensors else torch.zeros_like(response)
        left_out = (int(made_from(path).get(name, 0)) for name in ("skipped", "cut"))
        tokens = Tokens(tensors["input_ids"], tensors["offsets"], response, harmful, settings.custom, *left_out)
        losses = {name: tensors[name] for name in ("loss_utility", "loss_degraded", "loss_base")
                  if name in tensors or name != "loss_base"}
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path}: not a scores file ({error})") from None
    for name, loss in losses.items():
        if not loss.isfinite().all():
            row = int(tokens.row_of((~loss.isfinite()).nonzero()[0]))
            raise InputError(f"{path}: {name} is not finite on row {row} (counted from 0)")
    if needed:
        sources["scores_sha256"] = file_hash(path)
    return tokens, losses, sources


def selection_of(run: Run, tokens: Tokens, losses: dict[str, Tensor],
                 entries: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of selection.safetensors: the mask, and what it was cut by, if anything; and how they came about, in words."""
    settings = run.settings
    if settings.method == "mask":
        return mask_of_another_run(run, tokens)
    weights = (settings.weight_utility, settings.weight_degraded)
    keep, scores = choose(settings.method, Candidates(tokens, entries, losses, settings.seed, weights), settings.discard)
    ranked_by = {} if scores is None else {"score": torch.zeros(len(keep)).index_put((entries,), scores)}
    how = {"discard": str(settings.discard), "keep_eos": str(settings.keep_eos), "ranked": str(len(entries))}
    return {"keep": keep, **ranked_by}, how


def mask_of_another_run(run: Run, tokens: Tokens) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the selection that --mask names, and what a new header says of them: how they were chosen, and from what.

    A mask is a list of places, so it fits exactly the token ids that it was made over; nothing else of the two runs has
    to agree. Raises InputError for another file, for a mask over other tokens (naming what differs), and for one that
    takes more than response tokens away.
    """
    path = Path(run.settings.mask)
    header = made_from(path)
    try:
        selection = {name: tensor for name, tensor in load_file(path).items() if name in ("keep", "score")}
        keep, fingerprint = selection["keep"], header["tokens_sha256"]
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path}: not a selection.safetensors that select.py wrote ({error})") from None
    if fingerprint != tokens.fingerprint():
        here = {"custom_sha256": run.use(run.settings.custom), **run.identity, "base_sha256": header.get("base_sha256", "")}
        other = [f"{what} ({values})" for what, values in misfits(header, here).values()]
        raise InputError(f"{path} is a mask over other token ids than this run's{': it was made with ' if other else ''}"
                         f"{' and '.join(other)}; give both runs the same --custom, prompt form and length, and models of one "
                         "tokenizer")
    if keep.dtype not in (torch.bool, torch.uint8) or any(t.shape != tokens.response.shape for t in selection.values()):
        shapes = " and ".join(f"{name} of {tuple(t.shape)} ({t.dtype})" for name, t in selection.items())
        raise InputError(f"{path} holds {shapes}, where flags (and scores) of {len(tokens.response)} tokens were expected")
    selection["keep"] = keep = keep.bool()
    if taken := int((~keep & ~tokens.response).sum()):
        raise InputError(f"{path}: keep discards {taken} tokens of prompts, which have no loss to be taken out of")
    how = {name: header[name] for name in ("discard", "keep_eos", "ranked") if name in header}
    return selection, how | {f"mask_{name}": header[name] for name in ("base_sha256", "method") if name in header}


def adapter_of(run: Run, role: str) -> Path:
    """The folder of a reference adapter, after checking that it belongs to this run."""
    folder = run.folder / role
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise InputError(f"{file} is not there: run train.py --run {run.folder} first")
    trained = run.record.get("stages", {}).get(role, {}).get("recipe", {})
    run.check_made_from(file, **({"data_sha256": trained["data_sha256"]} if trained else {}))
    return folder


def merge(base: Base, folder: Path) -> None:
    """Write folder/merged: the base with the adapter folded in, in the dtype that the checkpoint is stored in."""
    if (folder / "merged").exists():
        print(f"merged checkpoint: already there ({folder / 'merged'})")
        return
    run, base.model = base.run, None  # the trained one makes room
    config = read_json(run.checkpoint / "config.json")
    name = config.get("dtype") or config.get("torch_dtype") if run.settings.dtype == "auto" else run.settings.dtype
    model = load_checkpoint(run.checkpoint, base.device, DTYPES.get(name, torch.float32))
    load_adapter(model, folder)
    merge_adapter(model)
    merged_from = {**run.identity, "adapter_sha256": file_hash(folder / "adapter_model.safetensors")}
    save_checkpoint(model, folder / "merged", run.checkpoint, merged_from)
    print(f"merged checkpoint: {folder / 'merged'} ({str(model.dtype).removeprefix('torch.')})")


def warn_references(run: Run, name: str, rows: list[Row]) -> None:
    """Warn when rows of a file are in the reference sets too."""
    for role in ("harmful", "utility"):
        path = run.record.get("settings", {}).get(role)
        if path and Path(path).exists():
            warn_overlap(f"{name} and {role} reference set", rows, read_rows(path))


def warn_overlap(names: str, rows: list[Row], others: list[Row], prompts_only: bool = False) -> None:
    """Print a warning when two files share rows."""
    if shared := overlap(rows, others, prompts_only):
        print(f"warning: {names}: {shared} of {len(rows)} {'prompts' if prompts_only else 'rows'} are in both")


def whole_rows(tokens: Tokens, keep: Tensor) -> int:
    """How many rows have response tokens, but none that is kept."""
    kept = torch.bincount(tokens.row_of((tokens.response & keep).nonzero().squeeze(1)), minlength=tokens.rows)
    there = torch.bincount(tokens.row_of(tokens.response.nonzero().squeeze(1)), minlength=tokens.rows)
    return int(((there > 0) & (kept == 0)).sum())


def report(stage: str, path: Path, cost: dict) -> None:
    """The closing lines of a stage: what was written, what was skipped and cut, what it cost."""
    speed, loss = cost["tokens"] / max(cost["seconds"], 1e-9), cost.get("last_loss")
    print(f"{stage}: wrote {path}\n    {cost['rows']} rows, {cost['skipped']} skipped, {cost['cut']} cut; {cost['tokens']} "
          f"tokens in {cost['seconds']:.1f} s ({speed:,.0f} a second), peak memory {cost['peak_memory_gib']:.2f} GiB"
          + ("" if loss is None else f", last loss {loss:.3f}"))
