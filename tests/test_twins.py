"""Each test that needs data beside the checkout has a twin that does not need them: users have none."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent

TWINS = {
    "engine/explainers/test_real_data.py::test_cifar_photographs": (
        "engine/explainers/test_twin.py::test_small_networks_equal_the_slow_twin"
    ),
    "engine/explainers/test_real_data.py::test_imagenet_photographs": (
        "engine/explainers/test_twin.py::test_torchvisions_networks_equal_the_slow_twin"
    ),
    "engine/explainers/test_real_data.py::test_a_scan_path_depends_on_its_photograph_alone": (
        "engine/explainers/test_fovex.py::test_a_path_depends_on_its_image_alone_bit_for_bit"
    ),
    "engine/explainers/test_real_data.py::test_the_closed_form_of_photographs_equals_passes": (
        "engine/explainers/test_afmi.py::test_the_closed_form_equals_passes"
    ),
    "storage/images/test_images.py::test_pngsuite": "storage/images/test_golden_pixels.py::test_png_broken",
    "storage/images/test_images.py::test_the_exif_set_looks_alike": (
        "storage/images/test_images.py::test_exif_orientation_is_undone"
    ),
}


def functions_of(file: Path) -> dict[str, set[str]]:
    """The arguments of each function of a file."""
    tree = ast.parse(file.read_text())
    return {node.name: {arg.arg for arg in node.args.args} for node in tree.body if isinstance(node, ast.FunctionDef)}


def needing_shared_data() -> set[str]:
    """Every test that asks for the fixture, or for a fixture of its file that does."""
    found = set()
    for file in sorted(TESTS.rglob("test_*.py")):
        functions = functions_of(file)
        needing = {"shared_data"}
        while more := {name for name, asked in functions.items() if asked & needing} - needing:
            needing |= more
        found |= {f"{file.relative_to(TESTS)}::{name}" for name in needing if name.startswith("test_")}
    return found


def test_every_test_that_needs_shared_data_has_a_twin():
    needing = needing_shared_data()
    assert set(TWINS) == needing
    for twin in TWINS.values():
        file, name = twin.split("::")
        assert name in functions_of(TESTS / file), twin
        assert twin not in needing, twin
