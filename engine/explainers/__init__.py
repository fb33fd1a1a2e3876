"""All explainers by name. Each is one file."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from blocksight.engine.catalog.composition import Method, parameters_of, parse_method
from blocksight.engine.explainers.ablationcam import AblationCam
from blocksight.engine.explainers.afmi import AFmi
from blocksight.engine.explainers.bee import Bee
from blocksight.engine.explainers.cams import WEIGHINGS, Cam
from blocksight.engine.explainers.chefer import Chefer
from blocksight.engine.explainers.controls import CentredGaussian, Edges, RandomMap
from blocksight.engine.explainers.daam import Daam
from blocksight.engine.explainers.explainer import Explainer
from blocksight.engine.explainers.extremal import ExtremalPerturbation
from blocksight.engine.explainers.featurecam import FeatureCam
from blocksight.engine.explainers.fovex import FovEx
from blocksight.engine.explainers.fullgrad import FullGrad
from blocksight.engine.explainers.gradients import Gradient, IntegratedGradients
from blocksight.engine.explainers.legrad import LeGrad
from blocksight.engine.explainers.libra import Libra
from blocksight.engine.explainers.occlusion import Occlusion
from blocksight.engine.explainers.reciprocam import ReciproCam
from blocksight.engine.explainers.rise import Rise
from blocksight.engine.explainers.scorecam import ScoreCam
from blocksight.engine.explainers.sise import Sise
from blocksight.engine.explainers.smoothgrad import SmoothGrad
from blocksight.engine.explainers.ucag import Ucag
from blocksight.engine.model.adapter import ModelAdapter

WRAPPERS: Mapping[str, Callable[..., Explainer]] = {
    "smoothgrad": SmoothGrad,
    "ucag": Ucag,
    "feature-cam": FeatureCam,
    "libra": Libra,
}
"""Methods that wrap another, as in `smoothgrad(gradcam)`."""


def make_explainer(name: str, adapter: ModelAdapter, parameters: Any = None, **options: Any) -> Explainer:
    """The explainer of this name, with its wrappers; `parameters` None: the paper's. Options are those of `Explainer`.

    Raises ValueError for an unknown name, ModelError if the model lacks what the method needs.
    """
    return _make(parse_method(name), adapter, parameters, **options)


def _make(method: Method, adapter: ModelAdapter, parameters: Any, **options: Any) -> Explainer:
    chosen = parameters if parameters is not None else parameters_of(method, {})
    if method.base is None:
        return EXPLAINERS[method.name](adapter, chosen, **options)
    base = partial(_make, method.base, parameters=chosen.base)
    return WRAPPERS[method.name](adapter, chosen, base=base, **options)


EXPLAINERS: Mapping[str, Callable[..., Explainer]] = {
    "sise": Sise,
    "ada-sise": Sise,
    **{name: partial(Cam, weigh=weigh) for name, weigh in WEIGHINGS.items()},
    "scorecam": ScoreCam,
    "ablationcam": AblationCam,
    "reciprocam": ReciproCam,
    "rise": Rise,
    "occlusion": Occlusion,
    "gradient": Gradient,
    "integrated_gradients": IntegratedGradients,
    "fullgrad": FullGrad,
    "extremal_perturbation": ExtremalPerturbation,
    "bee": Bee,
    "a-fmi": AFmi,
    "fovex": FovEx,
    "daam": Daam,
    "legrad": LeGrad,
    "chefer": Chefer,
    "random": RandomMap,
    "gaussian": CentredGaussian,
    "edges": Edges,
    **{name: partial(make_explainer, name) for name in WRAPPERS},
}
"""The names for `--explainer`; wrappers wrap their default method."""
