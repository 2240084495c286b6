"""Closed forms of Pyro's distributions. Each runs in a new process, because importing Pyro changes torch's registry."""

import importlib.util

import pytest

from tests.processes import run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pyro") is None, reason="Pyro is not installed")

PAIRS = {
    "normal": "dist.Normal(one, one), dist.Normal(0 * one, one)",
    "to_event": "dist.Normal(one, one).to_event(1), dist.Normal(0 * one, one).to_event(1)",
    "mixed": "dist.Normal(one, one).to_event(1), Independent(torch.distributions.Normal(0 * one, one), 1)",
    "nested": "dist.Normal(two, two).to_event(1).to_event(1), dist.Normal(0 * two, two).to_event(2)",
    "categorical": "dist.Categorical(logits=one), dist.Categorical(logits=torch.arange(3.0))",
    "binomial": "dist.Binomial(3, one / 4), dist.Binomial(3, one / 3)",
    "geometric": "dist.Geometric(one / 4), dist.Geometric(one / 3)",
    "poisson": "dist.Poisson(one), dist.Poisson(2 * one)",
    "vae": "diagonal_normal(one[None], one[None]), dist.Normal(0 * one[None], one).to_event(1)",
}

CODE = """
import json, warnings, torch
torch.set_num_threads(1)
import torch.distributions.kl as kl
from torch.distributions import Independent
before = dict(kl._KL_REGISTRY)
import torch_klloss
from torch_klloss import *
from torch_klloss.closed_forms.registry import _TORCH_RULES
import pyro.distributions as dist
rule = kl._KL_REGISTRY[Independent, Independent]
one, two, out = torch.ones(3), torch.ones(2, 3), {}
warnings.simplefilter("error")
for name, pair in %r.items():
    q, p = eval(pair)
    state = torch.get_rng_state()
    estimate = AutoKL().estimate(q, p)
    plain = torch.distributions.kl_divergence(q, p)
    out[name] = {
        "method": estimate.method,
        "route": AutoKL().route(q, p),
        "form": has_closed_form(q, p),
        "gap": (estimate.value - plain).abs().max().item(),
        "shape": list(estimate.value.shape) == list(plain.shape),
        "random": not torch.equal(state, torch.get_rng_state()),
    }
def intruder(q, p):
    raise AssertionError("the rule for Independent was asked")
kl._KL_REGISTRY[Independent, Independent] = intruder
q, p = dist.Normal(one, one).to_event(1), dist.Normal(0 * one, one).to_event(1)
print(json.dumps({
    "pairs": out,
    "replaced": rule is not before[Independent, Independent] and rule.__module__.startswith("pyro"),
    "peeled": [kl_divergence(q, p).item(), AnalyticKL()(q, p).item(), AutoKL().route(q, p)],
}))
"""


@pytest.fixture(scope="module")
def result():
    return run(CODE % PAIRS)


@pytest.mark.parametrize("name", PAIRS)
def test_pyros_distributions_keep_their_closed_form(result, name):
    pair = result["pairs"][name]
    assert (pair["method"], pair["route"], pair["form"], pair["shape"]) == ("closed_form", "closed_form", True, True)
    assert pair["gap"] < 1e-5
    assert not pair["random"]


def test_pyros_rule_for_independent_is_in_torchs_table_and_ours_peels_before_it(result):
    assert result["replaced"]
    assert result["peeled"] == [1.5, 1.5, "closed_form"]


def test_where_pyro_is_already_there_the_losses_work_as_well():
    code = "import pyro.distributions\n" + CODE
    assert run(code % {"normal": PAIRS["normal"]})["pairs"]["normal"]["method"] == "closed_form"
