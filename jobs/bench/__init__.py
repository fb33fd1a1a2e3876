"""Benchmarks: rates, efficiency, the race with peers, the fidelity curve, and memory banks."""
