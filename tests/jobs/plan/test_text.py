"""Text for people: counts agree with their nouns, everywhere that a command prints one."""

import re
from pathlib import Path

import pytest

from blocksight import jobs
from blocksight.jobs.plan.text import counted, percent

NOUNS = "unit|record|image|object|row|class|fragment|shard|metric|target|label|finding|suspicion|map"
COUNT = re.compile(rf"\{{(?!counted)[^{{}}\n]*(?:len\([^{{}}\n]*\)|num_\w+|count)(?::,)?\}} (?:\w+ )?(?:{NOUNS})e?s\b")


@pytest.mark.parametrize(
    ("number", "noun", "wanted"),
    [
        (1, "unit", "1 unit"),
        (0, "unit", "0 units"),
        (1200, "unit", "1,200 units"),
        (2, "class", "2 classes"),
        (2, "box", "2 boxes"),
        (2, "copy", "2 copies"),
        (2, "key", "2 keys"),
    ],
)
def test_a_count_has_the_form_of_its_noun(number, noun, wanted):
    assert counted(number, noun) == wanted


def test_a_share_is_in_percent_with_enough_digits():
    assert [percent(share) for share in (0, 1, 0.115, 0.00012)] == ["0.0 %", "100.0 %", "11.5 %", "0.012 %"]


def test_no_sentence_writes_a_plural_beside_a_number_of_any_size():
    """`1 images`: `counted` writes the number with its noun."""
    assert COUNT.search('f"{len(x)} images"')
    assert COUNT.search('f"{plan.num_records:,} committed records"')
    found = [
        f"{file.name}: {match[0]}"
        for file in sorted(Path(jobs.__file__).parent.rglob("*.py"))
        for match in COUNT.finditer(file.read_text())
    ]
    assert found == []
