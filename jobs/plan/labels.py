"""Ground-truth labels: maps a data set's labels to the model's class indices, and says by which rule."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from importlib.resources import files

from blocksight.jobs.plan.class_map import ClassMap
from blocksight.jobs.plan.text import counted, plain
from blocksight.storage.inputs.labels import is_several

MAX_DIGITS = 18
"""Digits of a class index in text: it fits 64 bits."""
NUM_IMAGENET_CLASSES = 1000
IMAGENET_ANCHORS = {0: "tench", 1: "goldfish", 217: "english springer", 497: "church", 999: "toilet"}
"""What the names of some of ImageNet's classes begin with: a model with other names has other classes."""
NUM_SHOWN = 3
"""Labels that a message names."""
MAX_SHOWN = 80
"""Characters of one of them."""


class Rule(StrEnum):
    """How a label's class was found, or why none was."""

    CLASS_MAP = "by the class map"
    NUMBER = "as class numbers"
    NAMED_NUMBER = "as numbers by the names that the table gives them: the model numbers these classes otherwise"
    NAME = "by class name"
    SPELLING = "by class name in another spelling (case, spaces, accents)"
    SYNONYM = "by one of the names of a class"
    WORDNET = "by ImageNet's WordNet numbers"
    TRUTH_VALUE = "as false = 0 and true = 1"
    SORTED = "GUESSED from the sorted order of the class folders"
    NO_CLASS = "means no class of the model"
    OUT_OF_RANGE = "is no class number of the model"
    AMBIGUOUS = "means more than one class"
    SEVERAL = "holds several labels or fields"
    MISSING = "no label"


@dataclass(frozen=True)
class Meaning:
    """What a label means."""

    index: int | None
    """The class index in [0, num_classes); None: it means no class, or more than one."""
    rule: Rule


class Labels:
    """Maps the labels of one data set to the classes of one model.

    In this order: the user's class map; class numbers, by name where a table names its numbers in another order than
    the model; class names, also in another spelling and also one of several
    names that commas separate; ImageNet's WordNet numbers. If a model has no class names, and there are as many class
    folders as classes, and none has a meaning yet, they are the classes in sorted order, as training tools number
    them. Other labels have no index, and neither has a name that two classes share.
    """

    def __init__(
        self,
        folders: Sequence[str],
        class_names: Sequence[str] | None,
        num_classes: int,
        class_map: ClassMap = (),
        number_names: Sequence[str] = (),
    ) -> None:
        """`folders` are the data set's class folders, if it has any; `number_names` what a table calls its numbers."""
        self.num_classes = num_classes
        self.class_names = list(class_names or ())
        self.class_map = {_plain(label): classes for label, classes in class_map}
        self.exact = _index_of(self.class_names, str)
        self.plain = _index_of(self.class_names, _plain)
        self.synonyms = _synonyms(self.class_names)
        self.wordnet = _wordnet_numbers() if _has_imagenet_classes(self.class_names, num_classes) else {}
        self.number_names = tuple(number_names) if self._are_others(number_names) else ()
        self.folder_names = frozenset(folders)
        self.folders: Mapping[str, int] = {}
        self.is_guessable = not self.class_names and not class_map and len(folders) > 1 and _are_classes(folders)
        """The folders may be the classes in sorted order: nothing else says which class is which."""
        self.is_guessable &= not any(self.read(name).rule is not Rule.NO_CLASS for name in folders)
        if self.is_guessable and len(folders) == num_classes:
            self.folders = {name: index for index, name in enumerate(sorted(folders))}

    def index(self, label: str | int | None) -> int | None:
        """The class index in [0, num_classes), or None if the label is absent, means no class or more than one."""
        return self.read(label).index

    def read(self, label: str | int | None) -> Meaning:
        """What a label means, and by which rule."""
        if label is None:
            return Meaning(None, Rule.MISSING)
        if (classes := self.class_map.get(_plain(str(label)))) is not None:
            return self._one_of(classes, Rule.CLASS_MAP)
        number = _as_number(label)
        return self._read_name(str(label)) if number is None else self._read_number(str(label), number)

    def _read_number(self, label: str, number: int) -> Meaning:
        """A class number; or the class whose name it is, where names are numbers (`10` may be the second class)."""
        if self.number_names:
            return self._read_named_number(number)
        named = self.exact.get(label, ())
        if label in self.folder_names and len(named) == 1:
            return Meaning(named[0], Rule.NAME)
        if named and list(named) != [number]:
            return Meaning(None, Rule.AMBIGUOUS)
        is_class = 0 <= number < self.num_classes
        return Meaning(number, Rule.NUMBER) if is_class else Meaning(None, Rule.OUT_OF_RANGE)

    def _are_others(self, number_names: Sequence[str]) -> bool:
        """True if a table's name for a number is the model's name of another class."""
        known = ((number, self.plain.get(_plain(name), [number])) for number, name in enumerate(number_names))
        return any(number not in classes for number, classes in known)

    def _read_named_number(self, number: int) -> Meaning:
        if not 0 <= number < len(self.number_names):
            return Meaning(None, Rule.OUT_OF_RANGE)
        classes = self.plain.get(_plain(self.number_names[number]), ())
        return self._one_of(classes, Rule.NAMED_NUMBER) if classes else Meaning(None, Rule.NO_CLASS)

    def _read_name(self, label: str) -> Meaning:
        if label in self.folders:
            return Meaning(self.folders[label], Rule.SORTED)
        ways = ((self.exact, label, Rule.NAME), (self.plain, _plain(label), Rule.SPELLING))
        for known, name, rule in (*ways, (self.synonyms, _plain(label), Rule.SYNONYM)):
            if name in known:
                return self._one_of(known[name], rule)
        if label in self.wordnet:
            return Meaning(self.wordnet[label], Rule.WORDNET)
        if self.num_classes == 2 and label.casefold() in ("true", "false"):
            return Meaning(int(label.casefold() == "true"), Rule.TRUTH_VALUE)
        return Meaning(None, Rule.SEVERAL if is_several(label) else Rule.NO_CLASS)

    def _one_of(self, classes: Sequence[int], rule: Rule) -> Meaning:
        if len(classes) != 1:
            return Meaning(None, Rule.AMBIGUOUS)
        return Meaning(classes[0], rule) if 0 <= classes[0] < self.num_classes else Meaning(None, Rule.OUT_OF_RANGE)

    def nearest(self, label: str) -> list[str]:
        """The class names that are spelled most like a label; for an ambiguous one the classes that it means."""
        number = _as_number(label)
        if number is not None:
            indices = [number] if 0 <= number < self.num_classes else []
            return [f"{self.class_names[index]} (class {index})" for index in (*indices, *self.exact.get(label, ()))]
        for known in (self.exact, self.plain, self.synonyms):
            classes = known.get(label, ()) or known.get(_plain(label), ())
            if len(classes) > 1:
                return [f"{self.class_names[index]} (class {index})" for index in classes[:NUM_SHOWN]]
        names = {_plain(name): name for name in self.class_names}
        return [names[near] for near in get_close_matches(_plain(label), names, n=NUM_SHOWN, cutoff=0.7)]


@dataclass(frozen=True)
class FoundLabels:
    """The labels of a data set as far as they were looked at."""

    counts: Mapping[str | int | None, int]
    """Records by label; None: without a label."""
    num_records: int | None = None
    """Records of the whole data set, if these are only the first of it."""
    what: str = "label"
    """`class folder` or `label`."""
    note: str = ""
    """What else is to be said of them."""


@dataclass(frozen=True)
class LabelReading:
    """How a data set's labels are read by one model."""

    rules: Mapping[Rule, int]
    """Records by rule."""
    text: str
    """One line: known, unknown and ambiguous labels, by which rules."""

    @property
    def num_known(self) -> int:
        """Records whose label means a class."""
        return sum(count for rule, count in self.rules.items() if rule not in UNKNOWN)


UNKNOWN = (Rule.NO_CLASS, Rule.OUT_OF_RANGE, Rule.AMBIGUOUS, Rule.SEVERAL, Rule.MISSING)
"""The rules that give no class."""


def reading_of(labels: Labels, found: FoundLabels) -> LabelReading:
    """How the labels are read."""
    rules: Counter[Rule] = Counter()
    examples: dict[Rule, list[str | int]] = defaultdict(list)
    for label, count in sorted(found.counts.items(), key=lambda item: str(item[0])):
        rule = labels.read(label).rule
        rules[rule] += count
        if label is not None:
            examples[rule].append(label)
    return LabelReading(rules, _sentence(labels, found, rules, examples))


def _sentence(
    labels: Labels, found: FoundLabels, rules: Mapping[Rule, int], examples: Mapping[Rule, Sequence[str | int]]
) -> str:
    num_labels = sum(map(len, examples.values()))
    if not num_labels:
        return f"none in the data{found.note and '; '}{plain(found.note)}"
    total = sum(found.counts.values())
    first = f" (the first {total:,} of {found.num_records:,})" if found.num_records not in (None, total) else ""
    parts = [
        f"{rules[rule]:,} known {_with_examples(labels, rule, examples[rule])}"
        for rule in Rule
        if rule in examples and rule not in UNKNOWN
    ]
    parts += [
        f"{rules[rule]:,} unknown: {_unknown(labels, rule, examples[rule])}"
        for rule in Rule
        if rule in examples and rule in UNKNOWN
    ]
    if not any(rule not in UNKNOWN for rule in examples):
        parts.append("--class-map says which class a label means")
    missing = rules.get(Rule.MISSING, 0)
    parts += [f"{missing:,} without a label"] if missing else []
    parts += [_other_order(labels)] if Rule.NUMBER in rules else []
    parts += [plain(found.note)] if found.note else []
    parts = [part for part in parts if part]
    return f"{counted(num_labels, found.what)} of {counted(total, 'record')}{first}: {'; '.join(parts)}"


def _other_order(labels: Labels) -> str:
    """A sentence if the class folders are numbers whose sorted order, by which training tools number, is another."""
    folders = sorted(labels.folder_names)
    if labels.class_names or len(folders) != labels.num_classes or labels.class_map:
        return ""
    others = [(name, index) for index, name in enumerate(folders) if _as_number(name) not in (None, index)]
    if not others:
        return ""
    name, index = others[0]
    return (
        f"GUESSED: a tool that numbers the class folders in sorted order takes {plain(name)} for class {index}; "
        "--class-map or --class-names says it for sure"
    )


def _with_examples(labels: Labels, rule: Rule, names: Sequence[str | int]) -> str:
    if rule not in (Rule.SORTED, Rule.WORDNET, Rule.TRUTH_VALUE, Rule.SPELLING, Rule.SYNONYM):
        return rule
    shown = [names[0], names[-1]] if len(names) > 1 else names
    meant = " … ".join(f"{plain(str(name))} = {_class_text(labels, labels.index(name))}" for name in shown)
    sure = "; --class-map or --class-names says it for sure" if rule is Rule.SORTED else ""
    return f"{rule} ({meant}{sure})"


def _class_text(labels: Labels, index: int | None) -> str:
    name = f" {labels.class_names[index]}" if index is not None and labels.class_names else ""
    return f"{index}{plain(name)}"


def _unknown(labels: Labels, rule: Rule, names: Sequence[str | int]) -> str:
    shown = ", ".join(repr(plain(_short(str(name)))) for name in names[:NUM_SHOWN])
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    near = labels.nearest(str(names[0])) if rule in (Rule.NO_CLASS, Rule.AMBIGUOUS) else []
    hint = f"; {'it is' if rule is Rule.AMBIGUOUS else 'nearest'}: {plain(', '.join(near))}" if near else ""
    verb = rule if len(names) == 1 else PLURAL[rule]
    return f"{shown}{more} {verb}{hint}"


def _short(label: str) -> str:
    return label if len(label) <= MAX_SHOWN else f"{label[:MAX_SHOWN]}…"


PLURAL = {
    Rule.NO_CLASS: "mean no class of the model",
    Rule.OUT_OF_RANGE: "are no class numbers of the model",
    Rule.AMBIGUOUS: "mean more than one class",
    Rule.SEVERAL: "hold several labels or fields",
}


def label_fault(labels: Labels, found: FoundLabels, folders: Sequence[str], *, is_target: bool) -> str | None:
    """Why the labels cannot be meant as they are: one sentence with what to do, or None.

    `is_target`: the label is the class that is explained, so at least one must be known.
    """
    reading = reading_of(labels, found)
    what = "--class-map says which class a label means"
    if labels.is_guessable and abs(len(folders) - labels.num_classes) == 1:
        side = "too few" if len(folders) < labels.num_classes else "too many"
        classes = counted(labels.num_classes, "class")
        return (
            f"the model has {classes} without names, and the data {counted(len(folders), 'class folder')}, one "
            f"{side}: their order does not say which class is which. {what}, and --labels none that they are no labels"
        )
    by_number = (Rule.NUMBER, Rule.OUT_OF_RANGE)
    counting = [label for label in found.counts if label is not None and labels.read(label).rule in by_number]
    numbers = {number for label in counting if (number := _as_number(label)) is not None}
    if numbers and min(numbers) == 1 and max(numbers) == labels.num_classes:
        return (
            f"the labels are numbers from 1 to {labels.num_classes}, and the model's classes are numbered from 0 to "
            f"{labels.num_classes - 1}: {what}"
        )
    if is_target and not reading.num_known and sum(found.counts.values()):
        way = "" if what in reading.text else f". {what}"
        return f"the target is the label, and no label means a class ({reading.text}){way}"
    return None


def _are_classes(folders: Sequence[str]) -> bool:
    """False for folders that are partitions (`date=2020`), and for one name in two spellings."""
    heads = {name.partition("=")[0] for name in folders if "=" in name}
    is_partition = len(heads) == 1 and all("=" in name for name in folders)
    return not is_partition and len({_plain(name) for name in folders}) == len(folders)


def _as_number(label: str | int) -> int | None:
    """The class number that a label is, also as text and as 3.0; None for other text."""
    if isinstance(label, int):
        return label
    text = label.strip()
    whole, dot, rest = text.partition(".")
    if dot and rest and not rest.strip("0"):
        text = whole
    sign = -1 if text.startswith("-") else 1
    return sign * int(text.removeprefix("-")) if is_class_number(text.removeprefix("-")) else None


def is_class_number(label: str) -> bool:
    """True if a label is at most 18 ASCII digits: `int` fails at `²` and at thousands of digits."""
    return label.isascii() and label.isdecimal() and len(label) <= MAX_DIGITS


def _plain(name: str) -> str:
    """A name without what spelling leaves open. A Mac writes accents as characters of their own."""
    return unicodedata.normalize("NFC", name).casefold().replace("_", " ").replace("-", " ").strip()


def _index_of(names: Iterable[str], form: Callable[[str], str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        found[form(name)].append(index)
    return dict(found)


def _synonyms(names: Sequence[str]) -> dict[str, list[int]]:
    """The classes of each of the names in `tench, Tinca tinca`."""
    found: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        for part in {_plain(part) for part in name.split(",")} if "," in name else ():
            found[part].append(index)
    return dict(found)


def _has_imagenet_classes(class_names: Sequence[str], num_classes: int) -> bool:
    if num_classes != NUM_IMAGENET_CLASSES:
        return False
    return not class_names or all(
        _plain(class_names[index]).startswith(start) for index, start in IMAGENET_ANCHORS.items()
    )


@cache
def _wordnet_numbers() -> Mapping[str, int]:
    """The classes of ImageNet's challenge of 2012 by WordNet number: they are numbered in sorted order.

    imagenet.txt lists the numbers alone, which are facts; from which copy of the list it was made is not known.
    """
    lines = files("blocksight.jobs.plan").joinpath("imagenet.txt").read_text().split()
    return {number: index for index, number in enumerate(lines)}
