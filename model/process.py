"""What a process shares with others: signals, locks, its exit status. Imports no torch at once."""

import ctypes
import fcntl
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from model.io import DoesNotFit, InputError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
stop = SimpleNamespace(signal=0, deferred=False)  # see on_signal


class Stopped(BaseException):
    """A signal asks the process to end. Its arguments: the signal, and what became of the work."""


def on_signal(number: int, frame: object) -> None:
    """The first signal stops the work, a second one ends the process at once.

    The work stops where it is, or, while `stop.deferred`, where it next looks at `stop.signal`:
    after a step, whose state it can save.
    """
    for each in SIGNALS:
        signal.signal(each, lambda number, _: os._exit(128 + number))
    stop.signal = number
    if not stop.deferred:
        raise Stopped(number, "what was not finished was not written")


def printable(text: str, limit: int = 1000) -> str:
    """The text on one line of about `limit` characters, with nothing that a terminal obeys."""
    half = (limit - 5) // 2
    cut = lambda text: text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"
    line = " ".join(cut(text).splitlines())
    return cut("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


def reported(work: Callable[[], int | None]) -> int:
    """Run a command; one line on stderr for a signal or expected error; return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # it is closed, or not a file
            # A terminal may lack a name's characters; a pipe would keep lines back.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    main = threading.current_thread() is threading.main_thread()
    heard = [n for n in SIGNALS if main and signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in heard}
    stop.signal, stop.deferred = 0, False
    try:
        return work() or 0
    except Stopped as stopped:
        number, kept = stopped.args
        print(f"error: stopped by {signal.Signals(number).name}; {kept}", file=sys.stderr)
        return 128 + number
    except Exception as error:
        said = printable(str(error))
        if out_of_memory(error):
            said = f"out of memory ({said})"
        elif not isinstance(error, (InputError, OSError)):
            raise
        print(f"error: {said}", file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def out_of_memory(error: Exception) -> bool:
    """True if memory ran out. cuBLAS, cuDNN and the CPU's allocator raise plain RuntimeErrors."""
    told = re.search("out of memory|_ALLOC(ATION)?_FAILED|can't allocate memory", str(error))
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported here
    return named or isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(told)


def halve_budget(budget: int, longest: int, remark: Callable[[dict], None]) -> int:
    """Halve the tokens per batch after running out of memory; DoesNotFit if a batch is one row."""
    if budget <= longest:
        advice = "lower --max-length, or train with --gradient-checkpointing"
        raise DoesNotFit(f"out of memory on a single row of at most {longest} tokens; {advice}")
    import torch

    next = f"continuing with {budget // 2} (--batch-tokens)"
    torch.cuda.empty_cache()  # for CUDA's libraries, which have their own allocations
    remark({"remark": f"out of memory with {budget} tokens per batch; {next}"})
    return budget // 2


patient = None  # torchrun's processes as a group in which they wait for a day


def joined(main: Callable[[], int | None]) -> None:
    """Run a command as one of the processes that torchrun started.

    Only process 0 prints and hears signals. When a process fails, torchrun ends the others.
    """
    global patient
    if "MASTER_ADDR" not in os.environ:
        raise InputError("several processes are needed: start the command with torchrun")
    with suppress(OSError, AttributeError):  # Linux: die with the parent, so as to leave no orphans
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.environ["RANK"] != "0":  # it ends with process 0, which can save its work
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    try:
        main()
    except (InputError, RuntimeError) as error:
        said = str(error)
        if re.search("gloo|NCCL", said):
            said = f"another process has ended, or hangs ({said})"
        elif not isinstance(error, InputError):
            raise
        where = f"process {dist.get_rank()} of {dist.get_world_size()}"
        raise InputError(f"{where}: {said}") from None
    dist.destroy_process_group()  # not after an error: others may wait for this process


def meet() -> None:
    """Wait until every process is here, as long as it takes: work of one alone may come before."""
    if patient is not None:
        import torch.distributed as dist

        dist.barrier(group=patient)


@contextmanager
def lock(file: Path, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lock file; the system frees it when the process dies, and its last holder removes it.

    Raises InputError naming the holder if the lock is not free, unless told to wait. Where the file
    system has no locks, a warning is all that is done.
    """
    handle = None
    try:
        while handle is None or not os.fstat(handle.fileno()).st_nlink:  # removed while we waited
            handle = take(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, wait)
    except (NotADirectoryError, FileExistsError):
        raise
    except OSError as error:
        warn_once(f"warning: no locks here ({error}): do not start two commands at once")
        handle = None
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):  # others share it
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()
            handle.close()


@cache
def warn_once(text: str) -> None:
    """Print a text, but not again."""
    print(text)


def take(file: Path, kind: int, wait: bool, tries: int = 100):
    """Open a lock file and lock it; its text says who holds it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = open(file, "a+", encoding="utf-8")
    except (FileNotFoundError, FileExistsError):  # another process has just removed the folder
        if not tries:
            raise
        return take(file, kind, wait, tries - 1)
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        if tries > 1 and not wait:  # its holder may be just leaving
            handle.close()
            time.sleep(0.05)
            return take(file, kind, wait, 1)
        handle.seek(0)
        holder = f"{file.stem} is in use by {handle.read() or 'another process'} ({file})"
        if not wait:
            said = f"{holder}; --wait waits for it, in a command that has it"
            raise InputError(said) from None
        print(f"{holder}: waiting for it", flush=True)
        fcntl.flock(handle, kind)
    except OSError:  # this file system has no locks
        file.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # the disk may be full
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}")
        handle.flush()
    return handle
