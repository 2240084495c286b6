"""KLRoute: the method that was taken, and a warning if an exact one exists."""

import warnings

import pytest
import torch
from torch.distributions import Independent, StudentT

from tests.callbacks.training import LIGHTNING_SAYS, fit, make_module
from torch_klloss import AutoKL, KLLoss, MonteCarloKL, categorical, diagonal_normal
from torch_klloss.callbacks import KLRoute
from torch_klloss.methods import MonteCarlo

pytestmark = LIGHTNING_SAYS


def student(module, x):
    mean, logvar = module.encoder(x).chunk(2, -1)
    return diagonal_normal(mean, logvar), Independent(StudentT(torch.full((3,), 4.0)), 1)


def watched(module, callback=None, **options):
    callback = callback or KLRoute(every_n_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, [callback], **options)
    return callback, trainer, [str(w.message) for w in caught if "exact" in str(w.message)]


def test_an_exact_loss_is_named_once_and_draws_no_warning(capsys):
    callback, trainer, messages = watched(make_module())
    assert callback.routes == {"kl": "closed_form"}
    assert capsys.readouterr().out.count("KLRoute: 'kl' takes KL(Independent(LogVarNormal, 1)‖") == 1
    assert trainer.callback_metrics["kl/kl/exact"] == 1
    assert trainer.callback_metrics["kl/kl/num_evaluations"] == 0
    assert messages == []


def test_a_loss_that_samples_for_want_of_a_closed_form_draws_no_warning():
    callback, trainer, messages = watched(make_module(pair=student, loss=AutoKL(fallback=MonteCarlo(4))))
    assert callback.routes == {"kl": "monte_carlo"}
    assert trainer.callback_metrics["kl/kl/exact"] == 0
    assert trainer.callback_metrics["kl/kl/num_evaluations"] == 4
    assert messages == []


def test_a_loss_that_samples_although_a_closed_form_exists_draws_one_warning():
    _, _, messages = watched(make_module(loss=MonteCarloKL(1)))
    assert messages == [
        "'kl' samples KL(Independent(LogVarNormal, 1)‖Independent(StandardNormal, 1)) in training (monte_carlo), "
        "although closed_form is exact: AutoKL() takes it, without the noise in value and gradient."
    ]


def test_a_route_that_changes_is_printed_again(capsys):
    def pair(module, x):
        module.count = getattr(module, "count", 0) + 1
        return student(module, x) if module.count > 3 else (student(module, x)[0],) * 2

    callback, _, _ = watched(make_module(pair=pair))
    out = capsys.readouterr().out
    assert out.index("by closed_form") < out.index("by monte_carlo")
    assert out.count("KLRoute:") == 2
    assert callback.routes == {"kl": "monte_carlo"}


def test_a_user_s_method_is_named_by_its_estimate():
    class Twice:
        def estimate(self, q, p, generator=None):
            return AutoKL().estimate(q, p, generator)

    callback, _, _ = watched(make_module(loss=KLLoss(Twice())))
    assert callback.routes == {"kl": "closed_form"}


@pytest.mark.parametrize("loss", [AutoKL(), MonteCarloKL(2)], ids=["exact", "sampled"])
@pytest.mark.filterwarnings("ignore:.*samples KL")
def test_training_is_bit_for_bit_the_same_with_and_without_it(loss):
    states = []
    for callbacks in ([], [KLRoute(1)]):
        module = make_module(loss=loss)
        fit(module, callbacks)
        states.append((module.state_dict(), torch.get_rng_state()))
    assert all(torch.equal(a, states[1][0][key]) for key, a in states[0][0].items())
    assert torch.equal(states[0][1], states[1][1])


def test_a_resumed_run_prints_only_what_has_changed(tmp_path, capsys):
    _, trainer, _ = watched(make_module())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    capsys.readouterr()
    watched(make_module(), ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    assert "KLRoute:" not in capsys.readouterr().out


def test_a_discrete_pair_is_known_to_have_an_exact_route():
    def pair(module, x):
        logits = module.encoder(x)[:, :3]
        return categorical(logits), categorical(torch.zeros(3))

    _, _, messages = watched(make_module(pair=pair, loss=MonteCarloKL(4)))
    assert len(messages) == 1


def test_a_module_without_a_loss_gets_one_warning_and_trains_on():
    with pytest.warns(UserWarning, match="KLRoute found no KLLoss in Module and will log nothing"):
        trainer = fit(make_module(loss=lambda q, p: AutoKL()(q, p)), [KLRoute()])
    assert trainer.global_step == 6
