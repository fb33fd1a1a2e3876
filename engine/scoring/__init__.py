"""Masked forward passes: masks perturb inputs, and the scores are computed or predicted."""
