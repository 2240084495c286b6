"""Mistakes of the gradient alone: the value is the KL's, and training follows another gradient."""

from torch_klloss.auditing.explanation.mistake import Mistake

MISTAKES = (
    Mistake(
        id="detached-samples",
        what="q gets a gradient that is zero on average: the samples do not depend on q's parameters, and the mean of "
        "the score is zero",
        fix="Draw with q.rsample(), outside of torch.no_grad(); where q has none, multiply log q(x) by the detached "
        "log-ratio (the score function), as MonteCarloKL does.",
        signature="distributions",
        wrong="(lambda x: (q.log_prob(x) - p.log_prob(x)).sum(-1).mean())(q.sample())",
        gradient={"q": "zero"},
    ),
    Mistake(
        id="gradient-of-other-direction",
        what="q gets the gradient of KL(p‖q), the other direction: k3 on samples that do not depend on q's parameters",
        fix="Draw with q.rsample(), or take the score function: log q(x) times the detached log-ratio.",
        signature="distributions",
        wrong="(lambda r: (r.exp() - 1 - r).mean())((lambda x: (p.log_prob(x) - q.log_prob(x)).sum(-1))(q.sample()))",
        gradient={"q": "other direction"},
    ),
    Mistake(
        id="gradient-of-difference",
        what="q gets the gradient of KL(q‖p) - KL(p‖q): k3 with log q(x) detached from q's parameters",
        fix="Leave q's parameters alive in log q(x), or take the log-ratio itself instead of k3.",
        signature="distributions",
        wrong="(lambda x: (lambda r: (r.exp() - 1 - r).mean())((p.log_prob(x) - torch.distributions.Normal("
        "q.loc.detach(), q.scale.detach()).log_prob(x)).sum(-1)))(q.rsample())",
        gradient={"q": "difference"},
    ),
    Mistake(
        id="no-gradient",
        what="no parameter gets a gradient: it is computed under no_grad, or detached",
        fix="Leave out detach(), .data and torch.no_grad(); for a number to log and not to train with, pass "
        "audit(…, gradient=False).",
        signature="mean_logvar",
        wrong="-0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean().detach()",
        gradient={"q": "none", "p": "none"},
    ),
    Mistake(
        id="parameter-without-gradient",
        what="one of the distribution's parameters gets no gradient, and the other does",
        fix="Leave out the detach() of that parameter.",
        signature="mean_logvar",
        wrong="-0.5 * (1 + logvar.detach() - mean**2 - logvar.detach().exp()).sum(-1).mean()",
        gradient={"q": "partly none"},
    ),
    Mistake(
        id="gradient-scaled",
        what="the gradient is a multiple of the KL's",
        fix="Look for a detached factor, or for a baseline that includes its own sample.",
        signature="mean_logvar",
        wrong="(lambda kl: 0.5 * kl + 0.5 * kl.detach())(-0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean())",
        gradient={"q": "scaled"},
    ),
    Mistake(
        id="gradient-reversed",
        what="the gradient has the wrong sign",
        fix="Change the sign of the loss that is differentiated.",
        signature="mean_logvar",
        wrong="(lambda kl: 2 * kl.detach() - kl)(-0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean())",
        gradient={"q": "reversed"},
    ),
    Mistake(
        id="gradient-of-something-else",
        what="the gradient is not the KL's, nor the gradient of another divergence that the audit knows",
        fix="Look for a detach(), a no_grad() or a custom backward pass on the way from the parameters to the loss.",
        signature="mean_logvar",
        wrong="(lambda kl: kl + mean.sum() - mean.sum().detach())"
        "(-0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean())",
        gradient={"q": "other"},
    ),
)
