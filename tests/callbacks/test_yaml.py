"""Losses with every method and sampler from the YAML of jsonargparse, which LightningCLI reads."""

import jsonargparse
import pytest
from torch import nn

from torch_klloss import AutoKL, KLLoss
from torch_klloss.methods import ClosedForm, Enumeration, FirstOf, MixtureBound, MonteCarlo, Quadrature
from torch_klloss.samplers import IID, Antithetic, Sobol, Stratified

# What jsonargparse deprecates is of its own import.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


class Model(nn.Module):
    def __init__(self, kl: KLLoss):
        super().__init__()
        self.kl = kl


def entry(cls, **arguments):
    return {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": arguments}


METHODS = {
    "closed form": (entry(ClosedForm), ClosedForm()),
    "enumeration": (entry(Enumeration, max_terms=0), Enumeration(max_terms=0)),
    "mixture bound": (entry(MixtureBound, side="upper"), MixtureBound("upper")),
    "quadrature": (entry(Quadrature, num_nodes=32, rtol=1e-4), Quadrature(32, rtol=1e-4)),
    "monte carlo": (entry(MonteCarlo, num_samples=8, gradient="pathwise"), MonteCarlo(8, gradient="pathwise")),
    "mixed": (entry(MonteCarlo, num_samples=8, gradient="mixed"), MonteCarlo(8, gradient="mixed")),
    **{
        repr(sampler): (entry(MonteCarlo, num_samples=8, sampler=written), MonteCarlo(8, sampler=sampler))
        for written, sampler in [
            (entry(IID), IID()),
            (entry(Antithetic), Antithetic()),
            (entry(Stratified, replicates=2), Stratified(2)),
            (entry(Sobol, replicates=2), Sobol(2)),
        ]
    },
}


def parsed(kl):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Model, "model")
    return parser.instantiate_classes(parser.parse_object({"model": {"kl": kl}})).model.kl


@pytest.mark.parametrize(("written", "method"), METHODS.values(), ids=METHODS)
def test_every_method_is_written_in_yaml(written, method):
    assert parsed(entry(KLLoss, method=written)).method == method
    assert parsed(entry(AutoKL, fallback=written)).method == AutoKL(method).method
    both = [written, entry(MonteCarlo, num_samples=4)]
    assert parsed(entry(AutoKL, fallback=both)).method == AutoKL([method, MonteCarlo(4)]).method


def test_the_first_of_some_methods_is_written_in_yaml():
    written = entry(FirstOf, methods=[entry(ClosedForm), entry(MonteCarlo, num_samples=8)])
    assert parsed(entry(KLLoss, method=written)).method == FirstOf(ClosedForm(), MonteCarlo(8))
    nested = entry(FirstOf, methods=[written, entry(Quadrature)])
    assert (
        parsed(entry(AutoKL, fallback=nested)).method
        == AutoKL(FirstOf(FirstOf(ClosedForm(), MonteCarlo(8)), Quadrature())).method
    )
