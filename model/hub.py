"""A checkpoint folder from a local path or a Hugging Face Hub id. Never fetches a pickle."""

import sys
from pathlib import Path

from model.io import InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = """tokenizer.json tokenizer_config.json chat_template.jinja chat_template.json
    special_tokens_map.json generation_config.json""".split()
# A hub repository must have the first file of a list.
SMALL_FILES = ["config.json", "additional_chat_templates/*.jinja", *TOKENIZER_FILES]
# Not *.safetensors: that would also match Mistral's second copy, consolidated.safetensors.
WEIGHT_FILES = [WEIGHTS, INDEX, "model-*-of-*.safetensors"]
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]


def resolve(path: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """A local folder as it is, or the snapshot of a hub id (`org/name`) in huggingface_hub's cache.

    revision: a branch, tag or commit of a hub id (default: main); the folder's name is the commit.
    weights: False to leave them out. Without a network a complete cache is used, else InputError.
    """
    path = Path(path)
    if path.is_dir():
        if revision is not None:
            raise InputError(f"{path} is a local folder and has no revisions: omit --revision")
        return path
    if not is_hub_id(path):
        raise InputError(f"{path}: no such checkpoint folder (a hub id has the form org/name)")
    return download(str(path), revision, SMALL_FILES + WEIGHT_FILES * weights)


def resolve_adapter(path: str | Path) -> Path:
    """The same for the folder of a PEFT adapter: a local one, or that of a hub id."""
    path = Path(path)
    fetched = is_hub_id(path) and not path.is_dir()
    return download(str(path), None, ADAPTER_FILES) if fetched else path


def is_hub_id(path: Path) -> bool:
    """True for `org/name`."""
    named = len(path.parts) == 2 and not path.is_absolute()
    return named and path.parts[0] not in (".", "..", "~")


def download(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Fetch the files that fit `patterns` and are not cached; every failure becomes one line."""
    from huggingface_hub import HfApi, errors, snapshot_download, utils

    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    login = "log in with `hf auth login` or set HF_TOKEN"
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        has = lambda file: (folder / file).is_file()
        lacks = "" if has(patterns[0]) else f"no {patterns[0]}"
        if WEIGHTS in patterns and not has(WEIGHTS) and not has(INDEX):
            lacks = lacks or f"neither {WEIGHTS} nor its index"
        if lacks:
            files = HfApi().list_repo_files(name, revision=folder.name)
            pickles = [file for file in files if file.endswith((".bin", ".pt", ".pth"))]
            note = f" ({pickles[0]} is a pickle, which is never read)" if pickles else ""
            raise InputError(f"{name}: the hub repository has {lacks}{note}")
        return folder
    except InputError:
        raise
    except errors.GatedRepoError:
        said = f"gated repository: request access on its Hub page, then {login}"
    except errors.RevisionNotFoundError:
        said = f"the hub repository has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        said = f"neither a local folder nor a hub repository that you can see (private: {login})"
    except Exception as error:  # those of the HTTP library, which differs between versions
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        said = (
            f"not a local folder, not in the cache, and the download failed ({reason}); without "
            f"a network, fetch it elsewhere with `hf download {name}` and pass the folder"
        )
    raise InputError(f"{name}: {said}")
