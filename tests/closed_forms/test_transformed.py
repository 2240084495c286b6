"""What can be peeled off two transformed distributions, and what cannot."""

import pytest
import torch
from torch.distributions import (
    AbsTransform,
    AffineTransform,
    Cauchy,
    ComposeTransform,
    ExpTransform,
    HalfCauchy,
    HalfNormal,
    Independent,
    IndependentTransform,
    LogisticNormal,
    LogNormal,
    Normal,
    PowerTransform,
    SigmoidTransform,
    SoftmaxTransform,
    TransformedDistribution,
)
from torch.distributions import kl_divergence as torch_kl

from tests.closed_forms.checks import check, t64
from torch_klloss import has_closed_form, kl_divergence


def transformed(*transforms, loc=0.0):
    return TransformedDistribution(Normal(t64(loc), t64(1.0)), list(transforms))


def test_equal_transforms_that_can_be_undone_are_peeled():
    for transforms in (
        [ExpTransform()],
        [SigmoidTransform(), AffineTransform(t64(1.0), t64(-2.0))],
        [ExpTransform(), PowerTransform(t64(3.0))],
        [ComposeTransform([ExpTransform(), AffineTransform(0.0, 2.0)])],
        [ExpTransform(), ExpTransform().inv],
    ):
        check(kl_divergence(transformed(*transforms), transformed(*transforms, loc=1.0)), 0.5)


def test_transforms_are_equal_by_their_parameters_and_not_only_by_identity():
    q, p = (transformed(ExpTransform(), AffineTransform(t64(1.0), t64(2.0)), loc=loc) for loc in (0.0, 1.0))
    check(kl_divergence(q, p), 0.5)
    other = transformed(ExpTransform(), AffineTransform(t64(1.0), t64(2.5)))
    with pytest.raises(NotImplementedError, match="must be equal, bijective"):
        kl_divergence(q, other)


def test_an_outer_transform_is_peeled_off_unlike_insides():
    q = transformed(ExpTransform())
    p = TransformedDistribution(Cauchy(t64(0.0), t64(1.0)), [ExpTransform(), ExpTransform()])
    nested = TransformedDistribution(LogNormal(t64(1.0), t64(1.0)), [ExpTransform()])
    assert not has_closed_form(q, p)
    check(kl_divergence(nested, TransformedDistribution(LogNormal(t64(0.0), t64(1.0)), [ExpTransform()])), 0.5)
    check(kl_divergence(LogNormal(t64(1.0), t64(1.0)), transformed(ExpTransform())), 0.5)


@pytest.mark.parametrize("transform", [AbsTransform(), PowerTransform(t64(2.0))], ids=["abs", "square"])
def test_a_transform_that_is_not_injective_is_not_peeled(transform):
    q, p = transformed(transform, loc=1.0), transformed(transform, loc=-1.0)  # the same distribution
    assert torch_kl(q, p) == 2
    with pytest.raises(NotImplementedError, match="bijective"):
        kl_divergence(q, p)


def test_a_softmax_is_not_peeled():
    q, p = (
        TransformedDistribution(Independent(Normal(t64(loc).expand(3), 1.0), 1), [SoftmaxTransform()])
        for loc in (0.0, 1.0)
    )
    assert torch_kl(q, p) > 0  # of equal distributions
    assert not has_closed_form(q, p)


def test_a_learned_transform_is_peeled_only_if_it_is_the_same():
    scale = t64(2.0, requires_grad=True)
    same = [transformed(AffineTransform(0.0, scale), loc=loc) for loc in (0.0, 1.0)]
    check(kl_divergence(*same), 0.5)
    twin = transformed(AffineTransform(0.0, scale.detach().clone().requires_grad_()), loc=1.0)
    assert not has_closed_form(same[0], twin)  # the KL changes with either scale, and its gradient would be lost


def test_transforms_of_vectors_keep_their_event():
    q, p = (LogisticNormal(t64(loc).expand(5, 2), t64(1.0).expand(5, 2)) for loc in (0.0, 1.0))
    check(kl_divergence(q, p), *[1.0] * 5)
    wrapped = [
        TransformedDistribution(
            Independent(Normal(t64(loc).expand(5, 2), 1.0), 1), [IndependentTransform(ExpTransform(), 1)]
        )
        for loc in (0.0, 1.0)
    ]
    check(kl_divergence(*wrapped), *[1.0] * 5)


def test_a_half_normal_and_a_half_cauchy_are_halves():
    q, p = t64(1.0, 3.0), t64(2.0, 3.0)
    zero = torch.zeros_like(q)
    check(kl_divergence(HalfNormal(q), HalfNormal(p)), *kl_divergence(Normal(zero, q), Normal(zero, p)).tolist())
    check(kl_divergence(HalfCauchy(q), HalfCauchy(p)), *kl_divergence(Cauchy(zero, q), Cauchy(zero, p)).tolist())
