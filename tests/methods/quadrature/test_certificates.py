"""Certificates: no bound is broken, and no KL is called infinite that is not."""

import math

import pytest
import torch
import torch.distributions as dist
from numpy.polynomial.legendre import leggauss
from torch import Tensor
from torch.distributions import (
    Beta,
    Categorical,
    Distribution,
    Gumbel,
    Laplace,
    MixtureSameFamily,
    Normal,
    SigmoidTransform,
    StudentT,
    TransformedDistribution,
    Uniform,
    VonMises,
)

from torch_klloss.distributions.logistic import Logistic
from torch_klloss.estimate import NotCertifiedError
from torch_klloss.methods import Quadrature


def f64(*values: float) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def logit_normal(loc: float, scale: float) -> TransformedDistribution:
    return TransformedDistribution(Normal(f64(loc), f64(scale)), [SigmoidTransform()])


def relaxed(temperature: float, logits: float) -> dist.RelaxedBernoulli:
    return dist.RelaxedBernoulli(f64(temperature), logits=f64(logits))


class Undeclared(Distribution):
    """Another distribution, without its class: nothing is known but its density and its support."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, d):
        self.d = d
        super().__init__(d.batch_shape, d.event_shape, validate_args=False)

    @property
    def support(self):
        return self.d.support

    def log_prob(self, x):
        return self.d.log_prob(x)


# --- infinite or not --------------------------------------------------------------------------------------------------

# By mpmath, in the logit of x or in x itself.
FINITE = {
    "flat at an end, logit-normal": (Beta(f64(1.0), f64(390.98)), logit_normal(0.875, 0.134), 1576.1301141339175),
    "continuous Bernoulli": (dist.ContinuousBernoulli(f64(0.4999)), logit_normal(1.267, 3.017), 0.29212637594813416),
    "relaxed Bernoulli": (relaxed(0.847, -2.755), Beta(f64(1.0), f64(1.0)), 1.4373609658325829),
    "Kumaraswamy": (dist.Kumaraswamy(f64(1.0), f64(1.13)), logit_normal(2.05, 2.8), 0.50467158907537922),
    "wide Gumbel": (Logistic(f64(0.0), f64(1.0)), Gumbel(f64(2.15), f64(40.6)), 2.7062482265742083),
    "nearly Cauchy": (
        StudentT(f64(1.0443), f64(0.0), f64(35.47)),
        Laplace(f64(-3.338), f64(0.797)),
        667.96451389531677,
    ),
    "barely a variance": (dist.InverseGamma(f64(2.025), f64(0.9016)), dist.HalfNormal(f64(2.1417)), 3.8404567624377620),
}


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("hidden", [(False, False), (True, False), (False, True), (True, True)])
def test_a_finite_kl_is_not_called_infinite(name, hidden):
    q, p, truth = FINITE[name]
    q, p = (Undeclared(d) if hide else d for d, hide in zip((q, p), hidden, strict=True))
    estimate = Quadrature(rtol=1e-7).estimate(q, p)
    assert abs(estimate.value.item() - truth) <= estimate.error_bound.item() + 1e-12 * truth


@pytest.mark.parametrize("temperature", [0.05, 0.005])
def test_a_relaxed_bernoulli_of_a_low_temperature_is_right_or_refused(temperature):
    truth = {0.05: 95.27398, 0.005: 995.38793}[temperature]
    for dtype in (torch.float32, torch.float64):
        q = dist.RelaxedBernoulli(torch.tensor(temperature, dtype=dtype), logits=torch.tensor(-5.0, dtype=dtype))
        p = dist.RelaxedBernoulli(torch.tensor(1.0, dtype=dtype), logits=torch.tensor(0.0, dtype=dtype))
        try:
            value = Quadrature().estimate(q, p).value.item()
        except NotCertifiedError:
            continue
        assert value == pytest.approx(truth, rel=1e-4)


# An undeclared tail shows only as far as float64 has digits, which near 1 is not far: no power of the distance there.
UNCLEAR = {
    "mass against the end": (relaxed(0.0885, 3.17), dist.FisherSnedecor(f64(2.13), f64(4.17)), 33.489),
    "a power of the logarithm": (dist.Kumaraswamy(f64(2.97), f64(0.0722)), logit_normal(3.818, 0.2843), 1948.0),
    "two of them": (relaxed(0.1393, 5.827), relaxed(1.33, 1.88), 58.0),
    "a steep tail": (dist.HalfNormal(f64(3.5143)), TransformedDistribution(
        Gumbel(f64(0.0), f64(0.0873)), [dist.AffineTransform(-1.0, -1.0)]), math.inf),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCLEAR)
@pytest.mark.parametrize("hidden", [(True, False), (False, True), (True, True)])
def test_what_does_not_show_is_not_called_infinite(name, hidden):
    q, p, _ = UNCLEAR[name]
    q, p = (Undeclared(d) if hide else d for d, hide in zip((q, p), hidden, strict=True))
    with pytest.raises(NotCertifiedError):
        Quadrature().estimate(q, p)


INFINITE = {
    "far Gumbel": (Logistic(f64(0.0), f64(2.2)), Gumbel(f64(-26943.0), f64(1.0))),
    "Gumbel": (Laplace(f64(0.0), f64(2.0)), Gumbel(f64(0.0), f64(1.0))),
    "flat at 0": (Beta(f64(1.0), f64(2.0)), dist.InverseGamma(f64(1.0), f64(1.0))),
    "Cauchy": (StudentT(f64(1.0)), Laplace(f64(0.0), f64(1.0))),
    "far gaps": (
        Normal(f64(0.0), f64(1.0)),
        MixtureSameFamily(Categorical(f64(1.0, 1.0)), Uniform(f64(-50.0, 0.0), f64(0.0, 50.0))),
    ),
}


@pytest.mark.parametrize("name", INFINITE)
@pytest.mark.parametrize("hidden", [(False, False), (True, False), (False, True), (True, True)])
def test_an_infinite_kl_is_never_a_number(name, hidden):
    q, p = (Undeclared(d) if hide else d for d, hide in zip(INFINITE[name], hidden, strict=True))
    try:
        assert Quadrature().estimate(q, p).value == math.inf
    except NotCertifiedError:
        assert any(hidden) or name == "far gaps"


def test_a_tail_that_is_no_density_does_not_make_a_kl_infinite():
    q = Undeclared(Normal(f64(0.0), f64(1.0)))
    q.log_prob = lambda x: Normal(f64(0.0), f64(1.0)).log_prob(x).clamp_min(-100)
    with pytest.raises(NotCertifiedError, match="cannot tell whether the KL is finite"):
        Quadrature().estimate(q, StudentT(f64(2.0)))


def test_the_circle_closes_whatever_else_is_in_the_batch():
    loc, narrow = f64(-1.9043905036764153, 1.0), f64(5.091515057413534, 1e4)
    q, p = VonMises(loc, narrow), VonMises(f64(0.9640499841017922, 1.0), f64(0.046051168079579874, 1.0))
    estimate = Quadrature().estimate(q, p)
    assert abs(estimate.value[0].item() - 1.21296590215311196693) <= estimate.error_bound[0].item() + 1e-15


# --- bounds -----------------------------------------------------------------------------------------------------------

SHAPES = {
    "Normal": (Normal, lambda z: -z * z / 2 - math.log(2 * math.pi) / 2),
    "Laplace": (Laplace, lambda z: -z.abs() - math.log(2)),
    "Logistic": (Logistic, lambda z: -z.abs() - 2 * torch.log1p((-z.abs()).exp())),
    "Gumbel": (Gumbel, lambda z: -z - (-z).exp()),
    "Cauchy": (dist.Cauchy, lambda z: -math.log(math.pi) - 2 * torch.hypot(torch.ones_like(z), z).log()),
}
LIGHT = ("Normal", "Laplace", "Logistic")
FINITE_PAIRS = [  # the left tail of a Gumbel falls off too fast for the others, and that of a Cauchy too slowly
    (a, b)
    for a in SHAPES
    for b in SHAPES
    if a in ("Normal", b) or b == "Cauchy" or (a in (*LIGHT, "Gumbel") and b in LIGHT)
]


def random_mixture(generator: torch.Generator, count: int, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return log weights, locations and scales `[count, components]`, some of them narrow, far or light."""
    raw = torch.rand(4, count, components, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, count, components, generator=generator, dtype=torch.float64)
    scales = 10 ** torch.where(raw[0] < 0.35, -4.5 * raw[1], 2 * raw[1] - 1)
    locs = noise[0] * torch.where(raw[2] < 0.3, 30.0, 1.0)
    return torch.log_softmax(8 * raw[3].round() * noise[1], -1), locs, scales


def component_densities(shape, mixture, x: Tensor) -> Tensor:
    """Return the weighted log-densities of the components at points `[count, points]`.

    Shape: `[count, components, points]`.
    """
    weights, locs, scales = (t.unsqueeze(-1) for t in mixture)
    return weights + shape((x.unsqueeze(1) - locs) / scales) - scales.log()


def log_density(shape, mixture, x: Tensor) -> Tensor:
    """Return the log-density at points `[count, points]`."""
    return component_densities(shape, mixture, x).logsumexp(1)


def around_takeovers(shape, mixture, edges: Tensor) -> Tensor:
    """Return edges that close in on where one component takes over from another, in up to six panels."""

    def largest(x: Tensor) -> Tensor:
        return component_densities(shape, mixture, x).argmax(1)

    takes_over = largest(edges).diff(dim=1) != 0
    index = takes_over.to(torch.uint8).topk(6, 1).indices
    low, high = edges.gather(1, index), edges.gather(1, index + 1)
    width, before = high - low, largest(low)
    for _ in range(60):
        middle = (low + high) / 2
        is_before = largest(middle) == before
        low, high = torch.where(is_before, middle, low), torch.where(is_before, high, middle)
    return torch.cat([low + sign * width * 4.0**-k for sign in (-1, 1) for k in range(1, 20)] + [low], 1)


def dense_kl(of_q, q, of_p, p, jitter: float) -> Tensor:
    """Return the KLs by Gauss-Legendre panels.

    Their edges lie around every component, ever farther apart, and around every takeover.
    """
    steps = torch.cat([torch.zeros(1), 0.05 * 1.08 ** torch.arange(0, 260, dtype=torch.float64)]) * jitter
    steps = torch.cat([-steps.flip(0), steps[1:]])
    edges = torch.cat([(locs + s * scales).flatten(1) for _, locs, scales in (q, p) for s in steps], 1).sort(1).values
    more = [around_takeovers(shape, mixture, edges) for shape, mixture in ((of_q, q), (of_p, p))]
    edges = torch.cat([edges, *more], 1).sort(1).values
    nodes, weights = (torch.as_tensor(t) for t in leggauss(16))
    low, high = edges[:, :-1, None], edges[:, 1:, None]
    x = ((low + high) / 2 + (high - low) / 2 * nodes).flatten(1)
    log_q, log_p = log_density(of_q, q, x), log_density(of_p, p, x)
    mass = ((high - low) / 2 * weights).flatten(1) * log_q.exp()
    return (mass * torch.where(mass == 0, 0.0, log_q - log_p)).sum(1)


def broken(seed: int, count: int) -> tuple[list[str], int]:
    """Return the pairs of mixtures that break their bound, and how many were certified."""
    generator = torch.Generator().manual_seed(seed)
    (name_q, name_p) = FINITE_PAIRS[seed % len(FINITE_PAIRS)]
    q, p = (random_mixture(generator, count, n) for n in ((1, 3), (2, 2), (3, 1))[seed % 3])
    (family_q, of_q), (family_p, of_p) = SHAPES[name_q], SHAPES[name_p]
    truth, again = (dense_kl(of_q, q, of_p, p, jitter) for jitter in (1.0, 0.87))
    found, certified = [], 0
    for i in range(count):
        pair = [MixtureSameFamily(Categorical(logits=w[i]), f(m[i], s[i]))
                for f, (w, m, s) in ((family_q, q), (family_p, p))]  # fmt: skip
        try:
            estimate = Quadrature().estimate(*pair)
        except NotCertifiedError:
            continue
        certified += 1
        doubt = 10 * (truth[i] - again[i]).abs() + 1e-12 * (1 + truth[i])  # the panels meet kinks between components
        off = (estimate.value - truth[i]).abs() - doubt
        if not off <= estimate.error_bound:
            found.append(f"{seed}: KL({name_q}‖{name_p}) {estimate.value} for {truth[i]}, {q}, {p}")
    return found, certified


@pytest.mark.parametrize("seed", range(5))
def test_no_mixture_breaks_its_bound(seed):
    found, certified = broken(7 * seed, 12)
    assert found == []
    assert certified >= 6


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(60))
def test_no_mixture_of_many_breaks_its_bound(seed):
    assert broken(100 + seed, 100)[0] == []


def test_a_transition_far_out_of_a_narrow_component_is_not_missed():
    p = MixtureSameFamily(
        Categorical(logits=f64(-3.717, -6.857, -0.0256)),
        Normal(f64(0.56, -0.0553, -60.69), f64(0.3492, 3.0805, 1.333e-4)),
    )
    q = Normal(f64(0.5413), f64(88.12))
    mixture = (f64(-3.717, -6.857, -0.0256).log_softmax(-1)[None], p.component_distribution.loc[None],
               p.component_distribution.scale[None])  # fmt: skip
    single = (f64(0.0)[None, None], f64(0.5413)[None, None], f64(88.12)[None, None])
    truth = dense_kl(SHAPES["Normal"][1], single, SHAPES["Normal"][1], mixture, 1.0)
    estimate = Quadrature().estimate(q, p)
    assert abs(estimate.value - truth) <= estimate.error_bound + 1e-10 * truth


@pytest.mark.parametrize("concentration", [0.05, 0.06, 0.1, 0.3])
def test_a_component_that_takes_over_beyond_the_last_node_is_right_or_refused(concentration):
    """The second component overtakes the first so near to 1 that no float64 lies between."""
    weights, of_zero = f64(1 - 2e-5, 2e-5), f64(0.3, concentration)
    q = MixtureSameFamily(Categorical(weights), dist.Kumaraswamy(f64(1.0, 1.0), of_zero))
    p = Uniform(f64(0.0), f64(1.0))
    # In u = -log(1 - x) each component is exponential, of rate b, and log q = log Σ w b exp(-(b - 1) u).
    u, w = (torch.as_tensor(t) for t in leggauss(40))
    edges = torch.linspace(0, 1200, 401, dtype=torch.float64)
    low, high = edges[:-1, None], edges[1:, None]
    u, w = (low + high) / 2 + (high - low) / 2 * u, (high - low) / 2 * w
    log_q = (weights.log() + of_zero.log() - (of_zero - 1) * u.unsqueeze(-1)).logsumexp(-1)
    truth = (w * (log_q - u).exp() * log_q).sum()
    try:
        estimate = Quadrature().estimate(q, p)
    except NotCertifiedError:
        return
    assert abs(estimate.value - truth) <= estimate.error_bound + 1e-10


def test_a_narrow_component_is_found_behind_a_transform():
    weights = f64(-16.1890105749365, -9.3154118299e-8)
    base = MixtureSameFamily(
        Categorical(logits=weights), Normal(f64(0.5949092896537765, -20.0), f64(4.357717e-4, 1.7784))
    )
    p = relaxed(1.0, -4.204063463293559).base_dist
    plain = MixtureSameFamily(
        base.mixture_distribution, dist.LogNormal(f64(0.5949092896537765, -20.0), f64(4.357717e-4, 1.7784))
    )
    found, expected = (
        Quadrature().estimate(q, p) for q in (TransformedDistribution(base, [dist.ExpTransform()]), plain)
    )
    assert abs(found.value - expected.value) <= found.error_bound.minimum(expected.error_bound)
    assert found.value.item() == pytest.approx(expected.value.item(), rel=1e-11)


def test_the_image_of_a_mixture_has_its_gradients():
    weights, locs = f64(0.3, 0.7).requires_grad_(), f64(0.0, 1.0).requires_grad_()
    stretch = f64(1.0, 2.0, 0.5).requires_grad_()
    base = MixtureSameFamily(Categorical(weights), Normal(locs, f64(0.7, 0.2))).expand((3,))
    q = TransformedDistribution(base, [dist.AffineTransform(0.0, stretch), dist.ExpTransform()])
    p = dist.LogNormal(f64(0.0), f64(2.0))
    plain = MixtureSameFamily(
        Categorical(weights.expand(3, 2)), dist.LogNormal(locs * stretch[:, None], f64(0.7, 0.2) * stretch[:, None])
    )
    gradients = []
    for each in (q, plain):
        value = Quadrature(rtol=1e-8).estimate(each, p).value
        gradients.append(torch.autograd.grad(value.sum(), [weights, locs, stretch]))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_terms_that_change_their_sign_beyond_the_last_node_are_no_exponential():
    """log(q/p) is 0.8 at the last node and rises by 0.95 a unit of log distance, over twenty units that matter."""
    q = MixtureSameFamily(
        Categorical(logits=f64(-5.967654026179542, -19.771365088246394, -0.0025635262548294414)),
        Beta(f64(3.526060888579599, 1.0, 4.290324133687322), f64(1.995111560690008, 0.047479514236309354, 2.029548301)),
    )
    rates = f64(0.0424813060603165, 0.5267658888845965, 32.59983573403365)
    p = MixtureSameFamily(
        Categorical(logits=f64(-2.3779982222823133, -0.09732213934086086, -15.097348213402611)),
        TransformedDistribution(
            dist.Gamma(f64(0.4707815844660619, 0.9586059180189666, 9.134901480104862), rates), [dist.ExpTransform().inv]
        ),
    )
    # In u = logit x, with 1 - x = sigmoid(-u), each density is accurate.
    u, w = (torch.as_tensor(t) for t in leggauss(30))
    edges = torch.linspace(-120, 1000, 1121, dtype=torch.float64)
    low, high = edges[:-1, None], edges[1:, None]
    u, w = ((low + high) / 2 + (high - low) / 2 * u).flatten(), ((high - low) / 2 * w).flatten()
    log_x, log_rest, x = -torch.log1p((-u).exp()), -torch.nn.functional.softplus(u), u.sigmoid()
    a, b = q.component_distribution.concentration1, q.component_distribution.concentration0
    norm = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b) + q.mixture_distribution.logits
    log_q = (norm + (a - 1) * log_x[:, None] + (b - 1) * log_rest[:, None]).logsumexp(-1)
    truth = (w * (log_q + log_x + log_rest).exp() * (log_q - p.log_prob(x))).sum()
    estimate = Quadrature().estimate(q, p)
    assert abs(estimate.value - truth) <= estimate.error_bound
