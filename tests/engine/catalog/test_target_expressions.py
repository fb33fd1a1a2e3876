"""The grammar of targets: what each text means, one canonical text per scalar, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocksight.engine.catalog.target_expressions import (
    MAX_TARGETS,
    GrammarError,
    formula_of,
    parse_formula,
    parse_targets,
    split_targets,
)

MEANINGS = {
    "predicted": ["predicted"],
    "label": ["label"],
    "top-3": ["predicted", "top-2", "top-3"],
    "281, 7,281": ["281", "7"],
    "281-282": ["281-282"],
    "-282 + 281": ["281-282"],
    "282+281": ["281+282"],
    "margin": ["margin"],
    "logit(margin)": ["margin"],
    "logprob(margin)": ["logprob(margin)"],
    "0.5*281+0.5*282": ["0.5*281+0.5*282"],
    "281+281": ["2*281"],
    "1*281": ["281"],
    ".00000012*281": ["0.00000012*281"],
    "logit(281)": ["logit(281)"],
    "logprob(281)": ["logprob(281)"],
    "logprob(1)-logprob(2)": ["logprob(1-2)"],
    "2*logit(281)-logit(3)": ["2*281-3"],
    "logit(281-282)": ["281-282"],
    "logprob(top-2)": ["logprob(predicted)", "logprob(top-2)"],
    "predicted-label,margin": ["predicted-label", "margin"],
    "tiger cat - tabby": ['"tiger cat"-"tabby"'],
    '"tench, Tinca tinca"': ['"tench, Tinca tinca"'],
    '"label"': ['"label"'],
    '"say ""A"""-7': ['"say ""A"""-7'],
    "text:a photo of a dog": ['text:"a photo of a dog"'],
    'text:"a black-and-white dog, left"': ['text:"a black-and-white dog, left"'],
    '"text:a, b"': ['"text:a, b"'],
    'text:"a, b"': ['text:"a, b"'],
    "text:a dog | a drawing of a dog": ['text:"a dog|a drawing of a dog"'],
    "text:a dog - text:a cat": ['text:"a dog"-text:"a cat"'],
    "logprob(text:a dog)": ['logprob(text:"a dog")'],
}


@pytest.mark.parametrize("text", MEANINGS)
def test_each_text_has_its_meaning(text):
    assert [one.text for one in parse_targets(text)] == MEANINGS[text]


@pytest.mark.parametrize("text", [own for meant in MEANINGS.values() for own in meant if "top-" not in own])
def test_the_canonical_text_means_itself(text):
    assert [one.text for one in parse_targets(text)] == [text]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("281+", "a class is missing"),
        ("--1", "a class is missing"),
        ("*", "a class is missing"),
        ("281-281", "is 0 for every image"),
        ("x*281", "is no number"),
        ("logprob(1)-2", "adds a log-probability to a logit"),
        ("logit(logprob(3))", "means two things"),
        ("logit(281", "a bracket is not closed"),
        ("281)", "is not expected"),
        ("predicted-top-2", "top-2 stands alone"),
        ("margin+281", "margin stands alone"),
        ("2*logit(top-3)", "top-K is several targets"),
        ("+".join(map(str, range(1001))), "names 1001 classes, and 1000 at most"),
        ("logprob(feature:3)", "a log-probability is of classes"),
        ("top-hat", "top-hat is no top-K; a class of this name is quoted"),
        ("top-0", "K from 1 to 100"),
        ("top-101", "K from 1 to 100"),
        ('"x', "opens a quote"),
        ('""', "a name is empty"),
        ("text:", "a prompt after text: is empty"),
        ("text:a||b", "a prompt after text: is empty"),
        ("a,,b", "a comma with no target"),
        ("", "a comma with no target"),
        ("logit(" * 9 + "1" + ")" * 9, "more than 8 brackets"),
        (",".join(map(str, range(MAX_TARGETS + 1))), "a record has 100 at most"),
        (f"{'9' * 300}*logit({'9' * 300}*1)", "not finite"),
    ],
)
def test_what_has_no_meaning_is_refused(text, reason):
    with pytest.raises(GrammarError, match=reason.replace("(", r"\(")):
        parse_targets(text)


def test_commas_separate_outside_quotes_and_brackets():
    assert split_targets('"a, b",logprob(1-2), x ') == ['"a, b"', "logprob(1-2)", "x"]


def test_the_source_says_how_a_class_is_chosen():
    found = {one.text: one.source for one in parse_targets("top-2,label,281,predicted,margin,logit(predicted),1+2")}
    assert found == {
        "predicted": "top",
        "top-2": "top",
        "label": "label",
        "281": "given",
        "margin": "expression",
        "logit(predicted)": "predicted",
        "1+2": "expression",
    }


NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).filter(lambda own: abs(own) > 1e-9)


@given(
    st.dictionaries(st.integers(0, 10**18 - 1), NUMBERS, min_size=1, max_size=5), st.sampled_from(["logit", "logprob"])
)
def test_a_formula_is_read_back_exactly(weights, reading):
    made = formula_of([(weight, index) for index, weight in weights.items()], reading)
    assert parse_formula(made.text) == made


def test_formulas_of_rows():
    assert parse_formula("281").is_score
    assert (parse_formula("281").target_class, parse_formula("logit(281)").target_class) == (281, 281)
    assert not parse_formula("logit(281)").is_score
    assert parse_formula("281-282").target_class is None
    same = formula_of([(1, 7), (-1, 7)], "logit")  # the prediction less the label, where the model is right
    assert parse_formula(same.text) == same
    for text in ("", "predicted", "top-2", "1,2", "margin", '"a"', "1-"):
        with pytest.raises(GrammarError, match="no target of class numbers"):
            parse_formula(text)


def test_people_read_names():
    names = {1: "tabby", 2: "tiger cat"}
    named = {text: parse_formula(text).named(names) for text in ("1", "1-2", "0.5*1+0.5*2", "logit(1)", "logprob(1-2)")}
    assert named == {
        "1": "tabby",
        "1-2": "tabby - tiger cat",
        "0.5*1+0.5*2": "0.5 tabby + 0.5 tiger cat",
        "logit(1)": "logit(tabby)",
        "logprob(1-2)": "logprob(tabby - tiger cat)",
    }
    assert formula_of([(-1, 1)], "logit").named(names) == "-tabby"
