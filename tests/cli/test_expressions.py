"""Expressions: every distribution of torch can be written, and nothing else."""

import math

import pytest
import torch
import torch.distributions as dist

from torch_klloss.cli.example_pairs import SCALARS
from torch_klloss.cli.expressions import parse_distribution

EXAMPLES = [
    *(f"{cls.__name__}({', '.join(map(str, q))})" for cls, q, _ in SCALARS if cls.__name__ in dist.__all__),
    "Binomial(10, 0.5)",
    "Categorical([0.5, 0.5])",
    "Dirichlet([1, 2])",
    "Independent(Normal([0, 1], [1, 1]), 1)",
    "LKJCholesky(3, 1)",
    "LogisticNormal([0, 0], [1, 1])",
    "LowRankMultivariateNormal([0, 0], [[1], [1]], [1, 1])",
    "MixtureSameFamily(Categorical([0.5, 0.5]), Normal([-1, 1], [0.5, 0.5]))",
    "Multinomial(3, [0.5, 0.5])",
    "MultivariateNormal([0, 0], [[1, 0], [0, 1]])",
    "NegativeBinomial(3, 0.5)",
    "OneHotCategorical([1, 2])",
    "OneHotCategoricalStraightThrough([1, 2])",
    "RelaxedOneHotCategorical(1, [1, 2])",
    "TransformedDistribution(Normal(0, 1), [AffineTransform(1, -2), ExpTransform()])",
    "Wishart(4, [[1, 0], [0, 1]])",
]


def type_name(text):
    return text.split("(")[0]


@pytest.mark.filterwarnings("ignore:Singular sample detected")  # torch's Wishart takes its good samples for singular
@pytest.mark.parametrize("text", EXAMPLES, ids=type_name)
def test_every_distribution_can_be_written_drawn_from_and_evaluated(text):
    d = parse_distribution(text)
    assert type(d) is getattr(dist, type_name(text))
    assert d.log_prob(d.sample()).isfinite().all()


def test_the_examples_are_all_the_distributions_that_torch_lists():
    listed = {name for name in dist.__all__ if isinstance(getattr(dist, name), type)}
    listed = {name for name in listed if issubclass(getattr(dist, name), dist.Distribution)}
    assert {type_name(text) for text in EXAMPLES} == listed - {"Distribution", "ExponentialFamily"}


def test_numbers_are_read_as_python_reads_them():
    d = parse_distribution("Normal([-1, +2, 1e-3, -pi, inf, -inf, nan], 0x10, validate_args=False)")
    expected = torch.tensor([-1, 2, 1e-3, -math.pi, math.inf, -math.inf, math.nan])
    torch.testing.assert_close(d.loc, expected, rtol=0, atol=0, equal_nan=True)
    assert d.scale.unique() == 16
    assert d._validate_args is False


def test_lists_and_tuples_become_tensors_of_the_default_dtype():
    d = parse_distribution("Normal(((0, 1), (2, 3)), [1, 1])")
    assert torch.equal(d.loc, torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    torch.set_default_dtype(torch.float64)
    assert parse_distribution("Normal([0, 1], 1)").loc.dtype == torch.float64
    torch.set_default_dtype(torch.float32)


def test_a_count_stays_a_number_and_a_list_of_calls_a_list():
    assert parse_distribution("Independent(Normal([0, 1], 1), 1)").reinterpreted_batch_ndims == 1
    d = parse_distribution("TransformedDistribution(Normal(0, 1), (SigmoidTransform(), AffineTransform(1, -2)))")
    assert [type(t).__name__ for t in d.transforms] == ["SigmoidTransform", "AffineTransform"]


def test_arguments_may_be_named():
    d = parse_distribution("StudentT(scale=2, df=4)")
    assert (d.df, d.loc, d.scale) == (4, 0, 2)


REFUSED = [
    ("Norml(0, 1)", "unknown name 'Norml': did you mean Normal?"),
    ("poisson(1)", "unknown name 'poisson': did you mean Poisson?"),
    ("TransformedDistribution(Normal(0, 1), ExpTransfrm())", "unknown name 'ExpTransfrm': did you mean ExpTransform?"),
    ("Distribution()", "unknown name 'Distribution'"),
    ("Normal(x, 1)", "unknown name 'x': the names are those of torch.distributions."),
    ("Normal", "Normal must be called, as in Normal(...)."),
    ("3", "expected a distribution such as Normal(0, 1), got 3."),
    ("ExpTransform()", "expected a distribution such as Normal(0, 1), got ExpTransform()."),
    ("Normal(0, -1)", "Normal(0, -1): parameter scale must satisfy GreaterThan(lower_bound=0.0), got -1.0"),
    (
        "Normal([0, 1],\n[-1, 2])",
        "Normal([0, 1], [-1, 2]): parameter scale must satisfy GreaterThan(lower_bound=0.0), got [-1.0, 2.0]",
    ),
    ("Normal(nan, 1)", "Normal(nan, 1): parameter loc must satisfy Real(), got nan"),
    (
        "Independent(MultivariateNormal([0, 0], [[1, 2], [2, 1]]), 0)",
        "MultivariateNormal([0, 0], [[1, 2], [2, 1]]): parameter covariance_matrix must satisfy PositiveDefinite(), "
        "got [[1.0, 2.0], [2.0, 1.0]]",
    ),
    ("Normal(0)", "Normal(0): missing a required argument: 'scale'; the parameters are loc, scale, validate_args."),
    ("Normal(0, 1, sigma=2)", "Normal(0, 1, sigma=2): got an unexpected keyword argument 'sigma'"),
    ("Normal(loc=0, loc=1, scale=1)", "each parameter is named once"),
    ("Normal([0, 1], [1, 1, 1])", "Normal([0, 1], [1, 1, 1]): The size of tensor a (2) must match"),
    ("Normal([0, [1]], 1)", "[0, [1]]: no rectangular array of numbers"),
    ("Normal([0, None], 1)", "[0, None]: no rectangular array of numbers: None among them"),
    ("Independent(1, 1)", "Independent(1, 1): 'int' object has no attribute 'batch_shape'"),
    ("RelaxedBernoulli(None, 0.5)", "RelaxedBernoulli(None, 0.5): must be real number, not NoneType"),
    ("Categorical()", "Categorical(): Either `probs` or `logits` must be specified, but not both."),
    ("Normal(0, 1", "cannot read 'Normal(0, 1': '(' was never closed at column 7."),
    ("Normal(0,, 1)", "at column 10."),
    ("Normal(0, 1); 2", "cannot read 'Normal(0, 1); 2'"),
    ("", "cannot read ''"),
    ("-" * 9000 + "1", "nested too deeply"),
    (" " * 10_001, "an expression may have 10000 characters, got 10001."),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[text[:40] for text, _ in REFUSED])
def test_a_mistake_is_named_on_one_line(text, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is compared below)
        parse_distribution(text)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


FORBIDDEN = {
    "__import__('os').system('true')": "an attribute",
    "torch.distributions.Normal(0, 1)": "an attribute",
    "Normal(0, 1).sample()": "an attribute",
    "Normal.__init__(0, 1)": "an attribute",
    "Normal(1 + 1, 1)": "an operator other than a sign",
    "Normal(2 ** 1000, 1)": "an operator other than a sign",
    "Normal(not 1, 1)": "an operator other than a sign",
    "Normal(1 and 2, 1)": "an operator other than a sign",
    "Normal(1 < 2, 1)": "a comparison",
    "Normal('0', 1)": "a value of type str",
    "Normal(b'0', 1)": "a value of type bytes",
    "Normal(1j, 1)": "a value of type complex",
    "Normal(..., 1)": "a value of type ellipsis",
    "Normal(f'{0}', 1)": "an f-string",
    "Normal([x for x in (0, 1)], 1)": "a comprehension",
    "Normal(lambda: 0, 1)": "a lambda",
    "(lambda: 0)()": "a lambda",
    "Normal(0 if 1 else 2, 1)": "a condition",
    "Normal((x := 0), 1)": "an assignment",
    "Normal(*[0, 1])": "unpacking with *",
    "Normal(0, **{})": "unpacking with **",
    "Normal([0, 1][0], 1)": "a subscript",
    "Normal({}, 1)": "a dict",
    "Normal({0}, 1)": "a set",
    "Normal(0, 1)(2)": "calling the result of a call",
}


@pytest.mark.parametrize(("text", "what"), FORBIDDEN.items(), ids=FORBIDDEN)
def test_nothing_else_is_allowed(text, what):
    with pytest.raises(ValueError, match="is not allowed") as caught:
        parse_distribution(text)
    assert f"{what} is not allowed" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["-True", "-None", "-[1]", "-Normal(0, 1)"])
def test_a_sign_belongs_before_a_number(text):
    with pytest.raises(ValueError, match="a sign belongs before a number"):
        parse_distribution(f"Normal({text}, 1)")


@pytest.mark.parametrize("name", ["eval", "exec", "open", "print", "__import__", "torch", "Tensor", "kl_divergence"])
def test_no_other_callable_is_reached(name):
    with pytest.raises(ValueError, match=f"unknown name '{name}'"):
        parse_distribution(f"{name}(1)")


def test_only_text_is_read():
    with pytest.raises(TypeError, match=r"takes a string such as 'Normal\(0, 1\)', got Normal"):
        parse_distribution(dist.Normal(0.0, 1.0))
