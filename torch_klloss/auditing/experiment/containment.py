"""Containment of a user's code: a limit of time, and the global state put back."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.distributions import Distribution

State = tuple[tuple[str, Callable[[], Any], Callable[[Any], Any]], ...]

CHANGED_BY_LOSSES: State = (
    ("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    ("whether torch records gradients", torch.is_grad_enabled, torch.set_grad_enabled),
    ("torch's number of threads", torch.get_num_threads, torch.set_num_threads),
)
"""Global state that no loss should change: its name, and how it is read and set."""


def _set_validation(value: bool) -> None:
    Distribution._validate_args = value


_PRESERVED: State = (
    *CHANGED_BY_LOSSES,
    ("torch's random stream", torch.get_rng_state, torch.set_rng_state),
    ("Python's random stream", random.getstate, random.setstate),
    ("the validation of distributions", lambda: Distribution._validate_args, _set_validation),
    ("deterministic algorithms", torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    ("anomaly detection", torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    ("the working directory", os.getcwd, os.chdir),
    ("the limit of recursion", sys.getrecursionlimit, sys.setrecursionlimit),
    ("the profile function", sys.getprofile, sys.setprofile),
    ("the trace function", sys.gettrace, sys.settrace),
)


@contextlib.contextmanager
def preserved_state() -> Iterator[None]:
    """Record gradients in the block, and put the process's global state back after it, as far as it has changed."""
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    before = [(put, get, get()) for _, get, put in _PRESERVED]
    streams = sys.stdout, sys.stderr
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        sys.stdout, sys.stderr = streams
        for put, get, value in before:
            if get() is not value:
                put(value)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def without_forks() -> Iterator[None]:
    """End every copy of this process that the user's code in the block makes, as it leaves the block."""
    process = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != process:
            os._exit(0)


class OutOfTimeError(BaseException):
    """Raised in the user's code when its time has ended; no `except Exception` of theirs takes it."""


_AGAIN = 0.5  # seconds after which it is raised again, where the code has taken it


@contextlib.contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raise `OutOfTimeError` in the block when it has taken so long.

    In the main thread of a POSIX system a call that waits is ended too; elsewhere the next line of Python is.
    """
    if seconds is None:
        yield
        return
    ends = _ends.of_blocks
    ends.append(time.monotonic() + seconds)
    try:
        with _alarm(seconds) if _may_use_signals() else _asynchronous(seconds):
            yield
    finally:
        ends.pop()


class _Ends(threading.local):
    """The ends of the limited blocks of each thread."""

    def __init__(self) -> None:
        self.of_blocks: list[float] = []


_ends = _Ends()


def check_time() -> None:
    """Raise `OutOfTimeError` where the time has ended, and the user's code has taken the error of that."""
    if any(time.monotonic() > end for end in _ends.of_blocks):
        raise OutOfTimeError


def _may_use_signals() -> bool:
    return threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _asynchronous(seconds: float) -> Iterator[None]:
    thread, over = ctypes.c_ulong(threading.get_ident()), threading.Event()

    def end() -> None:
        wait = seconds
        while not over.wait(wait):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(OutOfTimeError))
            wait = _AGAIN

    watcher = threading.Thread(target=end, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
