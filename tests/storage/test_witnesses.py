"""Reads that fail: one object's trouble is told from the store's by reading others."""

import pytest

from storage.loose import read_images
from storage.patient import TRIES_OF_ONE_OBJECT, PatientStore, witnesses_of
from storage.store import ChangedError, MissingError, ObjectError, StoreError, UnavailableError
from tests.faults.stores import InterceptedStore
from tests.storage.memory import MemoryStore

KEYS = ("a.png", "b.png", "c.png", "d.png")


class Refusing:
    """Raises for reads of some keys, and counts the calls."""

    def __init__(self, error, *keys):
        self.error, self.keys, self.asked = error, keys, []

    def __call__(self, name, key, call):
        self.asked.append((name, key))
        if name == "read" and key in self.keys:
            raise self.error
        return call()


def store_of(refusing, witnesses=KEYS, seconds=0.0):
    inner = MemoryStore()
    for key in KEYS:
        inner.put(key, key.encode())
    return PatientStore(InterceptedStore(inner, refusing), seconds, witnesses=witnesses)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("storage.patient.FIRST_PAUSE_SECONDS", 0.0)


@pytest.mark.parametrize("error", [ObjectError("403"), StoreError("400, made with another key")])
def test_a_refusal_of_one_object_is_its_own(error):
    with pytest.raises(ObjectError, match="40"):
        store_of(Refusing(error, "a.png")).read("a.png")


@pytest.mark.parametrize("error", [ObjectError("403"), StoreError("no credentials")])
def test_a_refusal_of_all_objects_is_the_stores(error):
    with pytest.raises(StoreError, match="nor can other objects") as caught:
        store_of(Refusing(error, *KEYS)).read("a.png")
    assert type(caught.value) is StoreError


def test_an_object_that_fails_while_others_are_served_is_given_up():
    refusing = Refusing(UnavailableError("500"), "a.png")
    with pytest.raises(ObjectError, match="500; other objects of memory:// can be read"):
        store_of(refusing, seconds=1e9).read("a.png")
    assert refusing.asked.count(("read", "a.png")) == TRIES_OF_ONE_OBJECT
    assert store_of(refusing).read("b.png") == b"b.png"


def test_a_store_that_is_away_is_waited_for():
    refusing = Refusing(UnavailableError("503"), *KEYS)
    with pytest.raises(UnavailableError):
        store_of(refusing).read("a.png")


def test_a_busy_object_is_asked_for_again():
    class Busy(Refusing):
        def __call__(self, name, key, call):
            if len(self.asked) > 4:
                self.keys = ()
            return super().__call__(name, key, call)

    assert store_of(Busy(UnavailableError("503"), "a.png")).read("a.png") == b"a.png"


@pytest.mark.parametrize("error", [MissingError("gone"), ChangedError("other")])
def test_what_says_enough_asks_for_no_witness(error):
    refusing = Refusing(error, "a.png")
    with pytest.raises(type(error)):
        store_of(refusing).read("a.png")
    assert refusing.asked == [("read", "a.png")]


def test_of_a_single_object_the_store_tells_whether_it_is_there():
    refusing = Refusing(UnavailableError("500"), "a.png")
    with pytest.raises(ObjectError):
        store_of(refusing, witnesses=("a.png",)).read("a.png")
    with pytest.raises(UnavailableError):
        store_of(refusing, witnesses=()).read("a.png")


def test_witnesses_are_spread():
    assert witnesses_of([f"{number}" for number in range(9)]) == ("0", "3", "6")
    assert witnesses_of(["b", "a", "a"]) == ("a", "b")
    assert witnesses_of([]) == ()


def images(refusing):
    store = store_of(refusing)
    return list(read_images(store, [store.head(key) for key in KEYS]))


def test_one_refused_image_is_one_record_with_a_reason():
    found = images(Refusing(ObjectError("archived"), "b.png"))
    assert [record.reject and str(record.reject.code) for record in found] == [None, "input_unreadable", None, None]
    with pytest.raises(StoreError, match="nor can other objects"):
        images(Refusing(ObjectError("403"), *KEYS))


def test_an_image_whose_reading_raises_is_one_record_with_a_reason():
    found = images(Refusing(ZeroDivisionError("odd"), "b.png"))
    assert [record.reject and str(record.reject.code) for record in found] == [None, "read_failed", None, None]
    assert found[1].reject.message == "ZeroDivisionError: odd"
    with pytest.raises(MemoryError):
        images(Refusing(MemoryError(), "b.png"))
