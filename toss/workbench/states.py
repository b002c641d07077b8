"""What unfinished work saves of itself, so that the same command goes on from there."""

import hashlib
import io
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from model.io import whole_file


class SavedState:
    """The states of one piece of work, such as the training of a reference; see parallel.State.

    folder: the scripts' belongs to one recipe and one version of the code, by its name, so that a
    state is never taken for another's. minutes: between two. before_save: called before each.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        minutes: float,
        before_save: Callable[[], None] | None = None,
    ):
        self.folder = Path(folder)
        self.name = name
        self.minutes = minutes
        self.before_save = before_save
        self.earlier_seconds = 0.0  # that processes before this one worked
        self.started = time.monotonic()
        self.last_save = self.started

    def file(self, part: int) -> Path:
        return self.folder / f"{self.name}-{part}.pt"

    def digest(self, part: int, payload: bytes) -> bytes:
        """Of the content and of what it belongs to: a file from elsewhere counts as damaged."""
        place = f"{self.folder.name}/{self.file(part).name}\n"
        return hashlib.sha256(place.encode() + payload).digest()

    def load(self, part: int) -> dict[str, Any] | None:
        """What was saved; None if nothing was, or if the file is damaged."""
        file = self.file(part)
        if not file.is_file():
            return None
        content = file.read_bytes()
        digest, payload = content[:32], content[32:]
        if self.digest(part, payload) != digest:
            print(f"note: {file} is damaged and not used")
            return None
        values = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        self.earlier_seconds = values.pop("seconds")
        return values

    def remove(self) -> None:
        """Forget what was saved, when the work is done."""
        for file in self.folder.glob(f"{self.name}-*.pt"):
            part = file.stem.removeprefix(f"{self.name}-")
            if part.isdigit():  # else it is of another name, which begins with this one
                file.unlink()
        with suppress(OSError):  # it holds other states, or was never made
            self.folder.rmdir()

    def is_due(self, last: bool) -> bool:
        """True if it is time to save, or if this is the last step."""
        return last or time.monotonic() - self.last_save >= 60 * self.minutes

    def save(self, values: dict[str, Any], part: int) -> None:
        """Replace what was saved. values: tensors, numbers, texts, and lists and dictionaries."""
        if self.before_save:
            self.before_save()
        self.last_save = time.monotonic()
        seconds = self.earlier_seconds + self.last_save - self.started
        buffer = io.BytesIO()
        torch.save({**values, "seconds": seconds}, buffer)
        payload = buffer.getvalue()
        with whole_file(self.file(part)) as file:
            file.write_bytes(self.digest(part, payload) + payload)
