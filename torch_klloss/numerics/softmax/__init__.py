"""Divergences of the softmax of logits, row by row, without a tensor of their size beside the gradients.

`divergence` is what the losses call. `rows` computes on the CPU, by the fastest way that keeps the digits of a row:
`blocks`, `differences` or `pairs`. `wide` computes on an accelerator with float64, `whole` what is small there, `fused`
and `opaque` in a graph. `picked` is the log-probability of given classes.
"""
