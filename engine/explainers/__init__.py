"""Explainers by name: each is one file, built on the engine's parts."""

from engine.explainers.sise import Sise

EXPLAINERS = {"sise": Sise}
"""What `--explainer` may name."""
