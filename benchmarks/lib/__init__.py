"""What single benchmarks need besides `common.py`."""
