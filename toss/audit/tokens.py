"""What was dropped? One view of a token: its text, losses, score and decision.

show, report, diagnose and evaluate see the tokens of a run through these functions alone.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from tokenizers import Tokenizer as RawTokenizer
from torch import Tensor

from model.io import InputError
from toss.audit import measures
from toss.selection import competing_tokens
from toss.tokens import Tokens
from toss.workbench.run import Run

INPUTS = ("--custom", "degraded", "utility")  # of a mask: it fits no others


@dataclass
class Token:
    """One token of a row. The numbers of a prompt's token are 0: it has no loss."""

    position: int  # in the row, from 0
    text: str
    response: bool  # else of a prompt, and neither kept nor discarded
    harmful: bool  # by ground truth
    discarded: bool
    utility: float  # L^u
    degraded: float  # L^h
    S: float
    score: float  # what the method ranks by
    order: int  # 1 for the highest score; 0 where the token does not compete
    base: float | None = None  # L^0, where the run has it


@dataclass(eq=False)
class Mask:
    """What a method ranked and discarded among the N tokens of a run's custom set."""

    name: str  # its folder under methods/
    method: str  # how it chooses: of toss.methods.METHODS, "toss-pro", "mask", or a rival
    tokens: Tokens
    losses: dict[str, Tensor]  # float32 [N]; "degraded" is that of TOSS-Pro's last round
    S: Tensor  # float32 [N]
    score: Tensor  # float32 [N]: what the method ranks by; S if its file holds no score
    order: Tensor  # int64 [N]: 1 for the highest score; 0 where a token does not compete
    keep: Tensor  # bool [N]: the loss mask
    raw: RawTokenizer

    @property
    def label(self) -> str:
        """Its name, and the method in brackets if it has another name."""
        return self.name if self.method == self.name else f"{self.name} ({self.method})"

    @cached_property
    def discarded(self) -> Tensor:
        """The discarded tokens, bool [N]."""
        return self.tokens.response & ~self.keep

    @property
    def threshold(self) -> float | None:
        """The lowest discarded score; None if nothing was discarded or a higher score was kept."""
        discarded = self.score[self.discarded]
        kept = self.score[self.keep & (self.order > 0)]
        if len(discarded) == 0 or (kept > discarded.min()).any():
            return None
        return float(discarded.min())

    @property
    def full_colour(self) -> float:
        """|S|, nats, from which on a token's colour is full: 2 % of the response tokens have it."""
        S = self.S[self.tokens.response].abs()
        return max(0.5, float(np.quantile(S.numpy(), 0.98)))  # torch's takes no large tensors

    def row(self, row: int) -> list[Token]:
        """The tokens of a row; none for a skipped row. InputError for a row that does not exist."""
        if not 0 <= row < self.tokens.rows:
            raise InputError(f"there is no row {row}: the rows are 0 to {self.tokens.rows - 1}")
        places = self.tokens.places([row])
        texts = token_texts(self.raw, self.tokens.input_ids[places].tolist())
        columns = {
            "response": self.tokens.response,
            "harmful": self.tokens.harmful,
            "discarded": self.discarded,
            **self.losses,
            "S": self.S,
            "score": self.score,
            "order": self.order,
        }
        values = {name: column[places].tolist() for name, column in columns.items()}
        tokens = []
        for position, text in enumerate(texts):
            numbers = {name: column[position] for name, column in values.items()}
            tokens.append(Token(position, text, **numbers))
        return tokens


# The masks of a run


def load_mask(run: Run, name: str, tokens: Tokens, losses: dict[str, Tensor]) -> Mask:
    """The mask of methods/NAME over the scored tokens, with the ranking that it came from.

    tokens, losses: of run.losses(). Raises InputError if the mask is missing or broken, or was made
    from other rows or references.
    """
    place = f"methods/{name}/selection"
    settings = run.check(place, INPUTS)["settings"]
    mask = run.mask(place, tokens)

    # TOSS-Pro ranks by the degraded model of its last round.
    rounds = settings.get("pro")
    if rounds:
        _, losses = run.losses(f"methods/{name}/round-{rounds}/scores")
    S = losses["utility"] - losses["degraded"]
    score = S if mask.score is None else mask.score

    # The place of each competing token in the ranking, from 1; 0 for the others.
    eos_id = run.tokenizer.eos_id if settings.get("keep_eos") else None
    competing = competing_tokens(tokens, eos_id)
    ranked = competing[score[competing].argsort(descending=True, stable=True)]
    order = torch.zeros(len(S), dtype=torch.int64)
    order[ranked] = torch.arange(1, len(ranked) + 1)
    method = "toss-pro" if rounds else settings.get("method", name)
    return Mask(
        name=name,
        method=method,
        tokens=tokens,
        losses=losses,
        S=S,
        score=score,
        order=order,
        keep=mask.keep,
        raw=run.tokenizer.raw,
    )


def load_masks(run: Run, tokens: Tokens, losses: dict[str, Tensor]) -> tuple[list[Mask], list[str]]:
    """The masks of all methods, toss first and sft last; and a line about each broken one."""
    files = run.folder.glob("methods/[!.]*/selection.safetensors")
    names = sorted(file.parent.name for file in files)
    names.sort(key=lambda name: (name == "sft", not name.startswith("toss")))
    masks = []
    lacking = []
    for name in names:
        try:
            masks.append(load_mask(run, name, tokens, losses))
        except InputError as error:
            lacking.append(f"The mask of {name} is left out: {error}")
    return masks, lacking


def selection_metrics(run: Run, method: str) -> measures.Metrics:
    """Precision, recall and AUC of a method's discards, where the rows carry ground truth.

    Precision and recall are over the response tokens, the AUC over those that competed.
    """
    if not run.path("scores").exists() or not run.path(f"methods/{method}/selection").exists():
        return {}
    try:
        run.check(f"methods/{method}/model")  # was it trained with this mask?
        mask = load_mask(run, method, *run.losses())
    except InputError as error:
        print(f"warning: the discards of {method} are not measured: {error}")
        return {}
    response = mask.tokens.response
    harmful = mask.tokens.harmful
    metrics = {}
    if harmful.any() and mask.discarded.any():
        metrics |= measures.found_harm(mask.discarded[response], harmful[response])
    if harmful.any() and mask.score is not mask.S:  # a score of its own
        ranked = mask.order > 0
        metrics["auc"] = measures.auc(mask.score[ranked], harmful[ranked])
    return metrics


# Of any tokens


def token_texts(raw: RawTokenizer, ids: list[int]) -> list[str]:
    """The text of each token of a row; joined they are the row's text, special tokens included.

    A byte-level token may hold part of a character: the last of such tokens gets the character,
    those before it "". Each text is what a token adds to the text of the tokens right before it,
    since some decoders treat the first token of a text differently.
    """
    texts = [""] * len(ids)
    start, end = 0, 0  # ids[start:end] is the last finished piece
    for t in range(len(ids)):
        before = raw.decode(ids[start:end], skip_special_tokens=False)
        text = raw.decode(ids[start : t + 1], skip_special_tokens=False)
        if not text.endswith("\ufffd") or t == len(ids) - 1:
            texts[t] = text[len(before) :]
            start, end = end, t + 1
    return texts


def count_by_row(tokens: Tokens, marked: Tensor, values: Tensor | None = None) -> Tensor:
    """How many marked tokens each row has: int64 [rows]. marked: bool [N].

    values: float64 [N], of which each row's sum is given instead.
    """
    places = marked.nonzero()[:, 0]
    weights = None if values is None else values[places]
    return tokens.row_of(places).bincount(weights, minlength=tokens.rows)
