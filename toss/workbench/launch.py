"""A command as one of the processes that torchrun started: how it begins, and how it ends."""

import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

from model.io import InputError


def joined(main: Callable[[], int | None]) -> None:
    """Run a command as one of the processes that torchrun started.

    Only process 0 prints and hears signals. When a process fails, torchrun ends the others.
    """
    if os.environ["RANK"] != "0":  # it ends with process 0
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    import torch
    import torch.distributed as dist

    from toss.parallel import meet

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    try:
        main()
        meet()  # a process that left early would look failed to those still at work
    except (InputError, RuntimeError) as error:
        message = str(error)
        if not isinstance(error, InputError):
            if not re.search("gloo|NCCL", message):
                raise
            message = f"another process has ended, or hangs ({message})"
        process = f"process {dist.get_rank()} of {dist.get_world_size()}"
        raise InputError(f"{process}: {message}") from None


def leave(status: int) -> NoReturn:
    """End a process that worked with others at once, not by Python's usual way out.

    A thread of Gloo may still be dropping the tensor of a sum that is done, for which it needs
    Python's lock. If Python shuts down first, the process aborts. Destroying the process group
    would wait for these threads, but caches of PyTorch's DTensor keep the group of a spread base.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # its reader has gone, or it is closed
            stream.flush()
    os._exit(status)
