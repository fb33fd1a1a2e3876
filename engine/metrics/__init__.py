"""Metrics by name: each with its direction, its range and a protocol whose hash stands beside the value."""

from engine.metrics.faithfulness import KeepTop

METRICS = {"drop": KeepTop, "increase": KeepTop}
"""What computes each metric; two names may share one evaluation."""
