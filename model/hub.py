"""Checkpoints by hub id: only the files that are needed go into huggingface_hub's cache, and never a pickle."""

from fnmatch import fnmatch
from pathlib import Path

from model.errors import InputError
from model.files import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def fetch(name: str, revision: str | None, small: tuple[str, ...], weights: bool) -> Path:
    """The folder of a repository's snapshot in the cache, whose name is the commit; fetched as far as it is not there.

    small: patterns of the files to fetch, config.json among them. weights: also model.safetensors, or else the shards
    that the index names. Without a network what the cache holds is used, if nothing is missing. Raises InputError.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub import errors as hub

    called = name if revision is None else f"{name} (revision {revision})"
    try:
        try:
            there = [file.rfilename for file in HfApi().model_info(name, revision=revision, timeout=10).siblings]
        except Exception:
            known = try_to_load_from_cache(name, "config.json", revision=revision)
            if isinstance(known, str) and complete(folder := Path(known).parent, weights):
                print(f"{called}: the hub could not be asked, so the cache's files are used as they are ({folder.name[:12]})")
                return folder
            raise
        # The revision is asked for by its name once, which the cache remembers; the rest comes from the commit found.
        folder = Path(hf_hub_download(name, "config.json", revision=revision)).parent
        commit = folder.name
        for file in there:
            if any(fnmatch(file, pattern) for pattern in small):
                hf_hub_download(name, file, revision=commit)
        for file in weight_files(called, folder, there) if weights else ():
            hf_hub_download(name, file, revision=commit)
        return folder
    except InputError:
        raise
    except hub.GatedRepoError:
        raise InputError(f"{called}: its owner gives access on request only: ask for it on its page on the hub, then log in "
                         "with `hf auth login`, or set HF_TOKEN") from None
    except hub.RevisionNotFoundError:
        raise InputError(f"{name}: the repository on the hub has no revision {revision!r}") from None
    except hub.RepositoryNotFoundError:
        raise InputError(f"{name}: neither a local folder nor a repository that the hub shows you: check the spelling; for a "
                         "private one log in with `hf auth login`, or set HF_TOKEN") from None
    except Exception as error:  # the hub's client raises what its HTTP library raises, which differs between versions
        if isinstance(error, hub.EntryNotFoundError) and not isinstance(error, hub.LocalEntryNotFoundError):
            raise InputError(f"{called}: the repository on the hub has no config.json, so it is no checkpoint") from None
        raise InputError(f"{called}: neither a local folder nor to be had from the hub ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:200]}), and the cache does not hold all of it; without a network, "
                         f"fetch it elsewhere with `hf download {name}` and pass the folder") from None


def weight_files(called: str, folder: Path, there: list[str]) -> list[str]:
    """Which of a repository's files hold the weights: one file, or those that the index names."""
    if WEIGHTS in there:
        return [WEIGHTS]
    if INDEX in there:
        return [file for file in there if file in shard_names(folder)]
    pickles = [file for file in there if fnmatch(file, "*.bin") or fnmatch(file, "*.pt*")]
    raise InputError(f"{called}: the repository has neither {WEIGHTS} nor its index"
                     + (f"; {pickles[0]} is a pickle, which is never read" if pickles else "")
                     + ": choose a revision or a repository with safetensors")


def shard_names(folder: Path) -> set[str]:
    """The files that the index names; what is wrong with them is said where they are loaded."""
    table = read_json(folder / INDEX).get("weight_map")
    return {name for name in table.values() if isinstance(name, str)} if isinstance(table, dict) else set()


def complete(folder: Path, weights: bool) -> bool:
    """Does a snapshot in the cache hold what a load needs?"""
    if not weights:
        return (folder / "tokenizer.json").exists() and (folder / "tokenizer_config.json").exists()
    if (folder / WEIGHTS).exists():
        return True
    return (folder / INDEX).exists() and all((folder / name).exists() for name in shard_names(folder) or {WEIGHTS})
