"""Explainers by name: each is one file, built on the engine's parts."""

from collections.abc import Callable, Mapping
from functools import partial

from engine.catalog import IntegratedGradientsParameters, NoParameters
from engine.explainers.ablationcam import AblationCam
from engine.explainers.cams import WEIGHINGS, Cam
from engine.explainers.controls import CentredGaussian, Edges, RandomMap
from engine.explainers.explainer import Explainer
from engine.explainers.extremal import ExtremalPerturbation
from engine.explainers.fullgrad import FullGrad
from engine.explainers.gradients import Gradient, IntegratedGradients
from engine.explainers.occlusion import Occlusion
from engine.explainers.points import PointExplainer
from engine.explainers.rise import Rise
from engine.explainers.scorecam import ScoreCam
from engine.explainers.sise import Sise
from engine.explainers.smoothgrad import SmoothGrad

SMOOTHED: Mapping[str, Callable[..., PointExplainer]] = {
    "gradient": partial(Gradient, parameters=NoParameters()),
    "integrated_gradients": partial(IntegratedGradients, parameters=IntegratedGradientsParameters()),
    "gradcam": partial(Cam, parameters=NoParameters(), weigh=WEIGHINGS["gradcam"]),
}
"""What SmoothGrad can wrap, with the defaults of each."""

EXPLAINERS: Mapping[str, Callable[..., Explainer]] = {
    "sise": Sise,
    "ada-sise": Sise,
    **{name: partial(Cam, weigh=weigh) for name, weigh in WEIGHINGS.items()},
    "scorecam": ScoreCam,
    "ablationcam": AblationCam,
    "rise": Rise,
    "occlusion": Occlusion,
    "integrated_gradients": IntegratedGradients,
    "smoothgrad": partial(SmoothGrad, bases=SMOOTHED),
    "fullgrad": FullGrad,
    "extremal_perturbation": ExtremalPerturbation,
    "random": RandomMap,
    "gaussian": CentredGaussian,
    "edges": Edges,
}
"""What `--explainer` may name."""
