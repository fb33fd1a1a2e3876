"""What a module returns: logits alone, or among other outputs; and grey input."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.outputs import Grey, as_it_was, of_channels, with_one_output

Pair = namedtuple("Pair", ["features", "logits"])


class Several(nn.Module):
    """Returns its logits [N, 3] in a form that is asked for."""

    def __init__(self, form):
        super().__init__()
        self.layer, self.form = nn.Linear(3, 3), form

    def forward(self, x):
        return self.form(self.layer(x.mean((2, 3))))


def made(form) -> ModelAdapter:
    torch.manual_seed(0)
    return ModelAdapter(Several(form), input_size=(8, 8))


FORMS = {
    "dict": lambda z: {"features": z + 1, "logits": z},
    "object": lambda z: SimpleNamespace(loss=None, hidden=z[:, :, None], logits=z),
    "tuple": lambda z: (z, z + 1),
    "named": lambda z: Pair(z + 1, z),
    "list": lambda z: [z[:, :, None, None], z],
    "only": lambda z: {"anything": z},
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_found(form):
    adapter = with_one_output(made(FORMS[form]))
    pixels = torch.rand(4, 3, 8, 8)
    assert torch.equal(adapter.logits(pixels), made(lambda z: z).logits(pixels))
    assert adapter.num_classes == 3
    assert with_one_output(adapter) is adapter
    assert isinstance(as_it_was(adapter.module), Several)


def test_what_was_chosen_among_several_is_said():
    assert with_one_output(made(FORMS["only"])).notes == ()
    assert "'logits' is explained (others: features" in with_one_output(made(FORMS["dict"])).notes[0]


@pytest.mark.parametrize(("form", "key", "more"), [("dict", "features", 1), ("tuple", "1", 1), ("object", "logits", 0)])
def test_another_output_is_named(form, key, more):
    pixels = torch.rand(4, 3, 8, 8)
    first = with_one_output(made(FORMS[form]))
    for adapter in (made(FORMS[form]), first):
        found = with_one_output(adapter, key).logits(pixels)
        assert torch.allclose(found, made(lambda z: z).logits(pixels) + more)


def test_one_number_per_image_is_a_column():
    adapter = with_one_output(made(lambda z: z[:, 0]))
    adapter.readout = "sigmoid"
    assert adapter.num_classes == 1


def test_what_cannot_be_is_told():
    with pytest.raises(ModelError, match="returns features, logits"):
        with_one_output(made(FORMS["dict"]), "nothing")
    with pytest.raises(ModelError, match="has one output: leave the key out"):
        with_one_output(made(lambda z: z), "logits")
    two = with_one_output(made(lambda z: {"a": z, "b": z}))
    with pytest.raises(ModelError, match="a dict with a, b"):
        _ = two.num_classes


def test_a_model_of_brightness():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    adapter = ModelAdapter(net, input_size=(8, 8), mean=(0.2,) * 3, std=(0.4,) * 3)
    grey = of_channels(adapter, 1)
    pixels = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8).expand(2, 3, 8, 8)
    with grey.borrowed(), torch.no_grad():
        wanted = net((pixels[:, :1] / 255 - 0.2) / 0.4)
        assert torch.allclose(grey.logits(grey.normalise(pixels)), wanted, atol=1e-6)
    assert of_channels(grey, 1) is grey
    assert of_channels(adapter, 3) is adapter
    assert grey.fingerprint == ModelAdapter(Grey(net)).fingerprint
    for fed in ({"mean": (0.1, 0.2, 0.3), "std": (0.5,) * 3}, {"mean": (0.1,) * 3, "std": (0.5, 0.5, 0.4)}):
        with pytest.raises(ModelError, match=r"is fed one channel .* has three means"):
            of_channels(ModelAdapter(net, **fed), 1)
    with pytest.raises(ModelError, match="takes 1 channels; say --channels 1"):
        _ = adapter.num_classes
    net[0] = nn.Conv2d(3, 4, 3)
    with pytest.raises(ModelError, match=r"first convolution module.0 takes 3 channels; leave --channels out"):
        _ = of_channels(ModelAdapter(net, mean=(0.2,) * 3, std=(0.4,) * 3, input_size=(8, 8)), 1).num_classes


def test_what_fails_is_left_as_it_is_and_a_trouble_of_the_device_is_told():
    def failing(error):
        def forward(_):
            raise error

        return made(forward)

    adapter = failing(ZeroDivisionError("by the user"))
    assert with_one_output(adapter) is adapter
    with pytest.raises(torch.OutOfMemoryError):
        with_one_output(failing(torch.OutOfMemoryError("CUDA out of memory")))
