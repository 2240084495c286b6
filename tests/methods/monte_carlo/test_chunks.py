"""Expectations in chunks: the same draws, value, error and gradient, with the memory of a chunk."""

import sys

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Gamma, Independent, MixtureSameFamily, Normal, StudentT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.processes import run as in_a_new_process
from torch_klloss.methods.monte_carlo.chunks import expectation_in_chunks
from torch_klloss.samplers import IID, Antithetic, Points, Sobol, Stratified
from torch_klloss.samplers.components import prepare_by_component
from torch_klloss.samplers.draws import StoredDraws, noise_in_blocks, prepare

F64 = torch.float64
SAMPLERS = [IID(), Antithetic(), Stratified(), Stratified(8), Sobol(), Sobol(8)]


class Plain:
    """A user's sampler that knows no parts."""

    def __repr__(self):
        return "Plain()"

    def draw(self, q, num_samples, *, differentiable):
        x = q.rsample((num_samples,)) if differentiable else q.sample((num_samples,))
        return Points(x, torch.full((num_samples, 1), 1 / num_samples, dtype=F64), num_replicates=num_samples)


def step(sampler, num_samples, chunk_size, family=Normal):
    torch.manual_seed(3)
    leaves = [torch.linspace(0.5, 2.0, 5, dtype=F64).requires_grad_() for _ in range(2)]
    df = torch.tensor(4.0, dtype=F64, requires_grad=True)
    q, p = family(*leaves), StudentT(df)
    draws = prepare(sampler, q, num_samples, differentiable=True)

    def evaluate(start, stop):
        points = draws.part(start, stop)
        return points, q.log_prob(points.x) - p.log_prob(points.x)

    result = expectation_in_chunks(evaluate, num_samples, chunk_size)
    return result, torch.autograd.grad(result.value.sum(), [*leaves, df])


@pytest.mark.parametrize(
    ("num_samples", "chunk_size"),
    [(8, 1), (8, 7), (8, 64), pytest.param(200, 3, marks=pytest.mark.exhaustive), (200, 7), (200, 64), (200, 100)],
)
@pytest.mark.parametrize("sampler", [*SAMPLERS, Plain()], ids=repr)
def test_neither_value_nor_error_nor_gradient_depend_on_the_chunk_size(sampler, num_samples, chunk_size):
    (whole, whole_gradients), (parts, gradients) = (step(sampler, num_samples, size) for size in (None, chunk_size))
    assert whole.num_points == parts.num_points == num_samples
    assert whole.dof == parts.dof
    torch.testing.assert_close(parts.value, whole.value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts.std_error, whole.std_error, rtol=1e-11, atol=1e-14, equal_nan=True)
    for part, full in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(part, full, rtol=1e-11, atol=1e-13)


def test_draws_whose_quantiles_are_found_numerically_are_the_same_in_parts():
    (_, whole), (_, parts) = (step(Sobol(), 32, size, Gamma) for size in (None, 5))
    for part, full in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, full, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("num_samples", [16, 200])
def test_what_draw_returns_is_what_the_parts_make(sampler, num_samples):
    q = Independent(Normal(torch.zeros(3, 2), 1.0), 1)
    torch.manual_seed(0)
    drawn = sampler.draw(q, num_samples, differentiable=False)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    draws = prepare(sampler, q, num_samples, differentiable=False)
    assert torch.equal(torch.get_rng_state(), after)
    parts = torch.cat([draws.part(start, min(start + 9, num_samples)).x for start in range(0, num_samples, 9)])
    assert torch.equal(parts, drawn.x)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("sampler", [IID(), Sobol(4)], ids=repr)
def test_a_mixture_is_the_same_in_parts(sampler):
    def run(chunk_size):
        torch.manual_seed(1)
        logits = torch.tensor([0.3, -0.4], dtype=F64, requires_grad=True)
        loc = torch.tensor([[-1.0, 1.0], [0.0, 2.0], [3.0, 1.0]], dtype=F64, requires_grad=True)
        q, p = MixtureSameFamily(Categorical(logits=logits.expand(3, 2)), Normal(loc, 0.7)), Normal(loc[0, 0] * 0, 1.0)
        draws = prepare_by_component(sampler, q, 40, differentiable=True)

        def evaluate(start, stop):
            points = draws.part(start, stop).points
            return points, q.log_prob(points.x) - p.log_prob(points.x)

        result = expectation_in_chunks(evaluate, 40, chunk_size, summed=1)
        return result.value, result.std_error, *torch.autograd.grad(result.value, (logits, loc)), result

    whole, parts = run(None), run(7)
    for part, full in zip(parts[:4], whole[:4], strict=True):
        torch.testing.assert_close(part, full, rtol=1e-11, atol=1e-13)
    assert parts[4].num_points == 80
    assert parts[4].dof == whole[4].dof


@pytest.mark.parametrize("replicates", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 12])
def test_the_error_is_that_of_the_points_however_replicates_are_broken_up(replicates, chunk_size):
    torch.manual_seed(0)
    f = torch.randn(12, 4, dtype=F64)
    points = Points(f, torch.full((12, 1), 1 / 12, dtype=F64), num_replicates=replicates)

    def evaluate(start, stop):
        return Points(f[start:stop], points.weights[start:stop], replicates), f[start:stop]

    for summed in (0, 1):
        error = expectation_in_chunks(evaluate, 12, chunk_size, summed).std_error
        torch.testing.assert_close(error, points.std_error(f, summed), equal_nan=True)


def test_points_that_are_not_random_have_no_error():
    nodes = Points(torch.arange(4.0), torch.full((4,), 0.25), num_replicates=None)
    result = expectation_in_chunks(lambda a, b: (Points(nodes.x[a:b], nodes.weights[a:b], None), nodes.x[a:b]), 4, 2)
    assert result.value == 1.5
    assert result.std_error is result.dof is None


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0, True])
def test_a_chunk_size_that_is_no_positive_integer_is_refused(chunk_size):
    with pytest.raises(ValueError, match=r"chunk_size .* must be an integer of at least 1"):
        expectation_in_chunks(lambda *_: None, 4, chunk_size)


def test_the_draws_of_a_block_do_not_depend_on_the_others():
    torch.manual_seed(0)
    part = noise_in_blocks(lambda n: torch.randn(n, 3), 300, torch.device("cpu"))
    assert torch.equal(part(100, 200), part(0, 300)[100:200])
    assert part(0, 300).unique().numel() == 900


class Square(torch.autograd.Function):
    """Hides what it is given from whoever looks on."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, upstream):
        return 2 * upstream * ctx.saved_tensors[0]


def through_a_network(chunk_size, hidden=None):
    """Return a function of the sum, its leaves, and what hooks saw; `hidden` names what a custom function reads."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    raw = torch.zeros(5, 3, dtype=F64, requires_grad=True)
    scale, seen = raw.exp(), []
    scale.retain_grad()
    scale.register_hook(lambda gradient: seen.append(gradient.clone()))
    raw.register_hook(lambda gradient: 3 * gradient)
    free = torch.full((5, 3), 0.5, dtype=F64, requires_grad=True)
    shared = torch.full((5, 3), 0.25, dtype=F64, requires_grad=True)
    read = {"a leaf": free, "a leaf read twice": shared, "a leaf with a hook": raw, "a result": scale}
    q = Independent(Normal(raw * 1.0, scale), 1)
    draws = prepare(IID(), q, 130, differentiable=True)

    def evaluate(start, stop):
        points = draws.part(start, stop)
        f = q.log_prob(points.x) - network(points.x * shared).squeeze(-1)
        return points, f + Square.apply(read[hidden]).sum(-1) if hidden else f

    value = expectation_in_chunks(evaluate, 130, chunk_size).value.square()
    return value.sum(), scale, seen, [raw, free, shared, *network.parameters()]


HIDDEN = pytest.mark.parametrize("hidden", [None, "a leaf", "a leaf read twice", "a leaf with a hook", "a result"])


@HIDDEN
def test_parameters_of_a_network_and_hooks_get_the_whole_gradient_once(hidden):
    def run(chunk_size):
        value, scale, seen, leaves = through_a_network(chunk_size, hidden)
        value.backward()
        assert len(seen) == 1
        return [value, scale.grad, seen[0], *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    for part, full in zip(run(32), run(None), strict=True):
        torch.testing.assert_close(part, full, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("with_a_result", [False, True])
def test_the_hook_of_a_leaf_that_only_a_custom_function_reads_runs_once_and_outside_of_checkpoints(with_a_result):
    """A checkpoint of torch 2.8 and before loses this hook."""

    def run(chunk_size):
        raw, leaf = (torch.full((5,), value, requires_grad=True) for value in (0.5, 2.0))
        leaf.register_hook(lambda gradient: 3 * gradient)
        result, x, calls = raw.exp(), torch.arange(6.0), []

        def evaluate(start, stop):
            calls.append((start, stop))
            f = Square.apply(leaf).sum() + (Square.apply(result).sum() if with_a_result else 0.0)
            return Points(x[start:stop], torch.tensor(1 / 6), 6), f * x[start:stop]

        value, forward = expectation_in_chunks(evaluate, 6, chunk_size).value, len(calls)
        value.backward()
        assert len(calls) == forward
        return [leaf.grad, raw.grad] if with_a_result else [leaf.grad]

    for part, full in zip(run(2), run(None), strict=True):
        torch.testing.assert_close(part, full)
    torch.testing.assert_close(run(2)[0], torch.full((5,), 3 * 4.0 * 2.5))


@HIDDEN
def test_the_gradient_can_be_differentiated_again(hidden):
    def run(chunk_size):
        value, _, _, (raw, free, shared, *weights) = through_a_network(chunk_size, hidden)
        wrt = [raw, shared, *([free] if hidden == "a leaf" else [])]
        gradients = torch.autograd.grad(value, wrt, create_graph=True)
        return *gradients, *torch.autograd.grad(sum(g.square().sum() for g in gradients), [*wrt, *weights[:3]])

    for part, full in zip(run(32), run(None), strict=True):
        torch.testing.assert_close(part, full, rtol=1e-11, atol=1e-12)


def test_a_leaf_that_a_custom_function_reads_needs_no_checkpoints():
    assert nodes_of(through_a_network(32, "a leaf")[0]) == nodes_of(through_a_network(32)[0]) + 1  # the leaf
    assert nodes_of(through_a_network(32, "a result")[0]) > 2 * nodes_of(through_a_network(32)[0])


def nodes_of(value):
    todo, seen = [value.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return len(seen)


def test_chunks_leave_a_single_node_in_the_graph():
    value = step_value(8)
    assert type(value.grad_fn).__name__ == "_RecomputationBackward"
    with torch.no_grad():
        assert step_value(8).grad_fn is None


def step_value(chunk_size):
    leaf = torch.linspace(0.5, 2.0, 5, requires_grad=True)
    draws = prepare(IID(), Normal(leaf, 1.0), 100, differentiable=True)

    def evaluate(start, stop):
        points = draws.part(start, stop)
        return points, points.x**2

    return expectation_in_chunks(evaluate, 100, chunk_size).value


def test_a_chunk_that_reads_other_tensors_in_the_backward_pass_is_an_error():
    leaf, calls = torch.ones(4, requires_grad=True), []

    def evaluate(start, stop):
        calls.append(start)
        x = leaf if len(calls) <= 5 else torch.ones(4, requires_grad=True)
        return Points(x[start:stop], torch.tensor(0.25), 4), x[start:stop]

    value = expectation_in_chunks(evaluate, 4, 2).value
    with pytest.raises(RuntimeError, match="must read the same tensors as the forward pass"):
        value.backward()


def test_under_autocast_the_gradient_is_that_of_a_single_chunk():
    seen = []

    def run(chunk_size):
        torch.manual_seed(0)
        layer, x, dtypes = torch.nn.Linear(3, 1), torch.randn(12, 3), []

        def evaluate(start, stop):
            y = layer(x[start:stop]).squeeze(-1)
            dtypes.append(y.dtype)
            return Points(x[start:stop], torch.tensor(1 / 12), 12), y.float() ** 2

        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = expectation_in_chunks(evaluate, 12, chunk_size).value
        assert chunk_size is None or type(value.grad_fn).__name__ == "_RecomputationBackward"
        (gradient,) = torch.autograd.grad(value, layer.weight)
        seen.append(dtypes[-1])
        return gradient

    torch.testing.assert_close(run(5), run(None), rtol=3 * 2**-8, atol=3 * 2**-8)
    assert seen == [torch.bfloat16] * 2  # in the backward pass, too, which is outside of the autocast


class Doubling(IID):
    """Draws in its own way, and inherits `prepare`."""

    def draw(self, q, num_samples, *, differentiable):
        return StoredDraws(super().draw(q, num_samples, differentiable=differentiable)).part(0, 1)


class Renamed(IID):
    """Leaves all as it is."""


def test_a_draw_of_ones_own_is_not_passed_over_for_an_inherited_prepare():
    q = Normal(torch.zeros(2), 1.0)
    assert len(prepare(Doubling(), q, 8, differentiable=False).part(0, 8).x) == 1
    assert not isinstance(prepare(Renamed(), q, 8, differentiable=False), StoredDraws)


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that are alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            key, size = storage._cdata, storage.nbytes()
            if key not in self.seen:
                self.now += size
                self.peak = max(self.peak, self.now)
                self.seen[key] = weakref.finalize(storage, self.free, key, size)
        return out

    def free(self, key, size):
        del self.seen[key]
        self.now -= size


def peak(num_samples, chunk_size, sampler):
    leaf = torch.zeros(64, 32, requires_grad=True)
    with Peak() as mode:
        q, p = Independent(Normal(leaf, 1.0), 1), Independent(StudentT(torch.full((32,), 4.0)), 1)
        draws = prepare(sampler, q, num_samples, differentiable=True)

        def evaluate(start, stop):
            points = draws.part(start, stop)
            return points, q.log_prob(points.x) - p.log_prob(points.x)

        torch.autograd.grad(expectation_in_chunks(evaluate, num_samples, chunk_size).value.sum(), leaf)
    return mode.peak


@pytest.mark.parametrize("sampler", [IID(), Sobol()], ids=repr)
def test_many_draws_in_chunks_take_the_memory_of_one_chunk(sampler):
    few = peak(64, None, sampler)
    assert peak(1024, 64, sampler) <= 1.2 * few
    assert peak(1024, None, sampler) > 8 * few


RESIDENT = """
import json, os, torch
torch.set_num_threads(1)
from torch.distributions import Normal, StudentT
from torch_klloss import MonteCarloKL

def status(key):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[key].split()[0])

def peak(loss, steps):
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
    before = status("VmRSS")
    for _ in range(steps):
        loss(Normal(mean, logvar.exp()), StudentT(torch.full((32,), 4.0))).backward()
    return status("VmHWM") - before

mean, logvar = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
for num_samples, chunk_size in ((3, None), (200, 64)):  # what the first calls load is no part of it
    loss = MonteCarloKL(num_samples, chunk_size=chunk_size)
    loss(Normal(mean, logvar.exp()), StudentT(torch.full((2,), 4.0))).backward()
mean, logvar = (torch.zeros(256, 32, requires_grad=True) for _ in range(2))
mean.grad, logvar.grad = torch.zeros(256, 32), torch.zeros(256, 32)
print(json.dumps(peak(MonteCarloKL(%s), %s)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of the resident memory from /proc")
@pytest.mark.long
def test_the_resident_memory_of_chunks_is_that_of_steps_with_as_many_draws():
    steps = in_a_new_process(RESIDENT % ("64", 8))
    assert in_a_new_process(RESIDENT % ("512, chunk_size=64", 1)) <= 1.2 * steps
    assert in_a_new_process(RESIDENT % ("512", 1)) > 4 * steps
