"""Divergences of the softmax of logits, row by row, without a tensor of their size beside the gradients.

`divergence` is what the losses call. `rows` computes on the CPU, by the fastest way that keeps the digits of a row:
`blocks`, `centred`, `differences`, else `wide`, or `pairs` for float64. `wide` computes on an accelerator with float64
too, `whole` what is small there, `pairs` what has no float64, and `fused` and `opaque` in a graph. `picked` is the
log-probability of given classes.
"""
