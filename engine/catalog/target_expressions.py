"""The grammar of targets: what of a model's output is explained, as text and as weighted sums of classes.

    targets  = target { "," target }
    target   = "predicted" | "label" | "top-K" | "margin" | sum
    sum      = [ "-" ] term { ( "+" | "-" ) term }
    term     = [ weight "*" ] ( class | wrapped )
    wrapped  = ( "logit" | "logprob" ) "(" target ")"
    class    = number | name | "predicted" | "label" | "text:" prompts | feature
    prompts  = prompt { "|" prompt }
    feature  = "similar:" place | "direction:" place | "prototype:" ( number | name ) | "feature:" number

A name, a prompt or a place that holds a comma, a plus sign, a hyphen, a star, a bracket or a quote stands in double
quotes; two quotes inside them are one. What begins with a quote is always a class's name: `"predicted"`, `"281"` and
`"text:x"` are names, and a prompt is quoted behind its word, `text:"red, black"`. A place is a path or URI: of a
picture, or of a direction's numbers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from math import isfinite
from typing import Literal

Reading = Literal["score", "logit", "logprob"]
"""What a target sums up: a class's score by the model's readout, logits, or log-probabilities."""
FeatureKind = Literal["similar", "prototype", "feature", "direction"]
AtomKind = Literal["class", "name", "place", "label", "text"] | FeatureKind
Source = Literal["predicted", "label", "top", "given", "expression"]

MAX_TARGETS = 100
"""Targets of a record."""
MAX_TERMS = 1000
"""Classes that one target names."""
MAX_DEPTH = 8
"""Brackets within brackets."""
CLASS_NUMBER = re.compile(r"[0-9]{1,18}")
"""A class number: it fits 64 bits."""
TOP = re.compile(r"top-([0-9]+)")
WEIGHT = re.compile(r"[0-9]{1,300}(\.[0-9]{1,300})?|\.[0-9]{1,300}")
TEXT = "text:"
"""What prompts begin with."""
FEATURES: Mapping[str, FeatureKind] = {
    "similar:": "similar",
    "prototype:": "prototype",
    "feature:": "feature",
    "direction:": "direction",
}
"""What targets begin with that are read from the feature vector, and not from a class."""
PLACES = ("similar:", "direction:")
"""Of these what follows is a path or URI."""
TOKEN = re.compile(r'"(?P<quoted>(?:[^"]|"")*)"|(?P<sign>[,+\-*()])|(?P<word>top-\w+|[^,+\-*()"]+)')
WRAPPERS: Mapping[str, Reading] = {"logit": "logit", "logprob": "logprob"}


MAX_SHOWN = 80
"""Characters of a target that a message repeats."""


def shown(text: str) -> str:
    """A text for a message, in quotes and not longer than a line."""
    return repr(text) if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]!r} ... ({len(text):,} characters)"


class GrammarError(ValueError):
    """The text is no target; the message is one sentence with the place."""


@dataclass(frozen=True)
class Atom:
    """One class, as a target names it."""

    kind: AtomKind
    value: int | str = ""
    """The class number, the name, the place among the model's classes (1 is the prediction), or the prompts; of a
    feature the picture, the class, the number within the vector, or the file."""

    @property
    def text(self) -> str:
        """In canonical form."""
        if self.kind == "place":
            return "predicted" if self.value == 1 else f"top-{self.value}"
        if self.kind == "label":
            return "label"
        return {"class": "", "name": ""}.get(self.kind, f"{self.kind}:") + quoted(self.value)

    @property
    def is_feature(self) -> bool:
        """True if it is read from the feature vector."""
        return self.kind in FEATURES.values()

    @property
    def is_cosine(self) -> bool:
        """True for the cosine to a vector, of a feature; False for the product with one."""
        return self.kind in ("similar", "prototype")


PREDICTED, RUNNER_UP, LABEL = Atom("place", 1), Atom("place", 2), Atom("label")


@dataclass(frozen=True)
class Term:
    """A class and what it counts."""

    weight: float
    atom: Atom


@dataclass(frozen=True)
class Expression:
    """One target: a weighted sum of classes, and what of them is summed."""

    terms: tuple[Term, ...]
    reading: Reading
    source: Source = "given"
    """How its class is chosen; `expression` where it is of no single class."""

    @property
    def text(self) -> str:
        """The canonical text: the same for all ways of writing the same scalar."""
        is_margin = self.terms == MARGIN
        inner = "margin" if is_margin else sum_text([(term.weight, term.atom.text) for term in self.terms])
        return inner if self.reading == _default_reading(self.terms) else f"{self.reading}({inner})"

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """The classes that it names."""
        return tuple(term.atom for term in self.terms)

    @property
    def atom(self) -> Atom | None:
        """Its class, where it is of one; None for a sum."""
        return self.terms[0].atom if _is_one(self.terms) else None


MARGIN = (Term(1.0, PREDICTED), Term(-1.0, RUNNER_UP))
"""The prediction less the runner-up."""


def parse_targets(text: str) -> tuple[Expression, ...]:
    """The targets of a text, in order, each once; names are not looked up. Raises GrammarError."""
    found = [one for part in split_targets(text) for one in parse_target(part)]
    unique: dict[str, Expression] = {}
    for one in found:
        unique.setdefault(one.text, one)
    if len(unique) > MAX_TARGETS:
        raise GrammarError(f"{len(unique)} targets are asked for, and a record has {MAX_TARGETS} at most")
    return tuple(unique.values())


def split_targets(text: str) -> list[str]:
    """The targets of a text, each as it is written: commas outside quotes and brackets separate them.

    Raises GrammarError.
    """
    depth, start, parts = 0, 0, []
    for token in _tokens(text):
        sign = token["sign"]
        depth += {"(": 1, ")": -1}.get(sign or "", 0)
        if sign == "," and depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    parts.append(text[start:].strip())
    if not all(parts):
        raise GrammarError(f"target {shown(text)} has a comma with no target beside it")
    return parts


def parse_target(text: str) -> tuple[Expression, ...]:
    """The targets that one part of a text means: K for top-K, else one. Raises GrammarError."""
    parser = _Parser(text)
    sums = parser.alternatives()
    parser.finish()
    return tuple(_expression(terms, reading, source) for terms, reading, source in sums)


def prompt_target(prompts: str) -> str:
    """The target of one or more prompts, joined by `|`, as text."""
    return f"{TEXT}{quoted(prompts)}"


def sum_text(terms: Sequence[tuple[float, str]]) -> str:
    """A weighted sum as text: `281-282`, `0.5*281+0.5*282`."""
    text = "".join(f"{'-' if weight < 0 else '+'}{_factor(abs(weight))}{name}" for weight, name in terms)
    return text.removeprefix("+")


def collected(terms: Iterable[Term]) -> tuple[Term, ...]:
    """The terms in canonical order, those of one class added up; what adds up to 0 stays, so that none gets lost."""
    sums: dict[Atom, float] = {}
    for term in terms:
        sums[term.atom] = sums.get(term.atom, 0.0) + term.weight
    order = sorted(sums, key=lambda atom: (sums[atom] < 0, ORDER.index(atom.kind), str(type(atom.value)), atom.value))
    return tuple(Term(sums[atom], atom) for atom in order)


ORDER: Sequence[AtomKind] = (
    *("place", "label", "class", "name", "text"),
    *("similar", "prototype", "feature", "direction"),
)
"""Of the kinds in canonical text."""


def _expression(terms: Sequence[Term], reading: Reading | None, source: Source) -> Expression:
    own = collected(terms)
    if not any(term.weight for term in own):
        raise GrammarError(f"target {shown(sum_text([(t.weight, t.atom.text) for t in own]))} is 0 for every image")
    if not all(isfinite(term.weight) for term in own):
        raise GrammarError("a weight of a target is not finite")
    if len(own) > MAX_TERMS:
        raise GrammarError(f"a target names {len(own)} classes, and {MAX_TERMS} at most can be")
    beside = next((term.atom.text for term in own if term.atom.is_feature), None)
    if beside is not None and reading == "logprob":
        raise GrammarError(f"logprob(...) of {beside}: a log-probability is of classes, and a feature has none")
    return Expression(own, reading or _default_reading(own), source if _is_one(own) else "expression")


def _is_one(terms: Sequence[Term]) -> bool:
    return len(terms) == 1 and terms[0].weight == 1


def _default_reading(terms: Sequence[Term]) -> Reading:
    """A class alone is explained by its score. A sum is one of logits, and a prompt's logit hears no other prompt.

    A feature has no score but itself.
    """
    own = terms[0].atom
    return "score" if _is_one(terms) and own.kind != "text" and not own.is_feature else "logit"


def quoted(value: int | str) -> str:
    """A class number as it is, a text in quotes."""
    return str(value) if isinstance(value, int) else '"' + value.replace('"', '""') + '"'


def _factor(weight: float) -> str:
    """A weight before its star, without an exponent; nothing for 1."""
    return "" if weight == 1 else f"{format(Decimal(repr(weight)).normalize(), 'f')}*"


def _tokens(text: str) -> list[re.Match[str]]:
    """Raises GrammarError for a quote that is not closed."""
    found, place = [], 0
    while place < len(text):
        token = TOKEN.match(text, place)
        if token is None:
            raise GrammarError(f"target {shown(text)} opens a quote and does not close it")
        found.append(token)
        place = token.end()
    return [token for token in found if token[0].strip()]


Sum = tuple[list[Term], Reading | None, Source]
"""Terms, how they are read if the text says it, and how the class of a single term is chosen."""


class _Parser:
    """Reads one target by recursive descent."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.place, self.depth = text, _tokens(text), 0, 0

    def alternatives(self) -> list[Sum]:
        """A target: K sums for top-K, else one."""
        word = self._word()
        if word is not None and self._ends_after(1):
            if top := TOP.fullmatch(word):
                self.place += 1
                return [([Term(1.0, Atom("place", place))], None, "top") for place in self._places(top[1])]
            if word == "margin":
                self.place += 1
                return [(list(MARGIN), None, "expression")]
        if word is not None and word in WRAPPERS and self._sign(1) == "(" and self._closes_at_end():
            return [(terms, self._joined(WRAPPERS[word], inner), source) for terms, inner, source in self._wrapped()]
        return [self._sum()]

    def finish(self) -> None:
        """Raises GrammarError if something is left."""
        if self.place < len(self.tokens):
            raise self._error(f"{self.tokens[self.place][0].strip()!r} is not expected")

    def _sum(self) -> Sum:
        terms, reading, source, is_first = [], None, "given", True
        while is_first or self._sign() in ("+", "-"):
            sign = -1.0 if self._sign() == "-" else 1.0
            self.place += self._sign() in ("+", "-") and not (is_first and self._sign() == "+")
            own, own_reading, source = self._term()
            if not is_first and own_reading != reading and "logprob" in (own_reading, reading):
                raise self._error("it adds a log-probability to a logit; logprob(...) around all of it is one sum")
            reading, is_first = own_reading or reading, False
            terms += [Term(sign * term.weight, term.atom) for term in own]
        return terms, reading, source

    def _term(self) -> Sum:
        weight, word = 1.0, self._word()
        if word is not None and self._sign(1) == "*":
            if not WEIGHT.fullmatch(word):
                raise self._error(f"{word!r} before a star is no number, such as 0.5*281")
            weight, self.place = float(word), self.place + 2
        terms, reading, source = self._factor()
        return [Term(weight * term.weight, term.atom) for term in terms], reading, source

    def _factor(self) -> Sum:
        word = self._word()
        if word is not None and word in WRAPPERS and self._sign(1) == "(":
            wrapped = self._wrapped()
            if len(wrapped) > 1:
                raise self._error("top-K is several targets, and cannot be part of a sum")
            terms, inner, source = wrapped[0]
            return terms, self._joined(WRAPPERS[word], inner), source
        atom = self._atom()
        return [Term(1.0, atom)], None, SOURCES.get(atom, "given")

    def _wrapped(self) -> list[Sum]:
        """What stands in the brackets after `logit` or `logprob`."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self._error(f"it has more than {MAX_DEPTH} brackets within each other")
        self.place += 2
        found = self.alternatives()
        if self._sign() != ")":
            raise self._error("a bracket is not closed, or what stands in it is no target")
        self.place += 1
        self.depth -= 1
        return found

    def _atom(self) -> Atom:
        word, name, token = self._word(), self._quoted(), self._at(0)
        self.place += 1
        if name is not None:
            return self._name(name)
        if word is None or token is None:
            raise self._error("a class is missing")
        if before := next((one for one in (TEXT, *FEATURES) if word.startswith(one)), None):
            self._refuse_touching(token, before)
            return self._prefixed(before, word[len(before) :].strip() or self._quoted_next())
        if CLASS_NUMBER.fullmatch(word):
            return Atom("class", int(word))
        if word.startswith("top-") and not TOP.fullmatch(word):
            raise self._error(f"{word} is no top-K; a class of this name is quoted")
        if TOP.fullmatch(word) or word == "margin":
            raise self._error(f"{word} stands alone, or within logit(...) or logprob(...)")
        return NAMED.get(word) or self._name(word)

    def _name(self, name: str) -> Atom:
        if not name.strip():
            raise self._error("a name is empty")
        return Atom("name", name)

    def _prefixed(self, before: str, rest: str) -> Atom:
        """What stands behind `text:` or the word of a feature."""
        if before == TEXT:
            return self._prompts(rest)
        kind = FEATURES[before]
        if not rest.strip():
            raise self._error(f"nothing follows {before}")
        is_number = CLASS_NUMBER.fullmatch(rest) is not None
        if kind == "feature" and not is_number:
            raise self._error(f"feature: is followed by a number of the feature vector, from 0, and {rest!r} is none")
        return Atom(kind, int(rest) if is_number and before not in PLACES else rest)

    def _refuse_touching(self, token: re.Match[str], before: str) -> None:
        """Raises GrammarError if a sign follows at once, so that it may be part of the prompt or place, or be a sign.

        `my-photo.png` is one place, and also `my` less `photo.png`.
        """
        is_number = before not in (TEXT, *PLACES) and CLASS_NUMBER.fullmatch(token[0].strip().removeprefix(before))
        if is_number or self._sign() in (None, ",", ")") or token[0][-1:].isspace():
            return
        whole = self.text[token.start() :].split(",")[0].strip().removeprefix(before).strip()
        example = quoted(whole) if len(whole) <= MAX_SHOWN else '"..."'
        raise self._error(
            f"{self._sign()!r} follows at once: write {before}{example} if it is part of it, and a space before "
            f"{self._sign()!r} if it is a sign"
        )

    def _prompts(self, prompts: str) -> Atom:
        parts = [part.strip() for part in prompts.split("|")]
        if not all(parts):
            raise self._error(f"a prompt after {TEXT} is empty")
        return Atom("text", "|".join(parts))

    def _quoted_next(self) -> str:
        text = self._quoted()
        self.place += text is not None
        return text or ""

    def _places(self, count: str) -> range:
        if len(count) > 4 or not 1 <= int(count) <= MAX_TARGETS:
            raise self._error(f"top-K has a K from 1 to {MAX_TARGETS}")
        return range(1, int(count) + 1)

    def _joined(self, outer: Reading, inner: Reading | None) -> Reading:
        if inner not in (None, outer):
            raise self._error(f"{outer}({inner}(...)) means two things; leave one of the two out")
        return outer

    def _word(self) -> str | None:
        token = self._at(0)
        return None if token is None or token["word"] is None else token["word"].strip()

    def _quoted(self) -> str | None:
        token = self._at(0)
        return None if token is None or token["quoted"] is None else token["quoted"].replace('""', '"')

    def _sign(self, ahead: int = 0) -> str | None:
        token = self._at(ahead)
        return None if token is None else token["sign"]

    def _at(self, ahead: int) -> re.Match[str] | None:
        place = self.place + ahead
        return self.tokens[place] if place < len(self.tokens) else None

    def _ends_after(self, ahead: int) -> bool:
        return self._at(ahead) is None or self._sign(ahead) == ")"

    def _closes_at_end(self) -> bool:
        """True if the bracket that opens next is closed by the last token of the target, or of the outer bracket."""
        depth = 0
        for place in range(self.place + 1, len(self.tokens)):
            depth += {"(": 1, ")": -1}.get(self.tokens[place]["sign"] or "", 0)
            if depth == 0:
                return self._ends_after(place + 1 - self.place)
        return True

    def _error(self, reason: str) -> GrammarError:
        return GrammarError(f"target {shown(self.text)} cannot be read: {reason}")


NAMED: Mapping[str, Atom] = {"predicted": PREDICTED, "label": LABEL}
SOURCES: Mapping[Atom, Source] = {PREDICTED: "predicted", LABEL: "label"}


Summand = int | Atom
"""What a row's target sums up: a class, by its number, or a feature."""


@dataclass(frozen=True)
class Formula:
    """A target whose classes are all numbers: what an explained row says of it."""

    terms: tuple[tuple[float, Summand], ...]
    """Weights, and class numbers or features, each once."""
    reading: Reading

    @property
    def text(self) -> str:
        """The formula as text, which `parse_formula` reads."""
        terms = tuple(Term(weight, _atom_of(own)) for weight, own in self.terms)
        return Expression(terms, self.reading).text

    @property
    def target_class(self) -> int | None:
        """The class, where it is of one; None for a sum, and for a feature."""
        weight, own = self.terms[0]
        return own if len(self.terms) == 1 and weight == 1 and isinstance(own, int) else None

    @property
    def is_score(self) -> bool:
        """True for the score of a class, as a class number alone means."""
        return self.target_class is not None and self.reading == "score"

    @property
    def classes(self) -> tuple[int, ...]:
        """The class numbers that it names."""
        return tuple(own for _, own in self.terms if isinstance(own, int))

    @property
    def features(self) -> tuple[Atom, ...]:
        """The features that it names."""
        return tuple(own for _, own in self.terms if isinstance(own, Atom))

    def named(self, name_of: Mapping[Summand, str]) -> str:
        """The formula with the classes' names, for people: `tabby - tiger cat`."""
        parts = [f"{_factor(abs(weight)).replace('*', ' ')}{name_of[own]}" for weight, own in self.terms]
        signs = ["-" if self.terms[0][0] < 0 else "", *(" - " if own < 0 else " + " for own, _ in self.terms[1:])]
        inner = "".join(sign + part for sign, part in zip(signs, parts, strict=True))
        is_default = self.reading == ("score" if self.target_class is not None else "logit")
        return inner if is_default else f"{self.reading}({inner})"


def formula_of(terms: Iterable[tuple[float, Summand]], reading: Reading) -> Formula:
    """The formula of weights and class numbers or features; those of one class are added up."""
    own = collected(Term(weight, _atom_of(one)) for weight, one in terms)
    return Formula(tuple((term.weight, _summand(term.atom)) for term in own), reading)


def _atom_of(own: Summand) -> Atom:
    return own if isinstance(own, Atom) else Atom("class", own)


def _summand(atom: Atom) -> Summand:
    return int(atom.value) if atom.kind == "class" else atom


@lru_cache(maxsize=4096)
def parse_formula(text: str) -> Formula:
    """The formula of a row. Raises GrammarError if it is none."""
    try:
        (found,) = _formulas(text)
    except ValueError as error:
        raise GrammarError(f"{shown(text)} is no target of class numbers") from error
    return found


def _formulas(text: str) -> Iterable[Formula]:
    parser = _Parser(text)
    for terms, reading, _ in parser.alternatives():
        if any(term.atom.kind != "class" and not term.atom.is_feature for term in terms):
            raise GrammarError("a class is no number")
        own = collected(terms)
        yield formula_of([(t.weight, _summand(t.atom)) for t in own], reading or _default_reading(own))
    parser.finish()
