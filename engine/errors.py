"""The engine's error for the user; imports no torch."""


class ModelError(Exception):
    """The model cannot be used as asked. The message says why and what to do."""
