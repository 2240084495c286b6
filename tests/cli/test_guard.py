"""A command that runs a user's file has a status, whatever the file does to its process."""

import os
import signal
import sys
import time

import pytest

from torch_klloss.cli import guard
from torch_klloss.cli.entry_point import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks with torch's threads on Linux alone")

RIGHT = """
def f(mu, logvar):
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1).mean()

def of_scales(fn, q, p):
    return fn(q.loc, 2 * q.scale.log())
"""


def fail():
    raise RuntimeError


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (lambda: 0, 0),
        (lambda: 1, 1),
        (fail, 2),
        (lambda: os._exit(0), 2),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 2),
        (lambda: time.sleep(1000), 2),
    ],
)
def test_the_status_is_the_command_s_or_2(monkeypatch, command, status):
    monkeypatch.setattr(guard, "_GRACE", 1.0)
    assert guard.guarded(command, 1.0) == status


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("while True: pass", "was not judged within 0.3 s"),
        ("raise KeyboardInterrupt", "raises KeyboardInterrupt: (no message)"),
        (
            "class E(Exception):\n    def __str__(self): raise ValueError\nraise E",
            "raises E: (its message raises ValueError)",
        ),
    ],
)
def test_a_file_that_never_ends_or_raises_anything_is_status_2(capsys, tmp_path, code, reason):
    (tmp_path / "file.py").write_text(code + RIGHT)
    assert main(["audit", f"{tmp_path}/file.py:f", "--timeout", "0.3"]) == 2
    printed = capsys.readouterr()
    assert reason in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    "code",
    [
        "import torch; torch.set_grad_enabled(False)",
        "import torch; torch.set_default_dtype(torch.float64)",
        "import torch; torch.manual_seed(0)",
        "import sys; sys.stdout = sys.stderr = None",
        "import os; os.fork()",
    ],
)
def test_what_a_file_changes_is_put_back(capsys, tmp_path, code):
    import torch

    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist(), os.getpid()
    (tmp_path / "file.py").write_text(code + RIGHT)
    assert main(["audit", f"{tmp_path}/file.py:f"]) == 0
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist(), os.getpid()) == before
    assert "RIGHT" in capsys.readouterr().out


def test_an_adapter_of_the_file_calls_the_loss(capsys, tmp_path):
    (tmp_path / "file.py").write_text(
        RIGHT.replace("2 * q.scale.log()", "2 * (q.scale / p.scale).log()").replace(
            "q.loc", "(q.loc - p.loc) / p.scale"
        )
    )
    for adapter in ("of_scales", f"{tmp_path}/file.py:of_scales"):
        assert main(["audit", f"{tmp_path}/file.py:f", "--adapter", adapter]) == 0
    assert "RIGHT" in capsys.readouterr().out
    assert main(["audit", f"{tmp_path}/file.py:f", "--adapter", "nothing"]) == 2
    assert "has no 'nothing'" in capsys.readouterr().err
