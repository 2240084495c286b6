"""What is looking on while a KL is computed, and what it forbids."""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """Tell whether `torch.compile`, `torch.func` or forward mode is at work, which may not look at values."""
    return is_recorded_by_operation() or torch._C._are_functorch_transforms_active()


def is_recorded_by_operation() -> bool:
    """Tell whether the derivative has to come from plain operations: under `torch.compile`, and in forward mode."""
    return torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0
