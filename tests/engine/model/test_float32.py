"""float32 is IEEE float32 inside a borrowed model, whatever was set before, and the settings come back."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from blocksight.engine.model.float32 import use_ieee_float32
from blocksight.engine.model.taps import frozen

OWN = torch.backends
SWITCHES = (OWN.cuda.matmul, OWN.cudnn.conv, OWN.cudnn.rnn, OWN.mkldnn.matmul, OWN.mkldnn.conv, OWN.mkldnn.rnn)


@pytest.fixture(autouse=True)
def defaults():
    """torch's own settings, before and after each test."""
    as_delivered()
    yield
    as_delivered()


def as_delivered():
    OWN.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    OWN.cudnn.allow_tf32 = True
    for switch, precision in zip(SWITCHES, ("none", "tf32", "tf32", "none", "none", "none"), strict=True):
        switch.fp32_precision = precision
    OWN.cudnn.deterministic, OWN.cudnn.benchmark = False, False


def precisions():
    return [switch.fp32_precision for switch in SWITCHES]


def old_settings():
    return torch.get_float32_matmul_precision(), OWN.cuda.matmul.allow_tf32, OWN.cudnn.allow_tf32


def while_borrowed(read):
    """What it reads while a model is borrowed by something that fails."""
    found = []
    with suppress(ZeroDivisionError), frozen(nn.Conv2d(3, 4, 3)):
        found.append(read())
        raise ZeroDivisionError
    return found[0]


def put(place, value):
    """Sets `cudnn.conv` or the like; an empty place is torch's setting of all libraries."""
    target = OWN
    for name in filter(None, place.split(".")):
        target = getattr(target, name)
    target.fp32_precision = value


CHANGES = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "cuBLAS, by the old setting": lambda: setattr(OWN.cuda.matmul, "allow_tf32", True),
    "cuDNN, by the old setting": lambda: setattr(OWN.cudnn, "allow_tf32", False),
    **{
        f"{place or 'all'} {value}": lambda place=place, value=value: put(place, value)
        for place in ("", "cudnn", "cudnn.conv", "cudnn.rnn", "cuda.matmul")
        for value in ("tf32", "ieee")
    },
    "mkldnn.conv bf16": lambda: put("mkldnn.conv", "bf16"),
    "mkldnn.matmul bf16": lambda: put("mkldnn.matmul", "bf16"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_float32_is_ieee_while_a_model_is_borrowed_and_the_users_settings_come_back(change):
    CHANGES[change]()
    before = precisions()
    inside = while_borrowed(lambda: (precisions(), old_settings()))  # the old settings can be read, and agree
    assert inside == (["ieee"] * 6, ("highest", False, False))
    assert precisions() == before


@pytest.mark.parametrize("change", CHANGES)
def test_a_process_can_be_set_to_ieee_float32(change):
    CHANGES[change]()
    use_ieee_float32()
    assert precisions() == ["ieee"] * 6
    assert old_settings() == ("highest", False, False)


def test_old_settings_come_back_where_they_could_be_read():
    torch.set_float32_matmul_precision("high")
    before = old_settings()
    while_borrowed(old_settings)
    assert old_settings() == before == ("high", True, True)


@pytest.mark.parametrize("before", [(False, False), (True, False), (False, True)])
def test_cudnn_takes_the_same_algorithms_in_each_run_while_a_model_is_borrowed(before):
    OWN.cudnn.deterministic, OWN.cudnn.benchmark = before
    assert while_borrowed(lambda: (OWN.cudnn.deterministic, OWN.cudnn.benchmark)) == (True, False)
    assert (OWN.cudnn.deterministic, OWN.cudnn.benchmark) == before
