"""What a loss does to the process: the audit ends, gives a report, and leaves the process's state as it was."""

import contextlib
import random
import threading
import time

import numpy as np
import pytest
import torch

from torch_klloss import audit


def right(mu, logvar):
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1).mean()


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize("error", [UnprintableError, GeneratorExit, KeyboardInterrupt, SystemExit, RecursionError])
def test_whatever_a_loss_raises_is_reported(error):
    def loss(mu, logvar):
        raise error

    report = audit(loss)
    assert report.verdict == "not judged"
    assert f"raises {error.__name__}" in report.reason


def endless(mu, logvar):
    while True:
        pass


def stubborn(mu, logvar):
    for _ in range(2):
        with contextlib.suppress(BaseException):
            endless(mu, logvar)
    return right(mu, logvar)


@pytest.mark.parametrize("loss", [endless, stubborn, lambda mu, logvar: time.sleep(1000)])
def test_a_loss_that_does_not_end_is_ended(loss):
    report = audit(loss, timeout=0.2)
    assert (report.verdict, report.reason) == ("not judged", "it was not judged within 0.2 s")


def test_a_loss_that_does_not_end_is_ended_in_another_thread():
    reports = []
    thread = threading.Thread(target=lambda: reports.append(audit(endless, timeout=0.2)))
    thread.start()
    thread.join(20)
    assert reports[0].verdict == "not judged"


def test_time_that_suffices_changes_nothing():
    assert audit(right, timeout=60).to_dict() == audit(right).to_dict()


def test_the_state_of_the_process_is_put_back():
    def loss(mu, logvar):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        torch.distributions.Distribution.set_default_validate_args(False)
        torch.use_deterministic_algorithms(True)
        return right(mu, logvar)

    def state():
        streams = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        switches = torch.are_deterministic_algorithms_enabled(), torch.distributions.Distribution._validate_args
        return streams, switches, torch.get_default_dtype(), torch.is_grad_enabled()

    before = state()
    audit(loss)
    assert state() == before
    with torch.no_grad():
        assert audit(right).ok
        assert not torch.is_grad_enabled()
