"""Rows tokenised once into flat arrays, and batches of them in the same form.

Every stage reads the same ids, so that a score, a mask and a training loss mean the same token: the
one at their place in these arrays.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from model.io import InputError
from model.packed import send
from model.template import LEFT_OUT, left_out
from model.tokenizer import Segment, Spans, Tokenizer, overlaps
from toss.rows import Row

CHUNK = 1024  # rows that go to the tokenizer's threads together
BATCH_TOKENS = {"cuda": 8192, "cpu": 1024}  # per batch, where no number is given


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
    skipped: int = 0  # rows whose prompt leaves no room for a response token, or without a response
    cut: int = 0  # rows whose end did not fit

    @cached_property
    def lengths(self) -> list[int]:
        return self.offsets.diff().tolist()

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @cached_property
    def filled(self) -> list[int]:
        """The rows that were not skipped."""
        return [row for row, length in enumerate(self.lengths) if length]

    def row_of(self, places: Tensor) -> Tensor:
        """The row of each place in the flat arrays, int64 [n]."""
        return torch.searchsorted(self.offsets, places, right=True) - 1

    def places(self, rows: Iterable[int]) -> Tensor:
        """The places of these rows' tokens in the flat arrays, row after row, int64 [n]."""
        ranges = [torch.arange(0)]  # for no rows at all
        for row in rows:
            start, end = self.offsets[row : row + 2]
            ranges.append(torch.arange(start, end))
        return torch.cat(ranges)

    def positions(self) -> Tensor:
        """j of every response token y_ij, from 0 in its row: int64 [N], elsewhere meaningless."""
        count = self.response.long().cumsum(0)
        before = torch.cat((torch.zeros(1, dtype=torch.int64), count))  # [t]: of tokens before t
        row = self.row_of(torch.arange(len(count)))
        return count - 1 - before[self.offsets[row]]

    def bounds(self, rows: Iterable[int]) -> Tensor:
        """The offsets of these rows when they are packed one behind the other, int64 [n + 1]."""
        lengths = [self.lengths[row] for row in rows]
        return torch.tensor([0, *lengths]).cumsum(0)

    def take(self, rows: list[int]) -> "Tokens":
        """These rows as a dataset of their own."""
        places = self.places(rows)
        return Tokens(
            input_ids=self.input_ids[places],
            offsets=self.bounds(rows),
            response=self.response[places],
            harmful=self.harmful[places],
            name=self.name,
        )

    def __add__(self, other: "Tokens") -> "Tokens":
        """The rows of both, this one's first."""
        return Tokens(
            input_ids=torch.cat((self.input_ids, other.input_ids)),
            offsets=torch.cat((self.offsets, self.offsets[-1] + other.offsets[1:])),
            response=torch.cat((self.response, other.response)),
            harmful=torch.cat((self.harmful, other.harmful)),
            name=f"{self.name} and rows of {other.name}",
        )


# From conversations to tokens


def tokenise(
    rows: list[Row],
    tokenizer: Tokenizer,
    max_length: int,
    name: str = "",
    skip_empty: bool = False,
) -> Tokens:
    """Tokenise conversations. max_length: tokens per row: prompt, responses and EOS together.

    A prompt that leaves no room for a response token is skipped; its row stays, empty. A response
    too long is cut on the right and then gets no EOS. skip_empty: also skip rows with an empty
    response. Raises InputError for these otherwise, when no row is left, or when the chat template
    leaves the text of a message out.
    """
    empty = [row.where for row in rows if row.has_empty_response]
    if empty and not skip_empty:
        problem = f"the row has an empty response, as {len(empty)} of {len(rows)} rows have"
        advice = "--skip-empty leaves them out"
        raise InputError(f"{empty[0]}: {problem} ({', '.join(empty[:3])}): {advice}")

    # Tokenise a chunk of rows at a time, and cut each row to max_length.
    parts = []  # (ids, response flags, harm flags) of each row
    cut = 0
    incomplete = []  # where the chat template leaves something out
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        for row, segments, encoded in encode(chunk, tokenizer, max_length):
            if left_out(row.messages, segments):
                incomplete.append(row.where)
            ids, response, harmful = flatten(row, segments, encoded, tokenizer)
            end = len(ids)
            if row.has_empty_response:
                end = 0
            elif end > max_length:
                # It ends with its last response token that fits: what follows is of no use.
                fitting = np.flatnonzero(response[:max_length])
                end = 0
                if len(fitting) > 0:
                    end = int(fitting[-1]) + 1
                    cut += 1
            parts.append((ids[:end], response[:end], harmful[:end]))

    if incomplete:
        count = f"first of {len(incomplete)} rows"
        raise InputError(f"{incomplete[0]}: {LEFT_OUT} ({count}); use another template")
    lengths = [len(ids) for ids, _, _ in parts]
    if not any(lengths):
        problem = f"every prompt is longer than --max-length {max_length}"
        raise InputError(f"{name}: {problem}, or every response is empty")
    input_ids, response, harmful = (np.concatenate(arrays) for arrays in zip(*parts))
    return Tokens(
        input_ids=torch.from_numpy(input_ids),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        response=torch.from_numpy(response),
        harmful=torch.from_numpy(harmful),
        name=name,
        skipped=lengths.count(0),
        cut=cut,
    )


def encode(
    rows: list[Row], tokenizer: Tokenizer, max_length: int
) -> Iterator[tuple[Row, list[Segment], list[tuple[list[int], Spans]]]]:
    """Each row with its segments, and the ids and character spans of each segment."""
    # Responses that can fit: each has two tokens at least, with the EOS.
    max_responses = max_length // 2 + 1
    segments = []
    for row in rows:
        with naming(row):
            segments.append(tokenizer.segments(row.messages, max_responses))
    try:
        encoded = tokenizer.encode_segments(segments)
    except InputError:
        for row, own_segments in zip(rows, segments):  # one by one, to name the row
            with naming(row):
                tokenizer.encode_segments([own_segments])
        raise
    return zip(rows, segments, encoded)


@contextmanager
def naming(row: Row) -> Iterator[None]:
    """Let an InputError begin with the row's file and line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from None


def flatten(
    row: Row, segments: list[Segment], encoded: list[tuple[list[int], Spans]], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row's ids, int32, and for each the flags `response` and `harmful`, bool."""
    ids = list(tokenizer.leading_ids())
    response = [False] * len(ids)
    harmful = [False] * len(ids)
    for (text, is_response), (segment_ids, spans) in zip(segments, encoded):
        marked = [False] * len(segment_ids)
        if is_response and row.harmful:
            # The spans in the row count from the response's first character, and the text may
            # begin with a space that belongs to the template.
            shift = len(text) - len(row.messages[-1]["content"])
            marks = [(start + shift, end + shift) for start, end in row.harmful]
            marked = overlaps(spans, marks)
        ids += segment_ids
        response += [is_response] * len(segment_ids)
        harmful += marked
        if is_response:
            ids.append(tokenizer.eos_id)
            response.append(True)
            harmful.append(False)
    if response[0]:
        raise InputError(f"{row.where}: the prompt is empty, so nothing predicts the response")
    return np.array(ids, np.int32), np.array(response, bool), np.array(harmful, bool)


# From tokens to batches


@dataclass
class Batch:
    """Rows packed one behind the other, and the n tokens in them whose loss is wanted."""

    ids: Tensor  # int64 [N]
    bounds: Tensor  # int64 [rows + 1], on the CPU: row i is bounds[i]:bounds[i + 1]
    before: Tensor  # int64 [n]: index into the N of the token before each wanted one
    targets: Tensor  # int64 [n]: the wanted tokens
    places: Tensor  # int64 [n]: their places in the flat arrays of the dataset
    rows: list[int]  # the rows of the dataset
    step: int = 0  # the optimizer step, from 1; 0 outside training

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device. The bounds stay on the CPU, where attention needs them."""
        return Batch(
            ids=send(self.ids, device),
            bounds=self.bounds,
            before=send(self.before, device),
            targets=send(self.targets, device),
            places=send(self.places, device),
            rows=self.rows,
            step=self.step,
        )


def check_ids(tokens: Tokens, vocabulary: int) -> None:
    """Raise InputError for an id without an embedding, as of a tokenizer that is another model's.

    On a GPU it would end in an error that names nothing.
    """
    highest = int(tokens.input_ids.max()) if len(tokens.input_ids) else 0
    if highest >= vocabulary:
        problem = f"has the id {highest}, but the base has {vocabulary} embeddings"
        raise InputError(f"{tokens.name} {problem}")


def collate(
    tokens: Tokens, rows: list[int], wanted: Tensor, device: torch.device, step: int = 0
) -> Batch:
    """Pack rows into a batch. wanted: bool [N], on the CPU: where a loss is asked for."""
    places = tokens.places(rows)
    ids = tokens.input_ids[places].long()
    target = wanted[places].nonzero()[:, 0]
    batch = Batch(
        ids=ids,
        bounds=tokens.bounds(rows),
        before=target - 1,  # a row begins with its prompt, so there is one
        targets=ids[target],
        places=places[target],
        rows=rows,
        step=step,
    )
    return batch.to(device)


def batches(rows: Iterable[int], lengths: list[int], budget: int) -> list[list[int]]:
    """Split rows into batches of at most `budget` tokens (a longer row alone).

    Padding inside attention counts. Longest first: running out of memory shows at once.
    """
    groups = []
    group: list[int] = []
    for row in sorted(rows, key=lambda row: -lengths[row]):
        if group and (len(group) + 1) * lengths[group[0]] > budget:
            groups.append(group)
            group = []
        group.append(row)
    if group:
        groups.append(group)
    return groups
