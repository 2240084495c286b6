"""The table of routes: every class, the answers of AutoKL, and the page in docs."""

import re
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, StudentT
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli

from tests.families import FAMILIES
from torch_klloss import AutoKL
from torch_klloss.cli.example_pairs import Example, all_examples, same_shape
from torch_klloss.cli.pairs import ROUTES, RoutedPair, grouped, markdown, routes, write_docs
from torch_klloss.distributions.families import LogVarNormal, RawCategorical, StandardNormal
from torch_klloss.distributions.logistic import Logistic
from torch_klloss.distributions.tensors import dtype_of
from torch_klloss.methods import MonteCarlo, Quadrature

LISTED_OTHERWISE = {LogVarNormal, StandardNormal, RawCategorical, LogitRelaxedBernoulli, Logistic}
PAGE = Path(__file__).parents[2] / "docs" / "pairs.md"
EXAMPLES = all_examples()


@pytest.fixture(scope="module")
def table():
    return routes()


def test_every_declared_family_has_an_example():
    covered = {type(d) for example in EXAMPLES for d in (example.q, example.p)}
    missing = {f.type for f in FAMILIES} - covered
    assert missing == LISTED_OTHERWISE, "add an example to torch_klloss/cli/example_pairs.py"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_is_two_instances_of_a_kind_without_a_batch_in_float64(example):
    q, p = example.q, example.p
    assert type(q) is type(p)
    assert q.event_shape == p.event_shape
    assert q.batch_shape == p.batch_shape == ()
    assert dtype_of(q) == dtype_of(p) == torch.float64


def test_names_are_unique_so_that_a_row_is_one_pair(table):
    assert len({(pair.q, pair.p) for pair in table}) == len(table)
    assert len({example.name for example in EXAMPLES}) == len(EXAMPLES)


def test_every_ordered_pair_of_one_event_shape_is_in_the_table(table):
    sizes = {}
    for example in EXAMPLES:
        sizes[example.q.event_shape] = sizes.get(example.q.event_shape, 0) + 1
    assert len(table) == sum(n * n for n in sizes.values()) == len(list(same_shape(EXAMPLES)))


@pytest.mark.parametrize(
    ("q", "p", "route"),
    [
        ("Normal", "Laplace", "closed form"),
        ("Normal", "StudentT", "quadrature"),
        ("Normal", "Gamma", "infinite"),  # by its support
        ("Cauchy", "Normal", "infinite"),  # by its second moment
        ("Bernoulli", "Binomial", "enumeration"),
        ("Dirichlet", "LogisticNormal", "sampling"),
        ("Poisson", "Normal", "undefined"),
        ("Gamma", "Multinomial", None),  # of another event shape
    ],
)
def test_the_table_has_the_route(table, q, p, route):
    assert {(pair.q, pair.p): pair.route for pair in table}.get((q, p)) == route


def test_the_table_says_what_auto_says_where_nothing_has_to_be_computed(table):
    names = {"closed form": "closed_form", "enumeration": "enumeration", "sampling": "monte_carlo"}
    examples = {example.name: example for example in EXAMPLES}
    loss = AutoKL(fallback=[Quadrature(), MonteCarlo()])
    for pair in table:
        if pair.route in names:
            assert names[pair.route] in loss.route(examples[pair.q].q, examples[pair.p].p)


def test_a_type_selects_the_pairs_that_are_made_of_it(table):
    selected = routes(type_name="Binomial")
    assert set(selected) == {pair for pair in table if "Binomial" in (pair.q, pair.p)}
    inner = routes(type_name="Laplace")
    assert RoutedPair("Independent(Laplace)", "Independent(Normal)", "closed form") in inner


def test_an_unknown_type_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Bernoulli, Beta, .*Wishart; got 'Gama'"):
        routes(type_name="Gama")


def test_own_examples_make_an_own_table():
    own = Example("mine", Normal(0.0, 1.0), Normal(1.0, 1.0)), Example("other", StudentT(3.0), StudentT(4.0))
    assert routes(own)[:2] == [RoutedPair("mine", "mine", "closed form"), RoutedPair("mine", "other", "quadrature")]


def test_grouping_and_markdown_keep_every_pair_once(table):
    flat = [RoutedPair(q, p, route) for q, by in grouped(table).items() for route, names in by.items() for p in names]
    assert sorted(map(str, flat)) == sorted(map(str, table))
    page = markdown(table)
    counts = re.findall(r"^\| (.+?) \| (\d+) \|", page, re.MULTILINE)
    assert [route for route, _ in counts] == list(ROUTES)
    assert sum(int(count) for _, count in counts) == len(table)


def test_the_page_in_docs_is_current(table, tmp_path):
    write_docs(table, tmp_path / "pairs.md")
    assert (tmp_path / "pairs.md").read_text() == PAGE.read_text(), (
        "run python -m torch_klloss pairs --write-docs docs/pairs.md"
    )


def test_the_global_random_stream_is_left_alone():
    state = torch.get_rng_state()
    routes([example for example in EXAMPLES if example.name in ("Dirichlet", "LogisticNormal")])
    assert torch.equal(torch.get_rng_state(), state)
