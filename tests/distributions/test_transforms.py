"""What chains of transforms are made of, and which are equal."""

import pytest
import torch
from torch.distributions import (
    AbsTransform,
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    Gamma,
    IndependentTransform,
    LogNormal,
    Normal,
    Pareto,
    PowerTransform,
    SigmoidTransform,
    SoftmaxTransform,
    StickBreakingTransform,
    TanhTransform,
    Uniform,
)

from tests.closed_forms.checks import t64
from torch_klloss.distributions.transforms import are_equal, elementwise, is_injective, is_same, parts_of

ZERO, ONE = t64(0.0), t64(1.0)
X = torch.linspace(0.1, 0.9, 6, dtype=torch.float64).reshape(2, 3)


def apply(transforms, x):
    for t in transforms:
        x = t(x)
    return x


def test_a_composition_is_taken_apart_in_the_order_that_it_is_applied_in():
    inner = ComposeTransform([ExpTransform(), AffineTransform(1.0, 2.0)])
    for t in (
        ComposeTransform([inner, TanhTransform()]),
        inner.inv,
        IndependentTransform(inner, 1),
        ComposeTransform([ComposeTransform([SigmoidTransform()]), inner.inv.inv]),
    ):
        parts = parts_of([t])
        assert not any(isinstance(part, ComposeTransform) for part in parts)
        torch.testing.assert_close(apply(parts, 2 + X), t(2 + X))
    assert parts_of([ComposeTransform([])]) == []


def test_a_map_of_every_component_is_told_from_one_that_mixes_them():
    affine = AffineTransform(t64(1.0, 2.0, 3.0), 2.0, event_dim=1)
    for t in (affine, affine.inv, IndependentTransform(ExpTransform(), 1), IndependentTransform(ExpTransform(), 1).inv):
        single = elementwise(t)
        assert single.domain.event_dim == single.codomain.event_dim == 0
        torch.testing.assert_close(single(X), t(X))
    assert elementwise(ExpTransform()) == ExpTransform()
    assert elementwise(StickBreakingTransform()) is None
    assert elementwise(SoftmaxTransform().inv) is None


@pytest.mark.parametrize(
    ("t", "inside", "outside"),
    [
        (PowerTransform(t64(2.0)), Gamma(ONE, ONE), Normal(ONE, ONE)),
        (SigmoidTransform().inv, Uniform(ZERO, ONE), Pareto(ONE, ONE)),
        (TanhTransform().inv, Uniform(-ONE, ONE), Uniform(-ONE, 2 * ONE)),
        (ExpTransform().inv, LogNormal(ZERO, ONE), Normal(ZERO, ONE)),
        (ComposeTransform([ExpTransform(), ExpTransform()]), Normal(ZERO, ONE), None),
        (AbsTransform(), None, Normal(ZERO, ONE)),
        (SoftmaxTransform(), None, Normal(ZERO.expand(3), ONE)),
    ],
)
def test_a_transform_can_be_undone_on_its_domain(t, inside, outside):
    assert inside is None or is_injective(t, inside)
    assert outside is None or not is_injective(t, outside)


def test_what_learns_is_equal_to_itself_alone():
    learned, twin = t64(2.0, requires_grad=True), t64(2.0, requires_grad=True)
    assert is_same(learned, learned)
    assert not is_same(learned, twin)
    assert is_same(t64(2.0), t64(2.0))
    assert is_same(2.0, 2.0)
    assert not is_same(2.0, 3.0)
    assert are_equal(AffineTransform(0.0, learned).inv, AffineTransform(0.0, learned).inv)
    assert not are_equal(AffineTransform(0.0, learned), AffineTransform(0.0, twin))
    assert not are_equal(ExpTransform(), SigmoidTransform())


def test_out_of_sight_only_the_same_object_is_equal():
    x = t64(1.0, 2.0)
    seen = []
    torch.func.vmap(lambda a, b: seen.extend((is_same(a, b), is_same(a, a))) or a)(x, x.clone())
    assert seen == [False, True]
