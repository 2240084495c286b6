"""The kit that checks a user's own KL: right ones pass, and every known mistake is told by name."""

import pytest
import torch
from torch import tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    Independent,
    Laplace,
    LogNormal,
    MultivariateNormal,
    Normal,
    Poisson,
    Uniform,
    constraints,
)
from torch.distributions import kl_divergence as torch_kl

from torch_klloss import kl_divergence, register_kl
from torch_klloss.closed_forms import registry
from torch_klloss.testing.laws import _CHECKS, check_kl


def d(*x):
    return tensor(x if len(x) > 1 else x[0], dtype=torch.float64)


EYE = torch.eye(2, dtype=torch.float64)
RIGHT = [
    (Exponential(d(2.0)), Exponential(d(0.5)), "quadrature"),
    (Normal(d(1.0, 2.0), d(1.0, 0.5)), Normal(d(0.0), d(2.0)), "quadrature"),
    (Normal(d(1.0), d(0.7)), Laplace(d(0.0), d(1.5)), "quadrature"),
    (Gamma(d(2.0), d(1.0)), Gamma(d(3.0), d(2.0)), "quadrature"),
    (Beta(d(2.0), d(3.0)), Beta(d(1.5), d(1.5)), "quadrature"),
    (LogNormal(d(0.0), d(1.0)), LogNormal(d(1.0), d(1.5)), "quadrature"),
    (Uniform(d(0.1), d(0.9)), Uniform(d(0.0), d(1.0)), "quadrature"),
    (Independent(Normal(d(1.0, 2.0), d(1.0, 0.5)), 1), Independent(Normal(d(0.0, 1.0), d(2.0)), 1), "quadrature"),
    (Bernoulli(d(0.3)), Bernoulli(d(0.6)), "enumeration"),
    (Categorical(d(0.2, 0.3, 0.5)), Categorical(d(0.4, 0.4, 0.2)), "enumeration"),
    (Dirichlet(d(2.0, 3.0, 4.0)), Dirichlet(d(1.0, 1.0, 3.0)), "monte_carlo"),
    (MultivariateNormal(d(0.0, 1.0), scale_tril=EYE), MultivariateNormal(d(1.0, 1.0), scale_tril=2 * EYE), "any"),
    (Poisson(d(2.0)), Poisson(d(3.0)), "any"),
]


def name_of(value):
    return type(value).__name__ if hasattr(value, "log_prob") else None


@pytest.mark.parametrize(("q", "p", "method"), RIGHT, ids=name_of)
def test_a_right_closed_form_passes_every_check_that_can_be_made(q, p, method):
    report = check_kl(q, p)
    assert (set(report.passed), report.skipped) == (set(_CHECKS), {})
    assert report.reference.method == method or method == "any"
    assert torch.equal(report.value, kl_divergence(q, p))


Q, P = Normal(d(1.0), d(0.7)), Normal(d(0.0), d(1.5))


def weighted_twice(q, p):
    """Take the mean of q(x) (log q - log p) over draws from q: the mistake that the library began with."""
    torch.manual_seed(0)
    x = q.rsample((4096,))
    log_ratio = q.log_prob(x) - p.log_prob(x)
    return (q.log_prob(x).exp() * log_ratio).mean(0)


def without_half(q, p):
    """Forget the ½ of the formula."""
    return (q.scale / p.scale) ** 2 + ((q.loc - p.loc) / p.scale) ** 2 - 1 - 2 * (q.scale / p.scale).log()


def without_its_constant(q, p):
    """Forget the -½."""
    return (p.scale / q.scale).log() + (q.scale**2 + (q.loc - p.loc) ** 2) / (2 * p.scale**2)


def of_detached_p(q, p):
    return torch_kl(q, Normal(p.loc.detach(), p.scale.detach(), validate_args=False))


def mean_over_event(q, p):
    """Take the mean where the sum over independent dimensions belongs."""
    if isinstance(q, Independent):
        return torch_kl(q.base_dist, p.base_dist).mean(tuple(range(-q.reinterpreted_batch_ndims, 0)))
    return torch_kl(q, p)


TWINS = [
    (weighted_twice, {"value", "gradient"}, "draws from q already carry the weight q"),
    (without_half, {"value", "gradient"}, "that is twice the KL"),
    (without_its_constant, {"value", "zero at q = p"}, "expected KL(q‖q) = 0, got 0.5"),
    (lambda q, p: torch_kl(p, q), {"value", "gradient"}, "are q and p swapped?"),
    (lambda q, p: torch_kl(q, p) / 2, {"value", "gradient"}, "that is half the KL"),
    (lambda q, p: -torch_kl(q, p), {"value", "not negative", "gradient"}, "expected at least 0, got -0.59"),
    (lambda q, p: torch_kl(q, p).unsqueeze(0), {"shape", "broadcasting"}, "broadcast batch shape (), got (1,)"),
    (lambda q, p: torch_kl(q, p).sum(), {"broadcasting"}, "(3, 2) for batch shapes (3, 1) and (2,), got ()"),
    (lambda q, p: torch_kl(q, p).detach(), {"gradient"}, "got 0; is it computed under no_grad"),
    (of_detached_p, {"gradient"}, "expected d KL/d p.loc = -0.44"),
    (lambda q, p: torch_kl(q, p).float(), {"dtype"}, "got torch.float32"),
    (lambda q, p: torch_kl(q, p).nan_to_num(0.0), {"NaN"}, "expected NaN for NaN parameters of q, got 0"),
    (mean_over_event, {"additivity"}, "of three independent copies"),
]


@pytest.mark.parametrize(("kl", "fails", "message"), TWINS)
def test_every_known_mistake_is_rejected_by_the_check_that_it_breaks(kl, fails, message):
    with pytest.raises(AssertionError) as caught:
        check_kl(Q, P, kl=kl)
    title, *lines = str(caught.value).splitlines()
    failed = {line.strip().partition(":")[0] for line in lines}
    assert title == f"KL(Normal‖Normal) fails {len(failed)} of {len(_CHECKS)} checks:"
    assert fails <= failed
    assert failed - fails <= {"broadcasting", "additivity"}  # what is random is not the same in a batch
    assert message in str(caught.value)


@pytest.mark.parametrize("kl", [lambda q, p: torch_kl(p, q), lambda q, p: 1.1 * torch_kl(q, p)])
def test_where_only_sampling_can_tell_a_mistake_beyond_the_sampled_error_is_rejected(kl):
    q, p = Dirichlet(d(2.0, 3.0, 4.0)), Dirichlet(d(1.0, 1.0, 3.0))
    with pytest.raises(AssertionError, match=r"value: expected .* ± .* by monte_carlo"):
        check_kl(q, p, kl=kl)


def test_the_gradient_reaches_the_leaves_that_the_user_learns():
    log_scale = tensor(-0.3, dtype=torch.float64, requires_grad=True)
    q = Normal(d(1.0), log_scale.exp())

    def of_detached_scale(q, p):
        return torch_kl(Normal(q.loc, q.scale.detach(), validate_args=False), p)

    assert "gradient" in check_kl(q, P, kl=torch_kl).passed
    expected = -1 + (q.scale**2 / P.scale**2).item()  # d KL/d log σ
    with pytest.raises(AssertionError, match=rf"gradient: expected d KL/d q\.scale = {expected:.6g}, got 0"):
        check_kl(q, P, kl=of_detached_scale)


def test_an_infinite_kl_is_right_where_p_lacks_the_support_and_only_there():
    q, p = Normal(d(0.0), d(1.0)), Exponential(d(1.0))
    assert check_kl(q, p).skipped == {"gradient": "the KL is not finite"}
    with pytest.raises(AssertionError, match="value: expected inf"):
        check_kl(q, p, kl=lambda q, p: torch.full(torch.broadcast_shapes(q.batch_shape, p.batch_shape), 3.0))
    with pytest.raises(AssertionError, match=r"value: expected 0\.59.*, got inf"):
        check_kl(Q, P, kl=lambda q, p: torch_kl(q, p) + torch.inf)


def test_a_pair_without_a_closed_form_says_how_to_register_one():
    with pytest.raises(NotImplementedError, match="@register_kl"):
        check_kl(Binomial(3, d(0.5)), Poisson(d(1.0)))


@pytest.mark.parametrize("swap", [False, True])
def test_a_side_without_parameters_is_not_asked_for_nan(swap):
    class Standard(Distribution):
        arg_constraints, support, loc, scale = {}, constraints.real, 0.0, 1.0

        def __init__(self):
            super().__init__(torch.Size([4]), validate_args=False)

        def log_prob(self, x):
            return -0.5 * x**2 - 0.9189385332046727

        def sample(self, sample_shape=torch.Size()):  # noqa: B008
            return torch.randn(*sample_shape, 4)

    def kl(q, p):
        ratio = torch.as_tensor(q.scale / p.scale).expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape))
        return 0.5 * (ratio**2 + ((q.loc - p.loc) / p.scale) ** 2 - 1) - ratio.log()

    pair = Normal(torch.ones(4).double(), torch.full((4,), 0.7).double()), Standard()
    report = check_kl(*(pair[::-1] if swap else pair), kl=kl)
    assert report.skipped["NaN"] == f"{'q' if swap else 'p'} has no parameter to make NaN"
    with pytest.raises(AssertionError, match="NaN: expected NaN for NaN parameters of"):  # the other side's are
        check_kl(*(pair[::-1] if swap else pair), kl=lambda q, p: torch.nan_to_num(kl(q, p), 0.0))


def test_a_class_without_expand_is_checked_as_far_as_it_goes(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))

    class UnitNormal(Normal):
        def __init__(self, loc):
            super().__init__(loc, torch.ones_like(loc))

    @register_kl(UnitNormal, UnitNormal)
    def _unit_normal(q, p):
        return (q.loc - p.loc) ** 2 / 2

    report = check_kl(UnitNormal(d(1.0).requires_grad_()), UnitNormal(d(-1.0).requires_grad_()))
    assert report.skipped == dict.fromkeys(
        ("broadcasting", "additivity"), "UnitNormal has no expand; define it, and batches can be checked"
    )


def test_the_global_random_stream_is_left_alone():
    state = torch.get_rng_state()
    check_kl(Dirichlet(d(2.0, 3.0, 4.0)), Dirichlet(d(1.0, 1.0, 3.0)))
    assert torch.equal(torch.get_rng_state(), state)
