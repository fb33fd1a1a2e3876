"""Whole jobs on models of each source: files here and in a bucket, memory banks, prompts."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import open_clip
import pytest
import safetensors.torch
import skimage.data
import timm
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from open_clip.push_to_hf_hub import save_for_hf
from PIL import Image

from blocksight.engine.errors import ModelError
from blocksight.engine.model.features import without_head
from blocksight.engine.model.loading import load_model
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.context import weights_bytes
from blocksight.jobs.plan.model_input import with_model_file
from blocksight.jobs.plan.plan import existing_plan
from blocksight.storage.images.decode import decode, fit
from blocksight.storage.outputs.map_codec import decode_map
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import called, config_of, rows_in, run_here
from tests.jobs.run.tiny_hugging_face import write, write_tokenizer
from tests.storage.loopback import served

RISE = {"explainer": "rise", "parameters": {"num_masks": 8}}
SIDE = 32
TOWER = {"image_size": SIDE, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
TEXTS = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
ARCHITECTURE = "blocksight-tiny"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    place, drawn = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number, label in enumerate(("cat", "cat", "dog", "dog")):
        (place / label).mkdir(exist_ok=True)
        pixels = drawn.integers(0, 256, (60 + number, 81, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / label / f"{number}.png")
    return place


def write_timm(folder: Path) -> str:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=5)
    (folder / "w.safetensors").write_bytes(safetensors.torch.save(network.state_dict()))
    return "timm:test_resnet"


def write_open_clip(folder: Path) -> str:
    """Weights as OpenCLIP's training writes them."""
    torch.manual_seed(0)
    network = open_clip.create_model(ARCHITECTURE, load_weights=False)
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"lr": 0.1}}, folder / "w.pt")
    return f"open_clip:{ARCHITECTURE}"


def write_open_clip_folder(folder: Path) -> str:
    """As OpenCLIP saves a model for a hub."""
    torch.manual_seed(2)
    own = {"embed_dim": 8, "vision_cfg": TOWER, "text_cfg": {**TEXTS, "hf_tokenizer_name": "of/this-folder"}}
    write_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = open_clip.create_model(ARCHITECTURE, load_weights=False, force_preprocess_cfg={"mean": (0.5,) * 3})
    save_for_hf(network, tokenizer, own, str(folder), safe_serialization=True)
    return "open_clip:{}"


def write_onnx(folder: Path) -> str:
    weights = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[8, 8]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    pixels = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])
    logits = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [pixels], [logits], [numpy_helper.from_array(weights, "w")])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return "onnx:{}/m.onnx"


def write_hugging_face(folder: Path) -> str:
    write(folder, "resnet", "ResNetForImageClassification")
    return "hf:{}"


@pytest.fixture(scope="module", autouse=True)
def _tiny_architecture(tmp_path_factory) -> Iterator[None]:
    """OpenCLIP knows a tiny architecture."""
    file = tmp_path_factory.mktemp("architectures") / f"{ARCHITECTURE}.json"
    file.write_text(json.dumps({"embed_dim": 8, "vision_cfg": TOWER, "text_cfg": TEXTS}))
    open_clip.add_model_config(file)
    yield
    open_clip.factory._MODEL_CONFIGS.pop(ARCHITECTURE)


WRITERS: Mapping[str, Callable[[Path], str]] = {
    "hf": write_hugging_face, "timm": write_timm, "onnx": write_onnx, "open_clip": write_open_clip,
    "open_clip folder": write_open_clip_folder,
}  # fmt: skip
NUM_FEATURES = {"hf": 16, "timm": 96, "onnx": 5, "open_clip": 8, "open_clip folder": 8}
"""What stands before the last layer, or a model of features returns."""
WEIGHTS = {"timm": "w.safetensors", "open_clip": "w.pt"}


def options(source: str, name: str, place: str) -> dict:
    """The model and its weights, below a folder or a bucket's prefix."""
    prompts = {"target": ["text:a dog", "text:a cat"]} if source.startswith("open_clip") else {}
    weights = {"weights": f"{place}/{WEIGHTS[source]}"} if source in WEIGHTS else {}
    return {"model": name.format(place), **weights, **prompts, **RISE}


@pytest.fixture(scope="module", params=WRITERS)
def source(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def written(source, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp(source)
    return folder, WRITERS[source](folder)


def test_a_job_from_a_bucket_is_the_same_as_from_a_folder(source, written, pictures, tmp_path):
    """Also by its hash in the plan; and another file there is another model."""
    folder, name = written
    run_here(pictures, tmp_path / "here", **options(source, name, str(folder)))
    with served() as (bucket, _):
        for file in folder.iterdir():
            bucket.objects[f"models/{file.name}"] = file.read_bytes()
        asked = {**options(source, name, "s3://b/models"), "endpoint_url": bucket.url}
        run_here(pictures, tmp_path / "there", **asked)
    here, there = (LocalStore(tmp_path / place) for place in ("here", "there"))
    assert len(rows_in(here)) == (8 if source.startswith("open_clip") else 4)
    for one, other in zip(rows_in(here), rows_in(there), strict=True):
        size = one["map_height"], one["map_width"]
        assert (one["key"], one["score"], one["target_name"]) == (other["key"], other["score"], other["target_name"])
        assert np.array_equal(decode_map(one["map"], size), decode_map(other["map"], size))
    plans = [existing_plan(store).identity for store in (here, there)]
    assert len(plans[0]["weights"]) == 64
    assert plans[0]["weights"] == plans[1]["weights"]


def test_a_folder_of_open_clip_is_the_librarys_model(tmp_path):
    """Its logits of prompts, and two photographs as it prepares them."""
    name = write_open_clip_folder(tmp_path).format(tmp_path)
    config = with_model_file(config_of("/", "/out", model=name))
    adapter = load_model(name, state=weights_bytes(config))
    own, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    own.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["a dog", "a cat"])
    prompted = adapter.with_prompts([["a dog"], ["a cat"]])
    for photograph in ("chelsea.png", "rocket.jpg"):
        pixels = decode((Path(skimage.data.__file__).parent / photograph).read_bytes()).pixels
        theirs = prepare(Image.fromarray(pixels))[None]
        image = fit(pixels, adapter.input_size, config.resize)
        ours = adapter.normalise(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
        assert (255 * torch.tensor(adapter.std).view(3, 1, 1) * (ours - theirs)).abs().max() <= 1e-3
        with prompted.borrowed(), torch.no_grad():
            features, texts, scale = own(theirs, tokens)[:3]
            assert torch.allclose(prompted.logits(theirs), scale * features @ texts.T, atol=1e-5)
    with pytest.raises(ModelError, match="the model reads 16"):
        adapter.with_prompts([["a dog " * 9]])
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="take a folder that holds it"):
        load_model(name, state=weights_bytes(config)).with_prompts([["a dog"], ["a cat"]])


def rewritten(file: Path, **changes: object) -> None:
    """Replaces values of a JSON file below `model_cfg`; `text_cfg__width` is one level deeper."""
    stored = json.loads(file.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = stored["model_cfg"]
        for one in outer:
            place = place[one]
        place[last] = value
    file.write_text(json.dumps(stored))


def test_what_a_folder_of_open_clip_lacks_is_told(tmp_path):
    def refused(told: str, change: Callable[[Path], object], kind: type[Exception] = ModelError) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        name = write_open_clip_folder(folder).format(folder)
        change(folder)
        with pytest.raises(kind, match=told):
            load_model(name, state=weights_bytes(config_of("/", "/out", model=name)))

    config, weights = "open_clip_config.json", "open_clip_model.safetensors"
    refused("is missing there", lambda folder: (folder / config).unlink(), ConfigError)
    refused("holds no weights", lambda folder: (folder / weights).unlink(), ConfigError)
    refused("describes no model", lambda folder: (folder / config).write_text("{}"))
    refused("no hub is reached", lambda f: rewritten(f / config, vision_cfg__timm_model_name="hf-hub:of/somebody"))
    refused("is never run", lambda f: rewritten(f / config, text_cfg__tokenizer_kwargs={"trust_remote_code": True}))
    refused("is never run", lambda f: (f / "tokenizer_config.json").write_text('{"auto_map": {"a": "b"}}'))
    refused("cannot make the model of this folder", lambda f: rewritten(f / config, text_cfg__unheard_of=1))
    refused("visual", lambda folder: rewritten(folder / config, vision_cfg__width=24))
    name = write_open_clip_folder(tmp_path).format(tmp_path)
    with pytest.raises(ConfigError, match=f"--model open_clip:{tmp_path}"):
        weights_bytes(config_of("/", "/out", model=f"hf:{tmp_path}"))
    assert load_model(name, weights="random", state=weights_bytes(config_of("/", "/out", model=name))).texts
    with pytest.raises(ModelError, match=r"open_clip:\./FOLDER"):
        load_model("open_clip:tiny/clip", weights="random")


def test_a_tag_brings_its_activation(monkeypatch):
    """OpenAI's weights were trained with QuickGELU, and the library computes them with GELU under a warning."""
    tags = {"slow": {"mean": (0.5,) * 3}, "openai": {"quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, ARCHITECTURE, tags)
    found = {tag: load_model(f"open_clip:{ARCHITECTURE}{tag}", weights="random") for tag in ("", "/slow", "/openai")}
    kinds = {tag: {type(one).__name__ for one in own.module.modules()} for tag, own in found.items()}
    assert ["QuickGELU" in own for own in kinds.values()] == [False, False, True]
    assert "GELU is assumed" in found[""].notes[-1]
    assert "which is taken" in found["/openai"].notes[-1]
    assert not any("GELU" in note for note in found["/slow"].notes)


def test_no_hub_is_reached(monkeypatch, tmp_path):
    asked: list[object] = []

    def reached(*address: object, **_: object) -> None:
        asked.append(address)
        raise OSError("there is no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.socket.connect", reached)
    monkeypatch.setattr("socket.getaddrinfo", reached)
    file = tmp_path / "blocksight-hub.json"
    file.write_text(
        json.dumps({"embed_dim": 8, "vision_cfg": TOWER, "text_cfg": {**TEXTS, "hf_tokenizer_name": "of/somebody"}})
    )
    open_clip.add_model_config(file)
    with pytest.raises(ModelError, match="is not part of open_clip"):
        load_model("open_clip:blocksight-hub", weights="random").with_prompts([["a dog"], ["a cat"]])
    assert not asked


def test_a_bank_of_each_source(source, written, pictures, tmp_path):
    folder, name = written
    asked = options(source, name, str(folder))
    bank = tmp_path / "bank.safetensors"
    weights = ("--weights", asked["weights"]) if "weights" in asked else ()
    code, told = called("bank", "--data", pictures, "--model", asked["model"], *weights, "--output", bank)
    assert code == 0, told
    run_here(pictures, tmp_path / "out", model=f"knn({asked['model']})", weights=str(bank), **RISE)
    rows = rows_in(LocalStore(tmp_path / "out"))
    assert {row["target_name"] for row in rows} <= {"cat", "dog"}
    assert safetensors.torch.load_file(bank)["bank.features"].shape == (4, NUM_FEATURES[source])


def test_a_bank_says_how_its_model_is_fed(pictures, tmp_path):
    write_onnx(tmp_path)
    banks = [tmp_path / "own.safetensors", tmp_path / "said.safetensors"]
    for bank, fed in zip(banks, [(), ("--mean", "0.5", "--std", "0.25", "--resize", "crop")], strict=True):
        code, told = called("bank", "--data", pictures, "--model", f"onnx:{tmp_path}/m.onnx", "--output", bank, *fed)
        told = " ".join(told.split())
        assert code == 0, told
        assert told.endswith(" ".join([*fed, "--explainer daam"]))
        assert ("is assumed (--mean)" in told) != bool(fed)
    features = [safetensors.torch.load_file(bank)["bank.features"] for bank in banks]
    assert not torch.allclose(*features, atol=1e-3)


def test_a_bank_of_another_onnx_file_is_refused(pictures, tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_onnx(tmp_path / name)
    made = onnx.load(tmp_path / "other" / "m.onnx")
    made.graph.node[1].op_type = "Sigmoid"
    onnx.save(made, tmp_path / "other" / "m.onnx")
    bank = tmp_path / "bank.safetensors"
    assert called("bank", "--data", pictures, "--model", f"onnx:{tmp_path}/one/m.onnx", "--output", bank)[0] == 0
    with pytest.raises(ModelError, match="another ONNX file"):
        run_here(pictures, tmp_path / "out", model=f"knn(onnx:{tmp_path}/other/m.onnx)", weights=str(bank), **RISE)


def test_a_model_of_two_heads_has_no_one_feature(tmp_path):
    """DeiT's answer is the mean of two; without one of them it would be the mean of classes and a feature."""
    write(tmp_path, "deit", "DeiTForImageClassificationWithTeacher")
    config = config_of("/", "/out", model=f"hf:{tmp_path}")
    adapter = load_model(config.model, state=weights_bytes(config))
    with pytest.raises(ModelError, match="returns other numbers than this layer's"):
        without_head(adapter)
