"""Weights that the training drives: GECO and PI control, step by step and in a closed loop."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.processes import run
from torch_klloss import ELBOLoss
from torch_klloss.elbo import GECO, PIControl
from torch_klloss.elbo.control import BetaController

CONTROLLERS = {"geco": lambda: GECO(tolerance=5.0, rate=0.05), "pi": lambda: PIControl(target=2.0, integral=0.01)}
every_controller = pytest.mark.parametrize("build", CONTROLLERS.values(), ids=CONTROLLERS)


def scalar(value):
    return torch.tensor(float(value))


def test_geco_follows_its_recurrence():
    """λ ← λ exp(rate · C) with C the moving average of the excess, and β = 1/λ; the twin lets β rise with the error."""
    weight, average, multiplier = GECO(tolerance=10.0, rate=0.1, momentum=0.9), None, 1.0
    for reconstruction in (30.0, 18.0, 11.0, 9.0, 2.0, 2.0):
        assert weight(scalar(reconstruction), scalar(1)).item() == pytest.approx(1 / multiplier, rel=1e-5)
        excess = reconstruction - 10.0
        average = excess if average is None else 0.9 * average + 0.1 * excess
        multiplier *= math.exp(0.1 * average)
    assert weight.beta < 1


def test_pi_control_follows_its_recurrence():
    weight, integral = PIControl(target=10.0, proportional=0.2, integral=0.01, bounds=(0.1, 1.0)), 0.0
    for kl in (30.0, 20.0, 11.0, 10.0, 8.0):
        error = 10.0 - kl
        integral -= 0.01 * error
        expected = 0.2 / (1 + math.exp(error)) + integral + 0.1
        assert weight(scalar(0), scalar(kl)).item() == pytest.approx(min(expected, 1.0), rel=1e-5)


def test_pi_control_comes_back_from_its_bounds():
    """The sum does not wind up beyond a bound, and does not stick there either."""
    weight = PIControl(target=10.0, proportional=0.01, integral=0.01)
    for _ in range(100):
        assert weight(scalar(0), scalar(50)) <= 1
    steps = 0
    while weight(scalar(0), scalar(5)) > 0.5:
        steps += 1
    assert steps < 30  # 0.05 a step from at most 1.4
    for _ in range(100):
        assert weight(scalar(0), scalar(0)) >= 0
    assert weight(scalar(0), scalar(40)) > 0


@every_controller
def test_evaluation_leaves_the_weight_where_it_is(build):
    weight = build()
    for _ in range(3):
        weight(scalar(20), scalar(20))
    weight.eval()
    before = copy.deepcopy(weight.state_dict())
    assert weight(scalar(100), scalar(100)) == weight.beta
    assert all(torch.equal(before[key], value) for key, value in weight.state_dict().items())


@every_controller
def test_the_state_is_in_the_state_dict(build):
    loss, other = ELBOLoss(beta=build()), ELBOLoss(beta=build())
    for _ in range(3):
        loss.controller(scalar(20), scalar(20))
    assert loss.beta != other.beta
    other.load_state_dict(loss.state_dict())
    assert other.beta == loss.beta
    assert torch.equal(other.controller(scalar(7), scalar(7)), loss.controller(scalar(7), scalar(7)))
    assert other.beta == loss.beta


@every_controller
def test_no_gradient_flows_into_the_weight_and_a_backward_pass_follows_the_step(build):
    loss = ELBOLoss(beta=build())
    mean = torch.ones(4, 3, requires_grad=True)
    for _ in range(3):
        x = torch.zeros(4, 2)
        terms = loss.from_tensors(x, x, mean, torch.zeros(4, 3), likelihood="gaussian")
        (grad,) = torch.autograd.grad(terms.loss, mean)
        assert torch.allclose(grad, terms.beta * mean.detach() / 4)
        assert torch.allclose(terms.loss, terms.reconstruction + terms.beta * terms.kl)


@pytest.mark.parametrize(
    ("controller", "term", "goal"),
    [
        (GECO(tolerance=4.0, rate=0.02, momentum=0.5), "reconstruction", 4.0),
        (PIControl(target=1.0, proportional=0.01, integral=0.01, bounds=(0.0, 20.0)), "kl", 1.0),
    ],
    ids=["geco", "pi"],
)
def test_a_trained_model_ends_where_the_controller_wants_it(controller, term, goal):
    """A linear VAE of two Gaussian pixels: its reconstruction and KL move against each other with β."""
    torch.manual_seed(0)
    data = torch.randn(256, 2) @ torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    encoder, decoder, loss = nn.Linear(2, 4), nn.Linear(2, 2), ELBOLoss(beta=controller)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.02)
    history = []
    for _ in range(800):
        mean, logvar = encoder(data).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (logvar / 2).exp()
        terms = loss.from_tensors(decoder(z), data, mean, logvar, likelihood="gaussian")
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        history.append(getattr(terms, term).item())
    assert sum(history[-200:]) / 200 == pytest.approx(goal, rel=0.1)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("build", [lambda: GECO(tolerance=10.0), lambda: PIControl(target=10.0)])
def test_a_step_that_is_not_finite_is_skipped_with_a_warning(build, when, bad):
    skipping, undisturbed = build(), build()
    for step in range(8):
        good = torch.tensor(12.0 - step)
        if step == when:
            with pytest.warns(RuntimeWarning, match=r"NaN or infinite; it leaves β as it was"):
                assert skipping(torch.tensor(bad), torch.tensor(bad)) == skipping.beta
        assert skipping(good, good) == undisturbed(good, good)
    assert all(map(torch.equal, skipping.state_dict().values(), undisturbed.state_dict().values()))


COMPILED = """
import json, math, torch
from torch_klloss.elbo import GECO, PIControl
same = []
for control in (GECO(tolerance=10.0), PIControl(target=10.0)):
    before = control.beta.clone()
    torch.compile(control, backend="eager", fullgraph=True)(torch.tensor(math.nan), torch.tensor(math.nan))
    same.append(bool(control.beta == before))
print(json.dumps(same))
"""


@pytest.mark.long
def test_a_compiled_controller_skips_such_a_step_too():
    assert run(COMPILED) == [True, True]


def test_setting_beta_of_a_controlled_loss_is_an_error():
    with pytest.raises(ValueError, match="beta is driven by GECO"):
        ELBOLoss(beta=GECO(tolerance=1.0)).beta = 0.5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GECO(math.nan), "tolerance must be a number, got NaN"),
        (lambda: GECO(math.inf), "finite tolerance"),
        (lambda: GECO(1.0, rate=0.0), "a rate above 0"),
        (lambda: GECO(1.0, momentum=1.0), r"momentum in \[0, 1\)"),
        (lambda: GECO(1.0, initial=1e9), "initial must lie within the bounds"),
        (lambda: GECO(1.0, bounds=(0.0, 1.0)), "bounds must be finite, in order and above 0"),
        (lambda: PIControl(-1.0), "target, proportional and integral to be finite and at least 0, got -1.0"),
        (lambda: PIControl(1.0, bounds=(1.0, 0.0)), "bounds must be finite, in order and at least 0"),
    ],
)
def test_bad_settings_are_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_user_s_controller_must_define_beta_and_forward():
    with pytest.raises(NotImplementedError, match=r"must define forward\(reconstruction, kl\)"):
        BetaController()(scalar(1), scalar(1))
    with pytest.raises(NotImplementedError, match="must define the property beta"):
        _ = BetaController().beta


RANKS = """
import json, tempfile, torch
from torch import distributed, multiprocessing
from torch_klloss.elbo import GECO

def work(rank, file, out):
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    weight = GECO(tolerance=10.0, rate=0.1, momentum=0.5)
    for step in range(3):
        weight(torch.tensor(12.0 + 4 * rank + step), torch.tensor(1.0))
    out[rank] = weight.beta.item()
    distributed.destroy_process_group()

manager = multiprocessing.get_context("fork").Manager()
out, folder = manager.dict(), tempfile.mkdtemp()
multiprocessing.start_processes(work, (folder + "/store", out), nprocs=2, start_method="fork")
alone = GECO(tolerance=10.0, rate=0.1, momentum=0.5)
for step in range(3):
    alone(torch.tensor(14.0 + step), torch.tensor(1.0))
print(json.dumps([out[0], out[1], alone.beta.item()]))
"""


def test_two_ranks_have_the_weight_of_one_process_that_sees_all_data():
    first, second, alone = run(RANKS)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-6)
