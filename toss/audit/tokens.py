"""What was dropped? One view of a token: its text, losses, score and decision.

show, report, diagnose and evaluate see the tokens of a run through these functions alone.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from tokenizers import Tokenizer as RawTokenizer
from torch import Tensor

from model.io import InputError
from toss.audit import measures
from toss.selection import competing_tokens
from toss.tokens import Tokens
from toss.workbench.run import Run

SOURCES = 20  # the commonest are counted
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
    tokens: Tokens
    losses: dict[str, Tensor]  # float32 [N]; "degraded" is that of TOSS-Pro's last round
    S: Tensor  # float32 [N]
    score: Tensor  # float32 [N]: what the method ranks by; S if its file holds no score
    order: Tensor  # int64 [N]: 1 for the highest score; 0 where a token does not compete
    keep: Tensor  # bool [N]: the loss mask
    raw: RawTokenizer

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

    def row(self, row: int) -> list[Token]:
        """The tokens of a row. InputError for a row that does not exist or was skipped."""
        if row not in self.tokens.filled:
            what = f"there is no row {row}: the rows are 0 to {self.tokens.rows - 1}"
            raise InputError(f"{what}, and {self.tokens.skipped} of them were skipped")
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
        tokens = []
        for position, text in enumerate(texts):
            place = places[position]
            values = {name: column[place].item() for name, column in columns.items()}
            tokens.append(Token(position, text, **values))
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
    return Mask(
        name=name,
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
    harmful = mask.tokens.harmful
    metrics = {}
    if not harmful.any():
        return metrics
    if mask.discarded.any():
        metrics |= measures.found_harm(mask.discarded, harmful)
    if mask.score is not mask.S:  # a score of its own
        ranked = mask.order > 0
        metrics["auc"] = measures.auc(mask.score[ranked], harmful[ranked])
    return metrics


# What the masks discard, counted


def discard_tables(masks: Sequence[Mask], sources: Sequence[str] = ()) -> list[tuple]:
    """What the masks discard, of all response tokens and of those of each source; and how much of
    it others discard, too.

    A table is a header and lines, with a column for each mask that discards anything; without any,
    no tables. sources: see runs.sources_of.
    """
    masks = [mask for mask in masks if mask.discarded.any()]
    if not masks:
        return []
    names = [mask.name for mask in masks]
    lines = []
    for kind, places in kinds_of(masks[0].tokens, sources).items():
        if len(places) > 0:
            cells = [counted(mask.discarded[places]) for mask in masks]
            lines.append([kind, *cells])
    shares = []
    for mask in masks:
        cells = [shared(mask, other) for other in masks]
        shares.append([f"of {mask.name}'s discards", *cells])
    return [(["discarded", *names], lines), (["shared with", *names], shares)]


def kinds_of(tokens: Tokens, sources: Sequence[str]) -> dict[str, Tensor]:
    """The places of all response tokens, and of those of each source of rows, where the rows have
    any: int64 [n] each."""
    places = tokens.response.nonzero()[:, 0]
    kinds = {"response tokens": places}
    if any(sources):
        row = tokens.row_of(places)
        for source, _ in Counter(sources).most_common(SOURCES):
            is_of_source = torch.tensor([one == source for one in sources])
            kinds[f"source: {source or '(none)'}"] = places[is_of_source[row]]
    return kinds


def shared(mask: Mask, other: Mask) -> str:
    """The share of a mask's discards that another discards, too."""
    both = int((mask.discarded & other.discarded).sum())
    return f"{both / int(mask.discarded.sum()):.3f}"


def counted(flags: Tensor) -> str:
    """The share of flags that are set, and the counts that it comes from."""
    part = int(flags.sum())
    whole = len(flags)
    return f"{part / whole:.3f} ({part:,} of {whole:,})"


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
