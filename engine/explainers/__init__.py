"""Explainers by name: each is one file, built on the engine's parts."""

from functools import partial

from engine.explainers.cams import WEIGHINGS, Cam
from engine.explainers.sise import Sise

EXPLAINERS = {"sise": Sise, **{name: partial(Cam, weigh=weigh) for name, weigh in WEIGHINGS.items()}}
"""What `--explainer` may name."""
