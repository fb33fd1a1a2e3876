"""ONNX files as models: equal to the network that they hold, and refused where they ask for more than numbers."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch.nn import functional

from blocksight.engine.errors import ModelError
from blocksight.engine.model.loading import load_model
from blocksight.engine.model.outputs import of_channels
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.context import weights_bytes
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import called, config_of, rows_in, run_here

WEIGHTS = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)


def model(
    batch=1, side=32, *, channels=3, is_last=False, extra=(), domain="", outputs=("y",), given=TensorProto.FLOAT
) -> onnx.ModelProto:
    """A convolution, a ReLU and a mean: logits [N, 5]."""
    kind = TensorProto.FLOAT
    shape = [batch, side, side, channels] if is_last else [batch, channels, side, side]
    turned = [helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2])] if is_last else []
    nodes = [
        *turned,
        helper.make_node("Conv", ["t" if is_last else "x", "w"], ["c"], strides=[8, 8]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
        *extra,
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", given, shape)],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [
            numpy_helper.from_array(
                np.resize(WEIGHTS, (5, channels, 8, 8)) if channels > 3 else WEIGHTS[:, :channels].copy(), "w"
            )
        ],
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def loaded(made: onnx.ModelProto, folder: Path, **options):
    onnx.save(made, folder / "model_of.onnx")
    config = config_of("/", "/out", model=f"onnx:{folder / 'model_of.onnx'}", **options)
    return load_model(config.model, weights=config.weights, state=weights_bytes(config))


@pytest.mark.parametrize("options", [{}, {"batch": "N"}, {"batch": 2}, {"is_last": True}, {"channels": 1}])
def test_it_is_the_network_of_the_file(options, tmp_path):
    adapter = loaded(model(**options), tmp_path)
    assert adapter.input_size == (32, 32)
    pixels = torch.rand(3, 3, 32, 32)
    given = pixels if options.get("channels", 3) == 3 else pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    seen = given[:, : options.get("channels", 3)]
    weights = torch.from_numpy(WEIGHTS)[:, : options.get("channels", 3)]
    wanted = functional.conv2d(seen, weights, stride=8).relu().mean((2, 3))
    assert torch.allclose(adapter.logits(given), wanted, atol=1e-5)
    assert adapter.num_classes == 5


def of_doubles() -> onnx.ModelProto:
    """The mean over the picture in float64, which ONNX Runtime can run: logits [N, 3]."""
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["N", 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)],
        [],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def test_doubles_are_fed_doubles(tmp_path):
    pixels = torch.rand(3, 3, 32, 32)
    assert torch.allclose(loaded(of_doubles(), tmp_path).logits(pixels), pixels.mean((2, 3)), atol=1e-6)


def test_inputs_that_are_no_pictures_are_refused_with_the_way_out(tmp_path):
    cast = helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT)
    of_bytes = model(given=TensorProto.UINT8)
    of_bytes.graph.node.insert(0, cast)
    of_bytes.graph.node[1].input[0] = "f"
    with pytest.raises(ModelError, match=r"takes x tensor\(uint8\) .* pictures are fed as floats: export the model"):
        loaded(of_bytes, tmp_path)
    with pytest.raises(ModelError, match=r"\[1, 4, 32, 32\], and pictures have 3 channels \(RGB\) or 1 \(grey\)"):
        loaded(model(channels=4), tmp_path)
    with pytest.raises(ModelError, match=r"fails on grey images: the file takes 3 channels; leave --channels out"):
        _ = of_channels(loaded(model(), tmp_path).fed(mean=(0.5,) * 3, std=(0.5,) * 3), 1).num_classes
    with pytest.raises(ModelError, match="takes one channel and --channels says 3: leave --channels out"):
        of_channels(loaded(model(channels=1), tmp_path), 3)
    of_two = model()
    of_two.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    with pytest.raises(ModelError, match=r"x tensor\(float\) .*, mask tensor\(float\) \[1\]; wanted one picture"):
        loaded(of_two, tmp_path)


def test_the_file_is_the_fingerprint(tmp_path):
    one, other = loaded(model(), tmp_path).fingerprint, loaded(model(batch=2), tmp_path).fingerprint
    assert one != other
    assert loaded(model(), tmp_path).fingerprint == one


def test_what_a_file_does_not_say_is_said(tmp_path):
    adapter = loaded(model(batch="N", side="S"), tmp_path)
    mean, std, size = adapter.assumptions
    assert "mean 0.485 0.456 0.406 is assumed (--mean)" in mean
    assert "std 0.229 0.224 0.225 is assumed (--std)" in std
    assert "224 x 224 pixels are assumed" in size
    assert adapter.fed(mean=(0.5,) * 3, std=(0.5,) * 3).assumptions == (size,)
    assert adapter.fed(input_size=(64, 64)).assumptions == (mean, std)


def test_one_of_several_outputs_is_explained(tmp_path):
    extra = [helper.make_node("Neg", ["y"], ["logits"])]
    adapter = loaded(model(extra=extra, outputs=("y", "logits")), tmp_path)
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(adapter.logits(pixels), -loaded(model(), tmp_path).logits(pixels))
    assert "(others: y; --output-key)" in adapter.notes[-1]


def test_custom_operators_are_refused(tmp_path):
    custom = [helper.make_node("Secret", ["y"], ["z"], domain="mine")]
    with pytest.raises(ModelError, match=r"custom operators \(mine\.Secret\)"):
        loaded(model(extra=custom, domain="mine", outputs=("z",)), tmp_path)
    inner = helper.make_graph(
        [helper.make_node("Secret", ["y"], ["b"], domain="mine")],
        "inner",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )
    flag = numpy_helper.from_array(np.array(True), "flag")
    hidden = [
        helper.make_node("Constant", [], ["flag"], value=flag),
        helper.make_node("If", ["flag"], ["z"], then_branch=inner, else_branch=inner),
    ]
    with pytest.raises(ModelError, match="custom operators"):
        loaded(model(extra=hidden, domain="mine", outputs=("z",)), tmp_path)


def test_tensors_beside_the_file(tmp_path):
    file = tmp_path / "model_of.onnx"
    onnx.save(model(), file, save_as_external_data=True, location="beside.data", size_threshold=0)
    config = config_of("/", "/out", model=f"onnx:{file}")
    body = weights_bytes(config)
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_model(config.model, state=body).logits(pixels), loaded(model(), tmp_path).logits(pixels))
    onnx.save(model(), file, save_as_external_data=True, location="beside2.data", size_threshold=0)
    (tmp_path / "beside2.data").unlink()
    with pytest.raises(ConfigError, match="is not there, or a file that it names"):
        weights_bytes(config)


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "a\\b", ""])
def test_tensors_outside_the_folder_are_refused(place, tmp_path):
    made = model()
    (tensor,) = made.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    file = tmp_path / "model_of.onnx"
    file.write_bytes(made.SerializeToString())
    with pytest.raises(ModelError, match="outside its folder"):
        weights_bytes(config_of("/", "/out", model=f"onnx:{file}"))


def test_what_is_no_model_is_told(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"\xff" * 90)
    with pytest.raises(ModelError, match="cannot be read"):
        weights_bytes(config_of("/", "/out", model=f"onnx:{tmp_path / 'broken.onnx'}"))
    with pytest.raises(ConfigError, match="is not there"):
        weights_bytes(config_of("/", "/out", model=f"onnx:{tmp_path / 'none.onnx'}"))
    with pytest.raises(ModelError, match="holds its own weights"):
        loaded(model(), tmp_path, weights="random")
    unknown = model(extra=[helper.make_node("NoSuchOperator", ["y"], ["z"])], outputs=("z",))
    with pytest.raises(ModelError, match=r"ONNX Runtime cannot load the file: .*; export the model in float32"):
        loaded(unknown, tmp_path)


def test_a_whole_job_and_what_it_cannot_do(tmp_path):
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    onnx.save(model(), tmp_path / "m.onnx")
    name = f"onnx:{tmp_path / 'm.onnx'}"
    options = {"model": name, "explainer": "rise", "parameters": {"num_masks": 8}}
    run_here(tmp_path / "in", tmp_path / "out", **options)
    (row,) = rows_in(LocalStore(tmp_path / "out"))
    assert row["map"] is not None
    assert called("evaluate", tmp_path / "out", "--runner", "local", "--metrics", "deletion")[0] == 0
    for explainer, told in (("gradcam", "no block was found"), ("integrated_gradients", "needs gradients")):
        with pytest.raises(ModelError, match=told):
            run_here(tmp_path / "in", tmp_path / explainer, model=name, explainer=explainer)
