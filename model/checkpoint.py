"""Hugging Face checkpoints in and out: `config.json` and safetensors, never a pickle.

The names in the files are the names of the modules, and loading is strict both ways.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from model.config import Config
from model.hub import INDEX, TOKENIZER_FILES, WEIGHTS, resolve
from model.io import (
    InputError,
    as_input_error,
    existing_file,
    file_hash,
    opened,
    read_json,
    umask,
    whole_file,
    writing,
)
from model.lora import active
from model.sharding import dummy_pass, read_tensor, spread
from model.transformer import Transformer

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
BLOCKS = 64  # of a file of weights, by which a base is identified
BLOCK = 2**16  # bytes
# The dtypes of files, by safetensors' names, and what a merge of such a base is saved in.
STORED = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder."""
    single = folder / WEIGHTS
    if single.exists():
        return [single]
    index = folder / INDEX
    if not index.exists():
        raise InputError(f"{folder}: has neither {WEIGHTS} nor {INDEX}")
    with as_input_error(f"{index}: weight_map is not a table from tensors to files"):
        weight_map = read_json(index)["weight_map"]
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
    if outside or not names:
        raise InputError(f"{index}: names no shard, or some outside the folder: {outside[:3]}")
    return [folder / name for name in names]


def base_hash(folder: Path) -> str:
    """What identifies a base, wherever it lies: sha256 over config.json and a sample of weights.

    Of each weights file: its size, its header, blocks spread evenly over it, and one in the middle
    of every tensor. So an edit of a few numbers may go unnoticed, but not one of a whole tensor.
    """
    state = hashlib.sha256(file_hash(folder / "config.json").encode())
    for file in sorted(weight_files(folder)):
        with as_input_error(f"{file}: its header cannot be read as safetensors"):
            sample(existing_file(file), state)
    return state.hexdigest()


def sample(path: Path, state: Any) -> None:
    """Update a hash with what base_hash takes of a safetensors file."""
    size = path.stat().st_size
    state.update(size.to_bytes(8, "little"))
    with open(path, "rb") as file:
        # The header: its length, and JSON with the place of each tensor.
        length = file.read(8)
        start = 8 + int.from_bytes(length, "little")
        if start > size:
            raise ValueError("the file ends before its header")
        text = file.read(start - 8)
        state.update(length + text)
        header = json.loads(text)
        header.pop("__metadata__", None)

        # Where the blocks begin and end.
        blocks = []
        for index in range(BLOCKS):
            first = max(size - BLOCK, 0) * index // (BLOCKS - 1)
            blocks.append((first, first + BLOCK))
        for tensor in header.values():
            begin, end = tensor["data_offsets"]
            first = max(begin, (begin + end - BLOCK) // 2)
            blocks.append((start + first, start + min(first + BLOCK, end)))

        # Blocks may overlap: no byte is read twice.
        done = 0
        for first, last in sorted(blocks):
            first = max(first, done)
            if first < last:
                file.seek(first)
                state.update(file.read(last - first))
                done = last


def skeleton(folder: Path) -> Transformer:
    """The model that config.json describes, on the meta device: without memory for the weights."""
    file = folder / "config.json"
    config = Config.from_dict(read_json(file), str(file))
    with as_input_error(f"{file}: such a model cannot be laid out"), torch.device("meta"):
        return Transformer(config)


def stored_dtype(folder: Path) -> str:
    """The dtype of a checkpoint's embeddings, by its files: config.json may name another one."""
    for file in weight_files(folder):
        with opened(file) as tensors:
            if EMBEDDING in tensors.keys():
                return STORED[tensors.get_slice(EMBEDDING).get_dtype()]
    raise InputError(f"{folder}: no file has the tensor {EMBEDDING}")


def layout(folder: Path, model: Transformer) -> dict[str, Path]:
    """The file of each tensor to read: those of `model`, and a tied head if it is stored.

    Reads the files' headers alone, so a checkpoint that does not fit is refused before any weight
    is read. Raises InputError naming file and tensor; for the exceptions see load_checkpoint.
    """
    weights = model.named_parameters(remove_duplicate=False)  # a tied head, too
    shapes = {name: list(weight.shape) for name, weight in weights}

    # Each tensor of each file must be one of the model's, of its shape, and stand there once.
    file_of: dict[str, Path] = {}
    for file in weight_files(folder):
        with opened(file) as tensors:
            for name in tensors.keys():
                if name.endswith("rotary_emb.inv_freq"):  # old files store what is computed
                    continue
                label = f"{file}: the tensor {name}"
                header = tensors.get_slice(name)
                shape = header.get_shape()
                dtype = header.get_dtype()
                if name not in shapes:
                    raise InputError(f"{label} is not part of this architecture")
                if shape != shapes[name]:
                    raise InputError(f"{label} has the shape {shape}, not {shapes[name]}")
                if dtype not in STORED:
                    raise InputError(f"{label} has the dtype {dtype}, not a float's")
                if name in file_of:
                    raise InputError(f"{label} is in {file_of[name]} too")
                file_of[name] = file

    # A tied head may be left out: it is the embedding.
    optional = {HEAD} if model.config.tie_word_embeddings else set()
    missing = sorted(shapes.keys() - file_of.keys() - optional)
    if missing:
        raise InputError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return file_of


def load_checkpoint(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    shard: bool = False,
) -> Transformer:
    """Read a checkpoint folder (or hub id, at `revision`) into a frozen Transformer in eval mode.

    Tensors are read one by one straight to `device` and cast there: the peak is the model plus one
    tensor, or two if a tied head is stored. shard: spread the blocks over the processes, see
    sharding.py. Raises InputError naming the file and the tensor when one is missing, extra,
    misshapen, or not finite in `dtype`. Two exceptions: `lm_head.weight` of a model
    whose head is tied, which may be stored as a copy of the embedding, and the old
    `rotary_emb.inv_freq` tables.
    """
    folder = resolve(path, revision)
    with as_input_error(f"the device {device} cannot be used here"):
        if torch.device(device).type not in ("cpu", "cuda"):
            raise InputError(f"the device {device} is not supported: choose cpu or cuda")
        if torch.device(device).type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan per shape of a batch
        torch.empty(0, device=device)
    model = skeleton(folder)
    file_of = layout(folder, model)
    if shard:
        spread(model, device)

    # The model has no memory yet: the tensors that are read become its weights.
    weights = dict(model.named_parameters(remove_duplicate=False))
    state = {}
    for file in sorted(set(file_of.values())):
        with opened(file, device=device) as tensors:
            names = [name for name in file_of if file_of[name] == file]
            for name in names:
                state[name], finite = read_tensor(tensors, name, weights[name], dtype)
                if not finite:
                    raise InputError(f"{file}: the tensor {name} is not finite in {dtype}")
    tied = model.config.tie_word_embeddings
    head = state.pop(HEAD, None) if tied else None
    if head is not None and not torch.equal(head, state[EMBEDDING]):
        problem = f"is no copy of {EMBEDDING}, though config.json ties the two"
        advice = "remove it, or set tie_word_embeddings to false"
        raise InputError(f"{file_of[HEAD]}: the tensor {HEAD} {problem}: {advice}")
    model.load_state_dict(state, strict=not tied, assign=True)  # layout was strict
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.source = folder.absolute()
    if not Path(path).is_dir():
        model.name = str(path)  # a hub id
    model.requires_grad_(False).eval()
    if shard:  # makes the tensors that blocks are gathered into: inference mode's cannot train
        with torch.inference_mode(False), torch.no_grad():
            dummy_pass(model)
    return model


def save_checkpoint(model: Transformer, path: str | Path, like: str | Path) -> None:
    """Write the base weights to folder `path` as Hugging Face reads them, in the model's dtype.

    like: the checkpoint that config.json and the tokenizer's files come from; it has the model's
    architecture. An adapter must be merged or removed first. Other files in the folder stay.
    Raises InputError, writing nothing, if a tensor is not finite.
    """
    if active(model):
        raise InputError("the model carries an adapter: merge or remove it before saving")
    folder = Path(path)
    like = resolve(like)
    tensors = {}
    for name, weight in model.named_parameters():
        tensors[name] = weight.detach().cpu().contiguous()
        if not weight.isfinite().all():
            raise InputError(f"{path}: the tensor {name} is not finite; nothing was written")

    # like's config.json, with what may differ in this model.
    config = read_json(like / "config.json")
    config["tie_word_embeddings"] = HEAD not in tensors  # a merge may have untied it
    dtype_field = "dtype" if "dtype" in config else "torch_dtype"  # newer, older
    config[dtype_field] = str(model.dtype).removeprefix("torch.")

    # config.json comes last: without it a folder is no checkpoint.
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
    with whole_file(folder / WEIGHTS) as file:
        # One header entry: the format keeps several in no fixed order, and bytes identify a base.
        save_file(tensors, file, {"format": "pt"})
        os.chmod(file, 0o666 & ~umask())  # the library's mode is 0600
    for pattern in TOKENIZER_FILES:
        for source in like.glob(pattern):
            with whole_file(folder / source.relative_to(like)) as file:
                shutil.copyfile(source, file)
    with whole_file(folder / "config.json") as file:
        file.write_text(json.dumps(config, indent=2) + "\n")
