"""Vision transformers of timm, transformers, OpenCLIP and torchvision, tiny and with seeded random weights."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

SIDE = 32
"""Of their inputs, in pixels; patches of 8: a grid of 4 x 4."""


class Logits(nn.Module):
    """A model of the library transformers that returns logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


class Prompted(nn.Module):
    """A tower of CLIP or SigLIP; its logits are the cosines to five random texts."""

    def __init__(self, tower: nn.Module, width: int, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.tower, self.read = tower, read
        self.register_buffer("texts", nn.functional.normalize(torch.randn(5, width), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return 10 * nn.functional.normalize(self.read(self.tower(x)), dim=1) @ self.texts.T


def _timm(kind: str = "vision_transformer:VisionTransformer", **options: Any) -> nn.Module:
    import timm.models

    module, name = kind.split(":")
    make = getattr(getattr(timm.models, module), name)
    return make(
        **{"img_size": SIDE, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5, **options}
    )


def _swin(patch_size: int = 2) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=SIDE, patch_size=patch_size, embed_dim=8, depths=(2, 2), num_heads=(2, 2), window_size=4, num_classes=5
    )


def _hf(kind: str, **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        image_size=SIDE,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=5,
        **options,
    )
    return Logits(getattr(transformers, f"{kind}ForImageClassification")(config))


def _hf_tower(kind: str, read: Callable[[Any], Tensor], **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}VisionConfig")(
        image_size=SIDE, patch_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    return Prompted(getattr(transformers, f"{kind}VisionModel")(config), 16, read)


def _pooled(output: Any) -> Tensor:
    return output.pooler_output


def _open_clip(**options: Any) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    tower = VisionTransformer(
        image_size=SIDE, patch_size=8, width=16, layers=3, heads=2, mlp_ratio=2.0, output_dim=12, **options
    )
    return Prompted(tower, 12, lambda output: output)


def _torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=SIDE, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )


GLOBAL: Mapping[str, Callable[[], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "timm, no class token": partial(_timm, class_token=False, global_pool="avg"),
    "timm, 4 registers": partial(_timm, reg_tokens=4),
    "timm, attention pooler": partial(_timm, class_token=False, global_pool="map"),
    "timm, DeiT": partial(_timm, "deit:VisionTransformerDistilled"),
    "timm, EVA": partial(
        _timm, "eva:Eva", use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, mlp_ratio=2.0, use_abs_pos_emb=False
    ),
    "transformers, ViT": partial(_hf, "ViT"),
    "transformers, DINOv2": partial(_hf, "Dinov2"),
    "transformers, DINOv2 with registers": partial(_hf, "Dinov2WithRegisters"),
    "transformers, CLIP": partial(_hf_tower, "CLIP", _pooled),
    "transformers, SigLIP": partial(_hf_tower, "Siglip", _pooled),
    "open_clip": _open_clip,
    "open_clip, attention pooler": partial(
        _open_clip, attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2
    ),
}
"""By name, those whose attentions span all patches."""


def _convit() -> nn.Module:
    from timm.models.convit import ConVit

    return ConVit(img_size=SIDE, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=5, local_up_to_layer=2)


def _cait() -> nn.Module:
    from timm.models.cait import Cait

    return Cait(img_size=SIDE, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5, depth_token_only=1)


CHANGED: Mapping[str, Callable[[], nn.Module]] = {"timm, ConViT": _convit, "timm, CaiT": _cait}
"""By name, those that change the weights of some attentions behind the softmax: by positions, or between heads."""

WINDOWED: Mapping[str, Callable[[], nn.Module]] = {
    "timm, Swin": _swin,
    "timm, Swin whose last window is all": partial(_swin, 4),
}


def made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The model in eval mode, with a head of random weights and parameters that start at zero drawn too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()
        for own in net.parameters():
            if not own.any():
                nn.init.normal_(own, std=0.2)
    return net.eval()
