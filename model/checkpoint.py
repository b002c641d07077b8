"""Hugging Face checkpoints in and out: `config.json` and safetensors, never a pickle.

The names in the files are the names of the modules, and loading is strict both ways.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.atomic import atomic_dir
from model.config import Config
from model.hub import INDEX, SMALL_FILES, WEIGHTS, resolve
from model.io import (
    InputError,
    NotFinite,
    as_input_error,
    file_hash,
    opened,
    read_json,
    write_record,
)
from model.lora import active
from model.sharding import keep_up, read, spread
from model.transformer import Transformer


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.exists():
        raise InputError(f"{folder}: has neither {WEIGHTS} nor {INDEX}")
    with as_input_error(f"{index}: weight_map is not a table from tensors to files"):
        names = sorted(set(read_json(index)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    if outside or not names:
        raise InputError(f"{index}: names no shard, or some outside the folder: {outside[:3]}")
    return [folder / name for name in names]


def base_hash(folder: Path, hash: Callable[[Path], str] = file_hash) -> str:
    """What identifies a base: sha256 over the sorted hashes of its weight files and config.json.

    hash: the sha256 of one file; a caller may pass a cached one.
    """
    hashes = sorted(hash(file) for file in [*weight_files(folder), folder / "config.json"])
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def skeleton(folder: Path) -> Transformer:
    """The model that config.json describes, on the meta device: without memory for the weights."""
    file = folder / "config.json"
    config = Config.from_dict(read_json(file), str(file))
    with as_input_error(f"{file}: such a model cannot be laid out"), torch.device("meta"):
        return Transformer(config)


def layout(folder: Path, model: Transformer) -> dict[str, Path]:
    """The tensors to read, which are exactly those of `model`, file by file.

    Reads the files' headers alone, so a checkpoint that does not fit is refused before any weight
    is read. Raises InputError naming file and tensor; for the exceptions see load_checkpoint.
    """
    wanted = {name: list(weight.shape) for name, weight in model.named_parameters()}
    copies = ["lm_head.weight"] if model.config.tie_word_embeddings else []
    found: dict[str, Path] = {}
    for file in weight_files(folder):
        with opened(file) as tensors:
            for name in tensors.keys():
                if name in copies or name.endswith("rotary_emb.inv_freq"):
                    continue
                part, this = tensors.get_slice(name), f"{file}: the tensor {name}"
                shape, dtype = part.get_shape(), part.get_dtype()
                if name not in wanted:
                    raise InputError(f"{this} is not part of this architecture")
                if shape != wanted[name]:
                    raise InputError(f"{this} has the shape {shape}, not {wanted[name]}")
                if dtype not in ("F64", "F32", "F16", "BF16"):
                    raise InputError(f"{this} has the dtype {dtype}, not a float's")
                if found.setdefault(name, file) != file:
                    raise InputError(f"{this} is in {found[name]} too")
    if missing := sorted(wanted.keys() - found.keys()):
        raise InputError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return found


def load_checkpoint(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    shard: bool = False,
) -> Transformer:
    """Read a checkpoint folder (or hub id, at `revision`) into a frozen Transformer in eval mode.

    Tensors are read one by one straight to `device` and cast there: the peak is the model plus one
    tensor. shard: spread the blocks over the processes, see sharding.py. Raises InputError naming
    the file and the tensor when one is missing, extra, misshapen, or not finite in `dtype`
    (NotFinite). Two exceptions: `lm_head.weight` of a model whose head is tied, and the old
    `rotary_emb.inv_freq` tables.
    """
    folder = resolve(path, revision)
    with as_input_error(f"the device {device} cannot be used here"):
        if torch.device(device).type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan per shape of a batch
        torch.empty(0, device=device)
    model, state = skeleton(folder), {}
    found = layout(folder, model)
    if shard:
        spread(model, device)
    weights = dict(model.named_parameters())
    for file, names in groupby(found, found.get):
        with opened(file, device=device) as tensors:
            for name in names:
                state[name], finite = read(tensors, name, weights[name], dtype)
                if not finite:
                    raise NotFinite(f"{file}: the tensor {name} is not finite in {dtype}")
    tied = model.config.tie_word_embeddings
    model.load_state_dict(state, strict=not tied, assign=True)  # layout was strict
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.source, model.name = folder.absolute(), "" if Path(path).is_dir() else str(path)
    model.requires_grad_(False).eval()
    if shard:  # makes the tensors that blocks are gathered into: inference mode's cannot train
        with torch.inference_mode(False), torch.no_grad():
            keep_up(model)
    return model


def save_checkpoint(
    model: Transformer, path: str | Path, like: str | Path, made_from: dict | None = None
) -> None:
    """Write the base weights to folder `path` as Hugging Face reads them, in the model's dtype.

    like: the checkpoint that config.json and the tokenizer's files come from; it has the model's
    architecture. An adapter must be merged or removed first. made_from: for record.json.
    """
    if active(model):
        raise InputError("the model carries an adapter: merge or remove it before saving")
    like = resolve(like)
    tensors = {n: weight.detach().cpu().contiguous() for n, weight in model.named_parameters()}
    config = read_json(like / "config.json")
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors  # a merge may have untied it
    spelling = "dtype" if "dtype" in config else "torch_dtype"  # newer, older
    config[spelling] = str(model.dtype).removeprefix("torch.")
    with atomic_dir(path, replace=False) as folder:
        # One header string: the format keeps several in no fixed order, and bytes identify a base.
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        for file in (file for pattern in SMALL_FILES for file in like.glob(pattern)):
            new = folder / file.relative_to(like)
            new.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, new)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_record(folder, made_from or {})
