"""Fixtures for all tests of this folder: jobs score masks with eager PyTorch."""

from tests.plain import chosen_forwards, plain_forwards

__all__ = ["chosen_forwards", "plain_forwards"]
