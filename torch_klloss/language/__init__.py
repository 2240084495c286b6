"""The KL between the token distributions of language models: distillation, and policies held to a reference."""

from torch_klloss.language.distillation import DistillationLoss
from torch_klloss.language.divergences import ForwardKL, Jeffreys, JensenShannon, ReverseKL, SkewKL
from torch_klloss.language.logits import LinearHead, VocabShards
from torch_klloss.language.reference import ReferenceKL
from torch_klloss.language.sparse_teacher import SparseTeacher
from torch_klloss.language.token_kl import log_probs_of, token_kl

__all__ = [
    "DistillationLoss",
    "ForwardKL",
    "Jeffreys",
    "JensenShannon",
    "LinearHead",
    "ReferenceKL",
    "ReverseKL",
    "SkewKL",
    "SparseTeacher",
    "VocabShards",
    "log_probs_of",
    "token_kl",
]


def __dir__() -> list[str]:
    return sorted(__all__)
