"""Entry of `python -m torch_klloss`, which is the command `torch-klloss`."""

import io
import os
import sys

from torch_klloss import __version__


def run() -> int:
    """Run the command of this process, and return its exit status."""
    if sys.argv[1:] == ["--version"]:
        print(f"torch_klloss {__version__}")  # before anything imports torch
        return 0
    from torch_klloss.cli.entry_point import main

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a pipe in a legacy encoding gets '?' for '‖', not a traceback
    try:
        status = main(own_process=True)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has closed the pipe; Python would complain when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(run())
