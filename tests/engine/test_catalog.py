"""The catalog names what the engine holds, and can be read where there is no torch."""

import subprocess
import sys
from dataclasses import fields, is_dataclass

from engine import catalog
from engine.composition import method_of
from engine.explainers import EXPLAINERS
from engine.explainers.sise import Sise
from engine.fusion import GATES
from engine.loading import PACKAGED
from engine.perturb import BASELINES


def test_the_catalog_names_what_there_is():
    assert catalog.EXPLAINERS.keys() == EXPLAINERS.keys()
    assert EXPLAINERS["sise"] is Sise
    assert PACKAGED.keys() <= catalog.MODELS.keys()


def test_the_default_parameters_are_the_papers():
    defaults = catalog.EXPLAINERS["sise"].parameters()
    assert (defaults.mu, defaults.selection, defaults.gate, defaults.baseline) == (0.0, "mu", "hard", "zero")
    assert defaults.gate in GATES
    assert defaults.baseline in BASELINES


def test_every_parameter_has_a_default_and_a_word_of_help():
    for entry in catalog.EXPLAINERS.values():
        assert is_dataclass(entry.parameters)
        assert entry.parameters() == entry.parameters()
        assert all(field.metadata["help"] for field in fields(entry.parameters))


def test_catalog_and_errors_need_no_torch():
    modules = "engine.composition, engine.detectors, engine.errors, engine.products"
    code = f"import sys; sys.modules['torch'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reconstructions_are_marked_and_say_so_in_their_parameters():
    marked = {name for name, entry in catalog.EXPLAINERS.items() if entry.is_reconstruction}
    assert marked == {"a-fmi", "feature-cam"}
    assert all(catalog.EXPLAINERS[name].parameters().origin == "reconstruction" for name in marked)


def test_a_method_names_its_wrappers_from_the_outermost_in():
    assert method_of("ucag(smoothgrad(gradcam))").names == ["ucag", "smoothgrad", "gradcam"]
    assert method_of("sise").names == ["sise"]
