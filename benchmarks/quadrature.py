"""How accurate is `Quadrature` at a given cost, and what does a batch cost, compared with sampling?

- "accuracy": pairs whose KL is known from a closed form or from mpmath at 18 digits: the relative errors of value and
  gradient, the certified bound, and the number of points, the scan included. The peer is `MonteCarlo` with 64 draws:
  how many times larger its squared error is for the same number of evaluations. Every value must be within the larger
  of rtol and its own error bound; otherwise the exit status is 1.
- "cost": 4096x16 pairs Normal‖StudentT(4), forward and backward, against `MonteCarlo(64)` of the same pairs in turns,
  in float32 and in float64, and the peak memory beyond the parameters and their gradients, each in a fresh process.
  Values are checked against a quadrature of four times as many nodes before timing.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import mpmath as mp
import torch
from common import Row, argument_parser, finish, interleaved, median, quartiles, ratios, show
from lib.coverage_densities import Line, beta, kumaraswamy, normal, student
from torch import Tensor
from torch.distributions import Beta, Distribution, Gamma, Kumaraswamy, Laplace, LogNormal, Normal, StudentT, Uniform

from torch_klloss import kl_divergence
from torch_klloss.methods import Method, MonteCarlo, Quadrature

DRAWS = 64
TARGET_RATIO, TARGET_MEMORY = 1.5, 2**30
ACCURACY = {
    "pair": "pair",
    "num_nodes": "nodes|d",
    "value": "KL|.6g",
    "value_error": "relative error|.1e",
    "gradient_error": "of the gradient|.1e",
    "error_bound": "certified|.1e",
    "num_evaluations": "evaluations|d",
    "gain": "squared error of sampling ÷ ours|.0e",
}
COST = {
    "dtype": "dtype",
    "peer": "peer",
    "forward_ms": "forward (ms)|.0f",
    "both_ms": "and backward (ms)|.0f",
    "ratio": "÷ sampling|.2f",
    "memory_mib": "extra memory (MiB)|.0f",
}
Pair = tuple[Distribution, Distribution]
Make = Callable[[Tensor], Pair]


def _normal_student(t: Tensor) -> Pair:
    return Normal(t[0], t[1]), StudentT(t[2])


def _gammas(t: Tensor) -> Pair:
    return Gamma(t[0], t[1]), Gamma(t[2], t[3])


# By name: the builder of the pair, its parameters, and the numbers of nodes.
PAIRS: dict[str, tuple[Make, tuple[float, ...], tuple[int, ...]]] = {
    "Normal‖StudentT(4)": (_normal_student, (0.3, 1.2, 4.0), (64,)),
    "Gamma(20, 2)‖Gamma(3, 1)": (_gammas, (20.0, 2.0, 3.0, 1.0), (64,)),
    "Gamma(0.3, 1)‖Gamma(3, 1)": (_gammas, (0.3, 1.0, 3.0, 1.0), (64, 256)),
    "Gamma(0.02, 1)‖Gamma(3, 1)": (_gammas, (0.02, 1.0, 3.0, 1.0), (64, 256)),
    "Beta(2, 3)‖Kumaraswamy(2, 2)": (
        lambda t: (Beta(t[0], t[1]), Kumaraswamy(t[2], t[3])),
        (2.0, 3.0, 2.0, 2.0),
        (64,),
    ),
    "Beta(2, 0.3)‖Beta(1.5, 2)": (lambda t: (Beta(t[0], t[1]), Beta(t[2], t[3])), (2.0, 0.3, 1.5, 2.0), (64,)),
    "Laplace‖Normal": (lambda t: (Laplace(t[0], t[1]), Normal(t[2], t[3])), (0.2, 1.1, 0.0, 1.5), (64,)),
    "LogNormal‖Gamma": (lambda t: (LogNormal(t[0], t[1]), Gamma(t[2], t[3])), (0.2, 0.9, 2.0, 1.0), (64,)),
    "Uniform(1, 3)‖Normal": (lambda t: (Uniform(t[0], t[1]), Normal(t[2], t[3])), (1.0, 3.0, 0.0, 1.0), (64,)),
    "Normal‖Normal, 1e-8 apart": (
        lambda t: (Normal(t[0], t[1]), Normal(t[2], t[3])),
        (0.0, 1.0, 1e-8, 1.0 + 1e-8),
        (64,),
    ),
}


# The laws of q and p where no closed form is at hand, and the points between which they are integrated.
LAWS: dict[str, tuple[Callable[..., tuple[Line, Line]], tuple[float, ...]]] = {
    "Normal‖StudentT(4)": (lambda m, s, nu: (normal(m, s), student(nu, 0, 1)), (-16, -4, 0, 4, 16)),
    "Beta(2, 3)‖Kumaraswamy(2, 2)": (lambda a, b, c, d: (beta(a, b), kumaraswamy(c, d)), (0, 0.5, 1)),
}


def _by_mpmath(name: str, *parameters: mp.mpf) -> mp.mpf:
    """Return the KL of the pair `name` of `LAWS`."""
    laws, points = LAWS[name]
    q, p = laws(*parameters)
    return mp.quad(lambda x: mp.exp(q.log_density(x)) * (q.log_density(x) - p.log_density(x)), points)


def truth(name: str, make: Make, parameters: tuple[float, ...]) -> tuple[float, Tensor]:
    """Return the KL and its gradient to the parameters."""
    if name in LAWS:
        f = partial(_by_mpmath, name)
        with mp.workdps(18):
            numbers = [mp.mpf(x) for x in parameters]
            slopes = [
                mp.diff(lambda x, k=k: f(*numbers[:k], x, *numbers[k + 1 :]), number)
                for k, number in enumerate(numbers)
            ]
            return float(f(*numbers)), torch.tensor([float(slope) for slope in slopes], dtype=torch.float64)
    t = torch.tensor(parameters, dtype=torch.float64, requires_grad=True)
    value = kl_divergence(*make(t))
    return value.item(), torch.autograd.grad(value, t)[0]


def accuracy(quick: bool) -> tuple[list[Row], list[str]]:
    """Return the rows of the first question, and the disagreements; no pair of `LAWS` if it has to be quick."""
    rows, disagreements = [], []
    for name, (make, parameters, nodes) in PAIRS.items():
        if quick and name in LAWS:
            continue
        exact, slopes = truth(name, make, parameters)
        for num_nodes in nodes:
            t = torch.tensor(parameters, dtype=torch.float64, requires_grad=True)
            estimate = Quadrature(num_nodes).estimate(*make(t))
            gradient = torch.autograd.grad(estimate.value, t)[0]
            error = abs(estimate.value.item() - exact)
            draws = MonteCarlo(DRAWS, gradient="none").estimate(*make(t.detach()), torch.Generator().manual_seed(0))
            variance = draws.std_error.item() ** 2 * DRAWS / estimate.num_evaluations
            rows.append(
                {
                    "pair": name,
                    "num_nodes": num_nodes,
                    "value": estimate.value.item(),
                    "value_error": error / exact,
                    "gradient_error": ((gradient - slopes).norm() / slopes.norm()).item(),
                    "error_bound": estimate.error_bound.item() / exact,
                    "num_evaluations": estimate.num_evaluations,
                    "gain": variance / max(error, 1e-16 * exact) ** 2,
                }
            )
            if error > max(1e-6 * exact, estimate.error_bound.item()):
                disagreements.append(f"{name}, {num_nodes} nodes: {estimate.value.item()} for {exact}")
    return rows, disagreements


class Batch:
    """The parameters of the second question, with its step."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.leaves = torch.randn(shape, dtype=dtype), 0.3 * torch.randn(shape, dtype=dtype)
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.df = torch.tensor(4.0, dtype=dtype)

    def value(self, method: Method) -> Tensor:
        """Return the KLs."""
        loc, log_scale = self.leaves
        return method.estimate(Normal(loc, log_scale.exp()), StudentT(self.df)).value

    def step(self, method: Method) -> None:
        """Take the KLs and their gradient."""
        for leaf in self.leaves:
            leaf.grad = None
        self.value(method).sum().backward()


METHODS: dict[str, Method] = {"sampling": MonteCarlo(DRAWS), "quadrature": Quadrature()}


def extra_memory(shape: tuple[int, int], dtype: torch.dtype, peer: str) -> float | None:
    """Return the peak memory of a step beyond its gradients, in bytes; None on other systems than Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_measure, shape, dtype, peer).result()


def _measure(shape: tuple[int, int], dtype: torch.dtype, peer: str) -> float:
    torch.set_num_threads(1)
    Batch((8, 2), dtype).step(METHODS[peer])
    batch = Batch(shape, dtype)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    batch.step(METHODS[peer])
    gradients = sum(leaf.grad.nbytes for leaf in batch.leaves if leaf.grad is not None)
    return _resident("VmHWM") - before - gradients


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def cost(shape: tuple[int, int], rounds: int, quick: bool) -> tuple[list[Row], list[str]]:
    """Return the rows of the second question, and the disagreements; memory is measured once if it has to be quick."""
    rows, disagreements = [], []
    for dtype in (torch.float32, torch.float64):
        batch = Batch(shape, dtype)
        value, finer = (
            batch.value(METHODS["quadrature"]),
            batch.value(Quadrature(256, rtol=1e-8 if dtype == torch.float64 else 1e-6)),
        )
        eps = torch.finfo(dtype).eps
        if ((value - finer).abs() > (1e-6 + 2 * eps) * finer).any():
            disagreements.append(f"{dtype}: 64 and 256 nodes differ")
        both = {peer: partial(batch.step, method) for peer, method in METHODS.items()}
        forward = {peer: partial(batch.value, method) for peer, method in METHODS.items()}
        interleaved(both, rounds=2)
        seconds, ahead = interleaved(both, rounds), interleaved(forward, rounds)
        for peer in METHODS:
            measured = not quick or (dtype, peer) == (torch.float32, "quadrature")
            memory = extra_memory(shape, dtype, peer) if measured else None
            low, ratio, high = quartiles(ratios(seconds[peer], seconds["sampling"]))
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "peer": peer,
                    "forward_ms": 1e3 * median(ahead[peer]),
                    "both_ms": 1e3 * median(seconds[peer]),
                    "ratio": ratio,
                    "ratio_quartiles": (low, high),
                    "memory_mib": None if memory is None else memory / 2**20,
                }
            )
    return rows, disagreements


def main() -> int:
    """Check, time, print; return the exit status."""
    arguments = argument_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    rows, disagreements = accuracy(arguments.quick)
    show("accuracy", rows, ACCURACY)
    shape, rounds = ((256, 16), 2) if arguments.quick else ((4096, 16), 15)
    costs, wrong = cost(shape, rounds, arguments.quick)
    show(f"cost of {shape[0]}x{shape[1]} pairs Normal‖StudentT(4)", costs, COST)
    for row in costs:
        if row["peer"] == "quadrature":
            low, high = row["ratio_quartiles"]
            print(
                f"{row['dtype']}: {row['ratio']:.2f} of the time of sampling (quartiles {low:.2f} to {high:.2f}; "
                f"target: at most {TARGET_RATIO}), extra memory {row['memory_mib']} MiB (target: {TARGET_MEMORY >> 20})"
            )
    return finish(arguments.json, rows + costs, disagreements + wrong)


if __name__ == "__main__":
    raise SystemExit(main())
