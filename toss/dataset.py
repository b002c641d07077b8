"""Rows tokenised once into flat arrays, and batches of them padded on the right.

Every stage reads the same ids: a score, a mask and a training loss mean the same token because they share its place
in these arrays.
"""

import hashlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model.errors import DoesNotFit, InputError
from model.tokenizer import Tokenizer
from toss.rows import Row

CHUNK = 1024  # rows that go to the tokenizer's threads together


@dataclass
class Tokens:
    """A tokenised dataset. N tokens in all; row i is the slice offsets[i]:offsets[i+1], empty when it was skipped.

    A row is encode(prompt) ++ encode(response) ++ [eos], again for every further turn, cut at max_length.
    """

    input_ids: Tensor  # int32 [N]
    offsets: Tensor  # int64 [rows + 1]
    response: Tensor  # bool [N]: the tokens y_ij, EOS included
    harmful: Tensor  # bool [N]: ground truth where the rows carry it, else all False
    name: str  # the file, for messages
    skipped: int = 0  # rows whose prompt leaves no room for a response token
    cut: int = 0  # rows whose end did not fit
    lengths: list[int] = field(init=False)

    def __post_init__(self):
        self.lengths = self.offsets.diff().tolist()

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def row_of(self, entries: Tensor) -> Tensor:
        """The row that each place in the flat arrays belongs to."""
        return torch.searchsorted(self.offsets, entries, right=True) - 1

    def fingerprint(self) -> str:
        """sha256 of the ids, the row bounds and the response flags: equal exactly when a mask fits."""
        state = hashlib.sha256()
        for tensor in (self.input_ids, self.offsets, self.response):
            state.update(tensor.numpy())
        return state.hexdigest()


def tokenise(rows: list[Row], tokenizer: Tokenizer, max_length: int, name: str) -> Tokens:
    """Tokenise conversations. max_length: tokens a row, prompt, responses and EOS together.

    A prompt that leaves no room for one response token is skipped and keeps its index; a response too long is cut on
    the right and then gets no EOS. Raises InputError when no row is left.
    """
    ids, response, harmful, lengths, skipped, cut = [], [], [], [], 0, 0
    lead = tokenizer.leading_ids()
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        pieces = [segments_of(row, tokenizer) for row in chunk]
        for row, segments, encoded in zip(chunk, pieces, tokenizer.encode_segments(pieces)):
            row_ids, counts, marks = [*lead], [len(lead)], []  # counts: tokens of the lead, then of each segment
            for (text, is_response), (piece, spans) in zip(segments, encoded):
                before = len(row_ids)
                row_ids += piece
                if is_response:
                    row_ids.append(tokenizer.eos_id)
                    if row.harmful:
                        shift = len(text) - len(row.messages[-1]["content"])  # the space before it
                        marks += [before + t for t, span in enumerate(spans()) if overlaps(span, row.harmful, shift)]
                counts.append(len(row_ids) - before)
            row_response = np.repeat([False, *(is_response for _, is_response in segments)], counts)
            if row_response[0]:
                raise InputError(f"{row.where}: the prompt is empty, so nothing predicts the first response token")
            row_harmful = np.zeros(len(row_ids), dtype=bool)
            row_harmful[marks] = True
            keep = len(row_ids)
            if keep > max_length:
                keep = int(row_response[:max_length].nonzero()[0].max(initial=-1)) + 1  # trailing prompt: useless
                skipped, cut = skipped + (keep == 0), cut + (keep > 0)
            ids.append(np.array(row_ids[:keep], dtype=np.int32))
            response.append(row_response[:keep])
            harmful.append(row_harmful[:keep])
            lengths.append(keep)
    if skipped == len(rows):
        raise InputError(f"{name}: every prompt is longer than --max-length {max_length}; nothing is left")
    return Tokens(
        torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int64)),
        torch.from_numpy(np.concatenate(response)), torch.from_numpy(np.concatenate(harmful)), name, skipped, cut)


def segments_of(row: Row, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The row's conversation as prompt and response texts; errors name its line."""
    try:
        return tokenizer.segments(row.messages)
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from None


def overlaps(span: tuple[int, int], marked: list[list[int]], shift: int) -> bool:
    """Does a token's character span touch one of the marked spans of the text behind `shift` characters?"""
    return any(span[0] - shift < end and span[1] - shift > start for start, end in marked)


def take(tokens: Tokens, rows: list[int]) -> Tokens:
    """The given rows as a dataset of their own."""
    bounds = tokens.offsets.tolist()
    part = lambda name: torch.cat([getattr(tokens, name)[bounds[i] : bounds[i + 1]] for i in rows])  # noqa: E731
    offsets = torch.tensor([0] + [tokens.lengths[i] for i in rows]).cumsum(0)
    return Tokens(part("input_ids"), offsets, part("response"), part("harmful"), tokens.name)


def concatenate(first: Tokens, second: Tokens) -> Tokens:
    """The rows of `first`, then those of `second`."""
    join = lambda name: torch.cat((getattr(first, name), getattr(second, name)))  # noqa: E731
    offsets = torch.cat((first.offsets, first.offsets[-1] + second.offsets[1:]))
    return Tokens(join("input_ids"), offsets, join("response"), join("harmful"), f"{first.name} and rows of {second.name}")


@dataclass
class Batch:
    """Rows side by side, padded on the right, and the n places in them where a loss is wanted."""

    ids: Tensor  # int64 [B, T]
    before: Tensor  # int64 [n]: index into the B*T positions of the token before each wanted one
    targets: Tensor  # int64 [n]: the wanted tokens
    entries: Tensor  # int64 [n]: their places in the flat arrays


def batches(rows: Iterable[int], lengths: list[int], budget: int) -> list[list[int]]:
    """Split rows into batches of at most `budget` tokens, padding included (a longer row goes alone).

    Longest first: little is padding, and running out of memory shows in the first batch. The few rows of an optimizer
    step differ much in length, so a batch that holds a quarter of the budget, which is enough for fast products, ends
    before a row that would be a tenth padding.
    """
    groups: list[list[int]] = []
    width = 0
    for i in sorted(rows, key=lambda i: -lengths[i]):
        full = groups and (len(groups[-1]) + 1) * width > budget
        enough = groups and len(groups[-1]) * width >= budget / 4
        if not groups or full or enough and lengths[i] < 0.9 * width:
            groups.append([])
            width = lengths[i]
        groups[-1].append(i)
    return groups


def halved(budget: int, longest: int, name: str, advice: str) -> int:
    """Half the tokens a batch, with a line, for when memory ran out; DoesNotFit where batches hold one row each already.

    longest: tokens of the longest row at hand. name, advice: for the messages, who ran out and what else would help.
    """
    if budget <= longest:
        raise DoesNotFit(f"{name}: out of memory on a single row of at most {longest} tokens; {advice}")
    print(f"{name}: out of memory with {budget} tokens a batch; going on with {budget // 2} (--batch-tokens)", file=sys.stderr)
    return budget // 2


def collate(tokens: Tokens, rows: list[int], wanted: Tensor, device: torch.device) -> Batch:
    """Put rows into one padded batch. wanted: bool [N], the places in the flat arrays where a loss is asked for.

    All index arithmetic happens on the CPU, so that the device never has to wait for a count.
    """
    T = max(tokens.lengths[i] for i in rows)
    ids = torch.zeros(len(rows), T, dtype=torch.int64)
    before, entries = [], []
    for b, i in enumerate(rows):
        start, end = int(tokens.offsets[i]), int(tokens.offsets[i + 1])
        ids[b, : end - start] = tokens.input_ids[start:end]
        places = wanted[start:end].nonzero().squeeze(1)  # positions in the row, all > 0: a prompt comes first
        before.append(b * T + places - 1)
        entries.append(start + places)
    entry = torch.cat(entries)
    parts = (ids, torch.cat(before), tokens.input_ids[entry].long(), entry)
    return Batch(*(part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part for part in parts))
