"""Models of an ONNX file, run by ONNX Runtime on the CPU: for methods that need neither gradients nor blocks."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from blocksight.engine.catalog.sources import require
from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.failures import first_line_of
from blocksight.engine.model.outputs import of_channels, with_one_output
from blocksight.engine.model.sources.files import split, unpack

MODEL_FILE = "model.onnx"
"""The name of the model among its packed files; the others have the names by which it refers to them."""
STANDARD = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Domains of operators that are part of ONNX Runtime itself."""
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
CHANNELS = (1, 3)
DEFAULT_SIDE = 224
MAX_SHOWN = 3


def external_files(body: bytes) -> tuple[str, ...]:
    """The files in which the tensors of a model lie, relative to its folder. Raises ModelError for one outside it."""
    require("onnx")
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    graphs = list(_graphs(_parsed(body)))
    tensors = [tensor for graph in graphs for tensor in _tensors(graph) if isinstance(tensor, onnx.TensorProto)]
    names = sorted({ExternalDataInfo(one).location for one in tensors if uses_external_data(one)})
    for name in names:
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or "\\" in name or name == MODEL_FILE:
            raise ModelError(f"the model's tensors lie in {name!r}, outside its folder: they are not read")
    return tuple(names)


def load_onnx(name: str, weights: str | None, state: bytes | None, seed: int) -> ModelAdapter:  # noqa: ARG001
    """The model of a file, whose bytes are packed in `state` with those beside it. Raises ModelError."""
    require("onnx")
    packed, file = split(state)
    if weights is not None or file is not None:
        raise ModelError(f"onnx:{name} holds its own weights: leave --weights out")
    if packed is None:
        raise ModelError(f"onnx:{name} names a file that was not read: call `load_model` with it packed")
    files = unpack(packed)
    _refuse_custom(_parsed(bytes(files[MODEL_FILE])))
    network = OnnxNetwork(_session(files), hashlib.sha256(packed).digest())
    adapter = ModelAdapter(network, name=f"onnx:{name}", input_size=network.size or (DEFAULT_SIDE, DEFAULT_SIDE))
    if network.in_channels == 1:
        adapter = of_channels(adapter.fed(mean=(0.5,) * 3, std=(0.5,) * 3), 1)
    adapter.assumed = _assumed(network, adapter)
    return with_one_output(adapter)


def _assumed(network: "OnnxNetwork", adapter: ModelAdapter) -> Mapping[str, str]:
    values = {"mean": adapter.mean, "std": adapter.std}
    shown = {name: " ".join(f"{value:g}" for value in own) for name, own in values.items()}
    found = {
        name: f"an ONNX file does not say how it is fed: {name} {text} is assumed (--{name})"
        for name, text in shown.items()
    }
    if network.size is None:
        sides = f"{DEFAULT_SIDE} x {DEFAULT_SIDE}"
        found["input_size"] = f"the file takes pictures of any size: {sides} pixels are assumed (--input-size)"
    return found


def _parsed(body: bytes) -> Any:
    import onnx

    try:
        return onnx.load_model_from_string(body)
    except Exception as error:  # protobuf raises its own errors over a stranger's bytes
        raise ModelError(f"the ONNX file cannot be read: {first_line_of(error)}") from error


def _graphs(model: Any) -> Iterator[Any]:
    """The graphs and functions of a model, also those inside nodes."""
    left = [model.graph, *model.functions]
    while left:
        graph = left.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                left += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _tensors(graph: Any) -> Iterator[Any]:
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)


def _refuse_custom(model: Any) -> None:
    """Raises ModelError for operators that are not ONNX Runtime's own."""
    known = {*STANDARD, *(function.domain for function in model.functions)}
    found = {
        f"{node.domain}.{node.op_type}" for graph in _graphs(model) for node in graph.node if node.domain not in known
    }
    if found:
        raise ModelError(
            f"the ONNX file needs custom operators ({', '.join(sorted(found)[:MAX_SHOWN])}), whose code is never "
            "loaded: export it with standard ones"
        )


def _session(files: Mapping[str, memoryview]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # the same bits on every machine
    options.log_severity_level = 4
    with TemporaryDirectory(prefix="blocksight-model-") as folder:
        for name, body in files.items():
            place = Path(folder) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(body)
        try:
            return onnxruntime.InferenceSession(
                str(Path(folder) / MODEL_FILE), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime raises its own errors
            raise ModelError(
                f"ONNX Runtime cannot load the file: {first_line_of(error)}; export the model in float32 with standard "
                "operators"
            ) from error


def _refuse_other_file(network: "OnnxNetwork", state: Mapping[str, Tensor], prefix: str, *others: Any) -> None:
    """Adds an error for the hash of another file, such as in a memory bank."""
    stored, errors = state.get(f"{prefix}digest"), others[-1]
    if stored is not None and not torch.equal(stored.cpu(), network.digest.cpu()):
        errors.append("the weights belong to another ONNX file than the one that is named")


def _refuse_other_inputs(given: Sequence[Any]) -> None:
    """Raises ModelError for inputs that are not one picture of floats in one or three channels."""
    shown = "the ONNX file takes " + ", ".join(f"{one.name} {one.type} {one.shape}" for one in given)
    if len(given) != 1 or len(given[0].shape) != 4:
        raise ModelError(f"{shown}; wanted one picture [N, C, H, W] of floats")
    if given[0].type not in FLOATS:
        raise ModelError(
            f"{shown}, and pictures are fed as floats: export the model without the step that casts or scales "
            "bytes, and say by --mean and --std what that step did"
        )
    shape = given[0].shape
    if not any(isinstance(shape[axis], str | None) or shape[axis] in CHANNELS for axis in (1, 3)):
        raise ModelError(f"{shown}, and pictures have 3 channels (RGB) or 1 (grey): export the model for those")


class OnnxNetwork(nn.Module):
    """A file's network as a module, without gradients and without parts."""

    digest: Tensor

    def __init__(self, session: Any, digest: bytes) -> None:
        """`digest`: a hash of the file, which tells the model again. Raises ModelError for input that is no picture."""
        super().__init__()
        self.register_buffer("digest", torch.tensor(list(digest), dtype=torch.uint8))
        self.register_load_state_dict_pre_hook(_refuse_other_file)
        self.session = session
        given = session.get_inputs()
        _refuse_other_inputs(given)
        self.name, self.dtype, shape = given[0].name, FLOATS[given[0].type], given[0].shape
        self.is_channels_last = shape[1] not in CHANNELS and shape[3] in CHANNELS
        axes = (0, 3, 1, 2) if self.is_channels_last else (0, 1, 2, 3)
        batch, channels, *sides = (shape[axis] if isinstance(shape[axis], int) else None for axis in axes)
        self.batch, self.in_channels = batch, channels
        self.size = (sides[0], sides[1]) if sides[0] and sides[1] else None
        self.outputs = [one.name for one in session.get_outputs()]

    def forward(self, inputs_nchw: Tensor) -> Tensor | dict[str, Tensor]:
        """The output, or all of them by name, without gradients."""
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            raise RuntimeError("an ONNX file cannot be traced")
        given = inputs_nchw.detach().cpu().numpy().astype(self.dtype)
        given = np.ascontiguousarray(given.transpose(0, 2, 3, 1) if self.is_channels_last else given)
        parts = [self._run(part) for part in self._parts(given)]
        joined = [
            torch.from_numpy(np.concatenate(own)[: len(given)]).to(inputs_nchw.device)
            for own in zip(*parts, strict=True)
        ]
        floats = [one.float() if one.is_floating_point() else one for one in joined]
        return floats[0] if len(floats) == 1 else dict(zip(self.outputs, floats, strict=True))

    def _parts(self, given: NDArray[Any]) -> Sequence[NDArray[Any]]:
        """The pictures in passes of the size that the file fixes; the last one is repeated to fill a pass."""
        if self.batch is None:
            return [given]
        missing = -len(given) % self.batch
        filled = np.concatenate([given, *[given[-1:]] * missing])
        return np.split(filled, len(filled) // self.batch)

    def _run(self, given: NDArray[Any]) -> Sequence[NDArray[Any]]:
        return self.session.run(self.outputs, {self.name: given})

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnnxNetwork":
        return self  # nothing in it changes
