"""Figures: every logger gets them in its own way, and training goes on without any."""

import sys
from types import SimpleNamespace

import pytest
import pytorch_lightning
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from tests.callbacks.training import LIGHTNING_SAYS, fit, make_module
from torch_klloss.callbacks import EstimatorGap, KLAnnealing, KLRoute, PosteriorCollapse
from torch_klloss.callbacks.figures import log_figure
from torch_klloss.plots import annealing_figure
from torch_klloss.schedules import Linear

pytestmark = LIGHTNING_SAYS


def draw():
    return annealing_figure([0, 1], [0.0, 1.0], [1.0, 2.0], [2.0, 1.0])


class Recorder:
    """An object that keeps the calls of the methods that it is said to have."""

    def __init__(self, *methods, **attributes):
        self.calls = []
        vars(self).update(attributes)
        for name in methods:
            setattr(self, name, lambda *args, **kwargs: self.calls.append((args, kwargs)))


def trainer_with(tmp_path, *loggers, **changes):
    settings = {"fast_dev_run": False, "is_global_zero": True, "log_dir": str(tmp_path / "logs")}
    return SimpleNamespace(loggers=loggers, default_root_dir=str(tmp_path), **(settings | changes))


def test_tensorboard_wandb_and_mlflow_get_the_figure_under_its_name(tmp_path):
    tensorboard, wandb = Recorder("add_figure"), Recorder("log_image")
    mlflow = Recorder("log_figure")
    loggers = SimpleNamespace(experiment=tensorboard), wandb, SimpleNamespace(experiment=mlflow, run_id="7")
    log_figure(trainer_with(tmp_path, *loggers), "kl/vae/gap", draw, step=30)
    (((name, figure), step),) = tensorboard.calls
    assert (name, step) == ("kl/vae/gap", {"global_step": 30})
    assert wandb.calls == [((), {"key": "kl/vae/gap", "images": [figure], "step": 30})]
    assert mlflow.calls == [(("7", figure, "kl_vae_gap.png"), {})]
    assert not list(tmp_path.iterdir())


def test_a_logger_without_figures_gets_a_png_beside_its_log(tmp_path):
    log_figure(trainer_with(tmp_path, Recorder()), "kl/vae/gap", draw, step=30)
    assert (tmp_path / "logs" / "kl_vae_gap.png").read_bytes()[:4] == b"\x89PNG"
    log_figure(trainer_with(tmp_path, Recorder(), log_dir=None), "kl/vae/gap", draw, step=30)
    assert (tmp_path / "kl_vae_gap.png").exists()


@pytest.mark.parametrize("changes", [{"fast_dev_run": True}, {"is_global_zero": False}])
def test_a_trial_run_and_the_other_ranks_draw_nothing(tmp_path, changes):
    log_figure(trainer_with(tmp_path, Recorder(), **changes), "kl", lambda: pytest.fail("drawn"), step=0)


def test_without_a_logger_or_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch):
    log_figure(trainer_with(tmp_path), "kl", lambda: pytest.fail("drawn"), step=0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    log_figure(trainer_with(tmp_path, Recorder()), "kl", lambda: pytest.fail("drawn"), step=0)


def all_callbacks():
    return [EstimatorGap(1), PosteriorCollapse(1), KLRoute(1), KLAnnealing(Linear(steps=2), "beta")]


def test_the_csv_logger_gets_both_figures_as_png(tmp_path):
    fit(make_module(beta=0.0), all_callbacks(), logger=CSVLogger(tmp_path, name="", version=""))
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["collapse_kl_units.png", "kl_kl_gap.png"]


def test_tensorboard_gets_both_figures_as_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(make_module(beta=0.0), all_callbacks(), logger=TensorBoardLogger(tmp_path, name="", version=""))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["images"]) == {"kl/kl/gap", "collapse/kl/units"}
    assert {"kl/beta", "kl/kl/gap_z", "kl/kl/exact", "collapse/kl/kl/0"} <= set(events.Tags()["scalars"])
    assert not list(tmp_path.glob("*.png"))


def test_a_fast_dev_run_works_with_all_callbacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(make_module(beta=0.0), all_callbacks(), fast_dev_run=2, logger=True, max_epochs=None)
    assert not list(tmp_path.rglob("*.png"))


def test_figures_can_be_switched_off(tmp_path):
    callbacks = [EstimatorGap(1, figure=False), PosteriorCollapse(1, figure=False)]
    fit(make_module(), callbacks, logger=CSVLogger(tmp_path, name="", version=""))
    assert not list(tmp_path.glob("*.png"))


def test_a_user_s_logger_without_folder_or_figures_is_no_obstacle(tmp_path):
    class Plain(pytorch_lightning.loggers.Logger):
        name, version = "plain", 0

        def __init__(self):
            super().__init__()
            self.keys = set()

        def log_metrics(self, metrics, step=None):
            self.keys |= set(metrics)

        def log_hyperparams(self, *args, **kwargs):
            pass

    logger = Plain()
    fit(make_module(beta=0.0), all_callbacks(), logger=logger, default_root_dir=tmp_path)
    assert (tmp_path / "kl_kl_gap.png").exists()
    assert "collapse/kl/active_units" in logger.keys
