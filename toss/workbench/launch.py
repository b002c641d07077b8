"""Running a command, alone or as one of the processes that torchrun started."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from model.io import InputError, run_command
from toss.parallel import meet


def run(main: Callable[[], int | None]) -> int:
    """Run a command and report its errors; returns the exit status."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or "MASTER_ADDR" not in os.environ:
        return run_command(main)
    status = run_command(lambda: joined(main))
    # Not by Python's usual way out: a thread of Gloo may still need Python's lock to drop the
    # tensor of a sum that is done. If Python shuts down first, the process aborts.
    with suppress(OSError):  # who read the output has gone
        sys.stdout.flush()
    os._exit(status)


def joined(main: Callable[[], int | None]) -> None:
    """Run a command as one of several processes. Process 0 alone prints and hears Ctrl-C.

    When a process fails, torchrun ends the others.
    """
    if os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    try:
        main()
        meet()  # a process that left early would look failed to those still at work
    except (InputError, RuntimeError) as error:
        process = f"process {dist.get_rank()} of {dist.get_world_size()}"
        raise InputError(f"{process}: {error} (torchrun's report below says no more)") from None
