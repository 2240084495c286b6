"""The versions of torch that the library runs on."""

import re

OLDEST = (2, 8)  # the first with torch.distributions.GeneralizedPareto


def check_torch(version: str) -> None:
    """Raise an ImportError, in one line, where torch is too old: what is needed, what is there, how to get it."""
    major, minor = map(int, re.findall(r"\d+", version)[:2])
    if (major, minor) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ImportError(
            f"torch_klloss needs torch {needed} or newer, and torch {version} is installed: "
            f"pip install --upgrade 'torch>={needed}'"
        )
