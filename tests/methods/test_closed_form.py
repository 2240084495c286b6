"""The exact KL where a formula is registered, and the care taken with subclasses that override `log_prob`."""

import warnings

import pytest
import torch
from torch.distributions import (
    Distribution,
    ExponentialFamily,
    ExpTransform,
    Gamma,
    Independent,
    LogNormal,
    Normal,
    StudentT,
    TransformedDistribution,
    constraints,
)

from torch_klloss import kl_divergence
from torch_klloss.methods import ClosedForm

STANDARD = Normal(0.0, 1.0)


def test_the_estimate_is_exact_and_says_so():
    estimate = ClosedForm().estimate(Normal(torch.ones(3), 1.0), STANDARD)
    assert estimate.value.tolist() == [0.5] * 3
    assert (estimate.exact, estimate.method) == (True, "closed_form")
    assert (estimate.std_error, estimate.dof, estimate.error_bound) == (None, None, None)
    assert estimate.num_evaluations == 0


def test_a_pair_without_a_form_names_itself_and_the_way_out():
    assert not ClosedForm().supports(STANDARD, StudentT(4.0))
    with pytest.raises(NotImplementedError, match=r"KL\(Normal‖StudentT\).*AutoKL\(\).*MonteCarloKL.*@register_kl"):
        ClosedForm().estimate(STANDARD, StudentT(4.0))
    with pytest.raises(NotImplementedError, match=r"KL\(Independent\(Normal, 1\)‖Independent\(StudentT, 1\)\)"):
        ClosedForm().estimate(Independent(STANDARD.expand((2,)), 1), Independent(StudentT(torch.ones(2)), 1))


def test_a_discrete_q_against_a_continuous_p_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="q is discrete and p is continuous, so that their log_prob"):
        ClosedForm().estimate(torch.distributions.Poisson(1.0), STANDARD)
    with pytest.raises(ValueError, match="q is continuous and p is discrete"):
        ClosedForm().estimate(STANDARD, torch.distributions.Bernoulli(0.5))


# Subclasses. Each test makes classes of its own, because what is known of a class is remembered.


def same_density() -> type[Normal]:
    class Renamed(Normal):
        def log_prob(self, value):
            return super().log_prob(value)

    return Renamed


def other_density() -> type[Normal]:
    class Tempered(Normal):
        def log_prob(self, value):
            return 2 * super().log_prob(value)

    return Tempered


def test_a_subclass_that_keeps_log_prob_inherits_the_form():
    class Plain(Normal):
        pass

    assert ClosedForm().supports(Plain(0.0, 1.0), STANDARD)
    assert ClosedForm().estimate(Plain(1.0, 1.0), STANDARD).value == 0.5


@pytest.mark.parametrize("as_q", [True, False])
def test_a_subclass_that_overrides_log_prob_to_the_same_density_inherits_the_form(as_q):
    renamed = same_density()(torch.ones(2), 1.0)
    pair = (renamed, STANDARD) if as_q else (STANDARD, renamed)
    assert ClosedForm().supports(*pair)
    assert ClosedForm().estimate(*pair).value.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("as_q", [True, False])
def test_a_subclass_with_another_density_has_no_form_and_is_warned_of_once(as_q):
    tempered = other_density()
    pair = (tempered(1.0, 1.0), STANDARD) if as_q else (STANDARD, tempered(1.0, 1.0))
    with (
        pytest.warns(UserWarning, match="Tempered overrides log_prob, and its density is not that of Normal"),
        pytest.raises(NotImplementedError, match="Tempered"),
    ):
        ClosedForm().estimate(*pair)
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        assert not ClosedForm().supports(*pair)
        with pytest.raises(NotImplementedError, match="Tempered"):
            ClosedForm().estimate(*pair)
    assert again == []


def test_only_a_difference_is_remembered():
    class Sometimes(Normal):
        tempered = False

        def log_prob(self, value):
            return super().log_prob(value) * (2 if self.tempered else 1)

    d = Sometimes(1.0, 1.0)
    assert ClosedForm().supports(d, STANDARD)
    d.tempered = True
    with pytest.warns(UserWarning, match="Sometimes overrides log_prob"):
        assert not ClosedForm().supports(d, STANDARD)


def test_the_classes_compared_are_not_kept_alive():
    import gc
    import weakref

    tempered = other_density()
    with pytest.warns(UserWarning, match="Tempered"):
        ClosedForm().supports(tempered(0.0, 1.0), STANDARD)
    reference = weakref.ref(tempered)
    del tempered
    gc.collect()
    assert reference() is None


def test_comparing_consumes_no_global_randomness():
    renamed = same_density()(torch.ones(2), 1.0)
    before = torch.get_rng_state()
    ClosedForm().estimate(renamed, STANDARD)
    assert torch.equal(before, torch.get_rng_state())


def test_comparing_leaves_no_gradient_behind():
    loc = torch.ones(2, requires_grad=True)
    value = ClosedForm().estimate(same_density()(loc, 1.0), STANDARD).value.sum()
    assert torch.autograd.grad(value, loc)[0].tolist() == [1.0, 1.0]


def test_the_exact_function_inherits_as_torch_does():
    tempered, p = other_density()(1.0, 1.0), STANDARD
    assert kl_divergence(tempered, p) == torch.distributions.kl_divergence(tempered, p) == 0.5


def test_a_subclass_that_validates_its_points_is_compared_at_points_of_its_own():
    class Positive(Gamma):
        def log_prob(self, value):
            self._validate_sample(value)
            return super().log_prob(value)

    q = Positive(torch.tensor([0.01, 100.0]), 1.0)
    torch.testing.assert_close(ClosedForm().estimate(q, q).value, torch.zeros(2), atol=1e-4, rtol=0)


def test_a_subclass_that_cannot_be_drawn_from_has_no_form():
    class Unknown(Normal):
        def sample(self, sample_shape=()):
            raise NotImplementedError

        def log_prob(self, value):
            return super().log_prob(value)

    assert not ClosedForm().supports(Unknown(0.0, 1.0), STANDARD)


def test_a_transformed_family_keeps_its_form():
    q, p = LogNormal(torch.ones(2), 1.0), LogNormal(0.0, 1.0)
    assert ClosedForm().estimate(q, p).value.tolist() == [0.5, 0.5]


def test_a_transformed_base_with_another_density_has_no_form():
    q = TransformedDistribution(other_density()(torch.ones(2), 1.0), [ExpTransform()])
    p = TransformedDistribution(Normal(torch.zeros(2), 1.0), [ExpTransform()])
    with pytest.warns(UserWarning, match="Tempered overrides log_prob"):
        assert not ClosedForm().supports(q, p)


def test_an_independent_base_with_another_density_has_no_form():
    q, p = Independent(other_density()(torch.ones(2), 1.0), 1), Independent(Normal(torch.zeros(2), 1.0), 1)
    with pytest.warns(UserWarning, match="Tempered overrides log_prob"):
        assert not ClosedForm().supports(q, p)


def test_a_rule_written_for_the_abstract_exponential_family_is_inherited():
    class Rate(ExponentialFamily):
        """An exponential law that knows its natural parameter alone."""

        arg_constraints = {"rate": constraints.positive}  # noqa: RUF012
        support = constraints.nonnegative
        _mean_carrier_measure = 0

        def __init__(self, rate):
            self.rate = rate
            super().__init__(rate.shape)

        @property
        def _natural_params(self):
            return (-self.rate,)

        def _log_normalizer(self, x):
            return -torch.log(-x)

        def log_prob(self, value):
            return self.rate.log() - self.rate * value

        def sample(self, sample_shape=()):
            return torch.distributions.Exponential(self.rate).sample(sample_shape)

    q, p = Rate(torch.tensor(2.0)), Rate(torch.tensor(1.0))
    exact = torch.distributions.kl_divergence(
        torch.distributions.Exponential(2.0), torch.distributions.Exponential(1.0)
    )
    assert issubclass(Rate, Distribution)
    torch.testing.assert_close(kl_divergence(q, p), exact)
    assert ClosedForm().supports(q, p)
    torch.testing.assert_close(ClosedForm().estimate(q, p).value, exact)
