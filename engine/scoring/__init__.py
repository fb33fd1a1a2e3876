"""Masked forward passes: how masks perturb inputs, and how their scores are computed or predicted."""
