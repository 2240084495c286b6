"""The table of closed forms: the rule of each pair of types, over the library's table and torch's."""

import pytest
import torch
import torch.distributions as dist
from torch.distributions import Gamma, Independent, Normal, Poisson, StudentT, Uniform
from torch.distributions import kl as torch_kl

from tests.processes import run
from torch_klloss import AutoKL, has_closed_form, kl_divergence, register_kl
from torch_klloss.closed_forms.registry import _RULES, find_rule

STANDARD = Normal(0.0, 1.0)


@pytest.fixture(autouse=True)
def _own_table():
    before = dict(_RULES)
    yield
    _RULES.clear()
    _RULES.update(before)


def constant(value: float):
    return lambda q, p: torch.full(torch.broadcast_shapes(q.batch_shape, p.batch_shape), value)


def subclass(parent: type[dist.Distribution], name: str = "Sub") -> type[dist.Distribution]:
    return type(name, (parent,), {})


# torch's contract


@pytest.mark.parametrize(
    ("q", "p"),
    [
        (Normal(torch.ones(3), 1.0), Normal(torch.zeros(2, 1), 2.0)),
        (dist.Gamma(torch.ones(2), 1.0), dist.Gamma(2.0, 3.0)),
        (Independent(Normal(torch.ones(2, 3), 1.0), 1), Independent(Normal(torch.zeros(3), 1.0), 1)),
        (dist.LogNormal(torch.ones(2), 1.0), dist.LogNormal(0.0, 1.0)),
        (dist.Categorical(torch.ones(2, 3)), dist.Categorical(torch.tensor([0.2, 0.3, 0.5]))),
        (
            dist.MultivariateNormal(torch.ones(2, 3), torch.eye(3)),
            dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
        ),
        (Normal(torch.ones(3), 1.0), Uniform(0.0, 1.0)),
    ],
    ids=lambda d: type(d).__name__,
)
def test_it_is_a_drop_in_for_torch(q, p):
    ours, theirs = kl_divergence(q, p), dist.kl_divergence(q, p)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_that_comes_in_goes_out(dtype):
    loc = torch.ones(3, dtype=dtype, requires_grad=True)
    value = kl_divergence(Normal(loc, torch.ones(3, dtype=dtype)), Normal(torch.zeros(3, dtype=dtype), loc.detach()))
    assert value.dtype == dtype
    assert value.tolist() == [0.5] * 3
    value.sum().backward()
    assert loc.grad.dtype == dtype


def test_half_precision_is_computed_with_in_float32():
    # In bfloat16 the variance ratio of these two rounds to 1 - 2**-6; exactly, the KL is 1.2e-4.
    q, p = (Normal(torch.zeros(()), torch.tensor(scale)) for scale in (1.0, 1.0078125))
    low = [Normal(d.loc.bfloat16(), d.scale.bfloat16()) for d in (q, p)]
    assert kl_divergence(*low) == kl_divergence(q, p).bfloat16()


@pytest.mark.parametrize("family", [dist.Gumbel, dist.Laplace, dist.LogNormal, dist.Cauchy])
def test_half_precision_reaches_through_transforms(family):
    q, p = (
        family(torch.full((2,), loc, dtype=torch.float16), torch.ones(2, dtype=torch.float16)) for loc in (0.0, 1.0)
    )
    value = kl_divergence(q, p)
    assert value.dtype == torch.float16
    torch.testing.assert_close(value, kl_divergence(family(0.0, 1.0), family(torch.ones(2), 1.0)).half())


def test_a_pair_without_a_form_raises_and_names_the_way_out():
    with pytest.raises(NotImplementedError, match=r"No closed form.*KL\(Normal‖StudentT\).*AutoKL\(\).*@register_kl"):
        kl_divergence(STANDARD, StudentT(4.0))
    assert not has_closed_form(STANDARD, StudentT(4.0))


@pytest.mark.parametrize(("wrong", "type_name"), [(1.0, "float"), (torch.zeros(3), "Tensor"), (Normal, "type")])
@pytest.mark.parametrize("function", [kl_divergence, has_closed_form])
def test_what_is_no_distribution_is_a_type_error(function, wrong, type_name):
    with pytest.raises(
        TypeError, match=f"^q must be a torch.distributions.Distribution, got {type_name}.*diagonal_norm"
    ):
        function(wrong, STANDARD)
    with pytest.raises(TypeError, match=f"^p must be a torch.distributions.Distribution, got {type_name}"):
        function(STANDARD, wrong)


def test_a_discrete_q_against_a_continuous_p_is_a_value_error():
    with pytest.raises(ValueError, match=r"KL\(Poisson‖Normal\) is not defined: q is discrete and p is continuous"):
        kl_divergence(Poisson(1.0), STANDARD)


# Whose rule


def test_ours_wins_on_a_tie():
    assert (Normal, Normal) in torch_kl._KL_REGISTRY
    assert find_rule(STANDARD, STANDARD).rule is _RULES[Normal, Normal]
    register_kl(Gamma, Gamma)(constant(7.0))
    assert kl_divergence(Gamma(1.0, 1.0), Gamma(1.0, 1.0)) == 7.0


def test_the_most_specific_rule_over_both_tables_wins():
    Sub = subclass(Normal)
    theirs = constant(3.0)
    torch_kl._KL_REGISTRY[Sub, Sub] = theirs  # the fixture of the suite puts the table back
    try:
        assert find_rule(Sub(0.0, 1.0), Sub(0.0, 1.0)).rule is theirs
        assert kl_divergence(Sub(0.0, 1.0), Sub(0.0, 1.0)) == 3.0
        assert kl_divergence(STANDARD, STANDARD) == 0.0
        register_kl(Sub, Sub)(constant(4.0))
        assert kl_divergence(Sub(0.0, 1.0), Sub(0.0, 1.0)) == 4.0
    finally:
        del torch_kl._KL_REGISTRY[Sub, Sub]


def test_a_rule_of_torch_that_is_replaced_under_the_same_key_is_picked_up():
    pair = (dist.Bernoulli, dist.Poisson)
    q, p = dist.Bernoulli(torch.tensor(0.5)), Poisson(1.0)
    assert find_rule(q, p).types == pair
    original = torch_kl._KL_REGISTRY[pair]
    if pair not in _RULES:
        torch_kl._KL_REGISTRY[pair] = constant(5.0)
        assert kl_divergence(q, p) == 5.0
        torch_kl._KL_REGISTRY[pair] = original
        assert kl_divergence(q, p) != 5.0


def test_a_rule_of_torch_for_new_types_is_picked_up():
    New, Other = subclass(StudentT, "New"), subclass(StudentT, "Other")
    dist.register_kl(New, Other)(constant(2.0))
    try:
        assert kl_divergence(New(3.0), Other(3.0)) == 2.0
        assert has_closed_form(New(3.0), Other(3.0))
        assert not has_closed_form(Other(3.0), New(3.0))
        dist.register_kl(New, Other)(constant(2.5))
        assert kl_divergence(New(3.0), Other(3.0)) == 2.5
    finally:
        del torch_kl._KL_REGISTRY[New, Other]


def test_an_ambiguous_match_is_warned_of():
    Sub = subclass(StudentT)
    register_kl(Sub, StudentT)(constant(1.0))
    register_kl(StudentT, Sub)(constant(2.0))
    with pytest.warns(RuntimeWarning, match="Sub‖Sub.* is ambiguous between .*Sub‖StudentT and StudentT‖Sub"):
        assert kl_divergence(Sub(3.0), Sub(3.0)) == 1.0  # the most specific for q, as torch decides
    register_kl(Sub, Sub)(constant(3.0))
    assert kl_divergence(Sub(3.0), Sub(3.0)) == 3.0


def test_two_keys_of_one_rule_are_not_ambiguous():
    Sub, rule = subclass(StudentT), constant(1.0)
    register_kl(Sub, StudentT)(rule)
    register_kl(StudentT, Sub)(rule)
    assert kl_divergence(Sub(3.0), Sub(3.0)) == 1.0


def test_register_takes_types_of_distributions_and_returns_the_rule():
    rule = constant(1.0)
    assert register_kl(StudentT, StudentT)(rule) is rule
    assert not hasattr(rule, "supports")
    for wrong in (STANDARD, int, "Normal", torch.nn.Module):
        with pytest.raises(TypeError, match="takes two subclasses of"):
            register_kl(Normal, wrong)
        with pytest.raises(TypeError, match="takes two subclasses of"):
            register_kl(wrong, Normal)


def test_registering_writes_nothing_to_the_table_of_torch():
    before = dict(torch_kl._KL_REGISTRY)
    register_kl(StudentT, StudentT)(constant(1.0))
    kl_divergence(StudentT(3.0), StudentT(3.0))
    assert before == torch_kl._KL_REGISTRY


# Rules that decide by instance


def test_a_rule_may_refuse_instances():
    calls = []

    @register_kl(StudentT, StudentT)
    def _equal_dof(q, p):
        calls.append(torch.is_grad_enabled())
        if not torch.equal(q.df, p.df):
            raise NotImplementedError("unequal degrees of freedom")
        return torch.zeros(q.batch_shape)

    assert has_closed_form(StudentT(3.0), StudentT(3.0))
    assert not has_closed_form(StudentT(3.0), StudentT(4.0))
    assert AutoKL().route(StudentT(3.0), StudentT(4.0)) == "monte_carlo"
    assert AutoKL().estimate(StudentT(3.0), StudentT(3.0)).method == "closed_form"
    with pytest.raises(NotImplementedError, match=r"for these instances \(unequal degrees of freedom\)"):
        kl_divergence(StudentT(3.0), StudentT(4.0))


def test_a_rule_that_says_what_it_supports_is_not_run_to_find_out():
    def unequal(q, p):
        return q.df != p.df

    @register_kl(StudentT, StudentT, supports=unequal)
    def _never(q, p):
        raise AssertionError("the rule ran")

    assert has_closed_form(StudentT(3.0), StudentT(4.0)) is True
    assert has_closed_form(StudentT(3.0), StudentT(3.0)) is False
    del _never.supports
    with pytest.raises(AssertionError, match="the rule ran"):
        has_closed_form(StudentT(3.0), StudentT(4.0))
    _never.supports = unequal  # as an attribute, it counts as well
    assert has_closed_form(StudentT(3.0), StudentT(4.0)) is True


def test_a_rule_is_run_without_a_graph_to_find_out():
    loc = torch.zeros(2, requires_grad=True)
    seen = []
    register_kl(StudentT, StudentT)(lambda q, p: seen.append((q.loc + 1).requires_grad) or torch.zeros(2))
    assert has_closed_form(StudentT(3.0, loc), StudentT(3.0, loc))
    assert seen == [False]


@pytest.mark.parametrize("family", [dist.Wishart, dist.Gamma, dist.Dirichlet, dist.VonMises, dist.Weibull])
def test_asking_raises_nothing(family):
    arguments = {
        dist.Wishart: (torch.tensor(4.0), torch.eye(3)),
        dist.Dirichlet: (torch.ones(3),),
    }.get(family, (torch.tensor(1.0), torch.tensor(2.0)))
    assert has_closed_form(family(*arguments), family(*arguments)) in (True, False)


def test_any_other_error_of_a_rule_is_an_error():
    register_kl(StudentT, StudentT)(lambda q, p: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        has_closed_form(StudentT(3.0), StudentT(3.0))
    with pytest.raises(ZeroDivisionError):
        kl_divergence(StudentT(3.0), StudentT(3.0))


def test_an_infinite_form_is_a_form():
    assert has_closed_form(STANDARD, Uniform(0.0, 1.0))
    assert kl_divergence(STANDARD, Uniform(0.0, 1.0)) == torch.inf


# Independent


def test_independent_is_peeled_before_any_table_is_asked():
    def intruder(q, p):
        raise AssertionError("the rule for Independent was asked")

    theirs = torch_kl._KL_REGISTRY[Independent, Independent]
    torch_kl._KL_REGISTRY[Independent, Independent] = intruder
    try:
        q, p = (Independent(Normal(torch.full((2, 3), loc), 1.0), 1) for loc in (1.0, 0.0))
        assert kl_divergence(q, p).tolist() == [1.5, 1.5]
        Sub = subclass(Independent)
        assert kl_divergence(Sub(q.base_dist, 1), p).tolist() == [1.5, 1.5]
        assert has_closed_form(q, p)
    finally:
        torch_kl._KL_REGISTRY[Independent, Independent] = theirs


@pytest.mark.parametrize("batch_shapes", [((4, 2, 3), (2, 3)), ((2, 3), (4, 2, 3)), ((4, 1, 3), (2, 3))])
def test_unlike_nesting_meets_where_the_event_shapes_agree(batch_shapes):
    q_loc, p_loc = (torch.randn(shape) for shape in batch_shapes)
    nested = Independent(Independent(Normal(q_loc.expand(*q_loc.shape[:-2], 2, 3), 1.0), 1), 1)
    flat = Independent(Normal(p_loc, 1.0), 2)
    expected = ((q_loc - p_loc) ** 2 / 2).sum((-1, -2))
    torch.testing.assert_close(kl_divergence(nested, flat), expected)
    torch.testing.assert_close(kl_divergence(flat, nested), expected)


# Whole processes


def test_importing_leaves_the_table_of_torch_as_it_was():
    result = run(
        "import json, torch, torch.distributions.kl as kl\n"
        "before = dict(kl._KL_REGISTRY), kl.kl_divergence, torch.distributions.kl_divergence\n"
        "import torch_klloss\n"
        "after = dict(kl._KL_REGISTRY), kl.kl_divergence, torch.distributions.kl_divergence\n"
        "print(json.dumps({'same': before == after, 'rules': len(before[0])}))"
    )
    assert result["same"]
    assert result["rules"] > 80


def test_a_client_that_puts_ours_in_place_of_torch_s_does_not_recurse():
    result = run(
        "import json, torch, torch_klloss\n"
        "from torch.distributions import *\n"
        "torch.distributions.kl_divergence = torch.distributions.kl.kl_divergence = torch_klloss.kl_divergence\n"
        "one = torch.ones(2)\n"
        "pairs = [(Normal(one, one), Normal(0 * one, one)), (LogNormal(one, one), LogNormal(0 * one, one)),\n"
        "         (Independent(Laplace(one, one), 1), Independent(Laplace(0 * one, one), 1)),\n"
        "         (Chi2(one), Gamma(one, one)), (LogisticNormal(one, one), LogisticNormal(0 * one, one))]\n"
        "print(json.dumps([torch.distributions.kl_divergence(q, p).isfinite().all().item() for q, p in pairs]))"
    )
    assert result == [True] * 5
