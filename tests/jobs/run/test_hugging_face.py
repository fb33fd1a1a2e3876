"""Every image classifier of the library transformers is fed as its own processor does it, or refused in a sentence."""

import importlib.util
from pathlib import Path

import pytest
import skimage.data
import torch
import transformers
from PIL import Image

from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.loading import load_model
from blocksight.engine.model.sources.feeding import BlueFirst
from blocksight.jobs.explain.preflight import check_output
from blocksight.jobs.explain.step import load
from blocksight.jobs.plan.config import ConfigError, JobConfig
from blocksight.jobs.plan.context import weights_bytes
from blocksight.jobs.plan.model_input import with_model_file
from blocksight.storage.images.decode import decode, fit
from tests.jobs.jobs_of import config_of
from tests.jobs.run.tiny_hugging_face import CLASSIFIERS, write

REFUSED = {
    "DonutSwinForImageClassification": "none that is known here",  # pads each picture at its long side
    "ImageGPTForImageClassification": "does not take a picture's pixels alone",
    "PPLCNetForImageClassification": "none that is known here",  # rounds the long side otherwise
    "PerceiverForImageClassificationConvProcessing": "none that is known here",  # cuts before it resizes
    "PerceiverForImageClassificationFourier": "none that is known here",
    "PerceiverForImageClassificationLearned": "none that is known here",
    "ShieldGemma2ForImageClassification": "does not take a picture's pixels alone",
    "Siglip2ForImageClassification": r"patches in each picture's own proportions",
    "TextNetForImageClassification": "none that is known here",  # of each picture another size
}
"""What the sentences say of those that are not fed."""
NEEDS = {"DinatForImageClassification": "natten"}
PHOTOGRAPHS = ("chelsea.png", "rocket.jpg")


def in_the_lane(number: int, family: str, name: str):
    return pytest.param(family, name, marks=[] if number % 7 == 3 else pytest.mark.sweep, id=name)


def taken(config: JobConfig) -> tuple[ModelAdapter, JobConfig]:
    """The model and its job, as a job takes them."""
    adapter = load_model(config.model, state=weights_bytes(config))
    return adapter, with_model_file(config)


@pytest.mark.parametrize(("family", "name"), [in_the_lane(number, *one) for number, one in enumerate(CLASSIFIERS)])
def test_classifiers_are_fed_as_their_processor_does_it(family, name, tmp_path):
    """On two photographs: within two grey levels, and the same logits of the same input."""
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{name} needs {NEEDS[name]}, which is not installed")
    model = write(tmp_path, family, name)
    config = config_of("/", "/out", model=f"hf:{tmp_path}")
    if name in REFUSED:
        with pytest.raises((ConfigError, ModelError), match=REFUSED[name]):
            taken(config)
        return
    adapter, config = taken(config)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    is_blue_first = any(isinstance(part, BlueFirst) for part in adapter.module.modules())
    found = []
    for photograph in PHOTOGRAPHS:
        pixels = decode((Path(skimage.data.__file__).parent / photograph).read_bytes()).pixels
        theirs = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        image = fit(pixels, adapter.input_size, config.resize)
        ours = adapter.normalise(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
        given = theirs.flip(1) if is_blue_first else theirs
        levels = 255 * torch.tensor(adapter.std).view(1, 3, 1, 1) * (ours - given)
        assert levels.abs().max() <= 2.1
        with adapter.borrowed(), torch.no_grad():
            found.append((model(pixel_values=theirs).logits, adapter.logits(given), adapter.logits(ours)))
    (theirs, same, fed), (other, _, _) = found
    apart = (theirs - other).abs().max()
    assert apart > 0
    assert (theirs - same).abs().max() <= 1e-4 * apart
    assert (theirs - fed).abs().max() <= 0.2 * apart


def test_a_size_that_depends_on_the_picture_is_said(tmp_path):
    model = write(tmp_path, "resnet", "ResNetForImageClassification")
    transformers.BitImageProcessor(size={"shortest_edge": 48}, do_center_crop=False).save_pretrained(tmp_path)
    config = config_of("/", "/out", model=f"hf:{tmp_path}")
    adapter = load_model(config.model, state=weights_bytes(config))
    assert adapter.input_size == (48, 48)
    assert adapter.assumptions == (
        "the model's own preprocessing gives each picture another size: 48 x 48 pixels are assumed (--input-size)",
    )
    with pytest.raises(ConfigError, match="none that is known here"):
        with_model_file(config)
    assert model.config.num_labels == adapter.num_classes


def test_the_librarys_wrapper_of_timm(tmp_path):
    """Its processor is written into the configuration; names that nobody gave are none."""
    model = write(tmp_path, "timm_wrapper", "TimmWrapperForImageClassification")
    config = config_of("/", "/out", model=f"hf:{tmp_path}")
    adapter = load_model(config.model, state=weights_bytes(config))
    assert (adapter.num_classes, adapter.class_names) == (5, None)
    random = load_model(config.model, weights="random", state=weights_bytes(config), seed=1)
    assert random.num_classes == 5
    assert random.fingerprint != adapter.fingerprint
    model.config.id2label = dict(enumerate("abcde"))
    model.save_pretrained(tmp_path)
    assert load_model(config.model, state=weights_bytes(config)).class_names == list("abcde")


def test_a_model_without_names_has_none(tmp_path):
    model = write(tmp_path, "pvt", "PvtForImageClassification")
    model.config.id2label = None
    model.config.save_pretrained(tmp_path)
    config = config_of("/", "/out", model=f"hf:{tmp_path}")
    assert load_model(config.model, state=weights_bytes(config)).class_names is None


@pytest.mark.parametrize(
    ("problem", "readout", "count"),
    [
        ("regression", "identity", 1),
        ("single_label_classification", "softmax", 5),
        ("multi_label_classification", "sigmoid", 5),
        ("multi_label_classification", "sigmoid", 1),
    ],
)
def test_a_folder_says_how_its_scores_are_read(problem, readout, count, tmp_path):
    """Without it one output of a regression is refused, and many sigmoids look like a softmax."""
    model = write(tmp_path, "resnet", "ResNetForImageClassification", num_labels=count, problem_type=problem)
    config = config_of("/", "/out", model=f"hf:{tmp_path}")
    adapter = load(config, weights_bytes(config), "cpu", "/")
    assert check_output(adapter, config.asked_readout).readout == readout
    assert f"a score is read by {readout}" in adapter.notes[0]
    assert adapter.num_classes == model.config.num_labels == count
    other = config_of("/", "/out", model=f"hf:{tmp_path}", readout="identity")
    found = load(other, weights_bytes(other), "cpu", "/")
    assert check_output(found, other.asked_readout).readout == "identity"
