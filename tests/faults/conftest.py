"""What all tests of this folder begin with."""

from tests.plain import plain_forwards

__all__ = ["plain_forwards"]
