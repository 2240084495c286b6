"""Experiments with a loss: its signature, the probes, the calls and the observations."""
