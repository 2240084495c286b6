"""The losses: reduction, settings, randomness, estimates, routes, and users' own methods and samplers."""

import copy
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import (
    Binomial,
    Categorical,
    Distribution,
    Gamma,
    Independent,
    Normal,
    Poisson,
    StudentT,
    Uniform,
)

import torch_klloss
from torch_klloss import (
    AnalyticKL,
    AutoKL,
    KLEstimate,
    KLLoss,
    MonteCarloKL,
    NotCertifiedError,
    QuadratureKL,
    categorical,
    diagonal_normal,
    kl_from_log_probs,
    standard_normal_like,
)
from torch_klloss.methods import ClosedForm, Enumeration, FirstOf, MonteCarlo
from torch_klloss.samplers import IID

STANDARD = Normal(0.0, 1.0)
T = StudentT(4.0)
LOSSES = {
    "kl": KLLoss(FirstOf(ClosedForm(), MonteCarlo(2)), reduction="sum"),
    "analytic": AnalyticKL(batch_dims=2),
    "monte_carlo": MonteCarloKL(8, gradient="score_function", reduction="none"),
    "auto": AutoKL([MonteCarlo(4)], on_fallback="warn"),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def normal(*shape: int) -> Normal:
    """Return a Normal whose KL to the standard one is 2 in every element."""
    return Normal(torch.full(shape, 2.0), 1.0)


# Examples and latent dimensions


@pytest.mark.parametrize(
    ("shape", "batch_dims", "mean", "total"),
    [
        ((), 1, 2, 2),
        ((5,), 1, 2, 10),
        ((5, 3), 1, 6, 30),
        ((5, 3), 2, 2, 30),
        ((5, 3), 0, 30, 30),
        ((4, 5, 3), 1, 30, 120),
    ],
)
def test_the_dimensions_after_the_first_batch_dims_are_summed(shape, batch_dims, mean, total):
    options = {"batch_dims": batch_dims}
    assert AnalyticKL(**options)(normal(*shape), STANDARD) == mean
    assert AnalyticKL(**options, reduction="sum")(normal(*shape), STANDARD) == total
    none = AnalyticKL(**options, reduction="none")(normal(*shape), STANDARD)
    assert none.shape == shape[:batch_dims]
    assert none.sum() == total


def test_a_mean_never_divides_by_the_latent_size():
    q = normal(16, 8)
    assert AnalyticKL()(q, STANDARD) == 16
    assert torch.distributions.kl_divergence(q, STANDARD).mean() == 2  # the usual mistake
    assert AnalyticKL()(Independent(q, 1), Independent(STANDARD.expand((16, 8)), 1)) == 16


def test_a_pair_may_have_fewer_dimensions_than_batch_dims():
    assert AutoKL()(Normal(0.0, 1.0), Normal(1.0, 1.0)) == 0.5
    assert AnalyticKL(batch_dims=3)(normal(4), STANDARD) == 2


def test_the_batch_shape_is_the_broadcast_one():
    q, p = normal(1, 3), Normal(torch.zeros(5, 1), 1.0)
    assert AnalyticKL()(q, p) == 6
    assert AnalyticKL(reduction="none")(q, p).shape == (5,)


def test_an_empty_batch_has_a_sum_and_no_mean():
    with pytest.raises(ValueError, match=r"needs at least one example, got the example shape \(0,\)"):
        AutoKL()(normal(0, 3), STANDARD)
    assert AutoKL(reduction="sum")(normal(0, 3), STANDARD) == 0
    assert AutoKL(reduction="none")(normal(0, 3), STANDARD).shape == (0,)
    assert MonteCarloKL(4, reduction="sum")(normal(0, 3), T) == 0


@pytest.mark.parametrize("build", [lambda **o: KLLoss(ClosedForm(), **o), AnalyticKL, MonteCarloKL, AutoKL])
def test_bad_settings_are_errors(build):
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'avg'"):
        build(reduction="avg")
    with pytest.raises(ValueError, match="batch_dims must be an integer of at least 0, got -1"):
        build(batch_dims=-1)


def test_more_bad_settings_are_errors():
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1, got 0"):
        MonteCarloKL(num_samples=0)
    with pytest.raises(ValueError, match="on_fallback must be 'allow', 'warn' or 'error', got 'raise'"):
        AutoKL(on_fallback="raise")
    with pytest.raises(TypeError, match=r"a method must have estimate\(q, p, generator=None\).*got 'closed_form'"):
        KLLoss("closed_form")
    with pytest.raises(TypeError, match="a method must have estimate"):
        AutoKL(fallback=MonteCarloKL)


def test_torchs_own_errors_pass_through():
    with pytest.raises(ValueError, match=r"Expected parameter scale .* to satisfy the constraint GreaterThan"):
        AutoKL()(Normal(torch.zeros(2), torch.tensor([1.0, -1.0])), STANDARD)
    with pytest.raises(ValueError, match=r"Expected parameter loc .* to satisfy the constraint Real\(\)"):
        AutoKL()(diagonal_normal(torch.tensor([[math.nan]]), torch.zeros(1, 1)), STANDARD)


def test_nan_parameters_give_nan():
    q = Normal(torch.tensor([math.nan, 0.0]), 1.0, validate_args=False)
    for loss in (AnalyticKL(), AutoKL(), MonteCarloKL(2)):
        assert loss(q, STANDARD).isnan()
        assert loss.estimate(q, STANDARD).value.isnan().tolist() == [True, False]


def test_p_without_the_support_of_q_gives_infinity():
    for loss in (AnalyticKL(), AutoKL(), MonteCarloKL(2)):
        assert loss(normal(3), Gamma(1.0, 1.0)) == math.inf
    assert AutoKL()(Categorical(logits=torch.zeros(2)), Categorical(logits=torch.tensor([0.0, -math.inf]))) == math.inf
    assert AutoKL()(Uniform(0.0, torch.tensor([1.0, 3.0])), Uniform(0.0, 2.0)) == math.inf
    assert AutoKL()(StudentT(torch.ones(2)), Uniform(0.0, 2.0)) == math.inf


# A module that is its settings


@every_loss
def test_it_is_a_plain_module_without_state(loss):
    assert isinstance(loss, nn.Module)
    before = {key: repr(value) for key, value in vars(loss).items()}
    loss(normal(3, 2), T if not isinstance(loss, AnalyticKL) else STANDARD) if loss is not LOSSES["auto"] else None
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []
    assert {key: repr(value) for key, value in vars(loss).items()} == before


@every_loss
def test_copies_are_equal_in_all_settings(loss):
    for copied in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert type(copied) is type(loss)
        assert (copied.method, copied.reduction, copied.batch_dims) == (loss.method, loss.reduction, loss.batch_dims)
        assert torch.equal(copied(normal(3), STANDARD), loss(normal(3), STANDARD)) or isinstance(loss, MonteCarloKL)


@every_loss
def test_it_prints_as_it_is_built(loss):
    typed = eval(repr(loss), {**vars(torch_klloss), **vars(torch_klloss.methods), **vars(torch_klloss.samplers)})
    assert type(typed) is type(loss)
    assert (typed.method, typed.reduction, typed.batch_dims) == (loss.method, loss.reduction, loss.batch_dims)
    assert repr(loss) in repr(nn.Sequential(loss))


@pytest.mark.parametrize(
    "text",
    [
        "AutoKL()",
        "AutoKL(fallback=[Quadrature(num_nodes=64, rtol=1e-06), MixtureBound(side='upper', num_iterations=1000)])",
        "AutoKL(on_fallback='error', reduction='sum')",
        "AutoKL(fallback=Quadrature(num_nodes=32, rtol=1e-06), on_fallback='warn', batch_dims=2)",
        "MonteCarloKL()",
        "MonteCarloKL(num_samples=8, sampler=Sobol(replicates=1), gradient='score_function', reduction='none')",
        "QuadratureKL(num_nodes=32)",
        "AnalyticKL(reduction='sum')",
        "KLLoss(method=ClosedForm())",
    ],
)
def test_it_prints_what_differs_from_the_defaults(text):
    assert repr(eval(text, {**vars(torch_klloss), **vars(torch_klloss.methods), **vars(torch_klloss.samplers)})) == text


@pytest.mark.parametrize("cls", [AutoKL, MonteCarloKL, QuadratureKL, AnalyticKL, KLLoss])
def test_a_constructor_that_is_given_a_pair_says_how_the_loss_is_called(cls):
    with pytest.raises(TypeError, match=rf"{cls.__name__} is built first .* loss = {cls.__name__}\(…\); loss\(q, p\)"):
        cls(STANDARD, STANDARD)


@pytest.mark.parametrize("call", [diagonal_normal, lambda mean, logvar: categorical(mean), kl_from_log_probs])
def test_an_array_is_refused_with_the_way_to_a_tensor(call):
    with pytest.raises(TypeError, match=r"must be a tensor, got ndarray: torch\.as_tensor\(\w+\)"):
        call(np.zeros((2, 3)), np.zeros((2, 3)))


def rows_of_probabilities(dtype):
    return [
        torch.tensor([0.3, 0.7], dtype=dtype),
        torch.randn(64, 5000, generator=torch.Generator().manual_seed(1)).softmax(-1).to(dtype),
        torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]], dtype=dtype),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_in_place_of_logits_are_told(dtype):
    for probs in rows_of_probabilities(dtype):
        with pytest.warns(UserWarning, match=r"^categorical takes raw logits.*Categorical\(probs\)") as caught:
            categorical(probs)
        assert [Path(w.filename) for w in caught] == [Path(__file__)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_not_taken_for_probabilities(dtype):
    whole = rows_of_probabilities(dtype)[1]
    for logits in (
        torch.zeros(3, 4, dtype=dtype),
        torch.full((3, 4), 0.25, dtype=dtype),  # uniform either way
        torch.ones(3, 1, dtype=dtype),
        torch.eye(4, dtype=dtype),  # typed, as (1, 0, 0) often is
        torch.tensor([[0, 1], [1, 0]]),
        torch.empty(0, 4, dtype=dtype),
        whole.log(),
        whole - whole.amin() - 1e-3,
        torch.tensor([[0.3, 0.7], [0.5, 0.6]], dtype=dtype),
        torch.randn(100, 2, dtype=dtype).abs(),
    ):
        categorical(logits)


def test_no_logit_is_read_on_other_devices_and_under_transforms():
    probs = torch.tensor([[0.3, 0.7]])
    categorical(probs.to("meta"))
    torch.func.vmap(lambda row: categorical(row).logits)(probs)


def test_the_constructors_of_q_and_p_show_their_parameters():
    q = diagonal_normal(torch.zeros(4, 2), torch.zeros(4, 2))
    assert repr(q.base_dist) == "LogVarNormal(loc: torch.Size([4, 2]), logvar: torch.Size([4, 2]))"
    assert repr(standard_normal_like(q).base_dist) == "StandardNormal(torch.Size([4, 2]))"
    one = diagonal_normal(torch.tensor([[1.0]]), torch.tensor([[-2.0]]))
    assert repr(one.base_dist) == "LogVarNormal(loc: tensor([[1.]]), logvar: tensor([[-2.]]))"


def test_it_moves_with_its_module():
    module = nn.ModuleDict({"kl": AutoKL(), "linear": nn.Linear(2, 2)}).to(torch.float64).eval()
    assert module["kl"](normal(3), STANDARD) == 2
    assert set(module.state_dict()) == {"linear.weight", "linear.bias"}


# Randomness


def test_a_generator_makes_a_loss_reproducible_and_does_not_touch_the_global_stream():
    loss, q = AutoKL(MonteCarlo(4)), normal(6, 3)
    before = torch.get_rng_state()
    values = [loss(q, T, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]
    assert torch.equal(before, torch.get_rng_state())
    assert loss(q, T) != loss(q, T)


def test_an_exact_route_draws_nothing():
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    AutoKL()(normal(3), STANDARD, generator=generator)
    AutoKL()(Binomial(3, torch.tensor(0.5)), Poisson(1.0))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(state, generator.get_state())


# Estimates


def test_the_estimate_is_neither_masked_nor_reduced():
    estimate = MonteCarloKL(16, reduction="sum").estimate(normal(6, 3), STANDARD)
    assert isinstance(estimate, KLEstimate)
    assert estimate.value.shape == estimate.std_error.shape == (6, 3)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_error_of_the_reduced_estimate_is_the_spread_of_reduced_losses(reduction):
    loss, q = MonteCarloKL(8, reduction=reduction), normal(5, 3)
    mask = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    repeats = 2000
    generator = torch.Generator().manual_seed(0)
    values = torch.stack([loss(q, STANDARD, mask=mask, generator=generator) for _ in range(repeats)])
    reduced = [loss.reduce(loss.estimate(q, STANDARD, generator), mask) for _ in range(200)]
    claimed = torch.stack([r.std_error for r in reduced]).square().mean().sqrt()
    # The log-ratio is Normal: the relative error of the spread is 1/√(2·2000), of the claim 1/√(2·7·200·3) at most.
    assert abs(values.std() / claimed - 1) < 6 * (1 / (2 * repeats) + 1 / (2 * 7 * 200 * 3)) ** 0.5
    truth = 2 * 3 * (1.0 if reduction == "mean" else mask.sum())
    assert abs(values.mean() - truth) < 6 * values.std() / repeats**0.5
    # Unequal weights cost degrees of freedom: Welch-Satterthwaite stays between one element's and all of them.
    assert all(7 < r.dof < 7 * 12 for r in reduced)


def test_reducing_an_estimate_is_the_loss():
    for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"batch_dims": 2}, {"batch_dims": 0}):
        loss, q, p = AnalyticKL(**options), Normal(torch.randn(4, 3), 1.0), STANDARD
        mask = torch.rand((4, 3)[: loss.batch_dims])
        for weights in (None, mask):
            torch.testing.assert_close(loss.reduce(loss.estimate(q, p), weights).value, loss(q, p, weights))


# Routes


@pytest.mark.parametrize(
    ("loss", "q", "p", "route"),
    [
        (AutoKL(), normal(3), STANDARD, "closed_form"),
        (AutoKL(), Binomial(3, torch.tensor(0.5)), Poisson(1.0), "enumeration"),
        (AutoKL(), normal(3), T, "monte_carlo"),
        (AutoKL(), normal(3), Gamma(1.0, 1.0), "closed_form"),
        (
            AutoKL([MonteCarlo(2, gradient="pathwise"), MonteCarlo(2)]),
            Poisson(1.0),
            Binomial(3, torch.tensor(0.5)),
            None,
        ),
        (AutoKL(on_fallback="warn"), normal(3), T, "monte_carlo"),
        (AnalyticKL(), normal(3), STANDARD, "closed_form"),
        (MonteCarloKL(), normal(3), STANDARD, "monte_carlo"),
        (KLLoss(Enumeration()), categorical(torch.zeros(3)), Categorical(torch.ones(3)), "enumeration"),
    ],
)
def test_the_route_is_the_one_that_the_estimate_takes(loss, q, p, route):
    before = torch.get_rng_state()
    said = loss.route(q, p)
    assert torch.equal(before, torch.get_rng_state())
    assert route is None or said == route
    if "warn" not in repr(loss) and "WarnFirst" not in repr(loss):
        assert loss.estimate(q, p).method == said


@pytest.mark.parametrize(("loss", "q"), [(AutoKL(on_fallback="error"), normal(3)), (AnalyticKL(), normal(3))])
def test_no_route_is_an_error_that_names_the_pair(loss, q):
    with pytest.raises(NotImplementedError, match=r"has no route for KL\(Normal‖StudentT\)"):
        loss.route(q, T)
    with pytest.raises(NotImplementedError, match=r"KL\(Normal‖StudentT\)"):
        loss(q, T)


def test_on_fallback_says_what_happens():
    q = normal(3)
    message = re.escape("KL(Normal‖StudentT) has no exact route: AutoKL falls back on monte_carlo.")
    with pytest.warns(UserWarning, match=message):
        assert AutoKL(on_fallback="warn").estimate(q, T).method == "monte_carlo"
    assert AutoKL(on_fallback="warn").estimate(q, STANDARD).method == "closed_form"
    tried = r"No method took KL\(Normal‖StudentT\):\n  closed_form: No closed.*\n.*enumeration: .*\n"
    refused = "keeps AutoKL from monte_carlo; take it with on_fallback='warn'"
    with pytest.raises(NotImplementedError, match=f"{tried}.*{refused}"):
        AutoKL(on_fallback="error")(q, T)
    assert AutoKL(on_fallback="error")(q, STANDARD) == 2


def test_a_sequence_of_fallbacks_is_tried_in_turn():
    class Unsure:
        def estimate(self, q, p, generator=None):
            raise NotCertifiedError("an error of 0.1")

    estimate = AutoKL(fallback=[Unsure(), MonteCarlo(64)]).estimate(normal(3), T)
    assert (estimate.method, estimate.num_evaluations) == ("monte_carlo", 64)
    assert AutoKL(fallback=(MonteCarlo(3),)).estimate(normal(3), T).num_evaluations == 3
    assert AutoKL().estimate(normal(3), T).num_evaluations == 1
    assert AutoKL(Unsure()).route(normal(3), T) == "Unsure"
    with pytest.raises(NotCertifiedError, match=r"Unsure: an error of 0\.1"):
        AutoKL(fallback=Unsure())(normal(3), T)


def test_a_users_own_method_works_in_a_loss():
    class Twice:
        """The smallest method that the protocol allows."""

        def estimate(self, q: Distribution, p: Distribution, generator: torch.Generator | None = None) -> KLEstimate:
            return KLEstimate(2 * torch.distributions.kl_divergence(q, p), exact=True, method="twice")

    loss = KLLoss(Twice(), reduction="none")
    assert loss(normal(4, 3), STANDARD).tolist() == [12.0] * 4
    assert loss(normal(2, 3), STANDARD, mask=torch.tensor([True, False])).tolist() == [12.0, 0.0]
    assert loss.route(normal(4, 3), STANDARD) == "Twice"
    assert AutoKL(Twice()).route(Normal(0.0, 1.0), T) == "Twice"


def test_a_users_own_sampler_works_in_a_loss():
    class Twin(IID):
        """A sampler that returns every point twice."""

        def draw(self, q, num_samples, *, differentiable):
            points = super().draw(q, num_samples // 2, differentiable=differentiable)
            return type(points)(
                points.x.repeat_interleave(2, 0), points.weights.repeat_interleave(2, 0) / 2, num_samples // 2
            )

    estimate = MonteCarloKL(8, sampler=Twin()).estimate(normal(1000), STANDARD)
    assert estimate.dof == 3
    spread, claimed = estimate.value.std(), estimate.std_error.square().mean().sqrt()
    assert abs(spread / claimed - 1) < 6 * 2000**-0.5
