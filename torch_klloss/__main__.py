"""Entry of `python -m torch_klloss`."""

import io
import os
import sys

from torch_klloss.cli.entry_point import main

if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a pipe in a legacy encoding gets '?' for '‖', not a traceback
    try:
        status = main(own_process=True)
        sys.stdout.flush()
    except (
        BrokenPipeError
    ):  # the reader, such as head, has closed the pipe; Python would complain when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    raise SystemExit(status)
