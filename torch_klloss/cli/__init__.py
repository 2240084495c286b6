"""The command line, `python -m torch_klloss COMMAND`: one file a command."""

from torch_klloss.cli.entry_point import main

__all__ = ["main"]
