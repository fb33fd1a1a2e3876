"""One picture from Python: the numbers of a job, every form of a picture, a model that is given back, and refusals."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import blocksight
from blocksight.engine.errors import ModelError
from blocksight.engine.model import known_networks
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.jobs.plan.config import ConfigError
from blocksight.storage.outputs.map_codec import decode_map
from blocksight.storage.outputs.pictures import PANELS
from blocksight.storage.stores.opening import open_store
from tests.jobs.jobs_of import config_of, rows_in, run_here
from tests.jobs.tiny import HOSTILE, MODEL, Tiny, folder_of_images, make, make_hostile, make_raising, picture, red

KEY = "cat/002.png"
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_images(tmp_path_factory.mktemp("one") / "data", bad=False)


def explained(model: object, image: object, *given: object, **options: object):
    return blocksight.explain(model, image, *given, console=QUIET, **options)


@pytest.mark.parametrize(
    ("target", "explainer", "options"),
    [
        ("dog", "sise", {"resize": "crop"}),
        (3, "rise", {"parameters": {"num_masks": 12}, "seed": 3}),
        ("predicted", "gradcam", {"blocks": ("first_1",), "batch_size": 2}),
    ],
)
def test_the_numbers_are_those_of_a_job(data, tmp_path, target, explainer, options):
    """Of the whole folder, whose units hold other pictures too: the map bit by bit, the score to the last digit."""
    own = {name: value for name, value in options.items() if name != "batch_size"}
    run_here(data, tmp_path / "maps", target=str(target), explainer=explainer, **own)
    (row,) = (row for row in rows_in(open_store(str(tmp_path / "maps"))) if row["key"] == KEY)
    for model in (MODEL, make()):
        found = explained(model, data / KEY, target, explainer, key=KEY, **options)
        assert np.array_equal(found.map, decode_map(row["map"], (row["map_height"], row["map_width"])))
        assert found.score == row["score"]
        assert (found.target, found.target_index) == (row["target_name"], row["target_index"])
        same = ("map_low", "map_high", "blocks", "num_forwards", "sha256", "width", "height", "format", "is_flat")
        assert {name: found.row[name] for name in same} == {name: row[name] for name in same}


@pytest.mark.parametrize("target", [-1, True, np.int64(-2)])
def test_a_class_number_from_the_end_is_refused(data, target):
    with pytest.raises(ConfigError, match="wanted a class number from 0"):
        explained(make(), data / KEY, target, "gradcam")


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_a_wrapped_model_of_timm_is_fed_as_itself(data, wrap):
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    net = timm.create_model("test_resnet", pretrained=False, num_classes=10).eval()
    plain, wrapped = (explained(one, data / KEY, 3, "gradcam") for one in (net, wrap(net)))
    assert wrapped.score == plain.score
    assert np.allclose(wrapped.map, plain.map, atol=1e-6)


def test_a_module_is_fed_at_the_size_for_which_it_was_made(data):
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    from blocksight.engine.model.sources.timm_models import fed

    assert fed(timm.create_model("test_vit", pretrained=False, img_size=64)).input_size == (64, 64)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    network = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))
    assert explained(network.eval(), data / KEY, "predicted", "gradient").map.shape == (32, 32)


def test_a_module_of_feature_maps_is_refused_with_the_way_out():
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    from blocksight.engine.model.sources.timm_models import fed

    with pytest.raises(ModelError, match=r"resnet18.* gives feature maps and no logits \(features_only\): make it"):
        fed(timm.create_model("resnet18", pretrained=False, features_only=True))


def test_features_of_timm_have_no_names_of_classes():
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    from blocksight.engine.model.sources.timm_models import fed

    assert fed(timm.create_model("test_resnet", pretrained=False)).class_names is not None
    assert fed(timm.create_model("test_resnet", pretrained=False, num_classes=0)).class_names is None


def test_random_numbers_follow_the_key_and_the_seed(data):
    """As a job's: another key or seed is another map, and the file's name is the key by default."""
    options = {"explainer": "rise", "parameters": {"num_masks": 8}}
    first, other, again, by_name = (
        explained(make(), data / KEY, **options, **more).map
        for more in ({}, {"key": KEY}, {"seed": 1}, {"key": "002.png"})
    )
    assert np.array_equal(first, by_name)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, again)


def test_every_form_of_a_picture_gives_one_map(data):
    file, buffer = data / KEY, io.BytesIO()
    pixels = np.asarray(Image.open(file).convert("RGB"))
    Image.fromarray(pixels).save(buffer, "PNG")
    forms = (
        str(file),
        file.read_bytes(),
        Image.open(file),
        pixels,
        pixels[:, ::-1][:, ::-1],
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
    )
    maps = [explained(make(), form, explainer="gradcam").map for form in forms]
    assert all(np.array_equal(maps[0], one) for one in maps[1:])


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_an_array_of_grey_or_with_transparency_is_read_as_its_file_is(mode, tmp_path):
    pixels = np.asarray(Image.open(io.BytesIO(picture(1))).convert("RGBA"), np.uint8).copy()
    pixels[..., 3] = np.arange(pixels.shape[1]) % 256
    pixels = pixels if mode == "RGBA" else pixels[..., 0]
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    maps = [explained(make(), form, explainer="gradcam").map for form in (pixels, tmp_path / "picture.png")]
    assert np.array_equal(*maps)


def test_a_picture_of_pillow_is_turned_and_put_on_white_as_its_file_is(tmp_path):
    clear = Image.open(io.BytesIO(picture(1))).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    turned = Image.open(io.BytesIO(picture(2, "JPEG")))
    exif = turned.getexif()
    exif[0x0112] = 6
    files = {"clear.png": (clear, {}), "turned.jpg": (turned, {"exif": exif}), "grey.png": (clear.convert("LA"), {})}
    for name, (image, more) in files.items():
        image.save(tmp_path / name, **more)
        of_file, of_image = (
            explained(make(), form, explainer="gradient", key=name)
            for form in (tmp_path / name, Image.open(tmp_path / name))
        )
        assert np.array_equal(of_file.pixels, of_image.pixels), name
        assert np.array_equal(of_file.map, of_image.map), name


def test_a_model_is_given_back_as_it_was(data):
    module = Tiny().train()
    module.second.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads_before + 1)  # a worker has one
    adapter = ModelAdapter(module, input_size=(32, 32))
    adapter.readout = "identity"
    for model, options in ((module, {"input_size": 32}), (adapter, {"readout": "sigmoid"})):
        explained(model, data / KEY, **options)
    assert adapter.readout == "identity"
    assert module.training
    assert not module.second.training
    assert all(one.requires_grad for one in module.parameters())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(one._forward_pre_hooks or one._forward_hooks for one in module.modules())
    assert torch.get_num_threads() == threads_before + 1
    torch.set_num_threads(threads_before)


def test_the_same_module_is_proved_once(data, monkeypatch):
    proofs, usual = [], known_networks.trace_network
    monkeypatch.setattr(known_networks, "trace_network", lambda *given: proofs.append(1) or usual(*given))
    module = make().module
    first, second = (explained(module, data / KEY, explainer="gradcam", input_size=32) for _ in range(2))
    assert len(proofs) == 1
    assert np.array_equal(first.map, second.map)


def test_a_module_says_how_it_is_fed(data):
    said = io.StringIO()
    console = Console(file=said, width=200)
    blocksight.explain(Tiny(), data / KEY, explainer="gradcam", input_size=32, console=console)
    assert "fed: 32 x 32 pixels, mean 0.485" in said.getvalue()
    fed = {"input_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    found = blocksight.explain(Tiny(), data / KEY, explainer="gradcam", console=console, **fed)
    assert said.getvalue().count("fed:") == 1
    assert found.map.shape == (32, 32)


def test_a_picture_is_plotted_and_saved(data, tmp_path):
    found = explained(make_hostile(), data / KEY, explainer="gradcam", target=4)
    assert found.target == HOSTILE[4]
    file = found.save(tmp_path / "overlay.png")
    with Image.open(file) as saved:
        assert (saved.format, saved.size) == ("PNG", (40, 30))
    figure = found.plot()
    assert [axes.get_title() for axes in figure.axes] == list(PANELS)
    for shown in (figure, found):
        assert shown._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot be written: there is no folder"):
        found.save(tmp_path / "missing" / "overlay.png")
    with pytest.raises(ConfigError, match=r"overlay.jpg says .jpg: name it .png"):
        found.save(tmp_path / "overlay.jpg")


def test_a_large_picture_is_saved_small(tmp_path):
    found = explained(make(), np.zeros((30, 3000, 3), np.uint8), explainer="gradcam")
    with Image.open(found.save(tmp_path / "overlay.png")) as saved:
        assert saved.size == (1024, 10)


def test_a_long_method_shows_progress(data, monkeypatch):
    monkeypatch.setattr("blocksight.jobs.worker.progress.PLAIN_SECONDS", 0.01)
    said = io.StringIO()
    options = {"explainer": "rise", "parameters": {"num_masks": 3000}}
    blocksight.explain(make(), data / KEY, console=Console(file=said, width=200), **options)
    lines = [line for line in said.getvalue().splitlines() if line.startswith("scoring: ")]
    assert any("/750 forward passes" in line and "left" in line for line in lines), said.getvalue()[:400]


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"target": "label"}, ConfigError, "one picture has no label"),
        ({"target": "top-3"}, ConfigError, "means 3 maps, and explain makes one"),
        ({"target": "1,2"}, ConfigError, "means 2 maps"),
        ({"target": 7}, ConfigError, "target 7 is no class of"),
        ({"target": "zebra"}, ConfigError, "'zebra' is no class of the model"),
        ({"explainer": "gradcan"}, ConfigError, "gradcam"),
        ({"explainer": "bee", "parameters": {"families": "train"}}, ConfigError, "learns from many images"),
        ({"blocks": "nowhere"}, ModelError, "nowhere"),
        ({"fidelty": "full"}, ConfigError, "no option 'fidelty'; did you mean 'fidelity'"),
        ({"data": "photos"}, ConfigError, "no option 'data'"),
        ({"weights": "random"}, ConfigError, "in memory and holds its own"),
        ({"model": 3}, ConfigError, "the model is a int"),
        ({"model": "nowhere.models:make"}, ModelError, "cannot be imported"),
        ({"model": nn.Identity()}, ModelError, "must return logits"),
        ({"image": "missing.png"}, ConfigError, "there is no picture missing.png"),
        ({"image": b"plain text"}, ConfigError, "not_an_image"),
        ({"image": np.zeros((8, 8, 3))}, ConfigError, "float64 ndarray of shape 8 x 8 x 3"),
        ({"image": np.zeros((3, 8, 8), np.uint8)}, ConfigError, "uint8 ndarray of shape 3 x 8 x 8;"),
        ({"image": "."}, ConfigError, ". is a folder, and explain takes one picture"),
        ({"target": [1, 2]}, ConfigError, "the target is a list; wanted one class number"),
        ({"target": None}, ConfigError, "the target is a NoneType"),
        ({"method": "gradcam"}, ConfigError, "no option 'method'; it is called 'explainer' here"),
        ({"target_layers": ["layer4"]}, ConfigError, "it is called 'blocks' here"),
        ({"image": np.zeros((0, 8, 3), np.uint8)}, ConfigError, "shape 0 x 8 x 3"),
        ({"image": torch.zeros(1, 3, 8, 8)}, ConfigError, "float32 Tensor of shape 1 x 3 x 8 x 8"),
        ({"image": torch.zeros(3, 8, 8)}, ConfigError, "floats do not say how they were normalised"),
        ({"image": None}, ConfigError, "the picture is a NoneType"),
        ({"image": Image.new("F", (8, 8))}, ConfigError, "mode F"),
    ],
)
def test_what_cannot_be_explained_is_refused_in_a_sentence(data, given, error, told):
    asked = {"model": make(), "image": data / KEY, **given}
    with pytest.raises(error, match=told.replace("(", r"\(")):
        explained(asked.pop("model"), asked.pop("image"), **asked)


def test_a_model_that_fails_at_the_picture_is_a_sentence():
    with pytest.raises(ModelError, match=r"the picture 'picture' cannot be explained: .*sees red \(model_failed\)"):
        explained(make_raising(), red(), "predicted", "gradcam")


def test_a_job_is_run_by_another_name(data, tmp_path):
    with pytest.raises(ConfigError, match="run_job"):
        blocksight.explain(config_of(data, tmp_path / "maps"), None)


def test_the_name_is_not_hidden_by_the_folder_of_that_name():
    import blocksight.jobs.explain.step

    assert blocksight.explain is sys.modules["blocksight.jobs.run.one_picture"].explain
    assert blocksight.jobs.explain.__name__ == "blocksight.jobs.explain"
