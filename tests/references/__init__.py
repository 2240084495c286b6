"""High-precision references for closed forms, and the harness that measures formulas against them."""
