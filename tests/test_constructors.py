"""Public constructors: an argument of a wrong kind is an error of this library that names the argument.

The classes come from `__all__` of every public module, and what is a wrong kind from the annotations.
"""

import collections.abc
import importlib
import inspect
import math
import re
import traceback
import types
import typing

import pytest
import torch

from torch_klloss import schedules
from torch_klloss.methods import ClosedForm

MODULES = ["", ".callbacks", ".elbo", ".language", ".methods", ".samplers", ".schedules", ".testing"]
RESULTS = {  # what the library makes, and what others derive from
    "ELBOTerms", "KLDecomposition", "KLEstimate", "KLReport", "Method", "NotCertifiedError", "Points",
    "RoundedDrawsWarning", "Sampler", "Schedule",
}  # fmt: skip
GIVEN = {  # arguments without a default
    "Constant": {"value": 1.0},
    "GECO": {"tolerance": 1.0},
    "KLAnnealing": {"schedule": schedules.Constant(1.0)},
    "KLLoss": {"method": ClosedForm()},
    "LinearHead": {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3)},
    "MixtureBound": {"side": "upper"},
    "PIControl": {"target": 1.0},
    "FirstOf": {"methods": ClosedForm()},
    "SparseTeacher": {"ids": torch.zeros(2, 1, dtype=torch.long), "log_probs": torch.zeros(2, 1)},
    "VocabShards": {"logits": torch.zeros(2, 5), "start": 0},
    **{name: {"steps": 10} for name in ("Linear", "Sigmoid", "Cosine", "Cyclical")},
}
SIGNED = {"value", "start", "stop", "tolerance", "seed", "ignore_index"}  # negative numbers are right
CALLED = {"fallback": "method", "methods": "method"}  # what an error calls the argument


def classes():
    found = {}
    for name in MODULES:
        module = importlib.import_module(f"torch_klloss{name}")
        found |= {each: getattr(module, each) for each in module.__all__ if inspect.isclass(getattr(module, each))}
    return {name: cls for name, cls in sorted(found.items()) if name not in RESULTS}


def kinds(annotation):
    """Return the plain types that an annotation takes; words, sequences and objects among them."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return set().union(*(kinds(each) for each in typing.get_args(annotation)))
    if origin is typing.Literal:
        return {"word"}
    if annotation is None:
        return {type(None)}
    if annotation is float:
        return {int, float}
    if inspect.isclass(origin or annotation) and issubclass(origin or annotation, collections.abc.Sequence):
        return {str} if annotation is str else {list}
    return {annotation}


def wrong_arguments(cls):
    """Yield every parameter with values of a kind that its annotation does not take."""
    hints = typing.get_type_hints(cls.__init__)
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL or hints.get(parameter.name, typing.Any) is typing.Any:
            continue
        taken = kinds(hints[parameter.name])
        values = [("bogus", str), (None, type(None)), ([object()], None), (True, bool), (object(), None)]
        values += [(math.nan, None)] if float in taken else [(1.5, float)]
        values += [(-1, None)] if int in taken and parameter.name not in SIGNED else []
        yield from ((parameter.name, value) for value, kind in values if kind not in taken)


def misses(cls, name, value):
    """Return what is missing of the error for a wrong argument; None if it is as it should be."""
    try:
        cls(**(GIVEN.get(cls.__name__, {}) | {name: value}))
    except (TypeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours, text = "torch_klloss" in frames[-1].filename, str(error)
        is_named = re.search(rf"\b{CALLED.get(name, name)}\b", text) and "got" in text
        return None if ours and is_named else f"{name}={value!r}: {text!r}"
    return f"{name}={value!r} is taken"


@pytest.mark.parametrize("cls", classes().values(), ids=classes())
def test_a_wrong_kind_is_an_error_that_names_the_argument(cls):
    cls(**GIVEN.get(cls.__name__, {}))
    found = [misses(cls, name, value) for name, value in wrong_arguments(cls)]
    assert [each for each in found if each] == []


def test_the_sweep_sees_every_kind_of_argument():
    found = [(name, type(value)) for cls in classes().values() for name, value in wrong_arguments(cls)]
    assert len(found) > 600
    assert {str, type(None), list, bool, object, float, int} <= {kind for _, kind in found}
