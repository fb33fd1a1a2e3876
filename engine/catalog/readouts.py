"""Readouts: how a class's score is read from a model's output."""

from collections.abc import Mapping
from typing import Literal

ReadoutName = Literal["softmax", "sigmoid", "probabilities", "identity"]

READOUTS: Mapping[ReadoutName, str] = {
    "softmax": "softmax probability",
    "sigmoid": "sigmoid of the label's own output",
    "probabilities": "the output itself, a probability",
    "identity": "the output itself",
}
"""The score in words, as the metrics' protocols store it."""
