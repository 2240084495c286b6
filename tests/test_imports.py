"""`import torch_klloss` needs torch alone, and changes nothing global."""

import json
import os

import pytest

import torch_klloss
from tests.processes import output

OPTIONAL = ["lightning", "pytorch_lightning", "matplotlib", "scipy", "sklearn", "rich", "pyro", "mpmath", "hypothesis"]

BLOCK = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in %r:
            raise ModuleNotFoundError(f"No module named {name!r}: blocked by the test", name=name)
sys.meta_path.insert(0, Block())
"""

USE = """
import torch, torch_klloss
from torch.distributions import Normal, StudentT
from torch_klloss import *
q = diagonal_normal(torch.zeros(4, 3), torch.zeros(4, 3))
value = AutoKL()(q, standard_normal_like(q)).item() + MonteCarloKL(8)(Normal(0.0, 1.0), StudentT(4.0)).item() * 0
print(json.dumps({"value": value, "loaded": [m for m in %r if m in sys.modules]}))
"""


def test_the_library_works_with_torch_alone():
    result = json.loads(output("-c", BLOCK % OPTIONAL + USE % OPTIONAL))
    assert result == {"value": 0.0, "loaded": []}


def test_the_block_would_be_noticed():
    with pytest.raises(AssertionError, match="blocked by the test"):
        output("-c", BLOCK % OPTIONAL + "import torch, scipy.stats")


def test_importing_changes_nothing_global():
    state = """
import json, warnings, torch
def state():
    return [str(torch.get_default_dtype()), torch.distributions.Distribution._validate_args, torch.get_num_threads(),
            torch.is_grad_enabled(), torch.initial_seed(), [str(f) for f in warnings.filters],
            str(torch.get_default_device())]
before = state()
import torch_klloss
q = torch_klloss.diagonal_normal(torch.zeros(4, 3), torch.zeros(4, 3))
torch_klloss.AutoKL()(q, torch_klloss.standard_normal_like(q))
print(json.dumps(before == state()))
"""
    assert json.loads(output("-c", state)) is True


def test_every_public_name_is_there():
    assert all(getattr(torch_klloss, name).__doc__ for name in torch_klloss.__all__)


FORK = """
import os, signal, time, torch, torch_klloss
import torch_klloss.auditing

def child():
    pid = os.fork()
    if pid == 0:
        torch.ones(2_000_000).exp().sum()  # in several threads
        os._exit(0)
    for _ in range(200):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False

print(child())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_process_that_has_imported_the_library_can_be_forked():
    """OpenMP's threads are not in the copy, which waits for them for ever."""
    assert output("-W", "ignore", "-c", FORK, env={"OMP_NUM_THREADS": "2"}).strip() == "True"
