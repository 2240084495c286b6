"""The loss of a VAE: reconstruction plus a weighted KL, and controls of the KL."""

from torch_klloss.elbo.control import GECO, PIControl
from torch_klloss.elbo.decomposition import KLDecomposition, decompose_kl
from torch_klloss.elbo.importance import IWAELoss
from torch_klloss.elbo.loss import ELBOLoss
from torch_klloss.elbo.terms import ELBOTerms

__all__ = ["GECO", "ELBOLoss", "ELBOTerms", "IWAELoss", "KLDecomposition", "PIControl", "decompose_kl"]


def __dir__() -> list[str]:
    return sorted(__all__)
