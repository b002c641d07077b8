"""Hugging Face checkpoints in and out: `config.json` and safetensors, one file or shards. Never pickle.

The names in the file are the names of the modules, so loading is a loop over tensors; what is added to that loop is
strictness, since a tensor that silently stays random is the worst kind of bug.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open

from model.errors import InputError, NotFinite
from model.files import read_json, save_tensors, written_beside
from model.hub import fetch
from model.transformer import Config, Transformer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json",
                   "special_tokens_map.json", "generation_config.json")
HUB_FILES = ("config.json", "model.safetensors.index.json", "additional_chat_templates/*.jinja", *TOKENIZER_FILES)


def resolve(path: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """A local checkpoint folder as it is; a hub id (`org/name`) fetched into huggingface_hub's cache, safetensors only.

    revision: a hub id's branch, tag or commit (default: its main branch); the folder's name is the commit. weights: False
    to leave them out.
    """
    path = Path(path)
    if path.is_dir():
        if revision is not None:
            raise InputError(f"{path} is a local folder, which has no revisions: leave --revision out")
        return path
    if path.is_absolute() or len(path.parts) != 2 or path.parts[0] in (".", "..", "~"):
        raise InputError(f"{path}: there is no such checkpoint folder (a hub id has the form org/name)")
    return fetch(str(path), revision, HUB_FILES, weights)


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, each known to exist."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise InputError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: weight_map is not a table from tensors to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{index}: the shard {name!r} lies outside the checkpoint's folder")
        if not (folder / name).is_file():
            raise InputError(f"{index}: the shard {name} is missing")
    return [folder / name for name in names]


@contextmanager
def open_tensors(file: Path, device: str | torch.device = "cpu") -> Iterator[safe_open]:
    """A safetensors file, open for reading; InputError naming it when it cannot be read, then or while it is open."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cannot be read as safetensors, it may be truncated ({error})") from None


def tensor_headers(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype (as safetensors spells it) and the shape of each tensor of a file; their values are not read."""
    with open_tensors(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def skeleton(folder: Path) -> Transformer:
    """The model that a folder's config.json describes, laid out without memory; InputError where it is not implemented."""
    file = folder / "config.json"
    config = Config.from_dict(read_json(file), str(file))
    try:
        with torch.device("meta"):
            return Transformer(config)
    except (RuntimeError, OverflowError) as error:  # absurd sizes
        raise InputError(f"{file}: such a model cannot be laid out ({str(error).splitlines()[0]})") from None


def layout(folder: Path, model: Transformer) -> dict[Path, list[str]]:
    """The tensors to read from each file of a checkpoint folder, which are all that `model` has.

    From the files' headers alone, so that a checkpoint that does not fit is refused before any weight is read. Raises
    InputError naming the file and the tensor when one is missing, extra or of another shape; see load_checkpoint.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # a tied head appears once
    found: dict[Path, list[str]] = {}
    for file in shards(folder):
        found[file] = []
        for name, (_, shape) in tensor_headers(file).items():
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.config.tie_word_embeddings):
                continue
            if name not in wanted:
                raise InputError(f"{file}: the tensor {name} is not part of this architecture")
            if shape != wanted[name]:
                raise InputError(f"{file}: the tensor {name} has the shape {shape}, but config.json asks for {wanted[name]}")
            found[file].append(name)
    if missing := sorted(wanted.keys() - {name for names in found.values() for name in names}):
        raise InputError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return found


def put_weight(module: torch.nn.Module, name: str, weight: torch.nn.Parameter) -> None:
    """Put a parameter into a module, in the place of the one of that name."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, weight)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
                    revision: str | None = None) -> Transformer:
    """Read a checkpoint folder (or hub id, at `revision`) into a frozen Transformer in evaluation mode.

    The model is laid out without memory and then given one tensor after the other, read straight to `device` and
    cast there to `dtype`: the peak is the model plus one tensor. Needs no tokenizer files.

    Raises InputError naming the file and the tensor when one is missing, extra, of another shape, or not finite in
    `dtype`. Two exceptions: `lm_head.weight` of a model whose head is tied, and the old `rotary_emb.inv_freq` tables.
    """
    folder = resolve(path, revision)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"the device {device} cannot be used here ({str(error).splitlines()[0]})") from None
    model = skeleton(folder)
    for file, names in layout(folder, model).items():
        with open_tensors(file, device) as tensors:
            for name in names:
                tensor = tensors.get_tensor(name).to(dtype)
                if not tensor.isfinite().all():
                    raise NotFinite(f"{file}: the tensor {name} is not finite in {dtype}")
                put_weight(model, name, torch.nn.Parameter(tensor, requires_grad=False))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.source, model.name = folder.absolute(), "" if Path(path).is_dir() else str(path)
    return model.eval()


def save_checkpoint(model: Transformer, path: str | Path, like: str | Path, note: dict[str, str] | None = None) -> None:
    """Write the base weights to folder `path` in the form that Hugging Face reads, in the model's dtype.

    config.json and the tokenizer's files come from the folder `like`, whose architecture the model has. An adapter
    must have been merged or removed before. note: what it was made from, for the file's header.
    """
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise InputError("the model still carries an adapter: merge or remove it before saving")
    like = resolve(like)
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    config = read_json(like / "config.json")
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors  # merging an adapter of the head unties it
    config["dtype" if "dtype" in config else "torch_dtype"] = str(model.dtype).removeprefix("torch.")  # newer, older spelling
    with written_beside(path) as folder:
        save_tensors(tensors, folder / "model.safetensors", note or {}, format="pt")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in TOKENIZER_FILES:
            if (like / name).exists():
                shutil.copyfile(like / name, folder / name)
