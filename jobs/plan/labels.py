"""Ground-truth labels: from what a data set writes to the model's class index, and never by a guess."""

from collections.abc import Sequence

MAX_DIGITS = 18
"""Of a class index that is written as text: it fits 64 bits."""


class Labels:
    """Knows what the labels of one data set mean for one model.

    A number is a class index and a class's name is that class. Class folders that are as many as the
    classes, and none of which is named after one, are the classes in sorted order. Everything else has no
    index: a guess would label a whole class wrong.
    """

    def __init__(self, folders: Sequence[str], class_names: Sequence[str] | None, num_classes: int) -> None:
        """`folders` are the data set's class folders, if it has any."""
        self.num_classes = num_classes
        self.named = {_plain(name): index for index, name in enumerate(class_names or ())}
        says_itself = all(map(is_class_number, folders)) or any(_plain(name) in self.named for name in folders)
        in_order = len(folders) == num_classes and not says_itself
        self.folders = {name: index for index, name in enumerate(sorted(folders))} if in_order else {}

    def index(self, label: str | int | None) -> int | None:
        """The class index in [0, num_classes), or None where the label is absent or means no class."""
        if isinstance(label, str):
            label = self._index_of_name(label)
        return label if label is not None and 0 <= label < self.num_classes else None

    def _index_of_name(self, label: str) -> int | None:
        if label in self.folders:
            return self.folders[label]
        return int(label) if is_class_number(label) else self.named.get(_plain(label))


def is_class_number(label: str) -> bool:
    """Whether a label is a number that Python can read, which takes neither `²` nor thousands of digits."""
    return label.isascii() and label.isdecimal() and len(label) <= MAX_DIGITS


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").replace("-", " ").strip()
