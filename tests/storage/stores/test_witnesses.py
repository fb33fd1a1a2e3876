"""Calls that fail: reading other objects, or writing beside one, tells an object's error from the store's."""

import errno

import pytest

from blocksight.storage.inputs.loose import read_images
from blocksight.storage.stores.retrying import MAX_TRIES_PER_OBJECT, PatientStore, is_probe, witnesses_of
from blocksight.storage.stores.store import (
    AlreadyExistsError,
    ChangedError,
    MissingError,
    ObjectError,
    ObjectInfo,
    OutputError,
    StoreError,
    UnavailableError,
)
from tests.faults.stores import InterceptedStore
from tests.storage.memory import MemoryStore

KEYS = ("a.png", "b.png", "c.png", "d.png")


def test_unlisted_entries_of_the_inner_store_are_passed_on():
    inner = MemoryStore()
    inner.unlisted = lambda: iter([("a pipe", "p")])
    assert [*PatientStore(inner).unlisted()] == [("a pipe", "p")]


def test_the_place_beside_an_object_is_its_own_folder():
    """A store may refuse a single folder."""
    asked = []

    class Noting(MemoryStore):
        def create(self, key, data, *, metadata=None):
            asked.append(key)
            super().create(key, data, metadata=metadata)

    assert PatientStore(Noting())._can_write_others("_job/receipts/a.json", 9)
    assert [key.rpartition("/")[0] for key in asked] == ["_job/receipts"]


class Refusing:
    """An interceptor that raises when some keys are read, and counts the calls."""

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
    monkeypatch.setattr("blocksight.storage.stores.retrying.FIRST_PAUSE_SECONDS", 0.0)


@pytest.mark.parametrize("error", [ObjectError("403"), StoreError("400, made with another key")])
def test_a_refusal_of_one_object_is_an_object_error(error):
    with pytest.raises(ObjectError, match="40"):
        store_of(Refusing(error, "a.png")).read("a.png")


@pytest.mark.parametrize("error", [ObjectError("403"), StoreError("no credentials")])
def test_a_refusal_of_all_objects_is_a_store_error(error):
    with pytest.raises(StoreError, match="nor can other objects") as caught:
        store_of(Refusing(error, *KEYS)).read("a.png")
    assert type(caught.value) is StoreError


def test_an_object_that_fails_while_others_are_served_is_given_up():
    refusing = Refusing(UnavailableError("500"), "a.png")
    with pytest.raises(ObjectError, match="500; other objects of memory:// can be read"):
        store_of(refusing, seconds=1e9).read("a.png")
    assert refusing.asked.count(("read", "a.png")) == MAX_TRIES_PER_OBJECT
    assert store_of(refusing).read("b.png") == b"b.png"


def test_an_object_that_takes_long_to_fail_is_given_up_at_the_second_time(monkeypatch):
    monkeypatch.setattr("blocksight.storage.stores.retrying.MAX_SECONDS_PER_OBJECT", 0.0)
    refusing = Refusing(UnavailableError("it hangs"), "a.png")
    with pytest.raises(ObjectError, match="it hangs; other objects"):
        store_of(refusing, seconds=1e9).read("a.png")
    assert refusing.asked.count(("read", "a.png")) == 2


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
def test_an_error_that_says_enough_asks_for_no_witness(error):
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
    assert witnesses_of(lambda: (ObjectInfo(key, 1, "v") for key in "012345678")) == ("0", "3", "6")
    assert witnesses_of(lambda: (ObjectInfo(key, 1, "v") for key in "aab")) == ("a", "b")
    assert witnesses_of(lambda: ()) == ()


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


# ---------------------------------------------------------------- objects of an output

CALLS = {
    "create": lambda store: store.create("data/b", b"12345"),
    "put": lambda store: store.put("data/b", b"12345"),
    "head": lambda store: store.head("data/b"),
    "delete": lambda store: store.delete("data/b"),
    "read": lambda store: store.read("data/b"),
}


class Output:
    """An output in memory, where `fails(name, key, stored)` decides which calls raise."""

    def __init__(self, error, fails):
        self.error, self.fails, self.inner, self.asked = error, fails, MemoryStore(), []
        plain = PatientStore(InterceptedStore(self.inner, self), 0.0, unit_folders=("data/",))
        self.store = plain

    def __call__(self, name, key, call):
        self.asked.append((name, key))
        if self.fails(name, key):
            raise self.error
        return call()


def of_one_object(_name, key):
    return key == "data/b"


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("error", [StoreError("403"), ObjectError("403"), UnavailableError("500")], ids=repr)
def test_an_object_of_an_output_that_fails_alone_is_an_output_error(name, error):
    output = Output(error, of_one_object)
    with pytest.raises(OutputError, match="other objects beside it can be written"):
        CALLS[name](output.store)
    ((_, probe),) = [asked for asked in output.asked if asked[0] == "create" and asked[1] != "data/b"]
    assert is_probe(probe)
    assert probe.startswith("data/")
    assert list(output.inner.list()) == []


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("error", [StoreError("403"), UnavailableError("500")], ids=repr)
def test_where_nothing_can_be_written_beside_it_it_is_a_store_error(name, error):
    output = Output(error, lambda _name, key: key.startswith("data/"))
    with pytest.raises(type(error)) as caught:
        CALLS[name](output.store)
    assert caught.value is error


def test_a_store_that_takes_only_small_objects_is_full():
    class Small(MemoryStore):
        def create(self, key, data, *, metadata=None):
            if len(data) >= 5:
                raise StoreError("no space is left")
            super().create(key, data, metadata=metadata)

    with pytest.raises(StoreError, match="no space") as caught:
        CALLS["create"](PatientStore(Small(), 0.0, unit_folders=("data/",)))
    assert type(caught.value) is StoreError


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, StoreError), (errno.EACCES, OutputError)])
def test_an_error_of_the_machine_is_no_error_of_an_object(number, kind):
    error = StoreError("no")
    error.__cause__ = OSError(number, "no")
    with pytest.raises(StoreError) as caught:
        CALLS["create"](Output(error, of_one_object).store)
    assert type(caught.value) is kind


@pytest.mark.parametrize("error", [MissingError("gone"), ChangedError("other")])
def test_an_error_that_says_enough_writes_no_probe(error):
    output = Output(error, of_one_object)
    with pytest.raises(type(error)):
        CALLS["read"](output.store)
    assert output.asked == [("read", "data/b")]


def test_an_object_that_exists_is_reported_without_a_probe():
    output = Output(AlreadyExistsError("there"), lambda _name, _key: False)
    output.inner.put("data/b", b"of another attempt")
    with pytest.raises(AlreadyExistsError):
        CALLS["create"](output.store)
    assert output.asked == [("create", "data/b"), ("head", "data/b")]


@pytest.mark.parametrize("error", [AlreadyExistsError("it exists already"), MissingError("no such key")])
def test_a_store_that_reports_an_object_it_lacks_cannot_write_it(error):
    output = Output(error, lambda name, key: (name, key) == ("create", "data/b"))
    with pytest.raises(OutputError, match="but the store has no such object; other objects beside it"):
        CALLS["create"](output.store)
    outside = Output(error, lambda name, _key: name == "create")
    with pytest.raises(type(error)):
        outside.store.create("_job/plan", b"1")
    assert outside.asked == [("create", "_job/plan")]


def test_an_error_of_an_object_of_the_whole_job_is_passed_on():
    output = Output(UnavailableError("500"), lambda _name, key: key == "_job/stop")
    with pytest.raises(UnavailableError):
        output.store.head("_job/stop")
    assert output.asked == [("head", "_job/stop")]


def test_a_store_that_is_back_by_then_is_asked_once_more():
    output = Output(UnavailableError("500"), lambda _name, _key: len(output.asked) == 1)
    CALLS["create"](output.store)
    assert output.inner.read("data/b") == b"12345"
