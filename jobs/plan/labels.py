"""Ground-truth labels: maps a data set's labels to the model's class indices, and never guesses."""

from collections.abc import Sequence

MAX_DIGITS = 18
"""Digits of a class index in text: it fits 64 bits."""


class Labels:
    """Maps the labels of one data set to the classes of one model.

    A number is a class index, a class name is that class. If there are as many class folders as classes, and none
    has a class's name or number, they are the classes in sorted order. Other labels have no index: a guess could
    label a whole class wrong.
    """

    def __init__(self, folders: Sequence[str], class_names: Sequence[str] | None, num_classes: int) -> None:
        """`folders` are the data set's class folders, if it has any."""
        self.num_classes = num_classes
        self.named = {_plain(name): index for index, name in enumerate(class_names or ())}
        says_itself = all(map(is_class_number, folders)) or any(_plain(name) in self.named for name in folders)
        in_order = len(folders) == num_classes and not says_itself
        self.folders = {name: index for index, name in enumerate(sorted(folders))} if in_order else {}

    def index(self, label: str | int | None) -> int | None:
        """The class index in [0, num_classes), or None if the label is absent or means no class."""
        if isinstance(label, str):
            label = self._index_of_name(label)
        return label if label is not None and 0 <= label < self.num_classes else None

    def _index_of_name(self, label: str) -> int | None:
        if label in self.folders:
            return self.folders[label]
        return int(label) if is_class_number(label) else self.named.get(_plain(label))


def is_class_number(label: str) -> bool:
    """True if a label is at most 18 ASCII digits: `int` fails at `²` and at thousands of digits."""
    return label.isascii() and label.isdecimal() and len(label) <= MAX_DIGITS


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").replace("-", " ").strip()
