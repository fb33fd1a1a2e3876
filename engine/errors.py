"""What the engine refuses, in a sentence for the user; importable without torch."""


class ModelError(Exception):
    """The model cannot be used as asked; the message is one sentence, with the way out."""
