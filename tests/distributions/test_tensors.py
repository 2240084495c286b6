"""Copies of a distribution with other tensors in it; the user's own object stays as it is."""

import copy
import math

import pytest
import torch
import torch.distributions as dist
from torch.distributions import Independent, Normal

from tests.families import FAMILIES
from torch_klloss.distributions.batch_dims import replace_examples, with_batch_dim
from torch_klloss.distributions.precision import in_full_precision
from torch_klloss.distributions.tensors import copy_with, device_of, dtype_of, tensors_of, unvalidated


@pytest.mark.parametrize("f", FAMILIES, ids=lambda f: f.name)
def test_every_family_can_be_copied_with_other_tensors(f):
    d = f(torch.linspace(-0.5, 0.5, 2 * f.size, dtype=f.dtype).reshape(2, f.size))
    own = tensors_of(d)
    before = [t.clone() for t in own]
    x = d.sample() if "sample" not in f.defects and f.name != "Wishart" else None
    moved = copy_with(d, lambda t, *_: t.clone())
    assert type(moved) is type(d)
    assert (moved.batch_shape, moved.event_shape) == (d.batch_shape, d.event_shape)
    assert dtype_of(moved) == dtype_of(d) == f.dtype
    if x is not None:
        torch.testing.assert_close(moved.log_prob(x), d.log_prob(x))
    assert not {t.data_ptr() for t in own} & {t.data_ptr() for t in tensors_of(moved)}
    assert all(torch.equal(a, b) for a, b in zip(before, own, strict=True))


@pytest.mark.parametrize("f", FAMILIES, ids=lambda f: f.name)
def test_a_distribution_of_full_precision_is_left_alone(f):
    d = f(torch.zeros(f.size, dtype=f.dtype))
    assert in_full_precision(d) is d


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "build",
    [
        lambda one: Normal(one, one),
        lambda one: Independent(Normal(one, one), 1),
        lambda one: dist.Gumbel(one, one),
        lambda one: dist.LogNormal(one, one),
        lambda one: dist.Weibull(one, one),
        lambda one: dist.Categorical(logits=one),
        lambda one: dist.TransformedDistribution(Normal(0.0, 1.0), [dist.AffineTransform(one, one)]),
        lambda one: dist.MixtureSameFamily(dist.Categorical(logits=one), Normal(one, one)),
    ],
    ids=["normal", "independent", "gumbel", "lognormal", "weibull", "categorical", "affine", "mixture"],
)
def test_half_precision_becomes_float32_wherever_it_is(build, dtype):
    d = build(torch.ones(3, dtype=dtype))
    full = in_full_precision(d)
    assert type(full) is type(d)
    assert {t.dtype for t in tensors_of(full) if t.is_floating_point()} == {torch.float32}
    assert dtype in {t.dtype for t in tensors_of(d)}
    x = torch.full(d.event_shape, 1.5) if not isinstance(d, dist.Categorical) else torch.tensor(1)
    assert full.log_prob(x).dtype == torch.float32


def test_the_widest_dtype_and_the_device_are_those_of_the_tensors():
    assert dtype_of(Normal(torch.ones(2), torch.ones(2, dtype=torch.float64))) == torch.float64
    assert dtype_of(Normal(torch.ones(2, dtype=torch.float16), 1.0)) == torch.float16
    assert dtype_of(Independent(Normal(torch.ones(2).double(), 1.0), 1)) == torch.float64
    assert device_of(Normal(torch.ones(2, device="meta"), 1.0, validate_args=False)).type == "meta"

    class Empty(dist.Distribution):
        pass

    assert (dtype_of(Empty(validate_args=False)), device_of(Empty(validate_args=False)).type) == (torch.float32, "cpu")


def test_an_unvalidated_copy_checks_nothing_and_the_original_still_does():
    d = Independent(dist.Beta(torch.ones(2), 2.0), 1)
    copied = unvalidated(d)
    copied.log_prob(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="Expected value"):
        d.log_prob(torch.tensor([0.5, 1.5]))
    assert d._validate_args
    assert d.base_dist._validate_args


NAN = math.nan


@pytest.mark.parametrize(
    "build",
    [
        lambda v: Normal(v, 1.0),
        lambda v: Independent(Normal(v.unsqueeze(-1).expand(3, 2), torch.ones(3, 2)), 1),
        lambda v: dist.Gumbel(v, 1.0),
        lambda v: dist.LogNormal(v, 1.0),
        lambda v: dist.Categorical(logits=torch.stack((v, -v), -1)),
        lambda v: dist.MultivariateNormal(v.unsqueeze(-1).expand(3, 3), torch.eye(3)),
        lambda v: dist.MultivariateNormal(torch.zeros(3), scale_tril=torch.diag_embed(v.unsqueeze(-1).expand(3, 3))),
        lambda v: dist.TransformedDistribution(Normal(v, 1.0), [dist.ExpTransform()]),
        lambda v: dist.TransformedDistribution(Normal(torch.zeros(3), 1.0), [dist.AffineTransform(v, 1.0)]),
        lambda v: dist.MixtureSameFamily(dist.Categorical(torch.ones(3, 2)), Normal(torch.stack((v, v), -1), 1.0)),
    ],
    ids=["normal", "independent", "gumbel", "lognormal", "categorical", "mvn", "mvn_scale", "exp", "affine", "mixture"],
)
def test_a_dropped_example_takes_the_parameters_of_one_that_is_kept(build):
    original = build(torch.tensor([1.0, 2.0, 3.0]))
    keep = torch.tensor([False, True, True])
    replaced = replace_examples(original, keep, original.batch_shape)
    expected = build(torch.tensor([2.0, 2.0, 3.0]))
    assert replaced.batch_shape == (3,)
    x = expected.sample()
    torch.testing.assert_close(replaced.log_prob(x), expected.log_prob(x))


def test_parameters_that_the_examples_share_are_not_taken_apart():
    # Three examples of three dimensions: the shared factor has the shape that a batch of vectors would have.
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [-1.0, 0.3, 0.5]])
    q = dist.MultivariateNormal(torch.arange(9.0).reshape(3, 3), scale_tril=factor)
    replaced = replace_examples(q, torch.tensor([False, True, True]), q.batch_shape)
    expected = dist.MultivariateNormal(q.loc[[1, 1, 2]], scale_tril=factor)
    x = torch.ones(3, 3)
    torch.testing.assert_close(replaced.log_prob(x), expected.log_prob(x))


def test_transforms_that_the_examples_share_are_not_taken_apart():
    x = torch.ones(3, 3)
    shift = torch.tensor([1.0, 2.0, 3.0])
    base = Independent(Normal(torch.arange(9.0).reshape(3, 3), 1.0), 1)
    q = dist.TransformedDistribution(base, [dist.AffineTransform(shift, 1.0, event_dim=1)])
    replaced = replace_examples(q, torch.tensor([False, True, True]), q.batch_shape)
    expected = Independent(Normal(base.mean[[1, 1, 2]] + shift, 1.0), 1)
    torch.testing.assert_close(replaced.log_prob(x), expected.log_prob(x))


def test_examples_that_a_distribution_does_not_have_are_none_to_replace():
    shared = Normal(torch.zeros(4), 1.0)
    assert replace_examples(shared, torch.tensor([True, False, True]), torch.Size((3, 4))) is shared
    single = Normal(torch.zeros(1, 4), 1.0)
    assert replace_examples(single, torch.tensor([True, False, True]), torch.Size((3, 4))) is single


def test_a_replaced_example_gets_no_gradient():
    loc = torch.tensor([NAN, 2.0, 3.0], requires_grad=True)
    d = replace_examples(Normal(loc, 1.0, validate_args=False), torch.tensor([False, True, True]), torch.Size((3,)))
    assert torch.autograd.grad(d.mean.sum(), loc)[0].tolist() == [0.0, 2.0, 1.0]


def test_a_copy_of_a_transformed_distribution_has_inverses_of_its_own():
    gumbel = dist.Gumbel(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
    gumbel.transforms[-1].inv(torch.ones(2))  # the inverse is now remembered
    doubled = copy_with(copy.copy(gumbel), lambda t, *_: t * 1.0)
    x = torch.tensor([0.3, 0.4])
    torch.testing.assert_close(doubled.log_prob(x), gumbel.log_prob(x))


@pytest.mark.parametrize("from_right", [0, 1])
def test_a_batch_dimension_is_inserted_into_transforms_as_well(from_right):
    loc, scale = torch.tensor([-1.0, 2.0, 0.5]), torch.tensor([0.5, 1.0, 2.0])
    base = Normal(torch.zeros(2, 3), torch.ones(2, 3))
    moved = with_batch_dim(dist.TransformedDistribution(base, [dist.AffineTransform(loc, scale)]), from_right)
    expected = with_batch_dim(Normal(loc.expand(2, 3), scale.expand(2, 3)), from_right)
    assert moved.batch_shape == expected.batch_shape == torch.Size([(2, 3, 1), (2, 1, 3)][from_right])
    x = torch.linspace(-1.0, 1.0, 2 * 3 * 4).reshape(2, *((3, 4), (4, 3))[from_right])
    torch.testing.assert_close(moved.log_prob(x), expected.log_prob(x))
