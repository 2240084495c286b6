"""The first method that takes the pair."""

import pickle
from dataclasses import dataclass

import pytest
import torch
from torch.distributions import Binomial, Categorical, Normal, Poisson, StudentT

from torch_klloss import KLEstimate, NotCertifiedError
from torch_klloss.methods import ClosedForm, Enumeration, FirstOf, MonteCarlo

Q, P, T = Normal(torch.zeros(3), 1.0), Normal(1.0, 1.0), StudentT(torch.tensor(4.0))


@dataclass(frozen=True)
class Fixed:
    """A method that answers, or raises, what it was told to."""

    answer: float | Exception
    name: str = "fixed"
    support: bool | None = None

    def estimate(self, q, p, generator=None):
        if isinstance(self.answer, Exception):
            raise self.answer
        return KLEstimate(torch.full(q.batch_shape, self.answer), exact=True, method=self.name)

    def supports(self, q, p):
        return self.support


class Bare:
    """All that the protocol asks for."""

    def estimate(self, q, p, generator=None):
        return KLEstimate(torch.zeros(q.batch_shape), exact=False, method="bare")


def test_the_first_method_that_takes_the_pair_answers():
    method = FirstOf(ClosedForm(), Enumeration(), MonteCarlo(4))
    assert method.estimate(Q, P).method == "closed_form"
    assert method.estimate(Binomial(3, torch.tensor(0.5)), Poisson(torch.ones(2))).method == "enumeration"
    assert method.estimate(Q, T).method == "monte_carlo"


@pytest.mark.parametrize("refusal", [NotImplementedError("no"), NotCertifiedError("unsure")])
def test_a_refusal_goes_on_to_the_next(refusal):
    assert FirstOf(Fixed(refusal), Fixed(2.0)).estimate(Q, P).value.tolist() == [2.0] * 3


@pytest.mark.parametrize("error", [ValueError("a wrong value"), RuntimeError("out of memory"), TypeError("a kind")])
def test_any_other_error_is_an_error(error):
    with pytest.raises(type(error), match=str(error)):
        FirstOf(Fixed(error), Fixed(2.0)).estimate(Q, P)


def test_where_all_refuse_the_error_says_what_each_of_them_said():
    both = FirstOf(Fixed(NotImplementedError("no route"), "first"), Fixed(NotImplementedError("none either"), "second"))
    with pytest.raises(NotImplementedError, match=r"KL\(Normal‖Normal\):\n  first: no route\n  second: none either"):
        both.estimate(Q, P)
    with pytest.raises(NotCertifiedError, match=r"first: no route\n  second: error 0\.1"):
        FirstOf(both.methods[0], Fixed(NotCertifiedError("error 0.1"), "second")).estimate(Q, P)


def test_an_uncertified_number_is_a_value_error():
    assert issubclass(NotCertifiedError, ValueError)


def test_the_generator_reaches_the_method_that_draws():
    first, again = (
        FirstOf(ClosedForm(), MonteCarlo(4)).estimate(Q, T, torch.Generator().manual_seed(1)).value for _ in range(2)
    )
    assert torch.equal(first, again)


def test_route_names_the_method_without_drawing():
    class Silent(Normal):
        def log_prob(self, value):
            raise AssertionError("route evaluated a density")

        rsample = sample = log_prob

    method = FirstOf(Enumeration(), MonteCarlo(4))
    assert method.route(Silent(0.0, 1.0), T) == "monte_carlo"
    before = torch.get_rng_state()
    assert FirstOf(ClosedForm(), MonteCarlo(4)).route(Q, T) == "monte_carlo"
    assert torch.equal(before, torch.get_rng_state())


def test_route_says_where_only_computing_can_tell():
    maybe, no = Fixed(0.0, "quadrature", support=None), Fixed(0.0, "never", support=False)
    assert FirstOf(no, maybe, MonteCarlo(4), ClosedForm()).route(Q, P) == "quadrature, else monte_carlo"
    assert FirstOf(Bare(), ClosedForm()).route(Q, P) == "Bare, else closed_form"
    assert FirstOf(no, Bare()).route(Q, P) == "Bare"
    assert FirstOf(no).route(Q, P) is None


def test_supports_is_the_best_of_its_methods():
    yes, no, maybe = (Fixed(0.0, support=answer) for answer in (True, False, None))
    assert FirstOf(no, maybe, yes).supports(Q, P) is True
    assert FirstOf(no, maybe).supports(Q, P) is None
    assert FirstOf(no, no).supports(Q, P) is False


def test_nested_choices_are_one_choice():
    inner = FirstOf(Enumeration(), MonteCarlo(4))
    method = FirstOf(ClosedForm(), inner)
    assert method.route(Q, T) == "monte_carlo"
    assert method.route(Categorical(torch.ones(2)), Poisson(1.0)) == "enumeration"
    assert method.estimate(Q, T).method == "monte_carlo"


def test_it_is_a_value():
    method = FirstOf(ClosedForm(), MonteCarlo(4))
    assert method == FirstOf(ClosedForm(), MonteCarlo(4)) != FirstOf(ClosedForm(), MonteCarlo(5))
    assert hash(method) == hash(FirstOf(ClosedForm(), MonteCarlo(4)))
    assert pickle.loads(pickle.dumps(method)) == method
    assert repr(method).startswith("FirstOf(ClosedForm(), MonteCarlo(num_samples=4")


def test_what_is_no_method_is_an_error():
    with pytest.raises(ValueError, match="at least one method, got none"):
        FirstOf()
    for wrong in (ClosedForm, "closed_form", None):
        with pytest.raises(TypeError, match=r"a method must have estimate\(q, p, generator=None\)"):
            FirstOf(wrong)


def test_methods_are_given_one_by_one_or_in_a_sequence():
    assert FirstOf([ClosedForm(), MonteCarlo(2)]) == FirstOf((ClosedForm(), MonteCarlo(2)))
    assert FirstOf([ClosedForm()], MonteCarlo(2)) == FirstOf(ClosedForm(), MonteCarlo(2))
    assert repr(FirstOf(methods=[ClosedForm()])) == "FirstOf(ClosedForm())"
    for nothing in ((), []):
        with pytest.raises(ValueError, match="at least one method"):
            FirstOf(nothing)
    for bad in ("closed_form", None, 3, [ClosedForm(), "x"]):
        with pytest.raises(TypeError, match="a method must have estimate"):
            FirstOf(bad)
