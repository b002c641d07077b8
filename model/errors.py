"""The errors that are the user's to mend, and how a command reports them."""

import sys
from collections.abc import Callable

import torch


class InputError(ValueError):
    """What the user gave cannot be used. The message says what is wrong, where, and what to do."""


class NotFinite(InputError):
    """A weight or a loss is NaN or infinite, in itself or in the dtype that was asked for."""


class DoesNotFit(InputError):
    """The device's memory does not hold what is asked for, however small the batches."""


def reported(work: Callable[[], None]) -> int:
    """Run a command's work; say what went wrong in one line on stderr. Returns the exit status."""
    try:
        work()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory on the device ({str(error).splitlines()[0]})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: finished stages stay, the one at work was not written", file=sys.stderr)
        return 130
    return 0
