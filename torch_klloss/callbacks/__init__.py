"""Lightning callbacks, for `pytorch_lightning` and `lightning.pytorch` alike. Nothing else imports Lightning."""

from torch_klloss.callbacks.estimator_gap import EstimatorGap
from torch_klloss.callbacks.kl_annealing import KLAnnealing
from torch_klloss.callbacks.kl_route import KLRoute
from torch_klloss.callbacks.posterior_collapse import PosteriorCollapse

__all__ = ["EstimatorGap", "KLAnnealing", "KLRoute", "PosteriorCollapse"]


def __dir__() -> list[str]:
    return sorted(__all__)
