"""Two KLs to audit: the mistake that the library began with, and the correct form.

python -m torch_klloss audit examples/audit_my_kl.py:weighted_twice
python -m torch_klloss audit examples/audit_my_kl.py:plain_mean
"""

from torch import Tensor
from torch.distributions import Normal


def weighted_twice(q: Normal, p: Normal) -> Tensor:
    """Weight samples of q by q(x), as if they were the points of a grid."""
    x = q.rsample((16,))
    log_q, log_p = q.log_prob(x).sum(-1), p.log_prob(x).sum(-1)
    return (log_q.exp() * (log_q - log_p)).mean()


def plain_mean(q: Normal, p: Normal) -> Tensor:
    """Take the plain mean over samples of q: drawing them from q is the weighting."""
    x = q.rsample((16,))
    log_q, log_p = q.log_prob(x).sum(-1), p.log_prob(x).sum(-1)
    return (log_q - log_p).mean()
