"""The tokens of a scored run and all that is known of each: what page and terminal show."""

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from model.io import InputError
from toss.audit.command import methods_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RawTokenizer
    from torch import Tensor

    from toss.tokens import Tokens
    from toss.workbench.run import Run

# "": the first tokens of a character that is spread over several tokens
MARKS = {"": "◌", " ": "·", "\n": "⏎", "\t": "⇥"}
INPUTS = ("--custom", "degraded", "utility")  # of a mask: it fits no others
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode categories of invisible characters


@dataclass
class Token:
    """One token of a row. The numbers of a prompt token are 0: it has no loss."""

    position: int  # in the row, from 0
    text: str
    response: bool
    harmful: bool  # by ground truth
    utility: float  # L^u
    degraded: float  # L^h
    base: float | None  # L^0; None where the run has none
    S: float
    score: float
    order: int
    keep: bool  # not discarded; a prompt's is not, either


@dataclass(eq=False)
class Mask:
    """What a method ranked and discarded among the N tokens of a run's custom set."""

    name: str  # its folder under methods/
    method: str  # how it chooses: of toss.config.METHODS, or "mask"
    tokens: "Tokens"
    losses: "dict[str, Tensor]"  # float32 [N]; "degraded" is that of TOSS-Pro's last round
    S: "Tensor"  # float32 [N]
    score: "Tensor"  # float32 [N]: what the method ranks by; S if its file holds no score
    order: "Tensor"  # int64 [N]: 1 for the highest score; 0 where a token does not compete
    keep: "Tensor"  # bool [N]: the loss mask
    raw: "RawTokenizer"

    @property
    def label(self) -> str:
        """Its name, and the method in brackets if it has another name."""
        return self.name if self.method == self.name else f"{self.name} ({self.method})"

    @property
    def gone(self) -> "Tensor":
        """The discarded tokens, bool [N]."""
        return self.tokens.response & ~self.keep

    @property
    def threshold(self) -> float | None:
        """The lowest discarded score; None if nothing was discarded or a higher score was kept."""
        gone, kept = self.score[self.gone], self.score[self.keep & (self.order > 0)]
        return float(gone.min()) if len(gone) and not (kept > gone.min()).any() else None

    @property
    def full(self) -> float:
        """|S|, nats, from which on a token's colour is full: 2 % of the response tokens have it."""
        S = self.S[self.tokens.response].abs()
        return max(0.5, float(np.quantile(S.numpy(), 0.98)))  # torch's takes no large tensors

    def row(self, row: int) -> list[Token]:
        """The tokens of a row; none for a skipped row. InputError for a row that does not exist."""
        tokens, losses = self.tokens, self.losses
        if not 0 <= row < tokens.rows:
            raise InputError(f"there is no row {row}: the rows are 0 to {tokens.rows - 1}")
        at = tokens.places([row])
        flat = (tokens.response, tokens.harmful, losses["utility"], losses["degraded"])
        flat += (losses.get("base"), self.S, self.score, self.order, ~self.gone)
        columns = ([None] * len(at) if x is None else x[at].tolist() for x in flat)
        texts = token_texts(self.raw, tokens.input_ids[at].tolist())
        return [Token(*values) for values in zip(range(len(at)), texts, *columns)]


def load_mask(run: "Run", name: str, tokens: "Tokens", losses: "dict[str, Tensor]") -> Mask:
    """The mask of methods/NAME over the scored tokens, with the ranking that it came from.

    tokens, losses: of run.scored(). Raises InputError if the mask is missing or broken, or was made
    from other rows or references.
    """
    import torch

    from toss.selection import competing_tokens
    from toss.workbench.files import load_selection, read_scores

    folder, there = run.path(f"methods/{name}"), ", ".join(methods_of(run))
    if there and not folder.exists():
        raise InputError(f"{run.folder} has no method {name!r}; it has {there}")
    record = run.check(f"methods/{name}", INPUTS)
    chosen = load_selection(folder / "selection.safetensors", tokens)
    how = record.get("settings", {})
    if last := how.get("pro"):  # the number of TOSS-Pro's rounds
        refined = read_scores(folder / f"round-{last}/scores.safetensors", tokens.name)[1]
        losses = {**losses, "degraded": refined["degraded"]}
    S = losses["utility"] - losses["degraded"]
    score = chosen.get("score", S)
    competing = competing_tokens(tokens, run.tokenizer.eos_id if how.get("keep_eos") else None)
    order = torch.zeros(len(S), dtype=torch.int64)
    ranked = competing[score[competing].argsort(descending=True, stable=True)]
    order[ranked] = torch.arange(1, len(ranked) + 1)
    method = "toss-pro" if how.get("pro") else how.get("method", name)
    return Mask(name, method, tokens, losses, S, score, order, chosen["keep"], run.tokenizer.raw)


def load_masks(
    run: "Run", tokens: "Tokens", losses: "dict[str, Tensor]"
) -> tuple[list[Mask], list[str]]:
    """The masks of all methods, toss first and sft last; and a line about each broken one."""
    masks, lacking = [], []
    names = [path.parent.name for path in run.folder.glob("methods/[!.]*/selection.safetensors")]
    for name in sorted(names, key=lambda n: (n == "sft", not n.startswith("toss"), n)):
        try:
            masks.append(load_mask(run, name, tokens, losses))
        except InputError as error:
            lacking.append(f"The mask of {name} is left out: {error}")
    return masks, lacking


def token_texts(raw: "RawTokenizer", ids: list[int]) -> list[str]:
    """The text of each token of a row; joined they are the row's text, special tokens included.

    A byte-level token may hold part of a character: the last of such tokens gets the character,
    those before it "". Each text is what a token adds to the text of the tokens right before it,
    since some decoders treat the first token of a text differently.
    """
    texts = [""] * len(ids)
    start, end = 0, 0  # ids[start:end] is the last finished piece
    for t in range(len(ids)):
        known = raw.decode(ids[start:end], skip_special_tokens=False)
        text = raw.decode(ids[start : t + 1], skip_special_tokens=False)
        if not text.endswith("\ufffd") or t == len(ids) - 1:
            texts[t] = text[len(known) :]
            start, end = end, t + 1
    return texts


def harmless(text: str) -> str:
    """Text with invisible characters spelled out, so that they control no terminal and no page.

    >>> harmless("a b\\x1b[2J")
    'a b<1b>[2J'
    """

    def kind(c):
        return "Cc" if c in "\ufffe\uffff" else unicodedata.category(c)  # not for XML

    def shown(c):
        return c in "\n\t" or kind(c) not in HIDDEN

    return "".join(c if shown(c) else f"<{ord(c):02x}>" for c in text)


def visible(text: str) -> str:
    """A token's text with a mark for each space and line break, too.

    >>> visible(" a\\n"), visible("")
    ('·a⏎', '◌')
    """
    return "".join(MARKS.get(c, c) for c in harmless(text)) or MARKS[""]
