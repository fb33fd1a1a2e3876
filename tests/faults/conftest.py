"""What all tests of this folder begin with."""

from tests.plain import chosen_forwards, plain_forwards

__all__ = ["chosen_forwards", "plain_forwards"]
