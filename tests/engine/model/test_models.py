"""Loading models: names, weights from strangers, and errors that show both sides."""

import io
import pickle
import sys
import warnings
import zipfile
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import IMAGENET_MEAN, IMAGENET_STD, ModelAdapter
from blocksight.engine.model.loading import load_model, random_weights_of
from blocksight.engine.model.state_dicts import StateDict, read_state
from blocksight.engine.model.torchvision_models import _image_size, _published_as, _skeleton, without_transform
from tests.engine.nets import Plain, seeded


def saved(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


# ---------------------------------------------------------------- files that hold code


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def legacy(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def bare(state) -> bytes:
    return pickle.dumps(state["state_dict"])


@pytest.mark.parametrize("write", [saved, legacy, bare])
def test_a_pickle_in_the_weights_does_not_run(tmp_path, write):
    trap = tmp_path / "ran"
    body = write({"state_dict": {"weight": Evil(str(trap))}})
    with pytest.raises(ModelError, match="neither safetensors nor a torch state dict"):
        read_state(body)
    assert not trap.exists()
    with pytest.raises(ModelError, match="neither safetensors nor a torch state dict"):
        load_model("torchvision:squeezenet1_1", state=body)
    assert not trap.exists()


def scripted() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # torch deprecates the format that must be refused
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.trace(seeded(Plain), torch.rand(1, 3, 32, 32)), buffer)
    return buffer.getvalue()


def exported() -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(seeded(Plain), (torch.rand(1, 3, 32, 32),)), buffer)
    return buffer.getvalue()


def pickled_module() -> bytes:
    return saved(seeded(Plain))


@pytest.mark.parametrize("make", [scripted, exported, pickled_module])
def test_code_in_the_weights_is_refused(make):
    with pytest.raises(ModelError, match=r"holds code .* is refused: save model.state_dict"):
        read_state(make())


@pytest.mark.parametrize("body", [b"", b"\x00" * 100, b"not weights at all", b"PK\x03\x04broken", b"{}"])
def test_rubbish_is_refused(body):
    with pytest.raises(
        ModelError, match=r"the weights file (is neither safetensors nor a torch state dict|holds no weights)"
    ):
        read_state(body)


def test_a_compressed_archive_is_refused_before_it_is_unpacked():
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.zeros(100_000)}, plain)
    assert read_state(plain.getvalue()).tensors["weight"].numel() == 100_000
    with zipfile.ZipFile(plain) as stored, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for name in stored.namelist():
            other.writestr(name, stored.read(name))
    with pytest.raises(ModelError, match="neither safetensors nor a torch state dict") as caught:
        read_state(packed.getvalue())
    assert "compressed archives are refused" in str(caught.value.__cause__)


# ---------------------------------------------------------------- state dicts


@pytest.mark.parametrize("write", [saved, safetensors.torch.save], ids=["torch", "safetensors"])
@pytest.mark.parametrize("architecture", ["squeezenet1_1", "resnet18", "mobilenet_v3_small", "densenet121"])
def test_torchvision_takes_the_class_count_from_the_weights(architecture, write):
    net = seeded(lambda: torchvision.models.get_model(architecture, num_classes=7))
    adapter = load_model(f"torchvision:{architecture}", state=write(net.state_dict()))
    assert adapter.num_classes == 7
    assert adapter.class_names is None
    assert adapter.class_name(3) == "class 3"
    assert adapter.fingerprint == ModelAdapter(net).fingerprint


@pytest.mark.parametrize(
    ("architecture", "layer"),
    [
        ("maxvit_t", {"classifier.5.weight": 0}),  # without a bias, behind a layer that has one
        ("regnet_x_400mf", {"fc.weight": 0, "fc.bias": 0}),  # computes with numbers while it is made
        ("googlenet", {"fc.weight": 0, "fc.bias": 0}),  # not one of its auxiliary heads
        ("squeezenet1_1", {"classifier.1.weight": 0, "classifier.1.bias": 0}),
    ],
)
def test_classes_are_counted_in_the_last_layer(architecture, layer):
    axes, names = _skeleton(architecture)
    assert axes == layer
    assert set(layer) < set(names)


@pytest.mark.parametrize("has_auxiliary", [True, False])
def test_googlenet_is_made_as_its_file_is_and_switched_as_torchvision_does(has_auxiliary):
    net = torchvision.models.googlenet(num_classes=6, init_weights=False, aux_logits=has_auxiliary)
    adapter = load_model("torchvision:googlenet", state=saved({f"model.{k}": v for k, v in net.state_dict().items()}))
    assert adapter.num_classes == 6
    assert adapter.fingerprint == ModelAdapter(net).fingerprint
    assert adapter.module.transform_input is True
    assert "transform_input) was switched on" in adapter.notes[-1]
    assert "If it was off: --mean 0.47813," in adapter.notes[-1]
    mean, std = without_transform()
    pixels = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    undone = adapter.module._transform_input(adapter.fed(mean=mean, std=std).normalise(pixels))
    assert torch.allclose(undone, adapter.normalise(pixels), atol=1e-5)


def test_the_image_size_of_a_vision_transformer_is_that_of_its_positions():
    def stored(tokens):
        return StateDict(
            {"encoder.pos_embedding": torch.zeros(1, tokens, 8), "conv_proj.weight": torch.zeros(8, 3, 16, 16)}
        )

    assert _image_size("vit_b_16", stored(1 + 24 * 24)) == {"image_size": 384}
    assert _image_size("vit_b_16", stored(1 + 24 * 23)) == {}
    assert _image_size("resnet18", stored(1 + 24 * 24)) == {}


def test_a_published_file_is_known_by_its_hash():
    known = [SimpleNamespace(url="https://x/net-12345678.pth"), SimpleNamespace(url="https://x/net-2c26b46b.pth")]
    assert _published_as(known, b"foo") is known[1]  # sha256 of foo
    assert _published_as(known, b"bar") is None


def test_a_class_count_beyond_all_bounds_is_refused_before_it_is_allocated():
    head = {"fc.weight": torch.zeros(1, 1).expand(1 << 30, 512), "fc.bias": torch.zeros(1).expand(1 << 30)}
    with pytest.raises(ModelError, match=r"has 1073741824 classes in fc.weight; wanted 1 to"):
        load_model("torchvision:resnet18", state=saved(head))


def test_weights_for_all_of_imagenet_bring_its_names():
    net = seeded(torchvision.models.squeezenet1_1)
    adapter = load_model("torchvision:squeezenet1_1", state=saved(net.state_dict()))
    assert adapter.num_classes == len(adapter.class_names) == 1000
    assert adapter.class_name(0) == "tench"


def test_a_wrong_shape_shows_both_sides():
    state = torchvision.models.resnet18(num_classes=7).state_dict()
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    sentence = (
        r"do not fit the model in 1 tensors: conv1.weight: \(64, 3, 7, 7\) wanted, \(64, 1, 7, 7\) given. "
        "Likely cause: another width"
    )
    with pytest.raises(ModelError, match=sentence):
        load_model("torchvision:resnet18", state=saved(state))


def test_another_architectures_weights_show_both_sides():
    body = saved(torchvision.models.squeezenet1_1(num_classes=7).state_dict())
    with pytest.raises(ModelError, match=r"Likely cause: another architecture; the model's names are conv1\.weight"):
        load_model("torchvision:resnet18", state=body)


def test_weights_without_a_classifier_say_so():
    with pytest.raises(ModelError, match="Likely cause: another architecture"):
        load_model("torchvision:resnet18", state=saved({"conv1.weight": torch.zeros(64, 3, 7, 7)}))


def test_a_wrong_class_count_shows_both_sides(my_models):
    net = Plain()
    net.head = nn.Linear(160, 9)
    sentence = (
        r"head.bias: \(5,\) wanted, \(9,\) given; head.weight: \(5, 160\) wanted, \(9, 160\) given. "
        "Likely cause: another number of classes; the file has 9, the model 5"
    )
    with pytest.raises(ModelError, match=sentence):
        load_model("my_models:make", state=saved(net.state_dict()))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("resnet50", {}, "unknown model 'resnet50'; known: efficientnet_lite0, torchvision:NAME, timm:NAME, hf:FOLDER"),
        ("", {}, "unknown model ''; known: "),
        ("efficientnet_lite0", {"weights": "nofile"}, "has no weights with a name, and there is no file 'nofile'"),
        ("torchvision:resnet18", {"weights": "nofile"}, "IMAGENET1K_V1.* there is no file 'nofile'"),
        ("torchvision:qqqqqqqq", {}, "has no classifier 'qqqqqqqq'; known: alexnet, "),
        ("torchvision:resnet5o", {"weights": "random"}, "no classifier 'resnet5o'; nearest: .*resnet50"),
        ("torchvision:", {"weights": "random"}, "no classifier ''; known: alexnet, "),
        ("torchvision:resnet18", {}, "needs --weights: .*IMAGENET1K_V1.*random"),
        ("torchvision:resnet18", {"weights": "IMAGENET9K"}, "needs --weights: .*IMAGENET1K_V1.*random"),
        ("nowhere.at_all:make", {}, "cannot be imported: .*package.module:factory"),
        ("math:nothing", {}, "cannot be imported: .*package.module:factory"),
        ("math:", {}, "cannot be imported"),
        (":make", {}, "cannot be imported"),
        (".models:make", {}, "cannot be imported"),
        ("math:factorial", {}, "failed.*factorial"),
        ("math:pi", {}, "failed"),
    ],
)
def test_what_is_wrong_is_one_sentence(name, options, sentence):
    with pytest.raises(ModelError, match=sentence):
        load_model(name, **options)


@pytest.mark.parametrize("architecture", ["squeezenet1_1", "mobilenet_v3_small"])
def test_random_weights_are_seeded(architecture):
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    one, same, other = (load_model(f"torchvision:{architecture}", weights="random", seed=seed) for seed in (3, 3, 4))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.name == f"torchvision:{architecture}"
    assert one.class_name(0) == "tench"


def test_torchvisions_preset_sets_the_input():
    adapter = load_model("torchvision:squeezenet1_1", weights="random")
    assert adapter.input_size == (224, 224)
    black = adapter.normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten().tolist()
    assert black == pytest.approx([-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])


def test_efficientnet_lite0_comes_with_its_weights():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the demo extra is not installed")
    adapter = load_model("efficientnet_lite0")
    assert adapter.num_classes == 1000
    assert adapter.class_name(1) == "goldfish"
    pixels = torch.tensor([0, 127, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    assert adapter.normalise(pixels)[0, 0, 0].tolist() == pytest.approx([-127 / 128, 0, 1], abs=1e-6)
    assert adapter.fingerprint == load_model("efficientnet_lite0").fingerprint


# ---------------------------------------------------------------- a factory of the user's own


FACTORIES = """
import torch
from blocksight.engine.model.adapter import ModelAdapter
from tests.engine.nets import Plain

def make():
    return ModelAdapter(Plain(), input_size=(32, 32), class_names=list("abcde"))

def bare():
    return Plain()

def number():
    return 3

def leaving():
    raise SystemExit(3)

def failing():
    raise FileNotFoundError("weights.pt")

class Maps(torch.nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output
    def forward(self, x):
        return {"maps": x, "pair": (x.mean((2, 3)),), "one": x.mean((0, 2, 3)), "dict": {"out": x}}[self.output]

def maps():
    return ModelAdapter(Maps("maps"), input_size=(8, 8))

def pair():
    return ModelAdapter(Maps("pair"), input_size=(8, 8))

def one():
    return ModelAdapter(Maps("one"), input_size=(8, 8))

def built(*, weights=None, progress=True):
    net = Plain()
    if weights is not None:
        torch.nn.init.ones_(net.head.weight)
    return net

def trained(pretrained=False):
    with torch.random.fork_rng():
        torch.manual_seed(5)  # as if it read a file
        return Plain()

def headless():
    net = trained()
    torch.nn.init.normal_(net.head.weight)
    return net

def mapping():
    return ModelAdapter(Maps("dict"), input_size=(8, 8))
"""


@pytest.fixture
def my_models(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_models", None)


def test_a_factory_returns_an_adapter_or_a_module(my_models):
    adapter = load_model("my_models:make")
    assert (adapter.name, adapter.num_classes, adapter.class_name(1)) == ("my_models:make", 5, "b")
    bare = load_model("my_models:bare")
    assert bare.input_size == (224, 224)
    assert bare.fingerprint == adapter.fingerprint  # seeded alike
    assert load_model("my_models:make", seed=1).fingerprint != adapter.fingerprint


def test_a_factory_takes_a_state_dict(my_models):
    net = seeded(Plain, seed=8)
    adapter = load_model("my_models:make", state=safetensors.torch.save(net.state_dict()))
    assert adapter.fingerprint == ModelAdapter(net).fingerprint


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("number", "my_models:number returned a int; wanted an nn.Module or an engine ModelAdapter"),
        ("leaving", "my_models:leaving.* failed when it was made: 3"),
        ("failing", "my_models:failing.*weights.pt"),
        ("missing", "my_models:missing.* cannot be imported"),
    ],
)
def test_a_factory_that_fails_is_one_sentence(my_models, name, sentence):
    with pytest.raises(ModelError, match=sentence):
        load_model(f"my_models:{name}")


@pytest.mark.parametrize(
    ("name", "returned"),
    [
        ("maps", r"\(2, 3, 8, 8\)"),
        ("one", r"\(3,\)"),
        ("mapping", r"a dict with out: wrap it .* output\['out'\]"),
    ],
)
def test_an_output_that_is_no_logits_is_refused(my_models, name, returned):
    adapter = load_model(f"my_models:{name}")
    sentence = rf"'my_models:{name}' must return logits \[N, classes\]; for 2 images it returned {returned}"
    with pytest.raises(ModelError, match=sentence):
        _ = adapter.num_classes


def test_the_logits_of_a_tuple_are_read(my_models):
    assert load_model("my_models:pair").num_classes == 3


def test_one_output_cannot_be_explained_and_the_way_out_is_said():
    net = seeded(Plain)
    net.head = nn.Linear(160, 1)
    with pytest.raises(ModelError, match=r"has one output, whose softmax is always 1.*\[0, z\]"):
        _ = ModelAdapter(net, input_size=(32, 32)).num_classes


def test_a_model_that_cannot_take_its_input_size_says_so():
    adapter = ModelAdapter(seeded(Plain), name="plain", input_size=(40, 32))
    with pytest.raises(ModelError, match=r"model 'plain' fails on RGB images of 40 x 32 pixels \(--input-size"):
        _ = adapter.num_classes


@pytest.mark.parametrize("name", ["my_models:built", "torchvision.models:squeezenet1_1"])
def test_a_librarys_function_without_weights_is_refused(my_models, name):
    with pytest.raises(
        ModelError, match=rf"'{name}' takes `weights`, and nobody named any: .*RANDOM.* --weights rando"
    ):
        load_model(name)
    assert load_model(name, weights="random").name == name


def test_a_librarys_function_with_a_file_or_weights_of_its_own_loads(my_models):
    net = seeded(Plain, seed=8)
    assert load_model("my_models:built", state=saved(net.state_dict())).fingerprint == ModelAdapter(net).fingerprint
    assert load_model("my_models:trained").fingerprint == load_model("my_models:trained", seed=3).fingerprint


def test_random_weights_of_a_factory_are_said_loudly(my_models):
    def sentence(name):
        return random_weights_of(name, load_model(name), 0)

    assert sentence("my_models:bare").startswith("THE WEIGHTS ARE RANDOM: ")
    assert sentence("my_models:headless").startswith("PART OF THE WEIGHTS IS RANDOM: 1 of 8 tensors of my_models:headl")
    assert sentence("my_models:trained") is None
    assert random_weights_of("torchvision:resnet18", load_model("my_models:bare"), 0) is None


# ---------------------------------------------------------------- the adapter


def renamed(net, order):
    """The same tensors, listed in another order."""
    items = list(net.state_dict().items())
    holder = nn.Module()
    for name, tensor in [items[index] for index in order]:
        holder.register_buffer(name.replace(".", "_"), tensor)
    return holder


def test_the_fingerprint_is_that_of_the_weights():
    one = ModelAdapter(seeded(Plain)).fingerprint
    assert len(one) == 64
    assert ModelAdapter(seeded(Plain).train()).fingerprint == one
    for name in seeded(Plain).state_dict():
        changed = seeded(Plain)
        tensor = changed.state_dict()[name].view(-1)
        tensor[0] = torch.nextafter(tensor[0], torch.tensor(9.0))
        assert ModelAdapter(changed).fingerprint != one


def test_the_fingerprint_does_not_change_with_the_order_of_names():
    net = seeded(Plain)
    count = len(net.state_dict())
    one, other = (ModelAdapter(renamed(net, order)).fingerprint for order in (range(count), reversed(range(count))))
    assert one == other


def test_the_fingerprint_tells_names_shapes_and_types_apart():
    def of(**buffers):
        holder = nn.Module()
        for name, tensor in buffers.items():
            holder.register_buffer(name, tensor)
        return ModelAdapter(holder).fingerprint

    prints = {
        of(a=torch.zeros(4)),
        of(b=torch.zeros(4)),
        of(a=torch.zeros(2, 2)),
        of(a=torch.zeros(4, dtype=torch.int32)),
        of(a=torch.zeros(2), b=torch.zeros(2)),
    }
    assert len(prints) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.bool])
def test_weights_of_every_type_have_a_fingerprint(dtype):
    net = nn.Module()
    for name, values in {"matrix": torch.eye(3), "number": torch.tensor(1.0)}.items():
        net.register_buffer(name, values.to(dtype))
    one = ModelAdapter(net).fingerprint
    net.number.zero_()
    assert ModelAdapter(net).fingerprint != one


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_have_a_fingerprint():
    def quantised(factor):
        net = seeded(lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)))
        net[0].weight.data *= factor
        return ModelAdapter(torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8))

    assert quantised(1).fingerprint == quantised(1).fingerprint
    assert quantised(1).fingerprint != quantised(2).fingerprint  # the same integers at another scale


def test_a_weight_without_fixed_bytes_is_one_sentence():
    net = nn.Linear(3, 3, device="meta")
    with pytest.raises(ModelError, match="weight 'bias' of model cannot be hashed"):
        _ = ModelAdapter(net).fingerprint


class Compiled(nn.Module):
    """What `torch.compile` returns, as far as it can be seen; the import of its compiler takes seconds."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


def test_a_compiled_model_is_the_model_inside():
    net = seeded(Plain)
    before = ModelAdapter(net).fingerprint
    assert ModelAdapter(Compiled(net)).module is net
    (inside,) = ModelAdapter(nn.Sequential(Compiled(net))).module
    assert inside is net
    net._compiled_call_impl = net.forward  # as `net.compile()` does
    assert ModelAdapter(net).module._compiled_call_impl is None
    assert ModelAdapter(net).fingerprint == before


def test_normalisation_is_the_usual_formula():
    adapter = ModelAdapter(nn.Identity(), mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    inputs = adapter.normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    assert inputs[0, :, 0, 0].tolist() == [1.0, 0.75, 0.5]
    assert inputs.dtype == torch.float32
    assert inputs.shape == (1, 3, 2, 2)


def test_borrowing_gives_the_model_back():
    net = seeded(Plain).train()
    adapter = ModelAdapter(net, input_size=(32, 32))
    assert adapter.num_classes == 5
    assert adapter.network.places
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
