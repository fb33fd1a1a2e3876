"""Makes the zoo's models: classifiers of timm, torchvision and transformers with random weights, by name and size."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Made:
    """A classifier, and what its library says of its tensors."""

    module: nn.Module
    side: int
    """Of its square pictures, in pixels."""
    prefix: int | None = None
    """The number of tokens before the picture's; None: the library does not say."""
    is_last: bool = False
    """Its features have their channels last."""


def made(name: str, side: int | None = None) -> Made:
    """The model of a name such as `timm:resnet18`, for pictures of its usual side or of another one that it takes."""
    library, _, own = name.partition(":")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MAKERS[library](own, side)


def _of_timm(name: str, side: int | None) -> Made:
    import timm
    from timm.layers import weight_init

    usual, weight_init._trunc_normal_ = weight_init._trunc_normal_, _normal
    try:
        net = _sized(lambda **size: timm.create_model(name, pretrained=False, **size), "img_size", side)
    finally:
        weight_init._trunc_normal_ = usual
    side = side or net.default_cfg.get("input_size", (3, 224, 224))[-1]
    return Made(net, side, getattr(net, "num_prefix_tokens", None), getattr(net, "output_fmt", "") == "NHWC")


def _sized(make: Callable[..., Any], option: str, side: int | None) -> Any:
    """A network for pictures of this side. Convolutions take all, and have no such option."""
    if side is not None:
        try:
            return make(**{option: side})
        except TypeError:
            torch.manual_seed(0)
    return make()


def _normal(tensor: Tensor, mean: float, std: float, *_limits: float) -> Tensor:
    """For weights that nobody trains: ten times as fast as the truncated one."""
    return tensor.normal_(mean, std)


def _of_torchvision(name: str, side: int | None) -> Made:
    import torchvision

    net = _sized(lambda **size: torchvision.models.get_model(name, **size), "image_size", side)
    return Made(net, side or 224, 1 if name.startswith("vit") else None, "swin" in name)


def _parallel(name: str, side: int | None) -> Made:
    return Made(nn.DataParallel(_of_torchvision(name, side).module), side or 224)


class Logits(nn.Module):
    """A classifier of the library transformers that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found = self.model(pixel_values=x)
        return getattr(found, "logits", found[0])  # PP-LCNet calls them its last hidden state


SIDE = 128
SMALL = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "image_size": SIDE,
}  # fmt: skip
"""Of the library's plain transformers."""
MAX_DEPTH = 2
"""Layers of a stage, of networks in stages."""
OWN: Mapping[str, Mapping[str, Any]] = {
    "cvt": {"depth": [1, 2, 3]},
    "donut-swin": {"image_size": 224},
    "swin": {"image_size": 224},
    "hiera": {"image_size": [SIDE, SIDE]},
    "pvt_v2": {"image_size": [SIDE, SIDE]},
    "dinov2": {"image_size": 126},
    "efficientnet": {"width_coefficient": 0.5, "hidden_dim": 640},
    "mobilevit": {"hidden_sizes": [48, 64, 80], "neck_hidden_sizes": [16, 16, 24, 32, 48, 64, 160]},
    "perceiver": {
        "image_size": 56,
        "num_latents": 16,
        "d_latents": 32,
        "num_self_attends_per_block": 2,
        "num_cross_attention_heads": 1,
    },
    "timm_wrapper": {"architecture": "resnet18"},
}
"""Settings of some kinds of models."""
SIDES = {
    "dinov2": 126, "donut-swin": 224, "swin": 224, "PerceiverForImageClassificationLearned": 56,
    "PerceiverForImageClassificationFourier": 224, "PerceiverForImageClassificationConvProcessing": 224,
}  # fmt: skip
PREFIX = {"deit": 2, "dinov2_with_registers": 5}
"""Class, distillation and register tokens, as the library's pages say; others have one or none."""


LEFT_OUT = {
    "DinatForImageClassification": "it needs the package natten, which has no wheel for CPUs",
    "ImageGPTForImageClassification": "it reads colours as words, and no pixels",
    "ShieldGemma2ForImageClassification": "it reads a picture and a text, and answers with words",
    "Siglip2ForImageClassification": "it reads patches that its processor cuts, with their number, and no pixels",
}
"""Classifiers of transformers that cannot be tried here, and why."""


def kinds() -> dict[str, str]:
    """The kind of each image classifier of transformers, by the name of its class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as NAMES

    return {one: kind for kind, own in NAMES.items() for one in ((own,) if isinstance(own, str) else own)}


def _of_transformers(name: str, side: int | None) -> Made:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = kinds()[name]
    config: Any = CONFIG_MAPPING[kind]()
    own = getattr(config, "vision_config", config)
    known = own.to_dict()
    is_plain = "depths" not in known
    for key, value in SMALL.items():
        if isinstance(known.get(key), int) and (is_plain or key == "image_size"):
            setattr(own, key, value)
    for key in ("depths", "depth", "num_block_repeats"):
        if isinstance(known.get(key), list | tuple):
            setattr(own, key, [min(MAX_DEPTH, depth) for depth in known[key]])
    for key, value in OWN.get(kind, {}).items():
        setattr(own, key, value)
    config.num_labels = 5
    net = Logits(getattr(transformers, name)(config))
    return Made(net, side or SIDES.get(name) or SIDES.get(kind) or SIDE, PREFIX.get(kind))


MAKERS: Mapping[str, Callable[[str, int | None], Made]] = {
    "timm": _of_timm,
    "torchvision": _of_torchvision,
    "parallel": _parallel,
    "hf": _of_transformers,
}
