"""Rows tokenised once into flat arrays, and batches of them in the same form.

Every stage reads the same ids, so that a score, a mask and a training loss mean the same token: the
one at their place in these arrays.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from model.io import InputError
from model.packed import send
from model.template import LEFT_OUT, left_out
from model.tokenizer import Tokenizer, overlaps
from toss.rows import Row

CHUNK = 1024  # rows that go to the tokenizer's threads together
BATCH_TOKENS = {"cuda": 8192, "cpu": 1024}  # per batch, where no number is given
PROMPT, RESPONSE, HARMFUL = 0, 1, 2  # kinds of tokens; a harmful one is of a response too


@dataclass
class Tokens:
    """A tokenised dataset of N tokens. Row i is offsets[i]:offsets[i + 1], empty if skipped.

    A row is encode(prompt) ++ encode(response) ++ [eos], for each turn, cut at max_length.
    """

    input_ids: Tensor  # int32 [N]
    offsets: Tensor  # int64 [rows + 1]
    response: Tensor  # bool [N]: the tokens y_ij, EOS included
    harmful: Tensor  # bool [N]: ground truth where the rows carry it, else all False
    name: str = ""  # the file, for messages
    skipped: int = 0  # rows whose prompt leaves no room for a response token
    cut: int = 0  # rows whose end did not fit

    @cached_property
    def lengths(self) -> list[int]:
        return self.offsets.diff().tolist()

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def row_of(self, places: Tensor) -> Tensor:
        """The row of each place in the flat arrays, int64 [n]."""
        return torch.searchsorted(self.offsets, places, right=True) - 1

    def places(self, rows: Iterable[int]) -> Tensor:
        """The places of these rows' tokens in the flat arrays, row after row, int64 [n]."""
        return torch.cat([torch.arange(0), *(torch.arange(*self.offsets[i : i + 2]) for i in rows)])

    def take(self, rows: list[int]) -> "Tokens":
        """These rows as a dataset of their own."""
        at = self.places(rows)
        offsets = torch.tensor([0] + [self.lengths[i] for i in rows]).cumsum(0)
        return Tokens(self.input_ids[at], offsets, self.response[at], self.harmful[at], self.name)

    def __add__(self, other: "Tokens") -> "Tokens":
        """The rows of both, this one's first."""
        join = lambda name: torch.cat((getattr(self, name), getattr(other, name)))
        offsets = torch.cat((self.offsets, self.offsets[-1] + other.offsets[1:]))
        arrays = join("input_ids"), offsets, join("response"), join("harmful")
        return Tokens(*arrays, f"{self.name} and rows of {other.name}")


def tokenise(rows: list[Row], tokenizer: Tokenizer, max_length: int, name: str = "") -> Tokens:
    """Tokenise conversations. max_length: tokens per row: prompt, responses and EOS together.

    A prompt that leaves no room for a response token is skipped; its row stays, empty. A response
    too long is cut on the right and then gets no EOS. Raises InputError when no row is left, or
    when the chat template leaves the text of a message out.
    """
    parts, cut, lost = [], 0, []
    for start in range(0, len(rows), CHUNK):
        for ids, kinds in encode(rows[start : start + CHUNK], tokenizer, max_length, lost):
            end = len(ids)
            if end > max_length:  # up to its last response token: what follows is of no use
                end = int(kinds[:max_length].nonzero()[0].max(initial=-1)) + 1
                cut += end > 0
            parts.append((ids[:end], kinds[:end]))
    lengths = [len(ids) for ids, _ in parts]
    if lost:
        raise InputError(f"{lost[0]}: {LEFT_OUT} (first of {len(lost)} rows); use another template")
    if not any(lengths):
        raise InputError(f"{name}: every prompt is longer than --max-length {max_length}")
    ids, kinds = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Tokens(ids, offsets, kinds > 0, kinds == HARMFUL, name, lengths.count(0), cut)


def encode(
    rows: list[Row], tokenizer: Tokenizer, max_length: int, lost: list[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each row, as much as can be of use: its ids, int32, and each token's kind, uint8.

    lost: gets the file:line of every row of which the chat template leaves something out.
    """
    most = max_length // 2 + 1  # responses: each has 2 tokens at least, with the EOS
    try:
        segments = [tokenizer.segments(row.messages, most) for row in rows]
        encoded = tokenizer.encode_segments(segments)
    except InputError as error:
        for row in rows if len(rows) > 1 else ():  # find the one
            list(encode([row], tokenizer, max_length, lost))
        raise InputError(f"{rows[0].where}: {error}") from None
    lost += [row.where for row, own in zip(rows, segments) if left_out(row.messages, own)]
    lead = tokenizer.leading_ids()
    for row, texts, pieces in zip(rows, segments, encoded):
        ids, kinds = [*lead], [PROMPT] * len(lead)
        for (text, is_response), (piece, spans) in zip(texts, pieces):
            shift = len(text) - len(row.messages[-1]["content"])  # the space before a response
            marks = [(a + shift, b + shift) for a, b in row.harmful if is_response]
            harm = overlaps(spans, marks) if marks else [False] * len(piece)
            ids += piece + [tokenizer.eos_id] * is_response
            kinds += [is_response + h for h in harm] + [RESPONSE] * is_response
        if kinds[0]:
            raise InputError(f"{row.where}: the prompt is empty, so nothing predicts the response")
        yield np.array(ids, np.int32), np.array(kinds, np.uint8)


@dataclass
class Batch:
    """Rows one behind the other, and the n tokens in them whose loss is wanted."""

    ids: Tensor  # int64 [N]
    before: Tensor  # int64 [n]: index into the N of the token before each wanted one
    targets: Tensor  # int64 [n]: the wanted tokens
    places: Tensor  # int64 [n]: their places in the flat arrays of the dataset
    bounds: Tensor  # int64 [rows + 1], on the CPU: row i is bounds[i]:bounds[i + 1]


def batches(rows: Iterable[int], lengths: list[int], budget: int) -> list[list[int]]:
    """Split rows into batches of at most `budget` tokens (a longer row alone).

    Padding inside attention counts. Longest first: running out of memory shows at once.
    """
    groups = []
    for i in sorted(rows, key=lambda i: -lengths[i]):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


def collate(tokens: Tokens, rows: list[int], wanted: Tensor, device: torch.device) -> Batch:
    """Pack rows into a batch, on the CPU. wanted: bool [N], where a loss is asked for."""
    places, own = tokens.places(rows), tokens.take(rows)
    ids, at = own.input_ids.long(), wanted[places].nonzero()[:, 0]
    parts = (ids, at - 1, ids[at], places[at])  # a prompt comes before the first
    return Batch(*(send(part, device) for part in parts), own.offsets)
