"""The engine's errors for the user; imports no torch."""


class ModelError(Exception):
    """The model cannot be used as asked. The message says why and what to do."""


class ImageError(Exception):
    """The method cannot explain one image. The message says why and what to do."""


class RandomWeightsError(ModelError):
    """The model's weights would be random, and nobody asked for that."""
