"""The tokens of a scored run with all that is known of each: what the page and the terminal show, a row at a time."""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer as RawTokenizer
from torch import Tensor

from model import load_tokenizer
from model.errors import InputError
from model.files import made_from, read_json
from model.tokenizer import Tokenizer
from toss.audit.command import run_folder, select_command
from toss.dataset import Tokens
from toss.selection import METHODS, as_many_rows_as_hold_harm, everywhere, in_each_row, ranked_entries, the_truth, whole_rows

MARKS = {"": "◌", " ": "·", "\n": "⏎", "\t": "⇥"}  # "": the first tokens of a character that is spread over several
CUTS = {  # where a method cuts -> which tokens it takes
    everywhere: "that it ranks highest",
    in_each_row: "that it ranks highest in each row",
    whole_rows: "of the rows that it ranks highest",
    as_many_rows_as_hold_harm: "of the rows that it ranks highest",
    the_truth: "that are harmful by ground truth",
}


@dataclass
class Scored:
    """A run's custom set, tokenised, and the losses of its response tokens."""

    folder: Path
    tokens: Tokens
    losses: dict[str, Tensor]  # loss_utility, loss_degraded, and loss_base where it was asked for: float32 [N]
    header: dict[str, str]  # what scores.safetensors was made from
    tokenizer: Tokenizer


@dataclass
class Mask:
    """What a method ranked and discarded."""

    name: str  # its folder under methods/
    method: str  # how it chooses: of toss.selection.METHODS, or the folder's name where its file does not say
    keep: Tensor  # bool [N]
    degraded: Tensor  # float32 [N]: L^h under the degraded model of this method's scores (TOSS-Pro refines it)
    S: Tensor  # float32 [N]: L^u - L^h, under that model
    score: Tensor  # float32 [N]: what the method ranks by; S where it ranks by nothing
    rank: Tensor  # int64 [N]: 1 for the highest score; 0 where a token does not compete

    @property
    def ranked(self) -> int:
        """How many tokens compete."""
        return int((self.rank > 0).sum())

    @property
    def cut(self) -> Callable | None:
        """Where it cuts, of toss.selection: `everywhere` puts one threshold to all rows; None: nowhere, or not known."""
        return METHODS.get(self.method, (None, None))[1]

    @property
    def threshold(self) -> float | None:
        """The lowest score that went; None where nothing did, or where no one threshold holds for all rows."""
        gone = ~self.keep
        return float(self.score[gone].min()) if gone.any() and self.cut is everywhere else None

    @property
    def label(self) -> str:
        """Its name, and the method in brackets where the name is another."""
        return self.name if self.method == self.name else f"{self.name} ({self.method})"


@dataclass
class Token:
    """One token of a row. The numbers of a prompt token are 0: it has no loss."""

    position: int  # in the row, from 0
    text: str
    response: bool
    harmful: bool  # by ground truth
    loss_utility: float
    loss_degraded: float
    loss_base: float | None  # None where the run has no loss_base
    S: float
    score: float
    rank: int
    keep: bool

    @property
    def utility_part(self) -> float | None:
        """L^u - L^0, by which S is more than its safety part."""
        return None if self.loss_base is None else self.loss_utility - self.loss_base

    @property
    def safety_part(self) -> float | None:
        """L^0 - L^h: how much of the base's surprise at the token the degraded model has lost."""
        return None if self.loss_base is None else self.loss_base - self.loss_degraded


def read_tensors(path: Path, names: tuple[str, ...], N: int | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file; InputError naming it (and the tensor) when one is missing or has not N entries."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error})") from None
    for name in names:
        if name not in tensors:
            raise InputError(f"{path}: the tensor {name} is missing")
    for name, tensor in tensors.items():
        if tensor.dim() != 1:
            raise InputError(f"{path}: {name} has the shape {tuple(tensor.shape)}, where one number a token was expected")
        if name != "offsets" and len(tensor) != (N or len(tensors[names[0]])):
            raise InputError(f"{path}: {name} has {len(tensor)} entries, where {N or len(tensors[names[0]])} were expected")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds a value that is not finite")
    return tensors


def read_scores(path: Path, name: str) -> tuple[Tokens, dict[str, Tensor]]:
    """The tokens and the losses of a scores file; InputError when it is broken. name: the custom file, for messages."""
    tensors, header = read_tensors(path, ("input_ids", "offsets", "response", "loss_utility", "loss_degraded")), made_from(path)
    offsets = tensors["offsets"]
    for key, dtype in (("input_ids", torch.int32), ("offsets", torch.int64)):
        if tensors[key].dtype != dtype:
            raise InputError(f"{path}: {key} is {tensors[key].dtype}, where {dtype} was expected")
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(tensors["input_ids"]) or (offsets.diff() < 0).any():
        raise InputError(f"{path}: offsets do not divide the {len(tensors['input_ids'])} tokens into rows")
    response = tensors["response"].bool()
    harmful = tensors["harmful"].bool() if "harmful" in tensors else torch.zeros_like(response)
    left_out = (int(header[key]) if header.get(key, "").isdecimal() else 0 for key in ("skipped", "cut"))
    tokens = Tokens(tensors["input_ids"], offsets, response, harmful, name, *left_out)
    return tokens, {key: tensor.float() for key, tensor in tensors.items() if key.startswith("loss_")}


def load_scored(folder: str | Path) -> Scored:
    """The scored tokens of a run, with its tokenizer; the model's weights are not read.

    Raises InputError when the run or its scores are missing or broken, or made with another tokenizer.
    """
    folder = run_folder(folder)
    path, settings = folder / "scores.safetensors", read_json(folder / "run.json").get("settings", {})
    if not path.exists():
        raise InputError(f"{path} is not there: run score.py --run {folder} first")
    tokens, losses = read_scores(path, str(settings.get("custom")))
    header = made_from(path)
    if "model" not in settings:
        raise InputError(f"{folder / 'run.json'}: the settings name no model")
    tokenizer = load_tokenizer(settings["model"], *(settings.get(name) for name in ("template", "date", "revision")))
    if header.get("tokenizer_sha256", tokenizer.fingerprint()) != tokenizer.fingerprint():
        raise InputError(f"{path} was made with another tokenizer than {settings['model']} has now: run score.py again")
    return Scored(folder, tokens, losses, header, tokenizer)


def kept_eos(header: dict[str, str], tokens: Tokens) -> bool:
    """Did EOS stay out of a mask's ranking? header: its file's; an older one does not say, but counts the tokens ranked."""
    if "keep_eos" in header:
        return header["keep_eos"] == "True"
    responses, ranked = int(tokens.response.sum()), header.get("ranked", "")
    return ranked.isdecimal() and int(ranked) < responses


def round_scores(place: Path) -> list[Path]:
    """The scores of TOSS-Pro's rounds in a method's folder, in order: those of the last are the ones that it ranks by."""
    rounds = [file for file in place.glob("round-*/scores.safetensors") if file.parent.name[len("round-"):].isdecimal()]
    return sorted(rounds, key=lambda file: int(file.parent.name[len("round-"):]))


def load_mask(scored: Scored, name: str) -> Mask:
    """The mask of methods/NAME over the scored tokens, with the ranking that it came from.

    Raises InputError when it is missing or broken, or was made from other rows or references.
    """
    place, tokens, N = scored.folder / "methods" / name, scored.tokens, len(scored.tokens.input_ids)
    path = place / "selection.safetensors"
    if not path.exists():
        raise InputError(f"{path} is not there: run {select_command(scored.folder, name)} first")
    header = made_from(path)
    method = header.get("method", name)
    rounds = round_scores(place)
    for file in (path, *rounds[-1:]):
        made = made_from(file)
        for key in ("tokens_sha256", "utility_sha256", *(["degraded_sha256"] if file == path else [])):
            if made.get(key, scored.header.get(key)) != scored.header.get(key):
                raise InputError(f"{file} was made from other rows or references than scores.safetensors now holds ({key} "
                                 f"differs): run {select_command(scored.folder, name, method)} --overwrite")
    chosen = read_tensors(path, ("keep",), N)
    degraded = read_tensors(rounds[-1], ("loss_degraded",), N)["loss_degraded"] if rounds else scored.losses["loss_degraded"]
    S = scored.losses["loss_utility"] - degraded
    score = chosen.get("score", S)
    entries = ranked_entries(tokens, kept_eos(header, tokens), scored.tokenizer.eos_id)
    order = entries[score[entries].argsort(descending=True, stable=True)]
    rank = torch.zeros(N, dtype=torch.int64).index_put((order,), torch.arange(1, len(order) + 1))
    return Mask(name, method, chosen["keep"].bool(), degraded, S, score, rank)


def row_tokens(scored: Scored, mask: Mask, row: int) -> list[Token]:
    """The tokens of a row, in order; none for a row that was skipped. Raises InputError for a row that does not exist."""
    tokens, losses = scored.tokens, scored.losses
    if not 0 <= row < tokens.rows:
        raise InputError(f"there is no row {row}: the rows go from 0 to {tokens.rows - 1}")
    span = slice(int(tokens.offsets[row]), int(tokens.offsets[row + 1]))
    part = lambda tensor: tensor[span].tolist()  # noqa: E731
    base = part(losses["loss_base"]) if "loss_base" in losses else [None] * tokens.lengths[row]
    columns = zip(token_texts(scored.tokenizer.raw, part(tokens.input_ids)), part(tokens.response), part(tokens.harmful),
                  part(losses["loss_utility"]), part(mask.degraded), base, *map(part, (mask.S, mask.score, mask.rank, mask.keep)))
    return [Token(position, *values) for position, values in enumerate(columns)]


def token_texts(raw: RawTokenizer, ids: list[int]) -> list[str]:
    """The text of each token of a row; joined they are the row's text, special tokens included.

    A byte-level token can hold a part of a character: the last of such tokens gets the character, those before it
    "". Each text is what a token adds to the text of the tokens right before it, since some decoders treat the first
    token of a text differently.
    """
    texts = [""] * len(ids)
    start, end = 0, 0  # ids[start:end] is the last finished piece
    for t in range(len(ids)):
        known = raw.decode(ids[start:end], skip_special_tokens=False)
        text = raw.decode(ids[start : t + 1], skip_special_tokens=False)
        if not text.endswith("\ufffd") or t == len(ids) - 1:
            texts[t] = text[len(known):]
            start, end = end, t + 1
    return texts


def harmless(text: str) -> str:
    """Text with invisible characters spelled out, so that it controls no terminal and no page's reading direction.

    >>> harmless("a b\\x1b[2J")
    'a b<1b>[2J'
    """
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in hidden else f"<{ord(c):02x}>" for c in text)


def visible(text: str) -> str:
    """A token's text with a mark for each space and line break, too.

    >>> visible(" a\\n"), visible("")
    ('·a⏎', '◌')
    """
    return "".join(MARKS.get(c, c) for c in harmless(text)) or MARKS[""]
