"""Fresh processes, for what can only be seen in one.

A fork of a process that has imported torch and its compiler starts in a hundredth of the seconds that these take. It is
as fresh as a new interpreter for whatever does not depend on when they were imported: nothing of this library is
loaded, and nothing was computed, compiled or set.
"""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "torch._functorch.aot_autograd"])


def run(code: str) -> Any:
    """Run code in a fork that has imported torch alone, and return the JSON that it prints last."""
    return json.loads(_printed_by(_execute, code).splitlines()[-1])


def script(path: str, *arguments: str) -> str:
    """Run a script of the repository as `__main__` of such a fork, and return what it prints."""
    return _printed_by(_run_script, str(ROOT / path), *arguments)


def output(*arguments: Any, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> str:
    """Run a new interpreter, as a shell would, on one thread, and return what it prints."""
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, **ONE_THREAD, **(env or {})}
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def said(stderr: str) -> str:
    """Return what a process wrote to stderr, less the line of a CUDA build of torch that finds no device."""
    return "".join(line for line in stderr.splitlines(keepends=True) if "No CUDA runtime is found" not in line)


def chunks(names: list[str], number: int) -> list[list[str]]:
    """Deal names into so many lists."""
    return [names[i::number] for i in range(number)]


def _printed_by(work: Callable[..., None], *arguments: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        process = FORKS.Process(target=_redirected, args=(files, work, arguments))
        process.start()
        process.join()
        out, err = (file.read_text() if file.exists() else "" for file in files)
    assert process.exitcode == 0, out + err
    return out


def _redirected(files: list[Path], work: Callable[..., None], arguments: tuple[str, ...]) -> None:
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(ROOT)
    os.environ.update(ONE_THREAD)  # for processes that it starts
    sys.modules["torch"].set_num_threads(1)
    work(*arguments)


def _execute(code: str) -> None:
    exec(code, vars(sys.modules["__main__"]))


def _run_script(path: str, *arguments: str) -> None:
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
