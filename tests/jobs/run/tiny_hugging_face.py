"""Tiny image classifiers of every family of the library transformers, as it writes them to a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import tokenizers
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

SIDE = 64
VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": SIDE,
    "patch_size": 8,
}  # fmt: skip
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4}
WINDOWS = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": SIDE, "patch_size": 4}
PYRAMID = {**STAGES, "num_attention_heads": [1, 1, 2, 2], "image_size": SIDE}
TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 32, "head_dim": 8, "vocab_size": 64,
}  # fmt: skip
LATENTS = {
    "num_latents": 8,
    "d_latents": 16,
    "num_blocks": 1,
    "num_self_attends_per_block": 1,
    "num_self_attention_heads": 1,
    "num_cross_attention_heads": 1,
    "image_size": SIDE,
}

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "bit": {**STAGES, "hidden_sizes": [32] * 4, "embedding_size": 32, "num_groups": 8},
    "clip": {"vision_config": VIT},
    "convnext": STAGES,
    "convnextv2": STAGES,
    "cvt": {"embed_dim": [16, 16, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "donut-swin": WINDOWS,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    "focalnet": {**STAGES, "embed_dim": 8, "focal_levels": [1] * 4, "focal_windows": [3] * 4},
    "hgnet_v2": {},
    "hiera": {"embed_dim": 8, "num_heads": [1, 1, 2, 2], "depths": [1] * 4},
    "imagegpt": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "levit": {
        "hidden_sizes": [16] * 3, "num_attention_heads": [1] * 3, "depths": [1] * 3, "key_dim": [8] * 3,
        "image_size": SIDE,
    },
    "metaclip_2": {"vision_config": VIT},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.35},
    "mobilevit": {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "image_size": SIDE},
    "mobilevitv2": {"width_multiplier": 0.25, "image_size": SIDE},
    "perceiver": LATENTS,
    "poolformer": STAGES,
    "pp_lcnet": {"scale": 0.25},
    "pvt": PYRAMID,
    "pvt_v2": PYRAMID,
    "regnet": {**STAGES, "embedding_size": 8, "groups_width": 8},
    "resnet": {**STAGES, "embedding_size": 8},
    "segformer": PYRAMID,
    "shieldgemma2": {"text_config": TEXT, "vision_config": VIT, "mm_tokens_per_image": 4},
    "siglip": {"vision_config": VIT},
    "siglip2": {"vision_config": {**VIT, "num_patches": 64}},
    "swiftformer": {"embed_dims": [8, 8, 16, 16], "depths": [1] * 4},
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "textnet": {},
    "timm_wrapper": {"architecture": "test_resnet", "pretrained_cfg": timm.get_pretrained_cfg("test_resnet").to_dict()},
}  # fmt: skip
"""What makes a family's model small; of those that are not named, `VIT`."""

OWN_SIDES = {"hgnet_v2", "hiera", "textnet", "mobilenet_v1", "mobilenet_v2", "siglip2"}
"""Families whose processor keeps its own sizes."""

CLASSIFIERS = [
    (family, name)
    for family, names in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items()
    for name in ((names,) if isinstance(names, str) else names)
]
"""Family and class of every image classifier that the library has."""


def classifier(family: str, name: str, **options: Any) -> torch.nn.Module:
    """The class with random weights, of five classes if nothing else is said, in eval mode. Every parameter counts."""
    config = CONFIG_MAPPING[family](**{**SETTINGS.get(family, VIT), "num_labels": 5, **options})
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.5 / max(1, parameter[0].numel()) ** 0.5)
    return model


def processor(family: str) -> Any:
    """The family's own processor, for pictures of `SIDE` pixels where the sizes of its models are free."""
    known = IMAGE_PROCESSOR_MAPPING_NAMES.get(family) or {"torchvision": "BitImageProcessor"}
    kind = getattr(transformers, known.get("torchvision") or known["pil"])
    if family == "timm_wrapper":
        return kind(SETTINGS[family]["pretrained_cfg"])
    if family in OWN_SIDES:
        return kind()
    known = kind().to_dict()
    return kind(**{name: _scaled(known[name]) for name in ("size", "crop_size") if known.get(name)})


def _scaled(size: Mapping[str, int]) -> Mapping[str, int]:
    """The sides for `SIDE` pixels instead of the 224, or more, of the family's models."""
    return {name: round(side * SIDE / max(224, min(size.values()))) for name, side in size.items()}


def write(folder: Path, family: str, name: str, **options: Any) -> torch.nn.Module:
    """Writes model and processor to the folder, and returns the model; `options` are of its configuration."""
    model = classifier(family, name, **options)
    model.save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return model


WORDS = ["[pad]", "[begin]", "[end]", "[unknown]", "a", "photo", "of", "dog", "cat", "red"]


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of ten words."""
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[unknown]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[begin] $A [end]", special_tokens=[("[begin]", 1), ("[end]", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[pad]", bos_token="[begin]", eos_token="[end]", unk_token="[unknown]"
    )
    fast.save_pretrained(folder)
