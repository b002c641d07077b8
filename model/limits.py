"""Bounds on what a stranger's program may take: a chat template, a regular expression."""

import faulthandler
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from model.io import InputError


class TimeIsUp(BaseException):
    """Not an Exception, which the program or a library around it may catch."""


@contextmanager
def limited(what: str, seconds: float = 10, gib: float = 1, *, said: str = "") -> Iterator[None]:
    """Run the body for at most `seconds`, taking at most `gib` more memory; else InputError.

    The time is bounded in the main thread only, the memory on Linux only. An alarm that was set
    before is set again, and rings late rather than never. A single call into C hears no alarm: one
    that takes twice the time ends the process. said: what any other exception means.
    """

    over = False  # the alarm may ring again while the rest of this function works

    def ring(*_) -> None:
        if not over:
            raise TimeIsUp

    begun, (soft, hard) = time.monotonic(), resource.getrlimit(resource.RLIMIT_AS)
    if main := threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGALRM, ring)
        left, again = signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again, if it was lost
    faulthandler.dump_traceback_later(2 * seconds, exit=True, file=sys.__stderr__)
    try:
        with suppress(FileNotFoundError):  # statm, of Linux, begins with the size in pages
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + int(gib * 2**30)
            most = most if soft == resource.RLIM_INFINITY else min(soft, most)
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        yield
    except TimeIsUp:
        over = True
        raise InputError(f"{what} takes more than {seconds} seconds") from None
    except MemoryError:
        raise InputError(f"{what} takes more than {gib} GiB of memory") from None
    except Exception as error:
        raise InputError(f"{said or what} ({error})") from None
    finally:
        over = True
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
            if left:
                rest = left - (time.monotonic() - begun)
                signal.setitimer(signal.ITIMER_REAL, max(rest, 1e-3), again)
