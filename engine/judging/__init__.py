"""Judges explainers: sanity checks, efficiency and the fidelity curve."""
