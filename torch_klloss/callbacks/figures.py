"""Figures for the loggers of a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def log_figure(trainer: Any, name: str, draw: Callable[[], Any], step: int) -> None:
    """Draw a figure on rank 0 and hand it to every logger that takes figures.

    TensorBoard, WandB and MLflow take them; if no logger does, the figure becomes a PNG beside the log. Without any
    logger or without matplotlib, and in a `fast_dev_run`, nothing is drawn. To be called on all ranks.

    Args:
        trainer: the Trainer.
        name: `collapse/kl`; a PNG is called `collapse_kl.png`.
        draw: returns the `matplotlib.figure.Figure`.
        step: the training step of the figure.
    """
    # The DummyLogger of a fast_dev_run has every attribute.
    if not trainer.loggers or trainer.fast_dev_run or find_spec("matplotlib") is None:
        return
    folder = trainer.log_dir or trainer.default_root_dir  # a broadcast: every rank has to take part
    if not trainer.is_global_zero:
        return
    figure = draw()
    taken = [_hand_over(logger, name, figure, step) for logger in trainer.loggers]
    if not any(taken):
        Path(folder).mkdir(parents=True, exist_ok=True)
        figure.savefig(Path(folder) / f"{name.replace('/', '_')}.png")


def _hand_over(logger: Any, name: str, figure: Any, step: int) -> bool:
    """Give the figure to a logger; return whether it takes figures."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):  # TensorBoard
        experiment.add_figure(name, figure, global_step=step)
    elif hasattr(logger, "log_image"):  # WandB
        logger.log_image(key=name, images=[figure], step=step)
    elif hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):  # MLflow
        experiment.log_figure(logger.run_id, figure, f"{name.replace('/', '_')}.png")
    else:
        return False
    return True
