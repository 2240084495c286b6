"""A distribution holds two parametrisations once somebody has asked for the other one; only one of them was given."""

import pytest
import torch
from torch.distributions import Bernoulli, Binomial, Categorical, ContinuousBernoulli, Geometric, NegativeBinomial

from torch_klloss import kl_divergence
from torch_klloss.distributions.given import as_given
from torch_klloss.distributions.precision import in_full_precision
from torch_klloss.distributions.tensors import copy_with

BINARY = [Bernoulli, Binomial, ContinuousBernoulli, Geometric, NegativeBinomial]
LOGITS = torch.tensor([50.0, -30.0, 0.3])
PROBS = torch.tensor([1e-12, 0.3, 0.6])


def _build(type_, **parameter):
    counts = {"total_count": 3} if type_ in (Binomial, NegativeBinomial) else {}
    if type_ is NegativeBinomial and "probs" in parameter:
        parameter["probs"] = parameter["probs"].clamp(max=0.9)
    return type_(**counts, **parameter)


def _ask_for_both(d):
    assert d.probs is not None
    assert d.logits is not None
    return d


@pytest.mark.parametrize("expanded", [False, True], ids=["as it is", "expanded"])
@pytest.mark.parametrize("type_", [*BINARY, Categorical])
@pytest.mark.parametrize("key", ["probs", "logits"])
def test_reading_the_other_parameter_does_not_change_which_one_was_given(type_, key, expanded):
    parameter = (LOGITS if key == "logits" else PROBS).expand(2, 3).clone()
    d = _build(type_, **{key: parameter})
    given = d.__dict__[key].clone()  # a Categorical normalises what it was given
    _ask_for_both(d)
    if expanded:
        d = d.expand((4, *d.batch_shape))
    param, is_probs = as_given(d, is_binary=type_ is not Categorical)
    assert is_probs == (key == "probs")
    assert torch.equal(param, given.expand_as(param))


def test_an_expanded_bernoulli_of_large_log_odds_keeps_its_finite_kl():
    q, p = Bernoulli(logits=torch.tensor(0.0)), _ask_for_both(Bernoulli(logits=torch.tensor(50.0)))
    expected = kl_divergence(q, Bernoulli(logits=torch.tensor(50.0)))
    assert expected.isfinite()
    assert torch.equal(kl_divergence(q.expand((2,)), p.expand((2,))), expected.expand(2))


def test_a_copy_holds_one_tensor_under_both_of_its_names():
    d = copy_with(_ask_for_both(Bernoulli(probs=PROBS)), lambda t, *_: t.clone())
    assert d._param is d.probs
    assert d._param is not d.logits


def test_a_half_precision_copy_remembers_what_was_given():
    d = in_full_precision(_ask_for_both(Bernoulli(probs=PROBS.half())))
    assert as_given(d)[1]
