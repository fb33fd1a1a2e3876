"""File names of records: different keys have different names, and each name is valid in every file system."""

import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blocksight.storage.outputs.file_names import DEVICES, file_name

ODD = ["a+b", "a#b", "a b", "a-b", "A-b", "a/b", "a\\b", "a.b", ".a", "a.", "a ", "..", ".", "", "/", "-", "con", "CON"]
ODD += [
    "nul.png",
    "Nul.tar.gz",
    "com1",
    "aux.",
    "caf\u00e9",
    "cafe\u0301",
    "\u0430b",
    "ab",
    "AB",
    "a\u200bb",
    "\x00",
    "~",
]
ODD += ["x" * 100, "x" * 101, "x" * 4000, "X" * 100, "\udc80", "%2e%2e", "$(id)", "-rf", "record", "lpt\u00b9"]

KEYS = st.one_of(st.sampled_from(ODD), st.text("aAbB-_./ +\u00e9\u0301", max_size=6), st.text(max_size=300))


@given(KEYS)
@example("a-b-0123456789abcdef")
def test_a_name_is_sound_in_every_file_system(key):
    name = file_name(key)
    assert re.fullmatch("[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?", name)
    assert len(f"{name}.products-1048576.png".encode()) <= 255
    assert name.split(".")[0].lower() not in DEVICES


@given(KEYS, KEYS)
def test_different_keys_have_different_names_also_without_case(one, other):
    if one != other:
        assert folded(file_name(one)) != folded(file_name(other))


def folded(name: str) -> str:
    return unicodedata.normalize("NFD", unicodedata.normalize("NFC", name)).casefold()


def test_all_odd_keys_have_names_of_their_own():
    assert len({folded(file_name(key)) for key in ODD}) == len(ODD)


@pytest.mark.parametrize("key", ["a+b", "a/b", "x" * 200, "A", ".."])
def test_no_key_can_take_the_file_name_of_another(key):
    assert file_name(file_name(key)) != file_name(key)


@pytest.mark.parametrize("key", ["tabby.jpg", "img_0001.png", "a-b", "0", "a..b", "x" * 100])
def test_a_sound_key_is_its_own_name(key):
    assert file_name(key) == key
