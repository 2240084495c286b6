"""Do q and p fit together, and what is the simplest pair behind them?"""

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Dirichlet, Independent, MultivariateNormal, Normal, Poisson

from torch_klloss import AutoKL, MonteCarloKL, has_closed_form, kl_divergence
from torch_klloss.methods import ClosedForm, Enumeration, MonteCarlo
from torch_klloss.structure import check_common_measure, check_pair, name, peel

ENTRIES = {
    "kl_divergence": kl_divergence,
    "has_closed_form": has_closed_form,
    "AutoKL": AutoKL(),
    "AutoKL.estimate": AutoKL().estimate,
    "AutoKL.route": AutoKL().route,
    "MonteCarloKL": MonteCarloKL(),
    "ClosedForm": ClosedForm().estimate,
    "Enumeration": Enumeration().estimate,
    "MonteCarlo": MonteCarlo().estimate,
}
every_entry = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


def normal(*shape: int, event_dims: int = 0) -> Normal | Independent:
    base = Normal(torch.zeros(shape), 1.0)
    return Independent(base, event_dims) if event_dims else base


@pytest.mark.parametrize(
    ("q_shape", "p_shape", "expected"),
    [
        ((), (), ()),
        ((3,), (), (3,)),
        ((), (3,), (3,)),
        ((2, 1), (3,), (2, 3)),
        ((0,), (1,), (0,)),
        ((4, 3), (3,), (4, 3)),
    ],
)
def test_batch_shapes_broadcast(q_shape, p_shape, expected):
    assert check_pair(normal(*q_shape), normal(*p_shape)) == expected
    assert check_pair(normal(*q_shape, 5, event_dims=1), normal(*p_shape, 5, event_dims=1)) == expected


@every_entry
def test_batch_shapes_that_do_not_broadcast_are_an_error_that_names_both(entry):
    with pytest.raises(ValueError, match=r"batch shapes that broadcast, got \(3,\) and \(2,\).*Independent"):
        entry(normal(3), normal(2))


@every_entry
def test_event_shapes_that_differ_are_an_error_that_suggests_independent(entry):
    with pytest.raises(
        ValueError, match=r"share an event shape, got \(3,\) and \(\): did you mean Independent\(p, 1\)\?"
    ):
        entry(normal(4, 3, event_dims=1), normal(4, 3))
    with pytest.raises(ValueError, match=r"got \(\) and \(2, 3\): did you mean Independent\(q, 2\)\?"):
        entry(normal(2, 3), normal(2, 3, event_dims=2))
    with pytest.raises(ValueError, match=r"Independent\(p, 1\)\? Its batch shape \(\) needs \.expand\(\) first"):
        entry(normal(4, 3, event_dims=1), normal())


@every_entry
@pytest.mark.parametrize(
    ("q", "p"),
    [
        (Dirichlet(torch.ones(3)), Dirichlet(torch.ones(1))),
        (normal(3, event_dims=1), normal(1, event_dims=1)),
        (MultivariateNormal(torch.zeros(3), torch.eye(3)), normal(1, event_dims=1)),
    ],
    ids=["dirichlet", "independent", "mixed"],
)
def test_events_of_unlike_size_do_not_broadcast_in_silence(entry, q, p):
    with pytest.raises(ValueError, match=r"got \(3,\) and \(1,\): they would broadcast silently"):
        entry(q, p)


@every_entry
@pytest.mark.parametrize("wrong", [torch.zeros(3), 0.5, None, Normal, "Normal(0, 1)"], ids=lambda w: type(w).__name__)
def test_what_is_no_distribution_is_a_type_error_that_says_what_came(entry, wrong):
    kind = type(wrong).__name__
    with pytest.raises(TypeError, match=f"q must be a torch.distributions.Distribution, got {kind}.*kl_from_log_probs"):
        entry(wrong, normal())
    with pytest.raises(TypeError, match=f"p must be a torch.distributions.Distribution, got {kind}.*diagonal_normal"):
        entry(normal(), wrong)


@pytest.mark.parametrize(
    "entry",
    [e for n, e in ENTRIES.items() if n != "has_closed_form"],
    ids=[n for n in ENTRIES if n != "has_closed_form"],
)
def test_a_discrete_q_against_a_continuous_p_is_an_error_that_says_why(entry):
    with pytest.raises(
        ValueError, match=r"KL\(Poisson‖Normal\).*q is discrete and p is continuous.*different measures"
    ):
        entry(Poisson(torch.ones(3)), normal(3))
    with pytest.raises(ValueError, match=r"KL\(Normal‖Bernoulli\).*q is continuous and p is discrete"):
        entry(normal(3), Bernoulli(torch.full((3,), 0.5)))


def test_kinds_that_agree_or_are_unknown_pass():
    check_common_measure(Poisson(1.0), Categorical(torch.ones(3)))
    check_common_measure(normal(), normal())

    class Unknown(torch.distributions.Distribution):
        pass

    check_common_measure(Unknown(validate_args=False), Poisson(1.0))


def independent(d, *dims: int):
    for n in dims:
        d = Independent(d, n)
    return d


@pytest.mark.parametrize(
    ("q_dims", "p_dims", "left_q", "left_p", "peeled"),
    [
        ((1,), (1,), 0, 0, 1),
        ((1, 1), (2,), 0, 0, 2),
        ((2,), (1, 1), 0, 0, 2),
        ((2,), (1,), 1, 0, 1),
        ((1,), (1, 1, 1), 0, 2, 1),
    ],
)
def test_what_both_share_is_peeled(q_dims, p_dims, left_q, left_p, peeled):
    q, p, dims = peel(independent(normal(2, 3, 4, 5), *q_dims), independent(normal(2, 3, 4, 5), *p_dims))
    assert dims == peeled
    assert [len(d.event_shape) for d in (q, p)] == [left_q, left_p]
    assert type(q) is (Independent if left_q else Normal)


def test_what_only_one_of_them_has_is_not_peeled():
    q, p = normal(2, 3, event_dims=1), MultivariateNormal(torch.zeros(3), torch.eye(3))
    assert peel(q, p) == (q, p, 0)
    assert peel(p, q) == (p, q, 0)


def test_independent_is_told_by_isinstance():
    class Mine(Independent):
        pass

    q, p, dims = peel(Mine(normal(2, 3), 1), normal(2, 3, event_dims=1))
    assert (type(q), type(p), dims) == (Normal, Normal, 1)


def test_a_pair_is_named_as_one_would_write_it():
    assert name(normal()) == "Normal"
    assert name(independent(normal(2, 3), 1, 1)) == "Independent(Independent(Normal, 1), 1)"
