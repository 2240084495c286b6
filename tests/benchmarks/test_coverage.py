"""The truth of the coverage benchmark: right by other means, and computed again where it is cheap."""

import math
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import mpmath as mp
import numpy as np
import pytest
import torch
import torch.distributions as dist
from scipy import integrate, stats

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import coverage
from lib.coverage_densities import Counts, Gaussian, Line, Product, Simplex, Vectors
from lib.coverage_laws import law_of
from lib.coverage_line import MOMENT, SINGULAR, SUPPORT, Truth
from lib.coverage_plane import kl_on_the_plane
from lib.coverage_table import TABLE, load_truth, write_truth
from lib.coverage_truth import true_kl

from torch_klloss import KLEstimate
from torch_klloss.cli.example_pairs import Example, all_examples, same_shape

PAGE = Path(__file__).parents[2] / "docs" / "pairs.md"
EXAMPLES = all_examples()
BY_NAME = {example.name: example for example in EXAMPLES}
TRUTHS = load_truth(EXAMPLES)


def log_densities(law, x):
    """Return the law's log-densities at points of torch."""
    if isinstance(law, (Line, Counts)):
        return [_log(law, x) for x in x.tolist()]
    if isinstance(law, Product):
        return [sum(map(_log, law.parts, row)) for row in x.flatten(1).tolist()]
    if isinstance(law, Vectors):
        return [law.log_mass[tuple(map(int, row))] for row in x.tolist()]
    if isinstance(law, Simplex):
        return law.log_density(np.log(x.numpy())).tolist()
    if isinstance(law, Gaussian):
        return stats.multivariate_normal(law.mean, law.cov).logpdf(x.flatten(1).numpy()).tolist()
    raise TypeError(f"{type(law).__name__} has no density on its own points.")


def _log(law, x):
    return law.log_mass(int(x)) if isinstance(law, Counts) else law.log_density(mp.mpf(x))


WITHOUT_A_DENSITY_HERE = ("Wishart", "LKJCholesky", "MixtureSameFamily(MultivariateNormal)")
WITHOUT_A_DENSITY_HERE += ("MixtureSameFamily(Independent(Normal))",)


@pytest.fixture
def _in_float64():
    torch.set_default_dtype(torch.float64)  # with which torch's GeneralizedPareto compares
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_in_float64")
@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in WITHOUT_A_DENSITY_HERE])
def test_a_law_has_the_density_of_the_distribution_that_it_was_read_from(name):
    tolerance = 1e-7 if name == "VonMises" else 1e-12  # torch knows its Bessel function to seven digits
    for d in (BY_NAME[name].q, BY_NAME[name].p):
        x = d.sample((5,))
        own = np.array(log_densities(law_of(d), x), dtype=float)
        assert np.allclose(own, d.log_prob(x).numpy(), rtol=0, atol=tolerance)


def test_the_table_has_every_defined_pair_and_no_other():
    counted = Counter(truth.kind for truth in TRUTHS.values())
    routes = {route: int(n) for route, n in re.findall(r"^\| ([a-z ]+) \| (\d+) \|", PAGE.read_text(), re.MULTILINE)}
    assert counted.total() == len(list(same_shape(EXAMPLES))) == sum(routes.values())
    assert {kind: counted[kind] for kind in ("infinite", "undefined")} == {
        k: routes[k] for k in ("infinite", "undefined")
    }
    assert all(truth.value > 0 and truth.error < 1e-7 for truth in TRUTHS.values() if truth.kind == "finite")


@pytest.mark.parametrize("pair", sorted(TRUTHS)[::61], ids=lambda pair: "‖".join(pair))
def test_an_entry_is_computed_again(pair):
    q, p = pair
    again, kept = true_kl(law_of(BY_NAME[q].q), law_of(BY_NAME[p].p)), TRUTHS[pair]
    assert (again.kind, again.reason) == (kept.kind, kept.reason)
    assert math.isclose(again.value, kept.value, rel_tol=1e-12)


def scipy_kl(q, p, *ends):
    def term(x):
        return math.exp(q.logpdf(x)) * (q.logpdf(x) - p.logpdf(x))

    return sum(integrate.quad(term, a, b, epsabs=1e-13, epsrel=1e-13, limit=500)[0] for a, b in pairwise(ends))


def test_entries_agree_with_scipy():
    cases = {
        ("Normal", "StudentT"): (stats.norm(0.3, 1.2), stats.t(4.5, -0.2, 1.2), (-12, 0, 12)),
        ("Gamma", "Weibull"): (stats.gamma(2.5, scale=1 / 1.5), stats.weibull_min(1.4, scale=1.5), (0, 2, 40)),
        ("Beta", "Kumaraswamy"): (stats.beta(2, 3), _kumaraswamy(1.6, 1.9), (0, 0.5, 1)),
        ("Laplace", "Gumbel"): (stats.laplace(0.4, 0.8), stats.gumbel_r(-0.1, 1.6), (-55, -10, 0.4, 10, 40)),
    }
    for pair, (q, p, ends) in cases.items():
        assert math.isclose(TRUTHS[pair].value, scipy_kl(q, p, *ends), rel_tol=1e-8), pair


def _kumaraswamy(a, b):
    class Law:
        def logpdf(self, x):
            return math.log(a * b) + (a - 1) * math.log(x) + (b - 1) * math.log1p(-(x**a))

    return Law()


@pytest.mark.parametrize("q", ["MultivariateNormal", "Independent(Laplace)", "Independent(StudentT)"])
@pytest.mark.parametrize("p", ["LowRankMultivariateNormal", "Independent(Laplace)", "Independent(StudentT)"])
def test_on_the_plane_the_grid_agrees_with_the_sum_over_marginals(q, p):
    grid = kl_on_the_plane(law_of(BY_NAME[q].q), law_of(BY_NAME[p].p))
    assert math.isclose(TRUTHS[q, p].value, grid.value, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("q", "p", "reason"),
    [
        (dist.Normal(0.0, 1.0), dist.Gamma(2.0, 1.0), SUPPORT),
        (dist.StudentT(2.0), dist.Normal(0.0, 1.0), MOMENT),  # just critical
        (dist.StudentT(2.1), dist.Normal(0.0, 1.0), ""),
        (dist.Pareto(1.0, 2.0), dist.Normal(0.0, 1.0), MOMENT),
        (dist.Pareto(1.0, 1.0), dist.Exponential(1.0), MOMENT),
        (dist.Laplace(0.0, 1.0), dist.Gumbel(0.0, 1.0), MOMENT),  # E[exp(-x)] just diverges
        (dist.Laplace(0.0, 0.9), dist.Gumbel(0.0, 1.0), ""),
        (dist.Exponential(1.0), dist.InverseGamma(1.0, 1.0), MOMENT),  # E[1/x] just diverges
        (dist.Gamma(1.1, 1.0), dist.InverseGamma(1.0, 1.0), ""),
        (dist.Cauchy(0.0, 1.0), dist.Cauchy(1.0, 2.0), ""),
        (dist.LogNormal(0.0, 1.0), dist.Pareto(1e-3, 1.0), SUPPORT),
        (dist.Uniform(0.0, 1.0), dist.Beta(0.5, 0.5), ""),
        (dist.Dirichlet(torch.ones(3)), dist.Independent(dist.Beta(torch.ones(3), 1.0), 1), SINGULAR),
        (dist.Geometric(0.5), dist.Binomial(3, 0.5), SUPPORT),
    ],
)
def test_whether_a_kl_is_infinite_is_told_with_its_reason(q, p, reason):
    truth = true_kl(law_of(q), law_of(p))
    assert (truth.kind, truth.reason) == ("infinite" if reason else "finite", reason)


def test_a_discrete_and_a_continuous_law_have_no_kl():
    assert true_kl(law_of(dist.Poisson(1.0)), law_of(dist.Normal(0.0, 1.0))).kind == "undefined"


def test_known_values_are_hit():
    cases = [
        (dist.Normal(1.0, 1.0), dist.Normal(0.0, 1.0), 0.5),
        (dist.Cauchy(0.0, 1.0), dist.Cauchy(1.0, 2.0), math.log(10 / 8)),  # Chyzak and Nielsen, 2019
        (dist.Poisson(2.0), dist.Poisson(1.0), 2 * math.log(2) - 1),
        (dist.Dirichlet(torch.tensor([1.0, 1.0, 1.0])), dist.Dirichlet(torch.tensor([2.0, 1.0, 1.0])), None),
    ]
    for q, p, value in cases:
        if value is None:  # E[log x₁] = ψ(1) - ψ(3) = -3/2, and log Γ(4)/Γ(3) = log 3
            value = 1.5 - math.log(3)
        assert math.isclose(true_kl(law_of(q), law_of(p)).value, value, rel_tol=1e-12)


def test_a_table_of_other_examples_is_refused(tmp_path):
    path = tmp_path / "truth.json"
    other = [Example("Normal", dist.Normal(0.0, 1.0), dist.Normal(1.0, 2.0))]
    write_truth(other, path)
    assert math.isclose(load_truth(other, path)["Normal", "Normal"].value, math.log(2) + 2 / 8 - 0.5, rel_tol=1e-12)
    moved = [Example("Normal", dist.Normal(0.0, 1.0), dist.Normal(1.5, 2.0))]
    with pytest.raises(ValueError, match=r"but Normal changed; run .* --write-truth"):
        load_truth(moved, path)
    assert TABLE.name == "coverage_truth.json"


FINITE, INFINITE = Truth("finite", 2.0, 1e-12), Truth("infinite")


def estimate(value, std_error=None, shape=coverage.BATCH_OF_P):
    noise = None if std_error is None else torch.full(shape, std_error)
    return KLEstimate(torch.full(shape, value, dtype=torch.float64), exact=False, std_error=noise)


@pytest.mark.parametrize(
    ("truth", "answer", "status"),
    [
        (FINITE, estimate(2.0), "right"),
        (FINITE, estimate(2.0 * (1 + 9e-7)), "right"),
        (FINITE, estimate(2.0 * (1 + 2e-6)), "wrong"),
        (FINITE, estimate(2.04, std_error=0.01), "right"),
        (FINITE, estimate(2.06, std_error=0.01), "wrong"),
        (FINITE, estimate(2.0, std_error=0.11), "wrong"),  # above 5 %
        (FINITE, estimate(math.nan), "wrong"),
        (FINITE, estimate(math.nan, std_error=0.01), "wrong"),
        (FINITE, estimate(math.inf), "wrong"),
        (FINITE, estimate(2.0, shape=(3,)), "wrong"),
        (INFINITE, estimate(math.inf), "right"),
        (INFINITE, estimate(-math.inf), "wrong"),
        (INFINITE, estimate(1e9, std_error=1e8), "wrong"),
        (INFINITE, estimate(math.inf, shape=(3,)), "wrong"),
        (Truth("undefined"), estimate(0.3), "wrong"),
        (FINITE, NotImplementedError("no such route"), "not implemented"),
        (FINITE, ValueError("q is discrete and p is continuous"), "wrong"),
        (Truth("undefined"), ValueError("q is discrete and p is continuous"), "right"),
        (Truth("undefined"), ValueError("value outside the support"), "wrong"),
        (INFINITE, RuntimeError("Double did not match Float"), "wrong"),
    ],
)
def test_an_answer_is_judged_by_what_the_benchmark_promises(truth, answer, status):
    def kl(q, p):
        if isinstance(answer, Exception):
            raise answer
        return answer

    example = BY_NAME["Normal"]
    judged, reason, _ = coverage.judged(kl, example, example, truth)
    assert judged == status
    assert bool(reason) == (status != "right")
