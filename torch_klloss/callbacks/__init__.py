"""Lightning callbacks, for `pytorch_lightning` and `lightning.pytorch` alike. Nothing else imports Lightning."""

from torch_klloss.callbacks.estimator_gap import EstimatorGap

__all__ = ["EstimatorGap"]
