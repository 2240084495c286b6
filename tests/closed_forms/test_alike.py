"""Pairs that have a closed form only where a parameter is the same: refusals and gradients."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Kumaraswamy, NegativeBinomial, RelaxedBernoulli
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli

from tests.closed_forms.checks import t64
from tests.expectations import integrate, log_density
from tests.families import FAMILIES
from torch_klloss import AutoKL, has_closed_form, kl_divergence
from torch_klloss.closed_forms.alike import where_alike
from torch_klloss.distributions.logistic import Logistic

BY_NAME = {f.name: f for f in FAMILIES}


def on_the_line(q: Distribution, p: Distribution) -> Tensor:
    return integrate(q, p, (-math.inf, 0.0, math.inf), log_density, log_density).value


@dataclass(frozen=True)
class Case:
    """A family, how to build it from the common parameter and its own one, and its KL by definition."""

    build: Callable[[Tensor, Tensor], Distribution]
    common: Tensor
    own: tuple[Tensor, Tensor]
    kl: Callable[[Distribution, Distribution], Tensor]
    what: str


CASES = {
    "Kumaraswamy": Case(
        lambda a, b: Kumaraswamy(a, b, validate_args=False),
        t64(1.5, 3.0, 2.0),
        (t64(2.0, 3.0, 1.0), t64(3.0, 2.5, 4.0)),
        lambda q, p: BY_NAME["Kumaraswamy"].kl(q, p).value,
        "first exponents",
    ),
    "NegativeBinomial(probs)": Case(
        lambda r, probs: NegativeBinomial(r, probs=probs, validate_args=False),
        t64(1.5, 4.0),
        (t64(0.3, 0.8), t64(0.5, 0.6)),
        lambda q, p: BY_NAME["NegativeBinomial"].kl(q, p).value,
        "numbers of failures",
    ),
    "NegativeBinomial(logits)": Case(
        lambda r, logits: NegativeBinomial(r, logits=logits, validate_args=False),
        t64(1.5, 4.0),
        (t64(-1.0, 1.5), t64(0.5, 0.2)),
        lambda q, p: BY_NAME["NegativeBinomial"].kl(q, p).value,
        "numbers of failures",
    ),
    "Logistic": Case(
        lambda scale, loc: Logistic(loc, scale, validate_args=False),
        t64(0.7, 2.0, 1.0, 1.0),
        (t64(0.3, -1.0, 0.0, -9.0), t64(0.5, 2.0, 1e-3, 8.0)),
        on_the_line,
        "scales",
    ),
    "LogitRelaxedBernoulli(logits)": Case(
        lambda temperature, logits: LogitRelaxedBernoulli(temperature, logits=logits, validate_args=False),
        t64(0.7, 2.0),
        (t64(0.3, -1.0), t64(0.5, 2.0)),
        on_the_line,
        "temperatures",
    ),
    "LogitRelaxedBernoulli(probs)": Case(
        lambda temperature, probs: LogitRelaxedBernoulli(temperature, probs=probs, validate_args=False),
        t64(0.7, 2.0),
        (t64(0.3, 0.9), t64(0.5, 0.1)),
        on_the_line,
        "temperatures",
    ),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def leaves(case: Case) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in (case.common, case.own[0], case.common, case.own[1])]


def pair(case: Case, of: list[Tensor]) -> tuple[Distribution, Distribution]:
    return case.build(*of[:2]), case.build(*of[2:])


@each
def test_value_and_gradient_are_those_of_the_definition_also_by_what_is_common(case):
    of = leaves(case)
    value, expected = kl_divergence(*pair(case, of)), case.kl(*pair(case, of))
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9)
    for found, truth in zip(*(torch.autograd.grad(kl.sum(), of) for kl in (value, expected)), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-7)


@each
def test_what_is_not_common_has_no_closed_form(case):
    of = leaves(case)
    of[2] = torch.cat([case.common[:1], case.common[1:] * 1.1])
    assert not has_closed_form(*pair(case, of))
    with pytest.raises(NotImplementedError, match=f"their {case.what}"):
        kl_divergence(*pair(case, of))


@each
def test_out_of_sight_what_is_not_common_is_nan(case):
    of = [t.detach() for t in leaves(case)]
    of[2] = torch.cat([case.common[:1], case.common[1:] * 1.1])
    found = torch.func.vmap(lambda *t: kl_divergence(*pair(case, list(t))))(*of)
    assert found.isnan().tolist() == [False] + [True] * (len(case.common) - 1)
    torch.testing.assert_close(found[:1], kl_divergence(*pair(case, [t[:1] for t in of])))


@each
def test_a_nan_is_not_mistaken_for_a_difference(case):
    for i in range(4):
        of = [t.detach() for t in leaves(case)]
        of[i][0] = torch.nan
        assert kl_divergence(*pair(case, of)).isnan().tolist() == [True] + [False] * (len(case.common) - 1)


def test_a_relaxed_bernoulli_is_a_logistic_behind_a_sigmoid():
    q, p = (RelaxedBernoulli(t64(0.5), logits=t64(logit)) for logit in (1.0, -2.0))
    logistics = (Logistic(t64(logit / 0.5), t64(1 / 0.5)) for logit in (1.0, -2.0))
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(*logistics))


def test_the_library_goes_on_where_there_is_no_closed_form():
    assert AutoKL().route(Kumaraswamy(2.0, 3.0), Kumaraswamy(2.5, 3.0)) == "monte_carlo"
    assert AutoKL().route(Kumaraswamy(2.0, 3.0), Kumaraswamy(2.0, 5.0)) == "closed_form"


def test_values_pass_where_parameters_agree_and_broadcast():
    value = torch.ones(2, 3)
    assert torch.equal(where_alike(t64(1.0, 2.0).unsqueeze(-1), t64(1.0, 2.0).unsqueeze(-1), value, "x"), value)
    with pytest.raises(NotImplementedError, match="their x differ"):
        where_alike(t64(1.0, 2.0).unsqueeze(-1), t64(1.0), value, "x")
