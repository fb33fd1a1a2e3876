"""The examination of a model's output: what is recognised, what is said, and what is refused."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional

from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.examination import examine
from blocksight.engine.scoring.setting_choice import drawn_pictures
from tests.engine.nets import Plain, seeded

SIDE = 16


class Wrapped(nn.Module):
    """A small network, with something done to its logits."""

    def __init__(self, change, factor=40.0):
        super().__init__()
        self.net, self.change, self.factor = nn.Conv2d(3, 5, 8, 8), change, factor

    def forward(self, x):
        return self.change(self.factor * self.net(x).mean((2, 3)))


def adapter_of(change, **options):
    return ModelAdapter(seeded(lambda: Wrapped(change, **options)), name="net", input_size=(SIDE, SIDE))


def examined(change, asked=None, **options):
    adapter = adapter_of(change, **options)
    return examine(adapter, drawn_pictures(adapter), asked)


def test_a_sound_classifier_gets_a_softmax_and_no_word():
    found = examined(lambda z: z)
    assert (found.readout, found.findings) == ("softmax", ())


@pytest.mark.parametrize(
    ("change", "readout", "sentence"),
    [
        (lambda z: z.softmax(1), "probabilities", "probabilities already .* a softmax is inside"),
        (lambda z: z.sigmoid(), "probabilities", "independent labels already .* a sigmoid is inside"),
        (lambda z: (z * 1e-3).sigmoid(), "probabilities", "a sigmoid is inside"),
        (lambda z: 1 / (1 + (-z).exp()), "probabilities", "a sigmoid is inside"),
        (lambda z: 0.3 + 0.2 / (1 + (-z).exp()), "softmax", "--readout probabilities"),
        (lambda z: z.sigmoid().clamp(0.01, 0.99) * 0.2 + 0.3, "probabilities", "a sigmoid is inside"),
        (lambda z: z.softmax(1) * (z > 0), "probabilities", "or a softmax that was changed"),
        (lambda z: z.softmax(1) * 100, "softmax", "sum to 100 for every image, as percentages do"),
        (lambda z: functional.logsigmoid(z), "softmax", "a log-sigmoid gives the outputs"),
        (lambda z: z.log_softmax(1), "softmax", None),
        (lambda z: z.double(), "softmax", "the outputs are float64"),
        (lambda z: z * 0 + 1.5, "softmax", "the same for all 8 images"),
    ],
)
def test_an_output_is_recognised(change, readout, sentence):
    found = examined(change)
    assert found.readout == readout
    assert len(found.findings) == (sentence is not None)
    assert all(re.search(sentence or "", one) for one in found.findings)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda z: functional.dropout(z), "changes from call to call"),
        (lambda z: z + torch.rand(1), "changes from call to call"),
        (lambda z: z - z.mean(0), "with the other images of the pass: something in it joins"),
        (lambda z: z * torch.nan, "NaN or infinity for each of 8 images: check"),
        (lambda z: z.index_fill(1, torch.tensor([2]), -torch.inf), "always at the classes 2 .leave them out"),
        (lambda z: -z.log_softmax(1), "negative logarithms .* every map would be of the wrong class"),
        (lambda z: z if len(z) > 1 else z.view(3, 2), "model 'net' fails on 8 images together or on one alone"),
    ],
)
def test_what_gives_no_map_twice_is_refused(change, sentence):
    with pytest.raises(ModelError, match=sentence):
        examined(change)


def test_batch_norm_without_running_statistics_is_named():
    adapter = adapter_of(nn.BatchNorm1d(5, track_running_stats=False))
    with pytest.raises(ModelError, match=r"change has no running statistics.* GroupNorm"):
        examine(adapter, drawn_pictures(adapter))


def test_what_an_image_makes_infinite_is_said():
    found = examined(spoiled)
    assert found.findings == ("the output holds NaN or infinity for 3 of 8 images: those are rejected",)


def spoiled(logits):
    """NaN for the images whose class 1 is likely."""
    return torch.where(logits[:, 1:2] > 10, torch.nan, logits)


def test_an_image_without_a_finite_output_hides_no_randomness():
    with pytest.raises(ModelError, match="changes from call to call"):
        examined(lambda z: functional.dropout(spoiled(z)))
    with pytest.raises(ModelError, match="changes from call to call"):
        examined(lambda z: torch.where(torch.rand(len(z), 1) < 0.5, torch.nan, z))


def test_every_image_is_tried_alone():
    with pytest.raises(ModelError, match="with the other images of the pass"):
        examined(lambda z: z - z[-1:])  # the first images alone would show it too, but not by how much
    with pytest.raises(ModelError, match="with the other images of the pass"):
        examined(lambda z: torch.cat([z[:-1], z[-1:] + 10 * (len(z) > 1)]))


class Woken(Wrapped):
    """A network whose forward puts a part of it into training mode."""

    def __init__(self):
        super().__init__(nn.Dropout(0.5))

    def forward(self, x):
        self.change.train()
        return super().forward(x)


def test_a_forward_that_calls_train_is_the_cause():
    adapter = ModelAdapter(seeded(Woken), name="net", input_size=(SIDE, SIDE))
    with pytest.raises(ModelError, match=r"call to call, by .* its forward puts change into training mode"):
        examine(adapter, drawn_pictures(adapter))


class InPlace(Wrapped):
    """A network that normalises its input in place."""

    def __init__(self):
        super().__init__(lambda z: z)

    def forward(self, x):
        return super().forward(x.sub_(0.1))


def test_an_input_that_is_changed_in_place_is_refused():
    adapter = ModelAdapter(seeded(InPlace), name="net", input_size=(SIDE, SIDE))
    with pytest.raises(ModelError, match=r"changes its input in place.* x = x.clone\(\)"):
        examine(adapter, drawn_pictures(adapter))


class Parts:
    """What some libraries return."""

    def __init__(self, logits):
        self.hidden, self.logits = logits[:, None], logits


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda z: z[:, 0], r"\(2,\): wrap .* output\[:, None\], and say --readout sigmoid"),
        (lambda z: z[:, :, None, None], r"output.flatten\(1\)"),
        (lambda z: z[:, :, None, None].expand(-1, -1, 3, 3), r"output.mean\(\(2, 3\)\)"),
        (lambda z: (z[:, None], z), r"a tuple of \(2, 1, 5\), \(2, 5\): .* such as output\[1\]"),
        (lambda z: {"hidden": z, "logits": z}, r"a dict with hidden, logits: .* output\['logits'\]"),
        (Parts, "a Parts: wrap .* such as output.logits"),
        (lambda _: None, "it returned a NoneType$"),
    ],
)
def test_an_output_that_is_no_logits_says_how_to_wrap_it(change, sentence):
    with pytest.raises(ModelError, match=sentence):
        _ = adapter_of(change).num_classes


class Labels(nn.Module):
    """A label per channel, absent unless the channel is bright somewhere."""

    def forward(self, x):
        return 8 * x.amax((2, 3)) - 6


def labelled(*present):
    pixels = torch.full((3, 3, SIDE, SIDE), 40, dtype=torch.uint8)
    for channel in present:
        pixels[:, channel, 4:8, 4:8] = 255
    return pixels


def of_labels(module, pixels):
    adapter = ModelAdapter(module, input_size=(SIDE, SIDE), mean=(0, 0, 0), std=(1, 1, 1))
    dark = adapter.normalise(torch.zeros(3, 3, SIDE, SIDE, dtype=torch.uint8))
    return examine(adapter, torch.cat([adapter.normalise(pixels), dark]), num_real=len(pixels))


def test_several_labels_at_once_are_taken_for_independent_and_the_guess_is_said():
    found = of_labels(Labels(), labelled(0, 1))
    assert found.readout == "sigmoid"
    assert "This is a guess: if the classes exclude each other say --readout softmax" in found.findings[0]


def test_one_label_at_a_time_is_no_sign_of_independent_labels():
    assert of_labels(Labels(), labelled(1)).readout == "softmax"


class Exclusive(Labels):
    """The same logits as a training by cross entropy leaves them: their sum is fixed."""

    def forward(self, x):
        logits = super().forward(x)
        return logits - logits.mean(1, keepdim=True) + 3


def test_an_uncertain_classifier_is_not_taken_for_independent_labels():
    assert of_labels(Exclusive(), labelled(0, 1)).readout == "softmax"


def test_what_the_user_says_is_taken_unless_it_cannot_be():
    assert examined(lambda z: z.sigmoid(), "softmax").readout == "softmax"
    (sentence,) = examined(lambda z: z.softmax(1), "softmax").findings
    assert sentence == "all outputs lie in [0, 1] already, and a softmax is taken of them, as it was asked"
    assert examined(lambda z: z, "identity").findings == ()
    with pytest.raises(ModelError, match=r"--readout probabilities, and the outputs of net lie in \[-.*: say softmax"):
        examined(lambda z: z, "probabilities")


def test_few_digits_are_said():
    net = seeded(lambda: Wrapped(lambda z: z.float())).bfloat16()
    net.register_forward_pre_hook(lambda _, given: (given[0].bfloat16(),))
    adapter = ModelAdapter(net, input_size=(SIDE, SIDE))
    found = examine(adapter, drawn_pictures(adapter))
    assert "weights are bfloat16: scores have fewer digits than in float32" in found.findings


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: nn.Sequential(nn.Conv2d(1, 5, 16), nn.Flatten()), "takes 1 channels; say --channels 1"),
        (lambda: nn.Sequential(nn.Conv2d(3, 5, 16), nn.Flatten()).half(), "weights are float16 .* model.float()"),
        (lambda: nn.Sequential(nn.Conv2d(3, 5, 16), nn.Flatten()).double(), "weights are float64 .* model.float()"),
        (lambda: nn.Linear(3, 5), "fails on RGB images of 16 x 16 pixels"),
    ],
)
def test_a_model_that_cannot_take_the_images_says_what_to_do(make, sentence):
    with pytest.raises(ModelError, match=sentence):
        _ = ModelAdapter(make(), input_size=(SIDE, SIDE)).num_classes


def test_one_output_is_explained_with_a_sigmoid():
    net = seeded(Plain)
    net.head = nn.Linear(160, 1)
    adapter = ModelAdapter(net, input_size=(32, 32))
    adapter.readout = "sigmoid"
    assert adapter.num_classes == 1
