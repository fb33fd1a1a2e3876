"""Finds the classes that a job's targets name, and what of a record they explain."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blocksight.engine.catalog.target_expressions import (
    FEATURES,
    PLACES,
    TEXT,
    Atom,
    Expression,
    Formula,
    GrammarError,
    Summand,
    Term,
    collected,
    formula_of,
    parse_formula,
    parse_target,
    quoted,
    shown,
    split_targets,
)
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.expressions import with_opposite
from blocksight.engine.model.feature_targets import SAME
from blocksight.engine.model.targets import Target
from blocksight.jobs.plan.config import TARGET_FORMS, ConfigError, JobConfig, TargetChoice
from blocksight.jobs.plan.labels import Labels, Rule, is_class_number
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.jobs.plan.text import counted

QUOTE = "a name that holds a comma, a hyphen, a plus sign, a star or a bracket stands in double quotes"


@dataclass(frozen=True)
class ResolvedTargets:
    """The targets of every record of a job, without class names."""

    expressions: tuple[Expression, ...]
    has_doubles: bool
    """Two of the targets may be the same class of a record: they are then known by their words."""
    prompts: tuple[str, ...] = ()
    """The texts that are the model's classes, if targets are prompts."""

    @property
    def features(self) -> tuple[Atom, ...]:
        """The features that targets name, each once, those that are cosines first: as the model returns them."""
        named = dict.fromkeys(atom for one in self.expressions for atom in one.atoms if atom.is_feature)
        return tuple(sorted(named, key=lambda atom: not atom.is_cosine))

    def same_picture(self, values: Tensor) -> str | None:
        """A target that is the similarity of a record's picture to itself, by the values [M] of `features`."""
        alone = [one.atom for one in self.expressions]
        near = zip(self.features, values.tolist(), strict=True)
        return next((own.text for own, value in near if own.kind == "similar" and value > SAME and own in alone), None)

    @property
    def needs_label(self) -> bool:
        """True if a target depends on the record's label."""
        return any(atom.kind == "label" for one in self.expressions for atom in one.atoms)

    def formulas(self, logits: Tensor, label: int | None) -> list[Formula]:
        """The targets of a record with these logits [K] and this label, which is known if `needs_label`."""
        order = logits.argsort(descending=True, stable=True)[: self._num_places].tolist()

        def index_of(atom: Atom) -> Summand:
            if atom.is_feature:
                return atom
            if atom.kind == "label":
                assert label is not None
                return label
            if atom.kind == "text":
                return self.prompts.index(str(atom.value))
            return order[int(atom.value) - 1] if atom.kind == "place" else int(atom.value)

        return [
            formula_of([(term.weight, index_of(term.atom)) for term in one.terms], one.reading)
            for one in self.expressions
        ]

    @property
    def _num_places(self) -> int:
        """The last place among a record's classes that a target names; 0 if none does."""
        atoms = (atom for one in self.expressions for atom in one.atoms)
        return max((int(atom.value) for atom in atoms if atom.kind == "place"), default=0)

    def text_of(self, expression: Expression, formula: Formula) -> str:
        """What a row calls its target: the join key of outputs. A class that is chosen is known by its number."""
        own = expression.atom
        is_class = own is not None and own.kind != "text" and not own.is_feature
        return formula.text if is_class and not self.has_doubles else expression.text


def resolved_targets(config: JobConfig, adapter: ModelAdapter) -> ResolvedTargets:
    """The job's targets with their classes as numbers; a name is read as a label is.

    Raises ConfigError, with the nearest names, for a name of no class or of more than one, for a class that the model
    lacks, for a text with two meanings, and for two targets that are the same.
    """
    choice = config.target_choice
    labels = Labels((), adapter.class_names, adapter.num_classes, config.label_classes)
    read = list(choice.expressions if choice.name is None else _read_lines(choice, labels))
    if choice.name is None:
        _refuse_numbers_that_are_names(read, labels)
    for one in read:
        _refuse_unknown_classes(one, adapter, config)
    twice = next((one.text for place, one in enumerate(read) if one.text in {own.text for own in read[:place]}), None)
    if twice is not None:
        raise ConfigError(f"two targets of {shown(choice.name or '')} are the same, {twice}: leave one of them out")
    alone = {atom.kind for one in read if (atom := one.atom) is not None and one.reading == "score"}
    has_doubles = len(alone) > 1 and bool(alone & {"place", "label"})
    return ResolvedTargets(tuple(read), has_doubles, choice.prompts)


def formulas_of_pictures(config: JobConfig, adapter: ModelAdapter, inputs_nchw: Tensor) -> list[list[Formula]]:
    """The job's targets of each of some inputs without a label: the prediction stands in for it. Raises ConfigError."""
    targets = resolved_targets(config, adapter)
    with adapter.borrowed(), torch.inference_mode():
        logits = adapter.of_classes(adapter.logits(inputs_nchw)).cpu()
    return [targets.formulas(own, int(own.argmax())) for own in logits]


def target_of_pictures(config: JobConfig, adapter: ModelAdapter, inputs_nchw: Tensor) -> Target:
    """What a job explains of some inputs without a label, with the opposites that signed maps need."""
    own = adapter.target_of(formulas_of_pictures(config, adapter, inputs_nchw))
    return with_opposite(own) if config.signed else own


def formulas_of(rows: Sequence[Mapping[str, Any]], adapter: ModelAdapter) -> list[Formula]:
    """The targets of stored rows of one record. Raises UnreconciledError for one that the model does not have."""
    try:
        found = [parse_formula(row["target_formula"]) for row in rows]
    except (GrammarError, TypeError) as error:
        raise UnreconciledError(f"the rows of record {rows[0]['key']!r} are damaged: {error}") from error
    beyond = [index for one in found for index in one.classes if index >= adapter.num_classes]
    if beyond:
        raise UnreconciledError(
            f"the rows of record {rows[0]['key']!r} name class {beyond[0]}, and {adapter.name} has "
            f"{adapter.num_classes}, from 0"
        )
    unknown = [own.text for one in found for own in one.features if own not in adapter.features]
    if unknown:
        raise UnreconciledError(f"the rows of record {rows[0]['key']!r} name {unknown[0]}, which the job has not")
    return found


def _read_lines(choice: TargetChoice, labels: Labels) -> Iterator[Expression]:
    """The targets of each line, which is one `--target`."""
    assert choice.name is not None
    for line in choice.name.split("\n"):
        yield from _read(line, labels, may_be_list=True)


def _read(text: str, labels: Labels, *, may_be_list: bool) -> list[Expression]:
    """The targets of a text, which may be the name of a class as well."""
    is_class_of_number = is_class_number(text.strip())  # which the grammar reads, and may be of another class
    whole = None if is_class_of_number else _index_of(text, labels)
    by_name = [] if whole is None else [Expression((Term(1.0, Atom("class", whole)),), "score")]
    try:
        by_grammar = _read_parts(text, labels) if may_be_list else _resolved(parse_target(text), labels)
    except GrammarError as error:
        if by_name:
            return by_name
        raise ConfigError(_refusal(labels, text, f" ({error}; {QUOTE})")) from error
    except ConfigError as error:
        if by_name:
            return by_name
        raise ConfigError(f"{error}{_hidden_name(text, labels)}{_hidden_comma(text)}") from error
    if by_name and {one.text for one in by_grammar} != {by_name[0].text} and not _is_word(by_grammar):
        raise ConfigError(_two_meanings(text, by_grammar, labels))
    return by_grammar if _is_word(by_grammar) else by_name or by_grammar


def _is_word(expressions: Sequence[Expression]) -> bool:
    """True for `predicted`, `label` and `top-K`, which are no names of classes without quotes."""
    return all(one.reading == "score" and one.atom is not None and one.atom.kind in WORDS for one in expressions)


WORDS = ("place", "label")


def _hidden_name(text: str, labels: Labels) -> str:
    """A clause that names a class in the text whose name would have to be quoted; empty if there is none."""
    known = (name for name in labels.class_names or () if set(name) & set(SIGNS) and f'"{name}"' not in text)
    name = next((name for name in known if name.casefold() in text.casefold()), None)
    return "" if name is None else f"; a class is named {shown(name)}: write it in double quotes"


SIGNS = ",+-*()"


def _hidden_comma(text: str) -> str:
    """A clause for a comma that may be part of a prompt or a place before it; empty if there is none."""
    first, comma, _ = text.partition(",")
    before = next((one for one in (TEXT, *PLACES) if first.startswith(one) and '"' not in text), None)
    if not comma or before is None:
        return ""
    return f"; a comma separates targets: write {before}{quoted(text.removeprefix(before))} if it is part of it"


def _read_parts(text: str, labels: Labels) -> list[Expression]:
    parts = split_targets(text)
    if len(parts) == 1:
        return _resolved(parse_target(text), labels)
    return [one for part in parts for one in _read(part, labels, may_be_list=False)]


def _resolved(expressions: Sequence[Expression], labels: Labels) -> list[Expression]:
    return [
        replace(one, terms=collected(Term(term.weight, _class_of(term.atom, labels)) for term in one.terms))
        for one in expressions
    ]


def _class_of(atom: Atom, labels: Labels) -> Atom:
    """The class that an atom names, as its number; other atoms stay. Raises ConfigError."""
    if atom.kind == "class" and int(atom.value) >= labels.num_classes:
        raise ConfigError(f"target {atom.value} is no class of the model: it has {labels.num_classes}, from 0")
    if atom.kind == "class":
        _refuse_number_that_is_a_name(int(atom.value), labels)
    if atom.kind not in ("name", "prototype"):
        return atom
    is_number = isinstance(atom.value, int)
    if is_number and int(atom.value) >= labels.num_classes:
        raise ConfigError(f"target {atom.text} is of no class: the bank has {labels.num_classes}, from 0")
    index = int(atom.value) if is_number else _index_of(str(atom.value), labels)
    if index is None:
        raise ConfigError(_refusal(labels, str(atom.value), _other_reading(str(atom.value))))
    return Atom("prototype" if atom.kind == "prototype" else "class", index)


def _other_reading(name: str) -> str:
    """A clause for a name of no class that means something else when it is written in another way; empty if not."""
    if _is_number(name):
        return f"; a class number stands without quotes: {name}"
    before = next((one for one in (TEXT, *FEATURES) if name.startswith(one)), None)
    if before is not None:
        return f"; what begins with a quote is a class's name: write {before}{quoted(name.removeprefix(before))}"
    return f"; {QUOTE}" if "-" in name else ""


def _index_of(name: str, labels: Labels) -> int | None:
    """The class of this name, as it is spelled before any other spelling; a number is no name unless a class has it."""
    names = list(labels.class_names or ())
    if names.count(name) == 1:
        return names.index(name)
    return None if _is_number(name) else labels.index(name)


def _is_number(text: str) -> bool:
    return is_class_number(text.strip().lstrip("+-"))


def _refuse_numbers_that_are_names(expressions: Sequence[Expression], labels: Labels) -> None:
    for one in expressions:
        for atom in one.atoms:
            if atom.kind == "class":
                _refuse_number_that_is_a_name(int(atom.value), labels)


def _refuse_number_that_is_a_name(number: int, labels: Labels) -> None:
    """Raises ConfigError if a class number is the name of another class."""
    names = list(labels.class_names or ())
    if number < len(names) and str(number) in names and names.index(str(number)) != number:
        raise ConfigError(
            f"target {number} has two meanings: the class of this name ({names.index(str(number))}), and the class of "
            f'this number, {names[number]!r}; write "{number}" in double quotes for the first, and its name '
            f'"{names[number]}" in double quotes for the second'
        )


def _two_meanings(text: str, by_grammar: Sequence[Expression], labels: Labels) -> str:
    others = ", ".join(one.text for one in by_grammar)
    way = "give each target its own --target" if len(by_grammar) > 1 else f"write logit({text})"
    index = _index_of(text, labels)
    return (
        f"target {shown(text)} has two meanings: the class of this name ({index}), and {others} by the grammar "
        f"of targets; write it in double quotes for the class, and {way} for the other"
    )


def _refuse_unknown_classes(expression: Expression, adapter: ModelAdapter, config: JobConfig) -> None:
    """Raises ConfigError for a class number or a place that the model does not have."""
    for atom in expression.atoms:
        if atom.kind == "class" and int(atom.value) >= adapter.num_classes:
            raise ConfigError(
                f"target {atom.value} is no class of {adapter.name}: it has {adapter.num_classes}, from 0"
            )
        if atom.kind == "place" and int(atom.value) > adapter.num_classes:
            raise ConfigError(
                f"target {shown(config.target)} asks for more than {counted(adapter.num_classes, 'class')}"
            )
        if not any(term.weight for term in expression.terms):
            raise ConfigError(f"target {shown(config.target)} is {shown(expression.text)}, which is 0 for every image")


def _refusal(labels: Labels, name: str, more: str = "") -> str:
    if labels.read(name).rule is Rule.AMBIGUOUS:
        classes = ", ".join(labels.nearest(name)) or "see the class map"
        return f"target {shown(name)} means more than one class: {classes}; name one by its number"
    if not labels.class_names:
        return f"target {shown(name)} is not known, and the model has no class names{more}; known: {TARGET_FORMS}"
    near = labels.nearest(name)
    nearest = f"nearest: {', '.join(map(repr, near))}; " if near else ""
    return f"target {shown(name)} is no class of the model{more}; {nearest}known: {TARGET_FORMS}, or a class name"
