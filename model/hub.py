"""A checkpoint folder from a local path or a Hugging Face Hub id. Never fetches a pickle."""

import sys
from pathlib import Path

from model.io import InputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = """tokenizer.json tokenizer_config.json chat_template.jinja chat_template.json
    additional_chat_templates/*.jinja special_tokens_map.json generation_config.json""".split()
SMALL_FILES = ["config.json", *TOKENIZER_FILES]
# Not *.safetensors: that would also match Mistral's second copy, consolidated.safetensors.
WEIGHT_FILES = [WEIGHTS, INDEX, "model-*-of-*.safetensors"]


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
    return download(str(path), revision, weights)


def is_hub_id(path: Path) -> bool:
    """True for `org/name`."""
    if len(path.parts) != 2 or path.is_absolute():
        return False
    return path.parts[0] not in (".", "..", "~")


def download(name: str, revision: str | None, weights: bool) -> Path:
    """Fetch the needed files that are not cached; every failure becomes one line."""
    from huggingface_hub import errors, snapshot_download, utils

    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    patterns = SMALL_FILES + WEIGHT_FILES if weights else SMALL_FILES
    login = "log in with `hf auth login` or set HF_TOKEN"
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        check_complete(folder, name, weights)
        return folder
    except InputError:
        raise
    except errors.GatedRepoError:
        reason = f"gated repository: request access on its Hub page, then {login}"
    except errors.RevisionNotFoundError:
        reason = f"the hub repository has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        reason = f"neither a local folder nor a hub repository that you can see (private: {login})"
    except Exception as error:  # those of the HTTP library, which differs between versions
        text = " ".join(str(error).split())[:200]
        reason = (
            "not a local folder, not in the cache, and the download failed "
            f"({type(error).__name__}: {text}); without a network, fetch it elsewhere with "
            f"`hf download {name}` and pass the folder"
        )
    raise InputError(f"{name}: {reason}")


def check_complete(folder: Path, name: str, weights: bool) -> None:
    """InputError if the snapshot lacks a file that is needed."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{name}: the hub repository has no config.json")
    if weights and not any((folder / file).is_file() for file in (WEIGHTS, INDEX)):
        missing = f"neither {WEIGHTS} nor its index (pickles are never read)"
        raise InputError(f"{name}: the hub repository has {missing}")
