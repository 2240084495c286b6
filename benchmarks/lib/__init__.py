"""Parts of single benchmarks; `common.py` has those of all."""
