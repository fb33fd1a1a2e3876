"""Errors of devices, in the words of the libraries, are told apart from errors of records and models."""

import ast
import pickle
from pathlib import Path

import pytest
import torch

from blocksight import engine
from blocksight.engine.errors import ModelError
from blocksight.engine.model.device_errors import DeviceTrouble, device_trouble, told_by_device
from tests.faults.devices import DEVICE_ERRORS, OutOfResources


@pytest.mark.parametrize(("trouble", "error"), DEVICE_ERRORS, ids=lambda value: str(value)[:60])
def test_the_words_of_each_library_are_known(trouble, error):
    assert device_trouble(error) is trouble
    assert device_trouble(pickle.loads(pickle.dumps(error))) is trouble
    assert device_trouble(RuntimeError(f"{type(error).__name__}: {error}")) in (trouble, None)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a label that says: CUDA out of memory"),
        KeyError("device-side assert"),
        RuntimeError("shapes do not fit"),
        RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
        RuntimeError("mat1 and mat2 must have the same dtype, but got Half and Float"),
        ModelError("compiled cannot run net: no such operator"),
        AssertionError("this model wants 3 channels"),
    ],
    ids=str,
)
def test_an_error_of_a_record_or_a_model_is_none_of_the_device(error):
    assert device_trouble(error) is None


def raised(error, *, by=None, inside=None):
    """The error as if it was raised from another one, or while that one was handled."""
    if by is not None:
        error.__cause__ = by
    error.__context__ = inside
    return error


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")
LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def test_the_errors_behind_an_error_count_and_the_worst_decides():
    assert device_trouble(raised(ModelError("x"), by=OUT_OF_MEMORY)) is DeviceTrouble.MEMORY
    assert device_trouble(raised(ValueError("x"), inside=OUT_OF_MEMORY)) is DeviceTrouble.MEMORY
    assert (
        device_trouble(raised(torch.OutOfMemoryError("x"), by=raised(ValueError("y"), by=LOST))) is DeviceTrouble.LOST
    )
    hidden = ValueError("x")
    hidden.__context__, hidden.__suppress_context__ = LOST, True
    assert device_trouble(hidden) is None
    round_about = ValueError("x")
    round_about.__context__ = round_about
    assert device_trouble(round_about) is None


def test_a_sentence_holds_the_librarys_words_and_what_to_do():
    error = raised(ModelError("the model fails"), by=torch.AcceleratorError("CUDA error: ECC\nCompile with DSA"))
    assert told_by_device(error) == (
        "the process lost its device (AcceleratorError: CUDA error: ECC): run the same command again; if it happens "
        "again and again, the device is faulty (dmesg tells)"
    )
    assert "smaller --batch-size" in told_by_device(OUT_OF_MEMORY)
    assert "driver" in told_by_device(OutOfResources("out of resource: shared memory"))


RUNS_NOTHING = {"_readable"}
"""Functions whose handlers see no device: a setting of torch's."""


def swallowing(function):
    """Handlers of any error, in a function, after which it goes on."""
    handlers = [node for node in ast.walk(function) if isinstance(node, ast.ExceptHandler)]
    broad = [one for one in handlers if one.type is None or ast.unparse(one.type) in ("Exception", "RuntimeError")]
    return [one for one in broad if not any(isinstance(node, ast.Raise) for node in ast.walk(one))]


def test_no_handler_of_the_engine_swallows_a_trouble_of_the_device():
    found = set()
    for file in Path(engine.__path__[0]).rglob("*.py"):
        functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        found |= {one.name for one in functions if swallowing(one)}
    assert found == RUNS_NOTHING
