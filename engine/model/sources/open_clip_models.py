"""Models of OpenCLIP: picture features, and texts for classes, fed as the architecture or a tag of it says."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from blocksight.engine.catalog.sources import require
from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.failures import first_line_of
from blocksight.engine.model.preprocessing import Preprocessing, Resizing
from blocksight.engine.model.prompts import Texts
from blocksight.engine.model.seeding import seeded
from blocksight.engine.model.sources.feeding import fed_by
from blocksight.engine.model.state_dicts import load_state, read_state
from blocksight.engine.model.torchvision_models import RANDOM_WEIGHTS


def load_open_clip(name: str, weights: str | None, state: bytes | None, seed: int) -> ModelAdapter:
    """The model `ARCH`, or `ARCH/TAG`, whose tag says how it is fed. Raises ModelError."""
    require("open_clip")
    architecture, _, tag = name.partition("/")
    _refuse_unknown(architecture, tag)
    if state is None and weights != RANDOM_WEIGHTS:
        raise ModelError(
            f"open_clip:{name} needs --weights: a file or URI of a state dict (nothing is downloaded from a hub), or "
            f"{RANDOM_WEIGHTS}" + (f"; there is no file {weights!r}" if weights is not None else "")
        )
    with _quiet():
        network = seeded(lambda: _network(architecture), seed)
        notes = () if state is None else load_state(network, read_state(state))
        settings, guessed = _settings(architecture, tag)
        adapter = _fed(network, settings, _texts(network, architecture))
    adapter.notes = (*adapter.notes, *notes, *guessed)
    return adapter


def _refuse_unknown(architecture: str, tag: str) -> None:
    import open_clip

    known = open_clip.list_models()
    if architecture not in known:
        near = get_close_matches(architecture, known, n=3, cutoff=0.4)
        raise ModelError(
            f"open_clip has no architecture {architecture!r}" + (f"; nearest: {', '.join(near)}" if near else "")
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and tag not in tags:
        raise ModelError(f"open_clip's {architecture} has no tag {tag!r}; known: {', '.join(tags) or 'none'}")


def _network(architecture: str) -> nn.Module:
    import open_clip

    options = {"pretrained": None, "load_weights": False, "pretrained_image": False, "pretrained_text": False}
    try:
        return open_clip.create_model(architecture, **options)
    except Exception as error:  # a library raises anything without the network that it wants
        raise ModelError(f"open_clip cannot make {architecture} here: {first_line_of(error)}") from error


def open_clip_preprocessing(name: str) -> Preprocessing:
    """What open_clip does to a picture for the model of this name. Raises ModelError."""
    require("open_clip")
    architecture, _, tag = name.partition("/")
    _refuse_unknown(architecture, tag)
    return _preprocessing(_settings(architecture, tag)[0])


def _settings(architecture: str, tag: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """How a picture is prepared for the tag, and what was assumed if none is named."""
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    size = (open_clip.get_model_config(architecture) or {})["vision_cfg"].get("image_size", 224)

    def of(one: str | None) -> dict[str, Any]:
        base = asdict(PreprocessCfg(size=size))
        return merge_preprocess_dict(base, open_clip.get_pretrained_cfg(architecture, one) if one else {})

    if tag:
        return of(tag), ()
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not tags:
        return of(None), ()
    differ = any(of(one) != of(tags[0]) for one in tags)
    note = (
        f"weights of {architecture} differ in how they are fed; it is fed as {tags[0]} (open_clip:{architecture}/TAG)"
    )
    return of(tags[0]), (note,) if differ else ()


def _preprocessing(settings: Mapping[str, Any]) -> Preprocessing:
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms.functional import to_pil_image

    transform: Any = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    return Preprocessing(lambda pixels: _tensor(transform(to_pil_image(pixels))), (_resizing(settings),))


def _fed(network: nn.Module, settings: Mapping[str, Any], texts: Texts) -> ModelAdapter:
    adapter = fed_by(PictureFeature(network), _preprocessing(settings), settings["mean"], settings["std"])
    adapter.texts = texts
    return adapter


def _tensor(found: Any) -> Tensor:
    assert isinstance(found, Tensor)
    return found


def _resizing(settings: Mapping[str, Any]) -> Resizing:
    size = settings["size"]
    height, width = (size, size) if isinstance(size, int) else size
    kind = "whole" if settings["resize_mode"] == "squash" else "short"
    named = settings["interpolation"]
    return Resizing(kind, height, width, named if named in ("bilinear", "bicubic") else "bicubic", rounds_down=False)


class PictureFeature(nn.Module):
    """The picture side of a model of OpenCLIP."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs_nchw: Tensor) -> Tensor:
        """Features [N, D], not normalised."""
        return self.network.encode_image(inputs_nchw)


def _texts(network: Any, architecture: str) -> Texts:
    bias = getattr(network, "logit_bias", None)
    return Texts(
        encode=_Encoder(network, architecture),
        scale=float(network.logit_scale.detach().exp()),
        bias=0.0 if bias is None else float(bias.detach()),
        are_alone=bias is not None,
    )


class _Encoder:
    """Encodes texts; makes the tokenizer when the first text comes."""

    def __init__(self, network: Any, architecture: str) -> None:
        self.network, self.architecture = network, architecture
        self._tokenizer: Callable[[str], Tensor] | None = None

    def __call__(self, text: str) -> Tensor:
        tokens = self._tokens(text)
        self._refuse_cut(text)
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            found = self.network.encode_text(tokens.to(device))[0].float().cpu()
        return found.clone()

    def _tokens(self, text: str) -> Tensor:
        import open_clip

        if self._tokenizer is None:
            try:
                with _quiet():
                    self._tokenizer = open_clip.get_tokenizer(self.architecture)
            except Exception as error:  # a library raises anything without the network that it wants
                raise ModelError(
                    f"the tokenizer of {self.architecture} is not part of open_clip and would be downloaded "
                    f"({first_line_of(error)}): take the model's Hugging Face folder, --model hf:FOLDER"
                ) from error
        return self._tokenizer(text)

    def _refuse_cut(self, text: str) -> None:
        """Raises ModelError for a text that the tokenizer would cut."""
        count = getattr(self._tokenizer, "encode", None)
        most = self.network.context_length
        if count is not None and len(count(text)) + 2 > most:
            raise ModelError(f"the prompt {text[:40]!r}... has {len(count(text)) + 2} tokens; the model reads {most}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the library prints; what matters is said by us."""
    log = logging.getLogger()
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
