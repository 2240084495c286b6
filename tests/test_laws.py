"""Laws that every family of `tests/families.py` obeys, whichever formula computes its KL."""

import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, reject, settings
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Distribution,
    Independent,
    Normal,
    SigmoidTransform,
    TransformedDistribution,
)

from tests.expectations import Reference
from tests.families import FAMILIES, Counts, Family, Line, reference
from torch_klloss import NotCertifiedError, has_closed_form, kl_divergence
from torch_klloss.closed_forms.registry import find_rule
from torch_klloss.distributions.densities import log_density
from torch_klloss.methods import ClosedForm, Enumeration, MonteCarlo
from torch_klloss.samplers.transport import transport

# torch's Wishart.rsample takes a sample for singular where it is not: it warns always.
pytestmark = pytest.mark.filterwarnings("ignore:Singular sample detected:UserWarning")

SHAPES = [((), ()), ((3,), (3,)), ((2, 1), (3,)), ((3,), (2, 1)), ((), (2,)), ((2,), ())]
EXAMPLES = settings.default.max_examples


def one_of(f: Family, number: float) -> Distribution:
    return f(torch.full((f.size,), number, dtype=f.dtype))


def each(families: list[Family]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("f", families, ids=lambda f: f.name)


LAWFUL = [f for f in FAMILIES if f.size]  # a law differentiates by a parameter, which StandardNormal lacks
EXACT = [f for f in LAWFUL if has_closed_form(one_of(f, 0.1), one_of(f, 0.2))]
CROSS = [
    pytest.param(f, g, id=f"{f.name}-{g.name}")
    for f in LAWFUL
    for g in LAWFUL
    if f is not g
    and type(f.kl) is type(g.kl)
    and isinstance(f.kl, (Line, Counts))
    and has_closed_form(one_of(f, 0.1), one_of(g, 0.2))
]
Form = Callable[[Distribution, Distribution], Tensor]
METHODS = [ClosedForm(), Enumeration(), MonteCarlo(5)]


def raw(shape: tuple[int, ...], size: int, dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    """Draw the numbers behind a family: `[*shape, size]` in [-1, 1]."""
    n = math.prod(shape) * size
    numbers = st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=n, max_size=n)
    return numbers.map(lambda values: torch.tensor(values, dtype=dtype).reshape(*shape, size))


@st.composite
def pairs(draw: st.DrawFn, f: Family, g: Family) -> tuple[Tensor, Tensor]:
    """Draw the numbers of a q of family f and a p of family g, of shapes that broadcast."""
    q_shape, p_shape = draw(st.sampled_from(SHAPES))
    return draw(raw(q_shape, f.size, f.dtype)), draw(raw(p_shape, g.size, g.dtype))


def rounding(f: Family, ref: Reference, num_operations: int = 256) -> Tensor:
    """Bound the rounding of a formula whose terms are as large as the log-densities are."""
    return num_operations * torch.finfo(f.dtype).eps * (1 + ref.magnitude)


def check_definition(f: Family, g: Family, q_raw: Tensor, p_raw: Tensor, form: Form = kl_divergence) -> None:
    """Compare value and gradient of the closed form with the definition of the KL; both may be infinite."""
    q_raw.requires_grad_(), p_raw.requires_grad_()
    ref = reference(f, g, q_raw, p_raw)
    value = form(f(q_raw), g(p_raw))
    assert value.shape == ref.value.shape
    assert value.dtype == torch.promote_types(f.dtype, g.dtype)
    assert (value[ref.value == math.inf] == math.inf).all()
    finite = ref.value.isfinite()  # NaN: the reference could not follow the density
    told = finite & (ref.error < 1e-6)  # elsewhere the tails are too heavy to tell, and the truth may be infinite
    assert ((value - ref.value)[told].abs() <= (rounding(f, ref) + ref.error)[told]).all()
    if told.all():
        expected = torch.autograd.grad(ref.value.sum(), (q_raw, p_raw))
        actual = torch.autograd.grad(value.sum(), (q_raw, p_raw))
        for a, e in zip(actual, expected, strict=True):  # torch's polygamma, in both of them, is good to 5e-10
            seen = e.isfinite()  # not the derivative of torch's density beside a kink that is nearly at an end
            scale = 1 + ref.magnitude.sum() + torch.where(seen, e, 0.0).abs().max()
            allowed = 1e-8 + 256 * torch.finfo(f.dtype).eps + 100 * ref.error.sum()
            assert ((a - e)[seen].abs() <= allowed * scale).all()


@each(EXACT)
@given(data=st.data())
@settings(max_examples=max(6, EXAMPLES // 8))
def test_the_closed_form_and_its_gradient_are_those_of_the_definition(f, data):
    check_definition(f, f, *data.draw(pairs(f, f)))


@pytest.mark.parametrize(("f", "g"), CROSS)
@given(data=st.data())
@settings(max_examples=max(2, EXAMPLES // 20))
def test_the_closed_form_across_families_is_that_of_the_definition(f, g, data):
    try:
        check_definition(f, g, *data.draw(pairs(f, g)))
    except NotCertifiedError:  # its digits are gone, and it says so
        reject()


@each(EXACT)
@given(data=st.data())
@settings(max_examples=max(6, EXAMPLES // 8))
def test_no_kl_is_negative_and_the_kl_to_itself_is_zero(f, data):
    q_raw, step = data.draw(raw((3,), f.size, f.dtype)), data.draw(raw((3,), f.size, f.dtype))
    p_raw = q_raw + 10.0 ** data.draw(st.integers(-8, -1)) * step
    near, itself = kl_divergence(f(q_raw), f(p_raw)), kl_divergence(f(q_raw), f(q_raw.clone()))
    # Our forms have no cancellation; torch's take the difference of terms as large as the log-densities.
    ours = find_rule(f(q_raw), f(p_raw)).is_ours
    bound = torch.zeros(()) if ours else rounding(f, f.reference(q_raw, q_raw))
    assert (near >= -bound).all()
    assert (itself.abs() <= bound).all()


GRADIENTS = {"pathwise": "rsample", "sticking_the_landing": "rsample", "score_function": "sample", "none": "sample"}


@each([f for f in LAWFUL if "sample" not in f.defects])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_monte_carlo_agrees_with_the_definition_in_value_and_gradient(f, gradient):
    if GRADIENTS[gradient] in f.defects:
        pytest.skip(f"torch's {f.name}.rsample has no right derivative")
    generator = torch.Generator().manual_seed(1)
    centre = 2 * torch.rand(3, f.size, generator=generator, dtype=f.dtype) - 1
    q_raw, p_raw = centre, centre + 0.4 * (2 * torch.rand(3, f.size, generator=generator, dtype=f.dtype) - 1)
    # Replicates of the whole estimate, each with a gradient of its own, so that their spread is the error.
    q_raw, p_raw = (raw.expand(64, 3, f.size).clone().requires_grad_() for raw in (q_raw, p_raw))
    method = MonteCarlo(64, gradient=gradient)
    q, p = f(q_raw), f(p_raw)
    if not method.supports(q, p):
        with pytest.raises(NotImplementedError, match=gradient):
            method.estimate(q, p, generator)
        return
    value = method.estimate(q, p, generator).value
    ref_q, ref_p = (raw[0].detach().clone().requires_grad_() for raw in (q_raw, p_raw))
    ref = f.reference(ref_q, ref_p)
    finite = ref.value.isfinite()
    assert (value[:, ~finite] == math.inf).all()
    assert finite.any()
    ref = Reference(*(part[finite] for part in ref))
    check_mean(f, value[:, finite], ref.value, ref)
    actual = torch.autograd.grad(value[:, finite].sum(), (q_raw, p_raw), allow_unused=gradient == "none")
    expected = torch.autograd.grad(ref.value.sum(), (ref_q, ref_p))
    if gradient == "none":
        assert actual[0] is None
    else:
        check_mean(f, actual[0][:, finite], expected[0][finite], ref)
    check_mean(f, actual[1][:, finite], expected[1][finite], ref)


def check_mean(f: Family, replicates: Tensor, truth: Tensor, ref: Reference) -> None:
    """Test |z| < 6, with a floor where nothing spreads; torch's implicit gradients are good to 3e-4."""
    replicates, truth = replicates.detach().double(), truth.detach()
    std_error = replicates.std(0) / len(replicates) ** 0.5
    floor = 3e-4 * truth.abs() + ref.error.max() + rounding(f, ref).max()
    assert ((replicates.mean(0) - truth).abs() <= torch.maximum(6 * std_error, floor)).all()


@each(LAWFUL)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@given(data=st.data())
@settings(max_examples=max(5, EXAMPLES // 20))
def test_the_kl_of_independent_components_is_the_sum_of_their_kls(f, method, data):
    q_raw, p_raw = data.draw(raw((2, 3), f.size, f.dtype)), data.draw(raw((2, 3), f.size, f.dtype))
    q, p = f(q_raw), f(p_raw)
    if not method.supports(q, p):
        return
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    joint = method.estimate(Independent(q, 1), Independent(p, 1), seeds[0])
    parts = method.estimate(q, p, seeds[1])
    assert joint.value.shape == (2,)
    terms = parts.value.abs().sum(-1)
    torch.testing.assert_close(joint.value, parts.value.sum(-1), rtol=0, atol=_atol(f, terms))


@each(LAWFUL)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@given(data=st.data())
@settings(max_examples=max(5, EXAMPLES // 20))
def test_every_batch_element_is_what_it_is_alone(f, method, data):
    q_raw, p_raw = data.draw(pairs(f, f))
    shape = torch.broadcast_shapes(q_raw.shape[:-1], p_raw.shape[:-1])
    if not method.supports(f(q_raw), f(p_raw)):
        return
    together = method.estimate(f(q_raw), f(p_raw)).value
    assert together.shape == shape
    if isinstance(method, MonteCarlo):  # drawn anew each time; its values are compared above
        return
    q_raw, p_raw = (x.expand(*shape, f.size).reshape(-1, f.size) for x in (q_raw, p_raw))
    alone = torch.stack([method.estimate(f(x), f(y)).value for x, y in zip(q_raw, p_raw, strict=True)])
    torch.testing.assert_close(together.flatten(), alone, rtol=0, atol=_atol(f, alone))


ON_A_LINE = [f for f in LAWFUL if isinstance(f.kl, Line)]
LEVELS = torch.tensor([1e-3, 0.1, 0.3, 0.5, 0.8, 0.97], dtype=torch.float64)


@each([f for f in ON_A_LINE if one_of(f, 0.0).has_rsample])
def test_points_from_uniform_numbers_are_the_quantiles_of_the_density(f):
    generator = torch.Generator().manual_seed(1)
    raw = 2 * torch.rand(3, f.size, generator=generator, dtype=torch.float64) - 1
    levels = LEVELS.unsqueeze(-1).expand(-1, 3)
    x = transport(f(raw, validate_args=False), levels.unsqueeze(-1), differentiable=False)
    below = f.kl.mass_below(f(raw.expand(len(LEVELS), 3, f.size), validate_args=False), x)
    torch.testing.assert_close(below, levels, rtol=1e-7, atol=1e-9)


@each(ON_A_LINE)
def test_the_density_of_quadrature_is_that_of_the_definition(f):
    q = f(torch.linspace(-0.9, 0.9, 3 * f.size, dtype=torch.float64).reshape(3, f.size), validate_args=False)
    x = q.sample((100,))
    torch.testing.assert_close(log_density(q, x, True), f.kl.density(q, x), rtol=1e-10, atol=1e-10)


@each([f for f in EXACT if isinstance(f.kl, Line)])
@pytest.mark.parametrize("transform", [AffineTransform(1.5, -2.0), SigmoidTransform()], ids=["affine", "sigmoid"])
@given(data=st.data())
@settings(max_examples=max(5, EXAMPLES // 40))
def test_a_shared_bijection_changes_nothing(f, transform, data):
    q, p = (f(each) for each in data.draw(pairs(f, f)))
    moved_q, moved_p = (TransformedDistribution(d, [transform]) for d in (q, p))
    assert has_closed_form(moved_q, moved_p)
    torch.testing.assert_close(kl_divergence(moved_q, moved_p), kl_divergence(q, p), rtol=0, atol=0)


def _atol(f: Family, values: Tensor) -> float:
    """Bound the difference between two orders of the same additions, whose terms are below 100 besides."""
    return 256 * torch.finfo(f.dtype).eps * (100 + float(values[values.isfinite()].abs().sum()))


def without_half(q, p):
    return 2 * kl_divergence(q, p)


def swapped(q, p):
    return kl_divergence(p, q)


def q_detached(q, p):
    return kl_divergence(Normal(q.loc.detach(), q.scale.detach()), p) + 0 * kl_divergence(q, p)


def cancelling(q, p):
    """Lose in the value what float32 would lose of it."""
    return kl_divergence(q, p) + 1e-7


def of_the_shape_of_q(q, p):
    return kl_divergence(q, p).sum(-1) / 3


@pytest.mark.parametrize("wrong", [without_half, swapped, q_detached, cancelling, of_the_shape_of_q])
def test_the_law_rejects_a_wrong_formula(wrong):
    normal = next(f for f in FAMILIES if f.name == "Normal")
    q_raw, p_raw = torch.rand(2, 1, 2, dtype=torch.float64), -torch.rand(3, 2, dtype=torch.float64)
    check_definition(normal, normal, q_raw, p_raw)
    with pytest.raises(AssertionError):
        check_definition(normal, normal, q_raw, p_raw, form=wrong)
