"""Fresh interpreters, for what can only be seen in one."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run(code: str) -> Any:
    """Run code in a new interpreter and return the JSON that it prints."""
    return json.loads(output("-c", code))


def output(*arguments: Any, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> str:
    """Run a new interpreter, as a shell would, on one thread, and return what it prints."""
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def chunks(names: list[str], number: int) -> list[list[str]]:
    """Deal names into so many lists."""
    return [names[i::number] for i in range(number)]
