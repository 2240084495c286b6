"""The gap of a posterior whose draws round to an end of its support."""

import pytest
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution, Uniform

from tests.callbacks.training import LIGHTNING_SAYS, fit, make_module
from torch_klloss import MonteCarloKL
from torch_klloss.callbacks import EstimatorGap

pytestmark = LIGHTNING_SAYS

# -H + log 2 - E[log(1 - tanh² z)] of z ~ N(mean, 1), by a trapezoidal sum over z.
EXACT = {3.0: 7.83855 / 2, 8.0: 27.7758 / 2}


@pytest.mark.parametrize("mean", EXACT)
def test_the_gap_of_a_saturated_policy_is_a_number_and_both_estimates_are_right(mean):
    def policy(module, x):
        loc = mean + 0.0 * module.encoder(x)[..., :3]
        q = TransformedDistribution(Normal(loc, 1.0), [TanhTransform(cache_size=1)])
        return Independent(q, 1), Independent(Uniform(-torch.ones(3), torch.ones(3)), 1)

    gap = EstimatorGap(every_n_steps=1, figure=False)
    fit(make_module(pair=policy, loss=MonteCarloKL(8), noise=0.0), [gap], 3)
    rows = gap.history["kl"]
    assert len(rows) == 3
    for row in rows:
        assert abs(row["gap_z"]) < 6
        assert abs(row["reference"] - 3 * EXACT[mean]) < 0.1 * 3 * EXACT[mean]
