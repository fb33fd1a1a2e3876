"""Models of OpenCLIP: picture features, and texts for classes, fed as the architecture or a tag of it says."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
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
from blocksight.engine.model.sources.files import folder_of, split, unpack
from blocksight.engine.model.sources.open_clip_files import WEIGHTS_FILES, settings_of
from blocksight.engine.model.sources.telling import nearest, quiet, without_weights
from blocksight.engine.model.state_dicts import load_state, read_state
from blocksight.engine.model.torchvision_models import RANDOM_WEIGHTS


def load_open_clip(name: str, weights: str | None, state: bytes | None, seed: int) -> ModelAdapter:
    """The model `ARCH`, or `ARCH/TAG`, whose tag says how it is fed; or of a folder, packed. Raises ModelError."""
    require("open_clip")
    packed, file = split(state)
    if packed is not None:
        return _of_folder(unpack(packed), weights, file, seed)
    architecture, _, tag = name.partition("/")
    _refuse_unknown(architecture, tag)
    if file is None and weights != RANDOM_WEIGHTS:
        raise without_weights(f"open_clip:{name}", weights)
    settings, guessed = _settings(architecture, tag)
    is_quick, told = _activation(architecture, tag)
    texts = _Tokens(architecture, lambda: _tokenizer(architecture))
    return _made(architecture, file, settings, texts, seed, is_quick, (*guessed, *told))


def _of_folder(files: Mapping[str, memoryview], weights: str | None, file: bytes | None, seed: int) -> ModelAdapter:
    """The model of a folder that OpenCLIP wrote."""
    model, feeding = settings_of(files)
    stored = next((bytes(files[one]) for one in WEIGHTS_FILES if one in files), None)
    stored = file if file is not None or weights == RANDOM_WEIGHTS else stored
    if stored is None and weights != RANDOM_WEIGHTS:
        raise ModelError(f"the folder holds no weights; wanted one of {', '.join(WEIGHTS_FILES)}")

    def tokenizer() -> Any:
        with folder_of(files) as folder:
            return _tokenizer(f"local-dir:{folder}")

    with folder_of({name: body for name, body in files.items() if name not in WEIGHTS_FILES}) as folder:
        made = _Tokens("this folder", tokenizer)
        return _made(f"local-dir:{folder}", stored, _folder_settings(model, feeding), made, seed)


def _made(
    name: str,
    stored: bytes | None,
    settings: Mapping[str, Any],
    tokens: "_Tokens",
    seed: int,
    is_quick: bool = False,
    told: Sequence[str] = (),
) -> ModelAdapter:
    """The model of OpenCLIP's name, with these weights or random ones."""
    with _quiet():
        network = seeded(lambda: _network(name, is_quick=is_quick), seed)
        notes = () if stored is None else load_state(network, read_state(stored))
        adapter = _fed(network, settings, _texts(network, tokens))
    adapter.notes = (*adapter.notes, *notes, *told)
    return adapter


def _refuse_unknown(architecture: str, tag: str) -> None:
    import open_clip

    known = open_clip.list_models()
    if architecture not in known:
        raise ModelError(
            f"open_clip has no architecture {architecture!r}{nearest(architecture, known)}; a folder is written with "
            "its path: open_clip:./FOLDER"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and tag not in tags:
        raise ModelError(f"open_clip's {architecture} has no tag {tag!r}; known: {', '.join(tags) or 'none'}")


def _network(name: str, *, is_quick: bool) -> nn.Module:
    import open_clip

    options = {"pretrained": None, "load_weights": False, "pretrained_image": False, "pretrained_text": False}
    try:
        return open_clip.create_model(name, **options, force_quick_gelu=is_quick)
    except Exception as error:  # a library raises anything without the network that it wants
        shown = "the model of this folder" if name.startswith("local-dir:") else name
        raise ModelError(f"open_clip cannot make {shown} here: {first_line_of(error)}") from error


def _activation(architecture: str, tag: str) -> tuple[bool, tuple[str, ...]]:
    """True if the architecture's GELU becomes the QuickGELU with which a tag was trained, and what was assumed."""
    import open_clip

    if (open_clip.get_model_config(architecture) or {}).get("quick_gelu", False):
        return False, ()
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    quick = [one for one in tags if open_clip.get_pretrained_cfg(architecture, one).get("quick_gelu", False)]
    if tag in quick:
        return True, (f"weights of the tag {tag} were trained with QuickGELU, which is taken",)
    if tag or not quick:
        return False, ()
    return False, (
        f"GELU is assumed, and the weights of {architecture} called {', '.join(quick)} were trained with QuickGELU: if "
        f"the file is one of these, name it, as in open_clip:{architecture}/{quick[0]}",
    )


def open_clip_preprocessing(name: str, files: bytes | None = None) -> Preprocessing:
    """What open_clip does to a picture for the model of this name, or of a folder, packed. Raises ModelError."""
    require("open_clip")
    packed, _ = split(files)
    if packed is not None:
        return _preprocessing(_folder_settings(*settings_of(unpack(packed))))
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


def _folder_settings(model: Mapping[str, Any], feeding: Mapping[str, Any]) -> dict[str, Any]:
    """How a picture is prepared for a folder's model, as open_clip reads it."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    found = merge_preprocess_dict(asdict(PreprocessCfg()), dict(feeding))
    size = model["vision_cfg"].get("image_size", 224)
    return {**found, "size": size if isinstance(size, int) else tuple(size)}


def _preprocessing(settings: Mapping[str, Any]) -> Preprocessing:
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms.functional import to_pil_image

    transform: Any = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    return Preprocessing(lambda pixels: _tensor(transform(to_pil_image(pixels))), (_resizing(settings),))


def _fed(network: nn.Module, settings: Mapping[str, Any], texts: Texts) -> ModelAdapter:
    adapter = fed_by(PictureFeature(network), _preprocessing(settings), settings["mean"], settings["std"])
    adapter.texts, adapter.gives_features = texts, True
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


def _texts(network: Any, tokens: "_Tokens") -> Texts:
    bias = getattr(network, "logit_bias", None)
    return Texts(
        encode=_Encoder(network, tokens),
        scale=float(network.logit_scale.detach().exp()),
        bias=0.0 if bias is None else float(bias.detach()),
        are_alone=bias is not None,
    )


def _tokenizer(name: str) -> Any:
    import open_clip

    with _quiet():
        return open_clip.get_tokenizer(name)


class _Tokens:
    """Makes a model's tokenizer when the first text comes, and counts its tokens."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name, self.make = name, make
        self._tokenizer: Any = None

    def __call__(self, text: str, most: int) -> Tensor:
        """The tokens of a text [1, L]. Raises ModelError if it has more than `most`, or if there is no tokenizer."""
        if self._tokenizer is None:
            try:
                self._tokenizer = self.make()
            except Exception as error:  # a library raises anything without the network that it wants
                raise ModelError(
                    f"the tokenizer of {self.name} is not part of open_clip and would be downloaded "
                    f"({first_line_of(error)}): take a folder that holds it, --model hf:FOLDER or open_clip:./FOLDER"
                ) from error
        count = self._count(text)
        if count is not None and count > most:
            raise ModelError(f"the prompt {text[:40]!r}... has {count} tokens; the model reads {most}")
        return self._tokenizer(text)

    def _count(self, text: str) -> int | None:
        """How many tokens a text has before it is cut; None: the tokenizer does not say."""
        inner = getattr(self._tokenizer, "tokenizer", None)
        if callable(inner):
            found: Any = inner(text)
            return len(found["input_ids"])
        encode = getattr(self._tokenizer, "encode", None)
        return None if encode is None else len(encode(text)) + 2


class _Encoder:
    """Encodes texts."""

    def __init__(self, network: Any, tokens: _Tokens) -> None:
        self.network, self.tokens = network, tokens

    def __call__(self, text: str) -> Tensor:
        tokens = self.tokens(text, self.network.context_length)
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            found = self.network.encode_text(tokens.to(device))[0].float().cpu()
        return found.clone()


@contextmanager
def _quiet() -> Iterator[None]:
    """Reaches no hub, and hides what the library prints."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        with quiet():
            yield
    finally:
        constants.HF_HUB_OFFLINE = before
