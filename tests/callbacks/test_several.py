"""Several callbacks of one class in one Trainer."""

from tests.callbacks.training import LIGHTNING_SAYS, data, fit, make_module
from torch_klloss.callbacks import EstimatorGap, KLAnnealing, KLRoute, PosteriorCollapse
from torch_klloss.schedules import Constant, Linear

pytestmark = LIGHTNING_SAYS


def callbacks():
    return [
        EstimatorGap(every_n_steps=1, figure=False),
        EstimatorGap(every_n_steps=2, prefix="again", figure=False),
        KLRoute(every_n_steps=1),
        KLRoute(every_n_steps=1, prefix="again"),
        PosteriorCollapse(every_n_steps=1, figure=False),
        PosteriorCollapse(stage="validation", figure=False),
        KLAnnealing(Linear(steps=4), attribute="beta"),
        KLAnnealing(Constant(2.0), attribute="gamma", prefix="gamma"),
    ]


def trained(several, folder, epochs, checkpoint=None):
    module = make_module(beta=0.0, gamma=0.0)
    trainer = fit(module, several, 4, validation=data(2), max_epochs=epochs, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "last.ckpt")
    return several


def test_each_keeps_its_own_state_through_a_checkpoint(tmp_path):
    before = trained(callbacks(), tmp_path, 1)
    resumed = trained(callbacks(), tmp_path, 2, tmp_path / "last.ckpt")
    assert len({callback.state_key for callback in before}) == len(before)
    for old, new in zip(before, resumed, strict=True):
        for path, rows in getattr(old, "history", {}).items():
            assert new.history[path][: len(rows)] == rows, type(old).__name__
    assert len(before[0].history["kl"]) == 2 * len(before[1].history["kl"]) == 4
    assert [callback.state_dict()["weight"] for callback in resumed[-2:]] == [1.0, 2.0]
