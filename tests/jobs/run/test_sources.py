"""Models of timm and Hugging Face: tiny random ones of the libraries' own classes, loaded, fed and explained."""

import io
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import skimage.data
import timm
import torch
import transformers
from PIL import Image
from rich.console import Console

from blocksight import explain
from blocksight.engine.errors import ModelError
from blocksight.engine.model.loading import load_model
from blocksight.engine.model.sources.feeding import BlueFirst
from blocksight.engine.model.sources.files import pack, split, unpack
from blocksight.engine.model.sources.timm_models import at_size, preprocessing_of, timm_preprocessing
from blocksight.jobs.explain.step import load
from blocksight.jobs.plan.config import ConfigError, JobConfig
from blocksight.jobs.plan.context import weights_bytes
from blocksight.jobs.plan.model_input import with_model_file
from blocksight.storage.images.decode import decode, fit
from blocksight.storage.outputs.map_codec import decode_map
from blocksight.storage.stores.local import LocalStore
from tests.engine import planted, planted_clip
from tests.jobs.jobs_of import called, config_of, rows_in, run_here
from tests.jobs.run.tiny_hugging_face import WORDS, write_tokenizer

SIDE = 32
VIT = transformers.ViTConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=SIDE, patch_size=8
)


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    transformers.utils.logging.disable_progress_bar()


def write_folder(folder: Path, model: torch.nn.Module, processor=None) -> Path:
    """A folder as the library writes it."""
    model.save_pretrained(folder)
    processor = processor or transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(7)
    config = transformers.ViTConfig(**{**VIT.to_dict(), "id2label": {0: "cat", 1: "dog", 2: "owl"}})
    return write_folder(tmp_path_factory.mktemp("vit"), transformers.ViTForImageClassification(config))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    place, drawn = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number, label in enumerate(("cat", "dog")):
        (place / label).mkdir()
        pixels = drawn.integers(0, 256, (60 + number, 81, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / label / f"{number}.png")
    return place


def loaded(folder: Path, **options):
    config = JobConfig(data="/", output="/", model=f"hf:{folder}", **options)
    return load_model(config.model, weights=config.weights, state=weights_bytes(config))


def changed(folder: Path, name: str, **values) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_files_travel_as_one_value():
    files = {"b.json": b"{}", "a.safetensors": bytes(range(9))}
    packed = pack(files)
    assert packed == pack(dict(sorted(files.items())))
    assert {name: bytes(body) for name, body in unpack(packed).items()} == files
    assert split(packed) == (packed, None)
    assert split(pack({**files, "--weights": b"own"})) == (packed, b"own")
    assert split(b"a state dict") == (None, b"a state dict")
    with pytest.raises(ModelError, match="not packed"):
        unpack(b"other")


def test_a_model_of_timm_is_fed_as_its_configuration_says():
    adapter = load_model("timm:test_vit.r160_in1k", weights="random", seed=3)
    assert (adapter.input_size, adapter.mean, adapter.std) == ((160, 160), (0.5,) * 3, (0.5,) * 3)
    assert adapter.class_name(281) == "tabby, tabby cat"
    assert adapter.num_classes == 1000
    assert adapter.fingerprint == load_model("timm:test_vit.r160_in1k", weights="random", seed=3).fingerprint
    assert load_model("timm:resnet10t.c3_in1k", weights="random").mean == (0.485, 0.456, 0.406)


def test_a_file_of_timm_says_how_many_classes_there_are():
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=7).eval()
    adapter = load_model("timm:test_resnet", state=safetensors.torch.save(network.state_dict()))
    pixels = torch.rand(2, 3, 160, 160)
    with adapter.borrowed(), torch.no_grad():
        assert torch.allclose(adapter.logits(pixels), network(pixels), atol=1e-5)
    assert adapter.class_names is None


def test_a_vision_transformer_of_timm_at_another_size(tmp_path):
    """As timm resamples the positions of a file; and a file of another size is taken at its own."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=5).eval()
    file = tmp_path / "w.safetensors"
    file.write_bytes(safetensors.torch.save(network.state_dict()))
    config = config_of("/", "/out", model="timm:test_vit", weights=str(file), input_size=224)
    adapter = load(config, weights_bytes(config), "cpu", "/")
    stored = {"file": str(file), "num_classes": 5}
    own = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay=stored, num_classes=5, img_size=224
    ).eval()
    pixels = torch.randn(2, 3, 224, 224)
    with adapter.borrowed(), torch.no_grad():
        assert torch.allclose(adapter.logits(pixels), own(pixels), atol=1e-5)
    assert "resampled from 160 x 160 to 224 x 224" in adapter.notes[-1]
    larger = load_model("timm:test_vit", state=safetensors.torch.save(own.state_dict()))
    assert larger.input_size == (224, 224)
    assert "224 x 224 pixels, which is the input size" in larger.notes[0]
    with larger.borrowed(), torch.no_grad():
        assert torch.allclose(larger.logits(pixels), own(pixels), atol=1e-5)
    odd = config_of("/", "/out", model="timm:test_vit", weights=str(file), input_size=100)
    with pytest.raises(ModelError, match=r"cannot bring this model to 100 x 100 pixels|fails on RGB images of 100"):
        _ = load(odd, weights_bytes(odd), "cpu", "/").num_classes


def test_a_model_that_was_given_keeps_its_size():
    """A user's own network is borrowed: the one at another size is a copy."""
    adapter = load_model("timm:test_vit", weights="random")
    assert at_size(adapter, (160, 160)) is adapter
    other = at_size(adapter, (224, 224))
    assert other.module.pos_embed.shape != adapter.module.pos_embed.shape
    resnet = load_model("timm:test_resnet", weights="random")
    assert at_size(resnet, (96, 96)) is resnet


def test_channels_that_pictures_do_not_have_are_told():
    with pytest.raises(ConfigError, match=r"channels 4, and pictures are read as RGB: .* package.module:factory"):
        config_of("/", "/out", channels=4)


@pytest.mark.parametrize(
    ("name", "told"),
    [("resnet5O", "nearest: .*resnet50"), ("resnet50", "needs --weights"), ("vit_tiny_patch16_224.no", "cannot make")],
)
def test_what_timm_has_not_is_told(name, told):
    weights = "random" if "no" in name else None
    with pytest.raises(ModelError, match=told):
        load_model(f"timm:{name}", weights=weights)


def test_a_preprocessing_that_timm_has_not_is_told():
    with pytest.raises(ModelError, match=r"timm cannot make 'resnet18.no': Invalid pretrained tag"):
        timm_preprocessing("resnet18.no")
    grey = timm.get_pretrained_cfg("resnet18").to_dict() | {"input_size": (1, 224, 224)}
    with pytest.raises(ModelError, match=r"takes 1 channels, and pictures have three: .* package.module:factory"):
        preprocessing_of(grey)


def test_a_missing_library_is_told(monkeypatch):
    monkeypatch.setattr("blocksight.engine.catalog.sources.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"timm: .* pip install '\.\[timm\]'"):
        load_model("timm:resnet50", weights="random")


def test_a_folder_is_the_librarys_model(folder):
    adapter = loaded(folder)
    assert (adapter.input_size, adapter.mean, adapter.class_names) == ((SIDE, SIDE), (0.5,) * 3, ["cat", "dog", "owl"])
    own = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    pixels = torch.rand(2, 3, SIDE, SIDE)
    with adapter.borrowed(), torch.no_grad():
        assert torch.allclose(adapter.logits(pixels), own(pixels).logits, atol=1e-6)


def test_other_weights_take_the_place_of_the_folders(folder, tmp_path):
    random = loaded(folder, weights="random")
    assert random.fingerprint != loaded(folder).fingerprint
    file = tmp_path / "tuned.safetensors"
    tensors = {name: one.contiguous() for name, one in random.module.module.network.state_dict().items()}
    file.write_bytes(safetensors.torch.save(tensors))
    assert loaded(folder, weights=str(file)).fingerprint == random.fingerprint


@pytest.fixture
def timm_folder(tmp_path) -> Path:
    torch.manual_seed(7)
    network = timm.create_model("test_resnet", num_classes=4).eval()
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "input_size": [3, 64, 64], "crop_pct": 1.0}
    settings = {"architecture": "test_resnet", "num_classes": 4, "label_names": list("abcd"), "pretrained_cfg": own}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").write_bytes(safetensors.torch.save(network.state_dict()))
    return tmp_path


def test_a_folder_of_timm(timm_folder):
    adapter = loaded(timm_folder)
    assert (adapter.input_size, adapter.mean, adapter.class_names) == ((64, 64), (0.1, 0.2, 0.3), list("abcd"))


def test_other_weights_take_the_place_of_those_of_timms_folder(timm_folder):
    drawn = loaded(timm_folder, weights="random")
    assert drawn.fingerprint != loaded(timm_folder).fingerprint
    file = timm_folder / "tuned.safetensors"
    tensors = {name: one.contiguous() for name, one in drawn.module.state_dict().items()}
    file.write_bytes(safetensors.torch.save(tensors))
    assert loaded(timm_folder, weights=str(file)).fingerprint == drawn.fingerprint
    (timm_folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="lacks safetensors"):
        loaded(timm_folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"architecture": "hf-hub:timm/resnet18"}, "timm has no model 'hf-hub:timm/resnet18'"),
        ({"architecture": "local-dir:/etc"}, "timm has no model"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "model_args of the folder name checkpoint_path"),
        ({"model_args": {"pretrained": True}}, "model_args of the folder name pretrained"),
        ({"model_args": ["pretrained"]}, "is a list; wanted an object"),
        ({"model_args": {"no_such": 1}}, "timm cannot make 'test_resnet'"),
        ({"architecture": 7}, "names no architecture"),
    ],
)
def test_a_folder_of_timm_reads_no_other_files_and_reaches_no_hub(timm_folder, change, told):
    changed(timm_folder, "config.json", **change)
    with pytest.raises(ModelError, match=told):
        loaded(timm_folder)


def test_colours_in_another_order_and_a_second_normalisation(tmp_path):
    model = transformers.ViTForImageClassification(VIT)
    blue = transformers.MobileViTImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    twice = transformers.EfficientNetImageProcessor(size={"height": SIDE, "width": SIDE})
    for number, processor in enumerate((blue, twice)):
        folder = write_folder(tmp_path / str(number), model, processor)
        adapter = loaded(folder)
        given = adapter.normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
        with adapter.borrowed(), torch.no_grad():
            wanted = model.eval()(processor(pixels, return_tensors="pt")["pixel_values"]).logits
            if number == 1:  # the picture has the model's size already: nothing is resized
                assert torch.allclose(adapter.logits(given), wanted, atol=1e-5)
        assert is_blue_first(adapter) == any("takes blue first" in note for note in adapter.notes) == (number == 0)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (transformers.Dinov2Model, transformers.Dinov2Config(**VIT.to_dict())),
        (transformers.ViTModel, VIT),
        (transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**VIT.to_dict())),
    ],
)
def test_models_of_features(kind, config, tmp_path):
    adapter = loaded(write_folder(tmp_path, kind(config)))
    assert adapter.class_names is None
    assert adapter.num_classes == 16


def test_what_a_folder_lacks_is_told(folder, tmp_path):
    model = transformers.ViTForImageClassification(VIT)
    torch.manual_seed(0)
    for name, change, told in (
        ("auto_map", lambda f: changed(f, "config.json", auto_map={"AutoModel": "x.Y"}), "auto_map"),
        ("in_processor", lambda f: changed(f, "preprocessor_config.json", auto_map={"A": "x.Y"}), "never run"),
        (
            "architecture",
            lambda f: changed(f, "config.json", architectures=["MineForAll"]),
            "has no model 'MineForAll'",
        ),
        ("text", lambda f: changed(f, "config.json", architectures=["BertModel"]), "picture.s pixels alone"),
        ("processor", lambda f: (f / "preprocessor_config.json").unlink(), "holds no preprocessor_config.json"),
        ("head", lambda f: changed(f, "config.json", id2label={str(n): str(n) for n in range(9)}), "another shape"),
        ("layers", lambda f: changed(f, "config.json", num_hidden_layers=3), "would be random"),
        ("broken", lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        ("cut", lambda f: (f / "model.safetensors").write_bytes(b"x" * 20), "cannot read the weights"),
    ):
        copy = write_folder(tmp_path / name, model)
        change(copy)
        with pytest.raises(ModelError, match=told):
            loaded(copy)


def test_a_place_without_a_model_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json is missing there"):
        loaded(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="lacks safetensors"):
        loaded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ModelError, match="beside it"):
        loaded(tmp_path)


def test_a_folder_in_several_weight_files(folder, tmp_path):
    model = transformers.ViTForImageClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "preprocessor_config.json").write_bytes((folder / "preprocessor_config.json").read_bytes())
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert loaded(tmp_path).fingerprint == loaded(folder).fingerprint


def test_whole_jobs(folder, pictures, tmp_path, monkeypatch):
    """Also a bank, and commands that load the model again from the plan."""
    monkeypatch.chdir(folder.parent)
    options = {"explainer": "rise", "parameters": {"num_masks": 8}}
    run_here(pictures, tmp_path / "hf", model=f"hf:{folder.name}", **options)
    rows = rows_in(LocalStore(tmp_path / "hf"))
    assert [row["map"] is not None for row in rows] == [True, True]
    assert {row["label"] for row in rows} == {0, 1}
    assert called("evaluate", tmp_path / "hf", "--runner", "local")[0] == 0
    run_here(pictures, tmp_path / "timm", model="timm:test_resnet", weights="random", **options)
    assert len(rows_in(LocalStore(tmp_path / "timm"))) == 2
    bank = tmp_path / "bank.safetensors"
    code, told = called("bank", "--data", pictures, "--model", f"hf:{folder}", "--output", bank)
    assert code == 0, told
    run_here(pictures, tmp_path / "knn", model=f"knn(hf:{folder})", weights=str(bank), **options)
    assert len(rows_in(LocalStore(tmp_path / "knn"))) == 2


PROCESSORS = {
    "squash": transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}),
    "short side 40, centre 32x32 rounded down, bicubic": transformers.BitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": SIDE, "width": SIDE}
    ),
    "short side 36, centre 32x32 rounded down, bicubic": transformers.ConvNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_pct=0.875
    ),
    "whole 36x36, centre 32x32 rounded down, bicubic": transformers.DeiTImageProcessor(
        size={"height": 36, "width": 36}, crop_size={"height": SIDE, "width": SIDE}
    ),
    "short side 40, centre 32x32 rounded down": transformers.MobileViTImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": SIDE, "width": SIDE}, resample=2
    ),
}


def fed(config: JobConfig, file: Path) -> torch.Tensor:
    """What a job gives a model of the file's picture."""
    config = with_model_file(config)
    adapter = load_model(config.model, weights=config.weights, state=weights_bytes(config))
    image = fit(decode(file.read_bytes()).pixels, adapter.input_size, config.resize)
    given = adapter.normalise(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
    return given.flip(1) if is_blue_first(adapter) else given


def is_blue_first(adapter) -> bool:
    return any(isinstance(part, BlueFirst) for part in adapter.module.modules())


@pytest.mark.parametrize("text", PROCESSORS)
def test_a_picture_is_fed_as_the_processor_does_it(text, tmp_path):
    file = Path(skimage.data.__file__).parent / "chelsea.png"
    folder = write_folder(tmp_path, transformers.ViTForImageClassification(VIT), PROCESSORS[text])
    config = config_of("/", "/out", model=f"hf:{folder}")
    assert with_model_file(config).resize == text
    wanted = PROCESSORS[text](images=Image.open(file), return_tensors="pt")["pixel_values"]
    levels = (fed(config, file) - wanted).abs() * 255 * 0.5
    assert levels.max() <= 2.1
    assert levels.mean() <= 0.1


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_resnet", "test_convnext"])
def test_a_picture_is_fed_as_timm_does_it(name):
    file = Path(skimage.data.__file__).parent / "chelsea.png"
    data = timm.data.resolve_model_data_config(timm.create_model(name))
    wanted = timm.data.create_transform(**data)(Image.open(file))
    levels = (fed(config_of("/", "/out", model=f"timm:{name}", weights="random"), file) - wanted).abs() * 255 * 0.5
    assert levels.max() <= 2.1
    assert levels.mean() <= 0.1


def test_how_a_picture_is_fed_stands_in_the_configuration(folder):
    def resize(**options) -> str:
        return with_model_file(config_of("/", "/out", **{"model": f"hf:{folder}", **options})).resize

    assert resize() == "squash"
    assert resize(interpolation="bicubic") == "squash, bicubic"
    assert resize(resize="crop", interpolation="lanczos") == "crop, lanczos"
    timm_vit = {"model": "timm:test_vit.r160_in1k", "weights": "random"}
    assert resize(**timm_vit) == "short side 168, centre 160x160, bicubic"
    assert resize(**timm_vit, input_size=80) == "short side 84, centre 80x80, bicubic"
    assert resize(**timm_vit, resize="squash") == "squash"
    assert resize(model="torchvision:resnet50", resize="own") == "short side 232, centre 224x224"
    assert resize(model="knn(timm:test_vit.r160_in1k)") == "short side 168, centre 160x160, bicubic"
    assert "interpolation" not in config_of("/", "/out").identity(None)
    with pytest.raises(ConfigError, match="nobody says how model tests"):
        resize(model="tests.jobs.tiny:make", resize="own")


def test_a_way_that_is_not_known_is_told(tmp_path):
    processor = transformers.PerceiverImageProcessor(
        size={"height": SIDE, "width": SIDE}, crop_size={"height": 36, "width": 36}
    )
    folder = write_folder(tmp_path, transformers.ViTForImageClassification(VIT), processor)
    with pytest.raises(ConfigError, match="none that is known here: take resize squash or crop"):
        with_model_file(config_of("/", "/out", model=f"hf:{folder}"))
    assert with_model_file(config_of("/", "/out", model=f"hf:{folder}", resize="squash")).resize == "squash"


def test_one_spelling_and_one_hash(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    config = config_of("/", "/out", model=f"knn(hf:{folder.name})")
    assert config.model == f"knn(hf:{folder})"
    assert config_of("/", "/out", model="hf:hf").model == f"hf:{folder.parent / 'hf'}"
    assert config.identity("a" * 64)["weights"] == "a" * 64
    assert config_of("/", "/out", model=f"hf:{folder}", weights="random").identity("a" * 64)["weights"] == "random"


def write_pair(folder: Path, family: str) -> Path:
    """A folder of a tiny CLIP or SigLIP."""
    torch.manual_seed(3)
    both = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**both, "vocab_size": len(WORDS), "max_position_embeddings": 12, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**both, "image_size": SIDE, "patch_size": 8}
    kinds = {
        "clip": (transformers.CLIPConfig, transformers.CLIPModel, {"projection_dim": 8}),
        "siglip": (transformers.SiglipConfig, transformers.SiglipModel, {}),
    }
    config, model, more = kinds[family]
    write_tokenizer(folder)
    made = model(config(text_config=text, vision_config=vision, **more))
    with torch.no_grad():
        for name in ("logit_bias", "logit_scale"):
            if hasattr(made, name):
                getattr(made, name).fill_(1.25)
    return write_folder(folder, made)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_prompts_are_classes(family, tmp_path):
    folder = write_pair(tmp_path, family)
    adapter = loaded(folder)
    prompted = adapter.with_prompts([["a dog"], ["a photo of a cat"]])
    own = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}[family].from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    filling = {"padding": "max_length", "max_length": 12} if family == "siglip" else {"padding": True}
    given = tokenizer(["a dog", "a photo of a cat"], return_tensors="pt", **filling)
    if family == "siglip":
        del given["attention_mask"]
    given.pop("token_type_ids", None)
    pixels = torch.randn(3, 3, SIDE, SIDE)
    with prompted.borrowed(), torch.no_grad():
        wanted = own(pixel_values=pixels, **given).logits_per_image
        assert torch.allclose(prompted.logits(pixels), wanted, atol=1e-6)
    assert prompted.class_names == ["a dog", "a photo of a cat"]
    assert prompted.readout == {"clip": "softmax", "siglip": "sigmoid"}[family]
    assert prompted.fingerprint != adapter.with_prompts([["a cat"], ["a dog"]]).fingerprint


def test_a_classifier_in_memory_knows_its_class_names(folder, pictures):
    network = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    image, size = next(pictures.rglob("*.png")), loaded(folder).input_size
    found = explain(network, image, explainer="gradient", input_size=size, console=Console(quiet=True))
    assert found.target in loaded(folder).class_names


def test_features_are_no_classes(pictures, tmp_path):
    place, image = f"hf:{write_pair(tmp_path, 'clip')}", next(pictures.rglob("*.png"))
    warned = {}
    for target in ("predicted", "text:a dog", "feature:1"):
        said = io.StringIO()
        explain(place, image, target, "gradient", console=Console(file=said, width=1000))
        warned[target] = "8 outputs are features of the picture and no classes" in said.getvalue()
    assert warned == {"predicted": True, "text:a dog": False, "feature:1": False}


def test_an_ensemble_is_the_mean_of_its_texts(tmp_path):
    adapter = loaded(write_pair(tmp_path, "clip"))
    pixels = torch.randn(3, 3, SIDE, SIDE)
    with adapter.borrowed(), torch.no_grad():
        alone = adapter.with_prompts([["a dog"], ["a red dog"]]).logits(pixels)
        together = adapter.with_prompts([["a dog", "a red dog"], ["a cat"]])
        ratio = together.logits(pixels)[:, 0] / alone.mean(1)
    assert torch.allclose(ratio, ratio[:1].expand(3), rtol=1e-4)
    assert ratio[0] >= 1 - 1e-6
    assert together.class_names[0] == "a dog (and 1 more)"
    assert adapter.with_prompts([["a dog"]]).readout == "identity"


def test_prompts_that_cannot_be_are_told(folder, tmp_path):
    adapter = loaded(write_pair(tmp_path, "clip"))
    for prompts, told in (
        ([], "a prompt is empty"),
        ([["a dog"], [" "]], "a prompt is empty"),
        ([["a dog"], ["a dog"]], "same prompts"),
        ([["a dog " * 9]], r"has 20 tokens; the model reads 12"),
    ):
        with pytest.raises(ModelError, match=told):
            adapter.with_prompts(prompts)
    with pytest.raises(ModelError, match="reads no text"):
        loaded(folder).with_prompts([["a dog"]])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        loaded(tmp_path).with_prompts([["a dog"]])


def test_a_model_of_open_clip():
    adapter = load_model("open_clip:ViT-S-32-alt", weights="random", seed=1)
    own = adapter.module.network
    pixels = torch.randn(2, 3, 224, 224)
    prompted = adapter.with_prompts([["a dog"], ["a cat"]])
    with prompted.borrowed(), torch.no_grad():
        image, text, scale = own(pixels, open_clip.get_tokenizer("ViT-S-32-alt")(["a dog", "a cat"]))
        assert torch.allclose(prompted.logits(pixels), scale * image @ text.T, atol=1e-5)
    with pytest.raises(ModelError, match="tokens; the model reads 77"):
        adapter.with_prompts([["dog " * 90]])


def test_a_tag_of_open_clip_says_how_it_is_fed():
    adapter = load_model("open_clip:MobileCLIP-S1/datacompdr", weights="random")
    assert (adapter.input_size, adapter.mean, adapter.std) == ((256, 256), (0.0,) * 3, (1.0,) * 3)
    for name, told in (
        ("ViT-B-23", "nearest: ViT-B-32"),
        ("ViT-B-32/none", "has no tag 'none'; known: openai"),
    ):
        with pytest.raises(ModelError, match=told):
            load_model(f"open_clip:{name}", weights="random")
    with pytest.raises(ModelError, match="needs --weights"):
        load_model("open_clip:ViT-B-32")


def test_the_list_of_models_says_what_is_installed(monkeypatch):
    assert "pip install" not in called("list", "models")[1]
    monkeypatch.setattr("blocksight.engine.catalog.sources.find_spec", lambda name: None if name == "timm" else name)
    shown = called("list", "models")[1]
    assert "no: pip install '.[timm]'" in " ".join(shown.split())
    assert "timm:vit_small_patch16_224" in shown


def test_another_output_of_a_librarys_model(tmp_path):
    config = transformers.DeiTConfig(**VIT.to_dict())
    folder = write_folder(tmp_path, transformers.DeiTForImageClassificationWithTeacher(config))
    pixels = torch.rand(2, 3, SIDE, SIDE)
    job = config_of("/", "/out", model=f"hf:{folder}", output_key="distillation_logits")
    found = load(job, weights_bytes(job), "cpu", "/")
    own = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(folder).eval()
    with found.borrowed(), torch.no_grad():
        assert torch.allclose(found.logits(pixels), own(pixels).distillation_logits, atol=1e-6)
    assert job.identity(None)["output_key"] == "distillation_logits"
    other = config_of("/", "/out", model=f"hf:{folder}", output_key="nothing")
    with pytest.raises(ModelError, match="returns logits, cls_logits, distillation_logits"):
        load(other, weights_bytes(other), "cpu", "/")


@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_one_picture_from_python_is_fed_as_in_a_job(kind, folder, pictures, tmp_path):
    """By name, by its adapter, and of timm as the bare module, which knows how it is fed."""
    name, given = ("timm:resnet10t", {"weights": "random"}) if kind == "timm" else (f"hf:{folder}", {})
    run_here(pictures, tmp_path / "maps", model=name, explainer="gradcam", **given)
    (row, _) = rows_in(LocalStore(tmp_path / "maps"))
    model = load_model(name, **given) if given else loaded(folder)
    forms = [(name, given), (model, {})] + ([(model.module, {})] if kind == "timm" else [])
    for form, more in forms:
        said = io.StringIO()
        console = Console(file=said, width=200)
        file = pictures / row["key"]
        found = explain(form, file, explainer="gradcam", key=row["key"], console=console, **more)
        assert np.array_equal(found.map, decode_map(row["map"], (row["map_height"], row["map_width"])))
        assert (found.score, found.target) == (row["score"], row["target_name"])
        assert ("timm's configuration of it" in said.getvalue()) == isinstance(form, torch.nn.Module)


def test_two_prompts_of_a_folder_have_two_maps_each_on_its_own_object(tmp_path):
    """A trained CLIP, its tokenizer and its preprocessing, on a picture of two planted objects."""
    folder = planted_clip.write_folder(tmp_path / "clip")
    pixels, ((first, second),), (boxes,) = planted.pairs(1, 1_000_003)
    for own, other in ((first, second), (second, first)):
        words = planted_clip.prompt(planted.CLASS_NAMES[own]), planted_clip.prompt(planted.CLASS_NAMES[other])
        target = f"text:{words[0]} - text:{words[1]}"
        found = explain(f"hf:{folder}", pixels[0], target, "libra(chefer)", console=Console(quiet=True))
        inside = [planted.energy_inside(torch.from_numpy(found.map), box) for box in boxes]
        assert (inside[0] > inside[1]) == (own == first)
