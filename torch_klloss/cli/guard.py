"""A process of its own for a command that runs a user's file: whatever that does, the command has a status."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable

import torch

_PR_SET_PDEATHSIG = 1  # of Linux
_GRACE = 5.0  # seconds between the command's own limit of time and the end of its process


def guarded(command: Callable[[], int], seconds: float) -> int:
    """Run a command in a child process and return its status; 2 where the child ends without one, or takes too long.

    Where a process cannot be forked with its threads, as on macOS and Windows, the command runs in this one.
    """
    if sys.platform != "linux":
        return command()
    sys.stdout.flush()
    sys.stderr.flush()
    receiving, sending = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads of this process only wait
        child = os.fork()
    if child == 0:
        os.close(receiving)
        _run_and_exit(command, sending)
    os.close(sending)
    ready: list[int] = []
    status = b""
    try:
        ready, _, _ = select.select([receiving], [], [], seconds + _GRACE)
        status = os.read(receiving, 1) if ready else b""
    finally:
        os.close(receiving)
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)  # with all that the file has started
        os.waitpid(child, 0)
    if status:
        return status[0]
    what = "ended the process" if ready else f"did not end within {seconds:g} s"
    print(f"error: not judged: the file {what}", file=sys.stderr)
    return 2


def _run_and_exit(command: Callable[[], int], sending: int) -> None:
    """Run the command as the leader of a process group, send its status, and end without the parent's clean-up."""
    status = 2
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with its parent
        torch.set_num_threads(1)  # the parent's other threads are not there, and OpenMP would wait for them for ever
        status = command()
        sys.stdout.flush()
    except BaseException as error:
        with contextlib.suppress(BaseException):
            os.write(2, f"error: not judged: {type(error).__name__}\n".encode())
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        with contextlib.suppress(OSError):
            os.write(sending, bytes([status]))
        os._exit(status)
