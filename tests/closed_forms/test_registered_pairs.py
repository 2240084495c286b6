"""Properties of every registered pair: a sweep over torch's table and the library's own.

The instances come from `tests/families.py`.
"""

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import CodeType

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, ExponentialFamily
from torch.distributions import kl_divergence as torch_kl
from torch.distributions.kl import _KL_REGISTRY

from tests.families import FAMILIES, Family, Space
from torch_klloss import kl_divergence
from torch_klloss.closed_forms.cross_family import registration
from torch_klloss.closed_forms.cross_family.registration import FORMULAS
from torch_klloss.closed_forms.registry import _RULES

Batch = tuple[int, ...]

ABSTRACT = {ExponentialFamily, Distribution}  # have no instances of their own; their rules stand for all classes
PARTS = 0.618033988749895
INSTANCES = {f.type: f for f in reversed(FAMILIES)}  # the first entry of a type

HOMES = ("torch.", "torch_klloss.")  # Pyro, where it was imported, has registered types of its own
TYPES = sorted(
    {
        types
        for types in (*_KL_REGISTRY, *_RULES)
        if ABSTRACT.isdisjoint(types) and all(cls.__module__.startswith(HOMES) for cls in types)
    },
    key=lambda types: tuple(cls.__name__ for cls in types),
)


@dataclass(frozen=True)
class Side:
    """One place of a pair: a family, and the spaces that its parameters are taken from there."""

    family: Family
    spaces: dict[str, Space]
    phase: float

    def parameters(self, batch: Batch, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Return one tensor `[*batch, *parameter]` for each parameter, from numbers that are all different."""
        found = []
        for i, space in enumerate(self.spaces.values()):
            shape = torch.Size((*batch, space.size))
            steps = torch.arange(shape.numel(), dtype=torch.float64)
            raw = 2 * ((self.phase + 0.29 * i + PARTS * steps) % 1) - 1
            found.append((space.wide or space.of)(raw.view(shape)).to(dtype))
        return found

    def build(self, parameters: Sequence[Tensor]) -> Distribution:
        return self.family.of(dict(zip(self.spaces, parameters, strict=True)), validate_args=False)

    def takes(self, what: str) -> bool:
        """Return whether torch's constructor takes parameters in "half" precision, a "nan", or a "trace"."""
        return what not in self.family.defects


@dataclass(frozen=True)
class Pair:
    """Two instances, and their KL as a function of one flat list of parameters, q's first."""

    q: Side
    p: Side
    rule: Callable[[Distribution, Distribution], Tensor] = kl_divergence

    @classmethod
    def of(cls, f: Family, g: Family) -> "Pair":
        return cls(Side(f, f.spaces | f.sweep, 0.1), Side(g, g.spaces | g.sweep | g.sweep_p, 0.37))

    def parameters(self, q_batch: Batch, p_batch: Batch, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [*self.q.parameters(q_batch, dtype), *self.p.parameters(p_batch, dtype)]

    def kl(self, *parameters: Tensor) -> Tensor:
        of_q, of_p = parameters[: len(self.q.spaces)], parameters[len(self.q.spaces) :]
        return self.rule(self.q.build(of_q), self.p.build(of_p))

    @property
    def free(self) -> list[int]:
        """The indices of the parameters that can be differentiated by."""
        spaces = [*self.q.spaces.values(), *self.p.spaces.values()]
        return [i for i, space in enumerate(spaces) if not space.constant]

    @property
    def traced(self) -> bool:
        return self.q.takes("trace") and self.p.takes("trace")

    def leaves(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Return parameters, and those among them that can be differentiated by, as leaves."""
        parameters = self.parameters(batch, batch)
        return parameters, [parameters[i].requires_grad_() for i in self.free]


def name_of(types: tuple[type[Distribution], type[Distribution]]) -> str:
    return "‖".join(cls.__name__ for cls in types)


PAIRS = {
    name_of(types): Pair.of(*(INSTANCES[cls] for cls in types)) for types in TYPES if INSTANCES.keys() >= set(types)
}


OURS = [types for types in TYPES if types in _RULES and name_of(types) in PAIRS]


def code_of(types: tuple[type[Distribution], type[Distribution]]) -> CodeType:
    """Return the code that computes the KL of a pair: of its formula, or of its rule."""
    return inspect.unwrap(FORMULAS.get(types, _RULES[types])).__code__


def by_function(types: tuple[type[Distribution], type[Distribution]]) -> set[object]:
    """Return the function that computes a pair, and each family with it: some are one function for many pairs."""
    code = code_of(types)
    return {code, *((code, cls) for cls in types)}


def by_kind(types: tuple[type[Distribution], type[Distribution]]) -> set[object]:
    """Return the function of a pair of like families, the file of another, and the families whose moments it takes."""
    code = code_of(types)
    moments = {(code, cls) for cls in types if code.co_filename == registration.__file__}
    return {code if types[0] is types[1] else code.co_filename, *moments}


@cache
def representatives(parts_of: Callable[[tuple[type[Distribution], type[Distribution]]], set[object]]) -> frozenset[str]:
    """Return pairs that have all parts together: those first that add most, so that few suffice."""
    kept, seen = set(), set()
    for num_new in (3, 2, 1):
        for types in OURS:
            if len(parts_of(types) - seen) >= num_new:
                kept.add(name_of(types))
                seen |= parts_of(types)
    return frozenset(kept)


SAID_BEFORE = {name_of(types) for types in OURS} - representatives(by_function)
"""Pairs of a function, and of families, that the pairs before have had together; `make test-all` takes them too."""

every_pair = pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, id=name, marks=pytest.mark.exhaustive if name in SAID_BEFORE else ())
        for name, pair in PAIRS.items()
    ],
)


def finite_sum(value: Tensor) -> Tensor:
    return torch.where(value.isfinite(), value, 0.0).sum()


def test_every_registered_type_has_instances():
    assert {cls for types in TYPES for cls in types} <= INSTANCES.keys(), "add an entry to tests/families.py"


BATCHES = [((3,), (2, 1)), ((2, 1), (3,)), ((2, 3), ()), ((), (2, 3))]


def pairs_with_batches():
    """Return the pairs with batch shapes: in every run all of a representative, and one of any other, in turn."""
    for i, (name, pair) in enumerate(PAIRS.items()):
        for j, batches in enumerate(BATCHES):
            often = name not in SAID_BEFORE or i % len(BATCHES) == j
            marks = [] if often else [pytest.mark.exhaustive]
            yield pytest.param(pair, *batches, id=f"{name}-{j}", marks=marks)


@pytest.mark.parametrize(("pair", "q_batch", "p_batch"), list(pairs_with_batches()))
def test_batch_shapes_broadcast_to_the_kl_of_every_element(pair, q_batch, p_batch):
    of_q, of_p = pair.q.parameters(q_batch), pair.p.parameters(p_batch)
    value = pair.kl(*of_q, *of_p)
    assert value.shape == torch.broadcast_shapes(q_batch, p_batch) == (2, 3)

    def element(t: Tensor, batch: Batch, index: Batch) -> Tensor:
        return t.expand(2, 3, *t.shape[len(batch) :])[index]

    for index in itertools.product(range(2), range(3)):
        alone = [element(t, batch, index) for d, batch in ((of_q, q_batch), (of_p, p_batch)) for t in d]
        torch.testing.assert_close(value[index], pair.kl(*alone), rtol=1e-12, atol=1e-14)


def pairs_with_dtypes():
    """Return the pairs with dtypes: in every run three of a representative, and one of any other, in turn."""
    dtypes = (torch.bfloat16, torch.float32, torch.float64, torch.float16)
    for i, (name, pair) in enumerate(PAIRS.items()):
        for j, dtype in enumerate(dtypes):
            often = j == i % 3 or (j < 3 and name not in SAID_BEFORE)
            marks = [] if often else [pytest.mark.exhaustive]
            yield pytest.param(pair, dtype, id=f"{name}-{dtype}", marks=marks)


@pytest.mark.parametrize(("pair", "dtype"), list(pairs_with_dtypes()))
def test_the_dtype_that_comes_in_goes_out(pair, dtype):
    if dtype.itemsize == 2 and not (pair.q.takes("half") and pair.p.takes("half")):
        with pytest.raises((NotImplementedError, RuntimeError), match="not implemented for"):
            pair.kl(*pair.parameters((3,), (3,), dtype))
        return
    parameters = pair.parameters((3,), (3,), dtype)
    value, exact = pair.kl(*parameters), pair.kl(*(t.double() for t in parameters))
    assert value.dtype == dtype
    # The constructor may round as well, as that of Categorical does, to which the KL is no more sensitive than this.
    torch.testing.assert_close(
        value.double(), exact, rtol=16 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps
    )


@every_pair
def test_vmap_gives_what_a_loop_gives(pair):
    if not pair.traced:
        pytest.skip("torch's constructor asks for the values of its arguments")
    parameters = pair.parameters((3,), (3,))
    loop = torch.stack([pair.kl(*(t[i] for t in parameters)) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(pair.kl)(*parameters), loop, rtol=1e-12, atol=1e-14)
    assert torch.func.vmap(pair.kl)(*pair.parameters((3,), (3,), torch.float32)).dtype == torch.float32


@every_pair
def test_the_gradient_reaches_every_parameter_and_can_be_differentiated(pair):
    parameters, leaves = pair.leaves((3,))
    value = pair.kl(*parameters)
    gradient = torch.autograd.grad(value.sum(), leaves, create_graph=True, allow_unused=True)
    assert all(g is not None for g in gradient)
    if value.isinf().all():
        assert all((g == 0).all() for g in gradient)
        return
    assert all(g.isfinite().all() for g in gradient)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradient), leaves, allow_unused=True)
    assert any(g is not None for g in second)
    assert all(g is None or g.isfinite().all() for g in second)


@every_pair
def test_a_functional_gradient_is_that_of_backward(pair):
    parameters, leaves = pair.leaves((3,))
    expected = torch.autograd.grad(finite_sum(pair.kl(*parameters)), leaves, allow_unused=True)
    expected = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(expected, leaves, strict=True)]
    plain = [t.detach() for t in parameters]
    if pair.free and pair.traced:
        found = torch.func.grad(lambda *t: finite_sum(pair.kl(*t)), argnums=tuple(pair.free))(*plain)
        torch.testing.assert_close(list(found), expected, rtol=1e-10, atol=1e-12)


@every_pair
def test_a_nan_stays_where_it_is(pair):
    parameters = pair.parameters((3,), (3,))
    value = pair.kl(*parameters)
    for i in pair.free:
        d = pair.q if i < len(pair.q.spaces) else pair.p
        spoiled = [t.clone() for t in parameters]
        spoiled[i].view(3, -1)[1, 0] = torch.nan
        if not d.takes("nan"):
            continue
        found = pair.kl(*spoiled)
        assert found.isnan().tolist() == [False, True, False], i
        torch.testing.assert_close(found[::2], value[::2], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["Normal‖Uniform", "Beta‖Pareto", "Poisson‖Bernoulli", "Wishart‖Wishart"])
def test_the_sweep_rejects_the_shapes_of_torch(name):
    pair = replace(PAIRS[name], rule=torch_kl)
    with pytest.raises((AssertionError, RuntimeError)):
        test_batch_shapes_broadcast_to_the_kl_of_every_element(pair, (3,), (2, 1))
