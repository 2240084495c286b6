"""How a loss is asked: its signature, the probes, the calls, what is observed."""
