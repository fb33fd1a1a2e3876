"""The configuration of a job: options or a TOML file, every key checked, resolved once and then exact."""

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from blocksight.cluster.sizing import Device
from blocksight.engine.catalog.composition import (
    AUTO,
    OF_COVARIANCE,
    OF_LOSSES,
    SIGNED,
    Method,
    Preset,
    has_sign,
    leaves_tokens_out,
    parameters_of,
    parse_method,
)
from blocksight.engine.catalog.edge_detectors import installed_detector
from blocksight.engine.catalog.entries import EXPLAINERS, FIDELITIES, Fidelity
from blocksight.engine.catalog.forward_setting import MAX_BATCH_SIZE
from blocksight.engine.catalog.parameters import SiseParameters
from blocksight.engine.catalog.readouts import ReadoutName
from blocksight.engine.catalog.sources import FED_BY_OWN, place_of, source_of
from blocksight.engine.catalog.target_expressions import (
    MAX_TARGETS,
    Expression,
    GrammarError,
    parse_targets,
    prompt_target,
    shown,
)
from blocksight.jobs.plan.class_map import ClassMap, class_map_file, class_map_of
from blocksight.jobs.plan.input_values import ClassNames, InputSize, Mean, Std, read_class_names
from blocksight.jobs.plan.labels import is_class_number
from blocksight.storage.images.decode import DECODE_POLICY
from blocksight.storage.images.fitting import Fitting
from blocksight.storage.limits import MAX_DOCUMENT_BYTES
from blocksight.storage.outputs.map_codec import CODEC
from blocksight.storage.outputs.schema import SCHEMA_VERSION
from blocksight.storage.stores.locations import normal_place
from blocksight.storage.stores.opening import open_file
from blocksight.storage.stores.s3_access import values_by_place
from blocksight.storage.stores.s3_endpoints import check_endpoints
from blocksight.storage.stores.store import MissingError, StoreError

CODE_VERSION = "5"
"""Raised whenever the same configuration and input would give other bytes."""

NO_LABELS = "none"
"""The value of `labels` that leaves the data's own labels out."""
DIGEST = re.compile("[0-9a-f]{64}")
"""The value of `labels` once the file was read: the sha256 of its content, as a plan holds it."""
MAX_SEED = 2**63 - 1
"""PyTorch's generators take no larger seed."""
MAX_TARGET_TEXT = 20_000
"""Characters of the targets."""
MAX_SENTENCE = 500
"""Characters of a message on a stranger's values, and of a model's name."""


OWN = "own"
"""The value of `resize` until the model's own way was looked up; no plan holds it."""

MODEL_SHAPE = ("channels", "output_key")
"""Keys that say which channels a model takes and which of its outputs is explained."""
MODEL_INPUT = ("input_size", "mean", "std", "class_names", *MODEL_SHAPE)
"""Keys that say how a model is fed; in a plan's configuration only where they were set."""


TARGET_FORMS = (
    f"predicted, label, top-K (K up to {MAX_TARGETS}), margin, class numbers, differences and sums such as 281-282 or "
    "0.5*281+0.5*282, logit(...), logprob(...), text:PROMPT, similar:PICTURE, prototype:CLASS, feature:NUMBER, "
    "direction:FILE, joined by commas"
)


PROMPT_FILE = "text:@"
"""What a target begins with that names a file of prompts."""


class ConfigError(Exception):
    """The configuration cannot be used; the message is one sentence that says what to change."""


@dataclass(frozen=True)
class TargetChoice:
    """What of a record is explained; made from `predicted`, `label`, `top-3`, `281,282`, `281-282` or a class name."""

    source: Literal["predicted", "label", "top", "given"]
    count: int = 1
    """How many targets every record has, as far as it is known without the model's names."""
    classes: tuple[int, ...] = ()
    """The class indices, where only they are given."""
    name: str | None = None
    """The text, where its meaning depends on the model's class names or is more than a class."""
    expressions: tuple[Expression, ...] = field(default=(), compare=False)
    """The targets by the grammar; empty where the text can only be a class's name."""

    @classmethod
    def parse(cls, text: str) -> "TargetChoice":
        """Raises ValueError with the known forms."""
        if text == "predicted":
            return cls("predicted", expressions=parse_targets(text))
        if text == "label":
            return cls("label", expressions=parse_targets(text))
        if text.startswith("top-") and is_class_number(text[4:]) and 1 <= int(text[4:]) <= MAX_TARGETS:
            return cls("top", int(text[4:]), expressions=parse_targets(text))
        parts = text.split(",")
        if all(is_class_number(part.strip()) for part in parts) and len(parts) <= MAX_TARGETS:
            classes = tuple(dict.fromkeys(int(part) for part in parts))
            return cls("given", len(classes), classes, expressions=parse_targets(text))
        if len(text) > MAX_TARGET_TEXT:
            raise ValueError(f"target has {len(text)} characters, and {MAX_TARGET_TEXT} at most are read")
        return cls("given", name=text, expressions=cls._by_grammar(text))

    @classmethod
    def _by_grammar(cls, text: str) -> tuple[Expression, ...]:
        """The targets of a text; none if it can only be a class's name. Raises ValueError if it is none either."""
        try:
            return targets_of_lines(text)
        except GrammarError as error:
            if any(char.isalpha() for char in text) and not text.startswith("top-") and len(text) <= MAX_SENTENCE:
                return ()
            raise ValueError(
                f"target {shown(text)} is not known; known: {TARGET_FORMS}, or a class name ({error})"
            ) from error

    @property
    def most_targets(self) -> int:
        """How many targets a record has at most."""
        return max(self.count, len(self.expressions))

    def allows(self, count: int) -> bool:
        """True if a record may have so many targets: a text with commas may be the name of one class."""
        return count in {self.count, self.most_targets}

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that targets name, in order, each once; `|` separates those of an ensemble."""
        atoms = (atom for one in self.expressions for atom in one.atoms)
        return tuple(dict.fromkeys(str(atom.value) for atom in atoms if atom.kind == "text"))

    @property
    def has_features(self) -> bool:
        """True if a target is read from the feature vector."""
        return any(atom.is_feature for one in self.expressions for atom in one.atoms)

    @property
    def files(self) -> tuple[str, ...]:
        """The pictures and directions that targets name, in order, each once."""
        atoms = (atom for one in self.expressions for atom in one.atoms)
        return tuple(dict.fromkeys(str(atom.value) for atom in atoms if atom.kind in ("similar", "direction")))

    @property
    def has_label(self) -> bool:
        """True if a target depends on the record's label."""
        return any(atom.kind == "label" for one in self.expressions for atom in one.atoms)


def targets_of_lines(text: str) -> tuple[Expression, ...]:
    """The targets of a configuration's text, each once: one `--target` a line. Raises GrammarError."""
    found: dict[str, Expression] = {}
    for line in text.split("\n"):
        for one in parse_targets(line):
            found.setdefault(one.text, one)
    return tuple(found.values())


class JobConfig(BaseModel):
    """What is computed. Every field but `output`, `endpoint_url` and `inventory` changes the bytes of the result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = Field(description="folder, file, s3:// prefix or 'pattern/*.tar' of images, tar shards or Parquet")
    output: str = Field(description="folder or s3:// prefix for the result")
    inventory: str | None = Field(
        default=None, description="manifest.json of an S3 inventory of the data's bucket, read instead of a listing"
    )
    endpoint_url: str | None = Field(
        default=None, description="S3 endpoint, for stores other than AWS; BUCKET=URL,BUCKET=URL where they differ"
    )
    model: str = Field(default="efficientnet_lite0", description="see `blocksight list models`")
    weights: str | None = Field(
        default=None, description="file or s3:// URI of a state dict, a weight name, or `random`"
    )
    input_size: InputSize | None = Field(
        default=None, description="height and width that the model takes; none: as it says itself"
    )
    mean: Mean | None = Field(default=None, description="of RGB in 0..1, subtracted from it; none: as the model says")
    std: Std | None = Field(default=None, description="of RGB in 0..1, that it is divided by; none: as the model says")
    class_names: ClassNames | None = Field(
        default=None, description="of the model's outputs, in their order; a list, or a file of names"
    )
    channels: Literal[1, 3] | None = Field(
        default=None, description="that the model takes: 1 is brightness; none: 3. Others need a factory of yours"
    )
    output_key: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_SENTENCE,
        description="of a model with several outputs, the one that is explained, such as logits or 0; none: its logits",
    )
    blocks: tuple[str, ...] = Field(
        default=(), description="blocks named by hand, shallow to deep; none: found by the rule"
    )
    explainer: str = Field(
        default="sise",
        description="see `blocksight list explainers`; some wrap others: ucag(gradcam); auto: sise for a CNN, and for "
        "another architecture what finds planted evidence best",
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="of the explainer, such as mu = 0.3; of what it wraps under base"
    )
    fidelity: Fidelity = Field(
        default="full",
        description="of the sise family: preview (no mask scored), balanced (a tenth), full (all), or auto: full for "
        "records that are wrong, uncertain, of a rare class folder, or whose balanced map is poor",
    )
    preset: Preset = Field(
        default="fast",
        description="fast: fewer steps for the dearest methods, and on a GPU half precision where its scores are near "
        "enough; paper: IEEE float32 and the papers' constants",
    )
    precision: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto",
        description="of masked forward passes; auto: float32 on a CPU, on a GPU what the preset says",
    )
    readout: Literal["auto", ReadoutName] = Field(
        default="auto",
        description="how a score is read from the model's output: softmax (classes exclude each other), sigmoid "
        "(independent labels), probabilities (it is one already), identity (the raw output); auto: examined",
    )
    target: str = Field(
        default="predicted",
        description="predicted, label, top-K, margin, class numbers or names, sums such as 281-282; or a list of them",
    )
    labels: str | None = Field(
        default=None, description="CSV or Parquet with columns key and label, or `none`: the data's own do not count"
    )
    class_map: dict[str, tuple[int, ...]] | None = Field(
        default=None, description="JSON file or table: the model's classes that a label means; none: found by name"
    )
    resize: str = Field(
        default="squash",
        description="squash: the whole image; crop: its centre at the short side; own: as the model's own library does "
        "(the default of timm, hf and open_clip)",
    )
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"] | None = Field(
        default=None, description="how images are resampled; none: as `resize` says, else bilinear"
    )
    target_files: dict[str, str] | None = Field(
        default=None, description="sha256 of the files that targets name; none: they are read when the job begins"
    )
    signed: bool = Field(
        default=False, description="also map what speaks against the target, in columns of its own: `map_negative`"
    )
    limit: int | None = Field(default=None, ge=1, description="only the first so many records")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="of all random numbers")

    @field_validator("channels", mode="before")
    @classmethod
    def _channels_are_of_pictures(cls, value: Any) -> Any:
        if isinstance(value, int) and value not in (1, 3):
            raise ValueError(
                f"channels {value}, and pictures are read as RGB: a model of other channels is made in a factory of "
                "yours that gives it those that it needs, --model package.module:factory"
            )
        return value

    @field_validator("blocks", mode="before")
    @classmethod
    def _blocks_may_be_one_text(cls, value: Any) -> Any:
        """`layer2,layer3`, as on the command line, or a list of names."""
        if not isinstance(value, str):
            return value
        names = [name.strip() for name in value.split(",")]
        if not all(names):
            raise ValueError(f"{value!r} names no blocks; wanted names joined by commas, such as layer2,layer3")
        return names

    @field_validator("class_map", mode="before")
    @classmethod
    def _class_map_may_be_a_file(cls, value: Any) -> Any:
        table = class_map_file(Path(value)) if isinstance(value, str | Path) else value
        return dict(class_map_of(table, "the class map")) if isinstance(table, dict) else table

    @field_validator("target", mode="before")
    @classmethod
    def _target_may_be_a_list(cls, value: Any) -> Any:
        """A TOML file may say 281, [281, 282] or ["281-282", "margin"]: each of a list is read by itself."""
        items = value if isinstance(value, list | tuple) else [value]
        if not items or not all(isinstance(item, int | str) and not isinstance(item, bool) for item in items):
            return value
        texts = [str(item) for item in items]
        return ",".join(texts) if all(map(is_class_number, texts)) else "\n".join(texts)

    @field_validator("data", "output", "inventory", "weights", "labels")
    @classmethod
    def _places_have_one_spelling(cls, value: str | None, info: ValidationInfo) -> str | None:
        """Normalises URIs; local paths become absolute, because workers may run in other folders."""
        if not value or (info.field_name == "weights" and is_weights_name(value)):
            return value
        if info.field_name == "labels" and (value == NO_LABELS or DIGEST.fullmatch(value)):
            return value
        return _as_value(normal_place, value)

    @field_validator("model")
    @classmethod
    def _models_place_has_one_spelling(cls, value: str) -> str:
        """Normalises the folder or file in a model's name."""
        return _as_value(normal_model, value)

    @field_validator("endpoint_url")
    @classmethod
    def _endpoint_is_a_store(cls, value: str | None) -> str | None:
        if value is not None:
            _as_value(check_endpoints, value)
        return value

    @field_validator("target")
    @classmethod
    def _target_is_known(cls, value: str) -> str:
        TargetChoice.parse(value)
        return value

    @field_validator("explainer")
    @classmethod
    def _explainer_is_known(cls, value: str) -> str:
        return AUTO if value.strip().lower() == AUTO else str(parse_method(value))

    @model_validator(mode="before")
    @classmethod
    def _resize_is_the_models_own(cls, values: Any) -> Any:
        """The library's own way, where a model comes from a library that has one and nothing else is said."""
        if not isinstance(values, Mapping) or values.get("resize") is not None:
            return values
        source = source_of(str(values.get("model", "")))
        is_own = source is not None and source[0] in FED_BY_OWN
        return {**values, "resize": OWN if is_own else "squash"}

    @field_validator("resize")
    @classmethod
    def _resize_is_known(cls, value: str) -> str:
        return value if value == OWN else str(Fitting.parse(value))

    @model_validator(mode="after")
    def _endpoint_has_a_use(self) -> "JobConfig":
        files = self.target_choice.files
        places = (self.data, self.output, self.inventory or "", self.weights or "", place_of(self.model) or "", *files)
        if self.endpoint_url is not None and not any(place.startswith("s3://") for place in places):
            raise ValueError("an endpoint URL is given, and neither data, output, weights nor model is an s3:// URI")
        for named in filter(None, values_by_place(self.endpoint_url or "")):
            if not any(f"{place}/".startswith(f"{named}/") for place in places):
                raise ValueError(
                    f"an endpoint URL is given for {named}, and neither data, output, weights nor model is there"
                )
        return self

    @model_validator(mode="after")
    def _auto_has_no_parameters(self) -> "JobConfig":
        if self.explainer == AUTO and (self.parameters or self.fidelity != "full"):
            raise ValueError("explainer auto takes its choice's own defaults: name the explainer to set its parameters")
        return self

    @model_validator(mode="after")
    def _signs_have_a_meaning(self) -> "JobConfig":
        if self.signed and (self.explainer == AUTO or not has_sign(parse_method(self.explainer))):
            raise ValueError(
                f"the maps of {self.explainer} have no sign, and signed asks for what speaks against the target: take "
                f"one of {', '.join((*SIGNED, *OF_LOSSES, *OF_COVARIANCE))}, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _papers_are_in_float32(self) -> "JobConfig":
        if self.preset == "paper" and self.precision not in ("auto", "float32"):
            raise ValueError(f"preset paper means float32, and precision {self.precision} is asked for: leave one out")
        return self

    @model_validator(mode="after")
    def _tokens_are_left_out_in_float32(self) -> "JobConfig":
        if leaves_tokens_out(self.parameters) and self.precision not in ("auto", "float32"):
            raise ValueError(
                f"baseline drop runs the model itself in float32, and precision {self.precision} is asked for: "
                "leave one out"
            )
        return self

    @property
    def target_choice(self) -> TargetChoice:
        """The target, parsed."""
        return TargetChoice.parse(self.target)

    @property
    def label_classes(self) -> ClassMap:
        """The class map, as `Labels` takes it."""
        return tuple(sorted((self.class_map or {}).items()))

    @property
    def asked_readout(self) -> ReadoutName | None:
        """The readout that the user names; None: the model's output is examined."""
        return None if self.readout == "auto" else self.readout

    @property
    def weights_are_named(self) -> bool:
        """True if the weights are one of the model's own names, such as `random`, and no file."""
        return self.weights is not None and is_weights_name(self.weights)

    @property
    def method(self) -> Method:
        """The explainer, with the one it wraps."""
        return parse_method(self.explainer)

    @property
    def level(self) -> Fidelity | None:
        """The fidelity that rows store; None for methods without one, and for a budget that the user set."""
        parameters = self.explainer_parameters()
        has_level = isinstance(parameters, SiseParameters) and (self.fidelity != "full" or parameters.budget is None)
        return self.fidelity if has_level else None

    def explained_by(self, explainer: str) -> "JobConfig":
        """The same job with an explainer that `auto` chose, and its defaults. Raises ConfigError."""
        config = checked_config({**self.model_dump(), "explainer": explainer})
        return config.model_copy(update={"parameters": _with_machine_defaults(config.method, {})})

    def in_full(self) -> "JobConfig":
        """The same job with every mask scored."""
        kept = {name: value for name, value in self.parameters.items() if name not in FIDELITIES["auto"]}
        return self.model_copy(update={"fidelity": "full", "parameters": kept})

    def explainer_parameters(self) -> Any:
        """The explainer's parameters, with defaults and the fidelity's values filled in.

        Raises ConfigError for an unknown or bad one, and for a fidelity that contradicts them or has no meaning.
        """
        self._check_fidelity(self.method.entry.parameters)
        values = {**self.parameters, **FIDELITIES[self.fidelity]}
        try:
            return parameters_of(self.method, values, self.preset, _checked)
        except ValidationError as error:
            raise ConfigError(f"parameter of {self.explainer}: {_sentence(error)}") from error
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _check_fidelity(self, kind: type) -> None:
        """Raises ConfigError if the fidelity has no meaning or contradicts the parameters.

        Equal values are allowed, because a plan holds both.
        """
        if self.fidelity == "full":
            return
        if not issubclass(kind, SiseParameters):
            family = (name for name, entry in EXPLAINERS.items() if issubclass(entry.parameters, SiseParameters))
            raise ConfigError(
                f"fidelity {self.fidelity} is a share of SISE's masks, and explainer {self.explainer} has none: "
                f"leave --fidelity out, or take one of {', '.join(family)}"
            )
        for name in sorted(FIDELITIES["auto"].keys() & self.parameters.keys()):
            ours, asked = FIDELITIES[self.fidelity].get(name), self.parameters[name]
            if asked != ours:
                raise ConfigError(
                    f"fidelity {self.fidelity} means {name} = {ours}, and {name} = {asked} is asked for as well: "
                    "leave one of the two out"
                )

    def identity(self, weights_sha256: str | None) -> dict[str, Any]:
        """Everything that changes the result's bytes, as plain JSON values, defaults filled in."""
        chosen = self.model_dump(
            mode="json", exclude={"output", "inventory", "endpoint_url", "parameters", "weights", "interpolation"}
        )
        named = (*MODEL_INPUT, "class_map", "labels")  # plans of earlier versions have none of them
        unsaid = {name for name in named if chosen[name] is None}
        if self.asked_readout is None:
            unsaid.add("readout")
        if not self.signed:
            unsaid.add("signed")
        if not self.target_files:
            unsaid.add("target_files")
        identity = {
            **{name: value for name, value in chosen.items() if name not in unsaid},
            "parameters": asdict(self.explainer_parameters()),
            "weights": self.weights if self.weights_are_named else weights_sha256,
            "decoding": DECODE_POLICY,
            "codec": CODEC,
            "schema": SCHEMA_VERSION,
            "code": CODE_VERSION,
        }
        return json.loads(json.dumps(identity))  # a tuple is a list in the plan that it is compared with


IDENTITY = {"data", "model", "weights", "blocks", "explainer", "parameters", "fidelity", "preset", "target", "resize"}
IDENTITY |= {"limit", "seed", "decoding", "codec", "schema", "code"}
"""The keys of the configuration in the plan of every version."""


def check_identity(identity: Mapping[str, Any]) -> None:
    """Raises ValueError if the values are no `JobConfig.identity`.

    Keys that other versions add are ignored; the explainer's parameters are checked when they are used.
    """
    missing = sorted(IDENTITY - identity.keys())
    if missing:
        raise ValueError(f"configuration: {', '.join(missing)} missing")
    known = {name: identity[name] for name in JobConfig.model_fields if name in identity}
    given = {**known, "output": "/", "endpoint_url": None, "weights": None}
    try:
        read_back = JobConfig.model_validate(given).model_dump(mode="json")
    except ValidationError as error:
        raise ValueError(f"configuration: {_sentence(error)[:MAX_SENTENCE]}") from error
    for name, value in given.items():
        if read_back[name] != value:
            raise ValueError(f"configuration: {name} is none that a plan holds")
    if identity["resize"] == OWN:
        raise ValueError("configuration: resize is none that a plan holds")
    if not isinstance(identity["weights"], str | None):
        raise ValueError("configuration: weights is no text")  # noqa: TRY004 - the plan is wrong
    if len(identity["model"]) > MAX_SENTENCE:
        raise ValueError("configuration: model is longer than any name")


DURATION = re.compile(r"(\d+(?:\.\d+)?) *([smh]?)")
UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def _in_seconds(text: Any) -> Any:
    """Seconds of a duration such as `90`, `90s`, `20m` or `2h`. Raises ValueError."""
    if not isinstance(text, str):
        return text
    found = DURATION.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no duration; wanted seconds, or a number with s, m or h, such as 20m")
    return float(found[1]) * UNIT_SECONDS[found[2]]


@dataclass(frozen=True)
class Part:
    """One of several parts of a job, each with a driver of its own."""

    number: int
    """From 0, as batch systems count the tasks of an array."""
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


PART = re.compile(r"(\d{1,6})/(\d{1,6})")


def _as_part(text: Any) -> Any:
    """The part of a text such as `0/16`. Raises ValueError."""
    if not isinstance(text, str):
        return text
    found = PART.fullmatch(text.strip())
    if found is None or not int(found[1]) < int(found[2]):
        raise ValueError(f"{text!r} is no part of a job; wanted NUMBER/PARTS, such as 0/16 to 15/16")
    return Part(int(found[1]), int(found[2]))


class Execution(BaseModel):
    """How a job runs and which failures it allows; only `batch_size` and `tune` may change a result's last bits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runner: Literal["ray", "local"] = Field(default="ray", description="Ray, or this process alone: same bytes")
    workers: int | None = Field(default=None, ge=1, description="explain actors; none: one per GPU, or per CPU core")
    address: str | None = Field(
        default=None, description="of a Ray cluster to join; none: Ray is started for the job and stopped after it"
    )
    device: Device = Field(
        default="auto", description="gpu, or cpu; auto: the GPUs if there are any. gpu without one is an error"
    )
    wait: Annotated[float, BeforeValidator(_in_seconds)] = Field(
        default=0.0, ge=0, description="for a cluster that is still coming, such as 90s, 20m or 2h; its pool then grows"
    )
    min_workers: int = Field(default=1, ge=1, description="the job begins once so many explain actors fit")
    py_modules: tuple[str, ...] = Field(
        default=(), description="folders of packages that the workers of a joined cluster get a copy of"
    )
    part: Annotated[Part, BeforeValidator(_as_part)] | None = Field(
        default=None, description="explain one part alone, such as 0/16; other drivers explain 1/16 to 15/16"
    )
    batch_size: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BATCH_SIZE,
        description="masked inputs per forward pass; none: by rule",
    )
    tune: bool = Field(
        default=False,
        description="choose a CPU's backend and batch size by timing: two fresh outputs may differ in bits",
    )
    max_reject_fraction: float = Field(
        default=0.5, ge=0, le=1, description="a larger share of rejected records is no success (exit 3)"
    )
    max_dead_units: int = Field(default=0, ge=0, description="more dead units are no success (exit 3)")
    metrics_file: str | None = Field(
        default=None, description="file of this machine for the run's metrics, such as DIR/blocksight.prom"
    )
    log_json: str | None = Field(
        default=None, description="file of this machine that gets a line of JSON per unit; -: standard error"
    )

    @model_validator(mode="after")
    def _only_a_cluster_comes_later(self) -> Self:
        if self.address is None and (self.wait or self.min_workers > 1 or self.py_modules):
            raise ValueError(
                "wait, min_workers and py_modules are for a Ray cluster that is joined: name it with --address"
            )
        if self.workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers is {self.min_workers}, and workers {self.workers}: begin with no more")
        return self


def _checked(kind: type, values: Mapping[str, Any]) -> Any:
    """The dataclass of these values. TOML has no null, so the text `none` means None where that is allowed."""
    hints = get_type_hints(kind)
    return _adapter(kind).validate_python({name: _plain(value, hints[name]) for name, value in values.items()})


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    """Kept, because it takes longer to make than to use, and a worker asks for it with each unit."""
    return TypeAdapter(kind)


def _plain(value: Any, hint: Any) -> Any:
    """Converts a text to the parameter's type: `none`, and words joined by commas for a tuple."""
    if not isinstance(value, str):
        return value
    if get_origin(hint) is tuple:
        return [word.strip() for word in value.split(",")]
    return None if value == "none" and type(None) in get_args(hint) else value


def _as_value(check: Callable[[str], Any], text: str) -> Any:
    """The result of the check. A StoreError becomes a ValueError, to which pydantic adds the key."""
    try:
        return check(text)
    except StoreError as error:
        raise ValueError(str(error)) from error


def normal_model(name: str) -> str:
    """A model's name with the normal spelling of the folder or file in it. Raises StoreError."""
    place = place_of(name)
    return normal_place(place).join(name.rsplit(place, 1)) if place else name


def is_weights_name(value: str) -> bool:
    """True if `weights` is one of the model's own names, such as IMAGENET1K_V1 or `random`, and no file."""
    return value.isidentifier() and not Path(value).exists()


def digest_of(values: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of plain values, as hex."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """One line per key in which two configurations differ: `key: THEIRS in the output, OURS asked for`."""
    return [
        f"{key}: {_short(theirs.get(key))} in the output, {_short(ours.get(key))} asked for"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= MAX_SENTENCE else f"{text[:MAX_SENTENCE]} ..."


def load_config(file: str | Path | None, options: Mapping[str, Any]) -> tuple[JobConfig, Execution]:
    """The configuration and execution from a TOML file or object; given options replace its keys.

    Options that are None were not given; `parameters` of both are joined. Raises ConfigError for an unreadable
    file, an unknown key (with the nearest known one) or a bad value.
    """
    values = _joined({} if file is None else _read_toml(str(file), options.get("endpoint_url")), options)
    known = JobConfig.model_fields | Execution.model_fields
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in the configuration; {nearest(key, known)}")
    missing = [key for key in ("data", "output") if not values.get(key)]
    if missing:
        flags = " and ".join(f"--{key}" for key in missing)
        raise ConfigError(f"{flags} must be given, as an option or in the --config file")
    execution = {key: values.pop(key) for key in Execution.model_fields if key in values}
    values["target"] = _with_prompts_in(values.get("target", "predicted"), values.get("endpoint_url"))
    if isinstance(values.get("class_names"), str):
        values["class_names"] = _names_in(values["class_names"], values.get("endpoint_url"))
    try:
        config = JobConfig.model_validate(values)
        if config.explainer != AUTO:  # which is chosen once the model is known
            config.explainer_parameters()
            config = config.model_copy(update={"parameters": _with_machine_defaults(config.method, config.parameters)})
        return config, Execution.model_validate(execution)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from error


def _with_prompts_in(target: Any, endpoint_url: str | None) -> Any:
    """The target, each `text:@FILE` replaced by the file's prompts: one target a line, an ensemble with `|`."""
    items = target if isinstance(target, list | tuple) else [target]
    if not any(isinstance(item, str) and item.startswith(PROMPT_FILE) for item in items):
        return target
    found: list[Any] = []
    for item in items:
        is_file = isinstance(item, str) and item.startswith(PROMPT_FILE)
        found += map(prompt_target, _prompts_in(item.removeprefix(PROMPT_FILE), endpoint_url)) if is_file else [item]
    return found


def _prompts_in(file: str, endpoint_url: str | None) -> list[str]:
    try:
        store, name = open_file(file, endpoint_url)
        lines = store.read(name, length=MAX_DOCUMENT_BYTES).decode().splitlines()
    except (StoreError, UnicodeDecodeError) as error:
        raise ConfigError(f"target: the prompts in {file} cannot be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"target: the file {file} holds no prompt; wanted one a line")
    if len(prompts) > MAX_TARGETS:
        raise ConfigError(
            f"target: the file {file} holds {len(prompts):,} prompts, and a record has {MAX_TARGETS} targets at most"
        )
    return prompts


def _names_in(file: str, endpoint_url: str | None) -> Sequence[str]:
    try:
        return read_class_names(file, endpoint_url)
    except (ValueError, StoreError) as error:
        raise ConfigError(f"class_names: {error}") from error


def with_input(config: JobConfig, values: Mapping[str, Any]) -> JobConfig:
    """The same job whose model is fed by these values, of which all names are in `MODEL_INPUT`. Raises ConfigError."""
    for name in values:
        if name not in MODEL_INPUT:
            raise ConfigError(f"unknown key {name!r}; {nearest(name, MODEL_INPUT)}")
    try:
        return JobConfig.model_validate({**config.model_dump(), **values})
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from error


def checked_config(values: Mapping[str, Any]) -> JobConfig:
    """The configuration of these values. Raises ConfigError in one sentence, which repeats no refused URI."""
    try:
        return JobConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from error


def _with_machine_defaults(method: Method, values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters, with `auto` replaced by this machine's default, so that all workers use the same."""
    own = dict(values)
    if method.name == "feature-cam" and own.get("edges", "auto") == "auto":
        own["edges"] = installed_detector()
    if method.base is not None:
        inner = _with_machine_defaults(method.base, own.get("base") or {})
        own |= {"base": inner} if inner else {}
    return own


def execution_of(options: Mapping[str, Any]) -> Execution:
    """The execution from a command's options; None means not given. Raises ConfigError."""
    try:
        return Execution.model_validate({key: value for key, value in options.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from error


def _joined(from_file: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in options.items() if value not in (None, (), {})}
    tables = [values.get("parameters", {}) for values in (from_file, given)]
    if not all(isinstance(table, Mapping) for table in tables):
        raise ConfigError("parameters is a table in the configuration file, such as [parameters] with mu = 0.3 below")
    beside = {"budget": from_file["budget"]} if "budget" in from_file else {}  # as its own option
    rest = {key: value for key, value in from_file.items() if key != "budget"}
    return {**rest, **given, "parameters": {**beside, **tables[0], **tables[1]}}


def parse_parameters(texts: Iterable[str]) -> dict[str, Any]:
    """`name=value` texts as a dict; values are read as TOML, and as plain text where that fails."""
    parameters: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        *outer, inner = name.split(".")
        if not separator or not all([*outer, inner]):
            raise ConfigError(f"parameter {text!r} is not of the form name=value, such as mu=0.3")
        table = parameters
        for part in outer:  # base.mu=0.3 is a parameter of the wrapped explainer
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"parameter {text!r}: {part} holds parameters, and a value is given for it as well")
        try:
            table[inner] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            table[inner] = value
    return parameters


def _read_toml(file: str, endpoint_url: str | None) -> dict[str, Any]:
    try:
        store, name = open_file(file, endpoint_url)
        return tomllib.loads(store.read(name, length=MAX_DOCUMENT_BYTES).decode())
    except MissingError as error:
        raise ConfigError(f"there is no configuration file {file}") from error
    except (StoreError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the configuration file {file} cannot be read: {error}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence on an unknown name: the nearest known one, or all of them."""
    names = list(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


TYPES = ("float", "int", "str", "bool")
"""The words that pydantic adds to a field's path for a value of several types."""


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if str(part).isidentifier() and part not in TYPES)
    if first["type"] == "value_error":  # our own sentence
        text = first["msg"].removeprefix("Value error, ")
    else:
        of_same = [one for one in error.errors() if one["loc"][:1] == first["loc"][:1]]
        wanted = " or ".join(dict.fromkeys(f"{one['msg'][0].lower()}{one['msg'][1:]}" for one in of_same))
        text = f"{wanted}, got {first['input']!r}"
    return f"{where}: {text}" if where and not text.startswith(where) else text
