"""Divergences between the token distributions of a teacher T and a student S."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch_klloss.numerics.arguments import check_flag, check_number
from torch_klloss.numerics.softmax.pairs import Terms


class Divergence(ABC):
    """A divergence of a teacher T and a student S: a sum of KLs to mixtures of the two."""

    @property
    @abstractmethod
    def terms(self) -> Terms:
        """The terms, with the teacher as q and the student as p."""


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(teacher‖student), the loss of knowledge distillation; the student covers what the teacher may say.

    References:
        *Distilling the knowledge in a neural network* (Hinton, Vinyals and Dean, 2015).

    Examples:
        >>> import torch
        >>> from torch_klloss.language import DistillationLoss, ForwardKL
        >>> teacher, student = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
        >>> DistillationLoss(ForwardKL())(student=student, teacher=teacher)
        tensor(0.1201)
    """

    @property
    def terms(self) -> Terms:
        """The terms, with the teacher as q and the student as p."""
        return Terms()


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(student‖teacher); the student keeps to what the teacher would say.

    References:
        *MiniLLM: knowledge distillation of large language models* (Gu et al., 2024).

    Examples:
        >>> import torch
        >>> from torch_klloss.language import DistillationLoss, ReverseKL
        >>> teacher, student = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
        >>> DistillationLoss(ReverseKL())(student=student, teacher=teacher)
        tensor(0.1109)
    """

    @property
    def terms(self) -> Terms:
        """The terms, with the teacher as q and the student as p."""
        return Terms(0.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Jeffreys(Divergence):
    """weight · KL(teacher‖student) + (1 - weight) · KL(student‖teacher).

    Args:
        weight: in [0, 1].

    Raises:
        ValueError: if the weight is out of range.

    References:
        *An invariant form for the prior probability in estimation problems* (Jeffreys, 1946), for weight = ½ up to a
        factor of 2.

    Examples:
        >>> import torch
        >>> from torch_klloss.language import DistillationLoss, Jeffreys
        >>> teacher, student = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
        >>> DistillationLoss(Jeffreys())(student=student, teacher=teacher)
        tensor(0.1155)
    """

    weight: float = 0.5

    def __post_init__(self) -> None:
        _check_range("weight", self.weight, "it is the forward KL's share, and 1 - weight is the reverse KL's")

    @property
    def terms(self) -> Terms:
        """The terms, with the teacher as q and the student as p."""
        return Terms(float(self.weight), 1.0, 1.0 - self.weight, 1.0)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """β · KL(T‖M) + (1 - β) · KL(S‖M) with M = βT + (1 - β)S: bounded, and 0 at both ends of β whatever S is.

    Divided by β(1 - β) (`scaled`), it runs from the forward KL at β = 0 to the reverse KL at β = 1.

    Args:
        beta: β in (0, 1); in [0, 1] if scaled.
        scaled: whether it is divided by β(1 - β).

    Raises:
        ValueError: if β is out of range.

    References:
        *On-policy distillation of language models: learning from self-generated mistakes* (Agarwal et al., 2024).

    Examples:
        >>> import torch
        >>> from torch_klloss.language import DistillationLoss, JensenShannon
        >>> teacher, student = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
        >>> [DistillationLoss(d)(student=student, teacher=teacher)
        ...     for d in (JensenShannon(), JensenShannon(beta=0.0, scaled=True))]
        [tensor(0.0285), tensor(0.1201)]
    """

    beta: float = 0.5
    scaled: bool = False

    def __post_init__(self) -> None:
        check_flag("scaled", self.scaled)
        check_number("beta", self.beta)
        if not self.scaled and self.beta in (0, 1):
            raise ValueError(
                f"beta must lie strictly between 0 and 1, got {self.beta!r}: at both ends the divergence is 0 whatever "
                "the student is, and so is its gradient. Take ForwardKL() or ReverseKL(), or "
                f"JensenShannon({self.beta!r}, scaled=True), whose ends are these two."
            )
        _check_range("beta", self.beta, "it is the teacher's share of the mixture")

    @property
    def terms(self) -> Terms:
        """The terms, with the teacher as q and the student as p."""
        beta = float(self.beta)
        if beta == 0:
            return Terms()
        if beta == 1:
            return Terms(0.0, 1.0, 1.0, 1.0)
        if self.scaled:
            return Terms(1 / (1 - beta), 1 - beta, 1 / beta, beta)
        return Terms(beta, 1 - beta, 1 - beta, beta)


@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(T‖αT + (1 - α)S), or its mirror KL(S‖αS + (1 - α)T): a KL whose gradient is bounded.

    Args:
        alpha: α in [0, 1); 0 is the plain KL.
        reverse: whether it is the mirror.

    Raises:
        ValueError: if α is out of range.

    References:
        *DistiLLM: towards streamlined distillation for large language models* (Ko et al., 2024).

    Examples:
        >>> import torch
        >>> from torch_klloss.language import DistillationLoss, SkewKL
        >>> teacher, student = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
        >>> DistillationLoss(SkewKL(alpha=0.1))(student=student, teacher=teacher)
        tensor(0.0950)
    """

    alpha: float = 0.1
    reverse: bool = False

    def __post_init__(self) -> None:
        check_flag("reverse", self.reverse)
        check_number("alpha", self.alpha)
        if self.alpha == 1:
            raise ValueError("alpha must lie in [0, 1), got 1: the divergence is 0 there whatever the student is.")
        _check_range("alpha", self.alpha, "it is the share of the first distribution in the mixture")

    @property
    def terms(self) -> Terms:
        """The terms, with the teacher as q and the student as p."""
        mix = 1.0 - self.alpha
        return Terms(0.0, 1.0, 1.0, mix) if self.reverse else Terms(1.0, mix)


def _check_range(name: str, value: float, meaning: str) -> None:
    check_number(name, value)
    if not 0 <= value <= 1 or not math.isfinite(value):
        raise ValueError(f"{name} must lie between 0 and 1, got {value!r}: {meaning}.")
