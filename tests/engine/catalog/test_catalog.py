"""The catalog names what the engine holds, and can be read where there is no torch."""

import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

from blocksight.engine.catalog import entries
from blocksight.engine.catalog.composition import parse_method
from blocksight.engine.explainers import EXPLAINERS
from blocksight.engine.explainers.fusion import GATES
from blocksight.engine.explainers.sise import Sise
from blocksight.engine.model.loading import PACKAGED
from blocksight.engine.scoring.perturb import BASELINES


def test_the_catalog_names_what_there_is():
    assert entries.EXPLAINERS.keys() == EXPLAINERS.keys()
    assert EXPLAINERS["sise"] is Sise
    assert PACKAGED.keys() <= entries.MODELS.keys()


def test_the_default_parameters_are_the_papers():
    defaults = entries.EXPLAINERS["sise"].parameters()
    assert (defaults.mu, defaults.selection, defaults.gate, defaults.baseline) == (0.0, "mu", "hard", "zero")
    assert defaults.gate in GATES
    assert defaults.baseline in BASELINES


def test_every_parameter_has_a_default_and_a_word_of_help():
    for entry in entries.EXPLAINERS.values():
        assert is_dataclass(entry.parameters)
        assert entry.parameters() == entry.parameters()
        assert all(field.metadata["help"] for field in fields(entry.parameters))


def test_catalog_and_errors_need_no_torch():
    rooms = Path(entries.__file__).parent
    modules = ", ".join(f"blocksight.engine.catalog.{file.stem}" for file in sorted(rooms.glob("[!_]*.py")))
    code = f"import sys; sys.modules['torch'] = None; import blocksight.engine.errors, {modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reconstructions_are_marked_and_say_so_in_their_parameters():
    marked = {name for name, entry in entries.EXPLAINERS.items() if entry.is_reconstruction}
    assert marked == {"a-fmi", "feature-cam"}
    assert all(entries.EXPLAINERS[name].parameters().origin == "reconstruction" for name in marked)


def test_a_method_names_its_wrappers_from_the_outermost_in():
    assert parse_method("ucag(smoothgrad(gradcam))").names == ["ucag", "smoothgrad", "gradcam"]
    assert parse_method("sise").names == ["sise"]
