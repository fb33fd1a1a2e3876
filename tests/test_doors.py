"""Files that may run code, or grow when they are decompressed, are opened in listed modules only."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cluster", "engine", "jobs", "storage")

DOORS = {
    ("storage/parquet/reader.py", "pyarrow.parquet.ParquetFile"),
    ("storage/parquet/reader.py", "pyarrow.parquet.FileMetaData"),
    ("storage/parquet/reader.py", "pyarrow.PythonFile"),
    ("storage/parquet/reader.py", "pyarrow.ipc.read_schema"),  # its bytes name no extension type any more
    ("engine/model/tensors.py", "safetensors.torch.load"),
    ("engine/model/tensors.py", "torch.load"),  # with weights_only, see below
    ("jobs/worker/isolation.py", "pickle.loads"),  # from its own child's pipe
    ("jobs/export/sql.py", "duckdb.connect"),  # DuckDB reads Parquet by itself: it knows no Python types
    ("jobs/export/sql.py", "duckdb.DuckDBPyConnection"),
    ("engine/model/adapter.py", "torch.jit.ScriptModule"),  # a type that modules are compared with: it opens nothing
    ("engine/model/taps.py", "torch.jit.ScriptModule"),
    ("engine/explainers/edges.py", "h5py.File"),  # a file of an installed package
    ("jobs/export/virelay.py", "h5py.File"),  # it writes
    ("jobs/export/virelay.py", "numpy.memmap"),  # numbers of our own, in a scratch file
    ("jobs/explain/feature_vectors.py", "numpy.load"),  # without pickle, of bytes that were read up to a limit
    ("jobs/export/arrays.py", "numpy.load"),  # without pickle, of a part of an export that this command wrote
    ("jobs/export/array_file.py", "numpy.lib.format.header_data_from_array_1_0"),  # they write
    ("jobs/export/array_file.py", "numpy.lib.format.write_array_header_1_0"),
    ("jobs/export/selection.py", "duckdb.DuckDBPyConnection"),  # a type: the connection is one of `sql.py`
    ("cluster/checks/documents.py", "yaml.load_all"),  # with a loader that makes plain values alone
    ("engine/model/sources/onnx_models.py", "torch.jit.is_tracing"),  # it opens nothing
    ("engine/model/sources/onnx_models.py", "onnx.load_model_from_string"),  # operators and places of tensors are read
    ("engine/model/sources/onnx_models.py", "onnxruntime.InferenceSession"),  # after them
}
"""Allowed pairs of a file and a function that it uses."""

OPENERS = re.compile(
    r"pyarrow\.parquet(?!\.(write_table|ParquetWriter)$).*"
    r"|pyarrow\.(ipc|dataset|feather|orc|csv|json|fs|flight|cuda)(\..*)?"
    r"|pyarrow\.(memory_map|OSFile|PythonFile|input_stream|CompressedInputStream|deserialize.*|read_.*)"
    r"|safetensors(?!$|\.SafetensorError$|\.torch$|\.torch\.save$).*"
    r"|torch\.(load|jit|hub|package|serialization|export\.load|_export\.load|storage)(\..*)?"
    r"|numpy\.(load|memmap|fromfile|loadtxt|genfromtxt|lib)(\..*)?"
    r"|(c?[pP]ickle|_pickle)\.(load|loads|Unpickler)|(cloudpickle|dill|joblib|marshal|shelve)(\..*)?"
    r"|(pandas|polars)\.(read|scan).*|ray\.data\.read.*|ray\.cloudpickle.*"
    r"|onnx\.(load.*|hub\..*|.*\.load_.*)|onnxruntime\.(InferenceSession|.*custom_ops.*)|openvino\..*(read_model|add_extension)"
    r"|transformers\..*trust_remote_code.*|duckdb(?!$|\.Error$).*|h5py(?!$).*|yaml\..*load.*"
)
"""Functions that read files which may hold code or grow when they are decompressed."""


def used(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """The full dotted names that a module uses, whatever their names in the module."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                names[one.asname or one.name.partition(".")[0]] = one.name if one.asname else one.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for one in node.names:
                names[one.asname or one.name] = f"{node.module}.{one.name}"
                yield f"{node.module}.{one.name}", node
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner:
            yield dotted(node, names), node


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, "") if isinstance(node, ast.Name) else ""


def openers(text: str) -> set[str]:
    return {name for name, _ in used(ast.parse(text)) if OPENERS.fullmatch(name)}


def test_every_file_is_opened_at_a_door():
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    found = {(file.relative_to(ROOT).as_posix(), name) for file in files for name in openers(file.read_text())}
    assert found == DOORS


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import pyarrow.parquet as pq\npq.read_table('x')", "pyarrow.parquet.read_table"),
        ("from pyarrow import parquet\nparquet.ParquetFile('x')", "pyarrow.parquet.ParquetFile"),
        ("import pyarrow as pa\npa.ipc.open_file('x')", "pyarrow.ipc.open_file"),
        ("import pyarrow.dataset as ds\nds.dataset('x')", "pyarrow.dataset.dataset"),
        ("import numpy as np\nf = np.load\nf('x')", "numpy.load"),
        ("from torch import load as restored\nrestored('x')", "torch.load"),
        ("def f():\n    from safetensors import safe_open\n    return safe_open('x')", "safetensors.safe_open"),
        ("import pickle\nclass U(pickle.Unpickler): pass", "pickle.Unpickler"),
        ("import pandas as pd\npd.read_parquet('x')", "pandas.read_parquet"),
        ("import ray\nray.data.read_parquet('x')", "ray.data.read_parquet"),
    ],
)
def test_whatever_it_is_called_it_is_seen(text, name):
    assert name in openers(text)


def test_torch_loads_plain_tensors_alone():
    tree = ast.parse((ROOT / "engine/model/tensors.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    assert [{one.arg: ast.unparse(one.value) for one in call.keywords}["weights_only"] for call in calls] == ["True"]
