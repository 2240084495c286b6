"""Pairs that structure simplifies, and the closed form of the simpler pair."""

import warnings

import pytest
import torch
from torch.distributions import (
    AbsTransform,
    AffineTransform,
    Beta,
    Cauchy,
    ComposeTransform,
    Distribution,
    ExpTransform,
    Gamma,
    HalfCauchy,
    HalfNormal,
    Independent,
    IndependentTransform,
    InverseGamma,
    LogisticNormal,
    LogNormal,
    Normal,
    PowerTransform,
    SigmoidTransform,
    SoftmaxTransform,
    TanhTransform,
    TransformedDistribution,
    Uniform,
)
from torch.distributions import kl_divergence as torch_kl

from tests.closed_forms.checks import check, t64
from torch_klloss import has_closed_form, kl_divergence, register_kl
from torch_klloss.closed_forms.registry import _RULES
from torch_klloss.methods import ClosedForm


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
    other = transformed(SigmoidTransform(), AffineTransform(t64(1.0), t64(2.5)))
    with pytest.raises(NotImplementedError, match="must be injective and, where it learns, the same object"):
        kl_divergence(transformed(SigmoidTransform(), AffineTransform(t64(1.0), t64(2.0))), other)


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
    with pytest.raises(NotImplementedError, match="injective"):
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
    squashed = [transformed(AffineTransform(0.0, scale), TanhTransform(), loc=loc) for loc in (0.0, 1.0)]
    check(kl_divergence(*squashed), 0.5)
    power = t64(2.0, requires_grad=True)
    same = [transformed(SigmoidTransform(), PowerTransform(power), loc=loc) for loc in (0.0, 1.0)]
    check(kl_divergence(*same), 0.5)
    twin = transformed(SigmoidTransform(), PowerTransform(power.detach().clone().requires_grad_()), loc=1.0)
    assert not has_closed_form(same[0], twin)  # the KL changes with either power, and its gradient would be lost


def test_affine_maps_that_learn_apart_give_their_gradients_to_both():
    params = [t.requires_grad_() for t in (t64(0.5), t64(-2.0), t64(0.1), t64(3.0))]
    q = transformed(AffineTransform(params[0], params[1]), loc=1.0)
    p = transformed(AffineTransform(params[2], params[3]), loc=-1.0)
    value = kl_divergence(q, p)
    loc_q, scale_q, loc_p, scale_p = (t.detach().clone().requires_grad_() for t in params)
    direct = kl_divergence(Normal(loc_q + scale_q, scale_q.abs()), Normal(loc_p - scale_p, scale_p))
    torch.testing.assert_close(value, direct)
    found, expected = (
        torch.autograd.grad(kl, leaves) for kl, leaves in ((value, params), (direct, (loc_q, scale_q, loc_p, scale_p)))
    )
    torch.testing.assert_close(found, expected)


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


def test_the_inverse_of_a_gamma_has_its_kl():
    q, p = (Gamma(t64(a, 3.0), t64(1.5, 2.0)) for a in (2.0, 4.0))
    inverses = [InverseGamma(d.concentration, d.rate) for d in (q, p)]
    assert torch.equal(kl_divergence(*inverses), kl_divergence(q, p))
    moved = TransformedDistribution(q, [PowerTransform(t64(-1.0))])
    assert torch.equal(kl_divergence(moved, inverses[1]), kl_divergence(q, p))


def test_a_transform_of_one_side_is_undone_on_the_other():
    stretched = TransformedDistribution(Beta(t64(2.0), t64(3.0)), [AffineTransform(-1.0, 2.0)])
    of_uniform = kl_divergence(Beta(t64(2.0), t64(3.0)), Uniform(t64(0.0), t64(1.0)))
    torch.testing.assert_close(kl_divergence(stretched, Uniform(t64(-1.0), t64(1.0))), of_uniform)
    log_gamma = TransformedDistribution(Gamma(t64(2.0), t64(3.0)), [AffineTransform(1.0, -1.0)])
    mirrored = kl_divergence(Gamma(t64(2.0), t64(3.0)), Normal(t64(1.0), t64(1.0)))
    torch.testing.assert_close(kl_divergence(log_gamma, Normal(t64(0.0), t64(1.0))), mirrored)


def test_batches_broadcast_and_keep_their_dtype_through_structure():
    q = TransformedDistribution(Independent(Normal(torch.zeros(2, 1, 3), 1.0), 1), [AffineTransform(0.0, 2.0)])
    p = Independent(Normal(torch.ones(4, 3), torch.ones(3)), 1)
    value = kl_divergence(q, p)
    assert (value.shape, value.dtype) == ((2, 4), torch.float32)
    expected = 3 * kl_divergence(Normal(0.0, 2.0), Normal(1.0, 1.0))
    torch.testing.assert_close(value, expected.expand(2, 4))


def test_the_losses_ask_a_subclass_behind_a_transform_for_its_density():
    class Wrong(Normal):
        def log_prob(self, value):
            return 2 * super().log_prob(value)

    q = TransformedDistribution(Wrong(t64(0.0), t64(1.0)), [ExpTransform()])
    with pytest.warns(UserWarning, match="Wrong overrides log_prob"):
        assert not ClosedForm().supports(q, LogNormal(t64(0.0), t64(1.0)))
    assert ClosedForm().supports(transformed(ExpTransform()), LogNormal(t64(0.0), t64(1.0)))


def test_a_rule_for_all_of_structure_does_not_compete_with_one_for_a_class():
    class Mine(Normal):
        pass

    register_kl(Mine, Distribution)(lambda q, p: torch.zeros(q.batch_shape))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kl_divergence(Mine(0.0, 1.0), transformed(TanhTransform())) == 0
    finally:
        del _RULES[Mine, Distribution]


def test_a_half_normal_and_a_half_cauchy_are_halves():
    q, p = t64(1.0, 3.0), t64(2.0, 3.0)
    zero = torch.zeros_like(q)
    check(kl_divergence(HalfNormal(q), HalfNormal(p)), *kl_divergence(Normal(zero, q), Normal(zero, p)).tolist())
    check(kl_divergence(HalfCauchy(q), HalfCauchy(p)), *kl_divergence(Cauchy(zero, q), Cauchy(zero, p)).tolist())
