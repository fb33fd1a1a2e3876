"""Examines a loaded model on a few images before any work: what is odd about it is said, or refused in a sentence."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from blocksight.engine.catalog.readouts import ReadoutName
from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.device_errors import device_trouble
from blocksight.engine.model.failures import first_line_of, name_of

ROUNDING = 1e-4
"""Differences up to this, relative to the range of the outputs, are float32's rounding."""
MAX_DIFFERENCE = 0.02
"""A model whose output for one image differs by more is refused; int8 and bfloat16 stay below."""
NEAR_ONE = 1e-3
"""How far the sum of an image's probabilities may be from 1."""
SURE = 0.8
"""Two labels whose sigmoids are both above this hold at once, if the softmax of both is below it."""
LEAST_DRIFT = 0.25
"""Deviation of the mean logit over images, relative to that of all logits. Training by cross entropy keeps the sum of
the logits where it began: its gradient has the sum 0."""
MAX_SHOWN = 5
RANDOM = "something in it is random in eval mode, such as F.dropout without training=self.training"
MAX_KNOWN = 16
"""Classes whose outputs are kept of each random picture."""

_SQUASHING = (
    *(torch.sigmoid, Tensor.sigmoid, functional.sigmoid, Tensor.sigmoid_, functional.hardsigmoid),
    *(torch.softmax, Tensor.softmax, functional.softmax),
)


@dataclass(frozen=True)
class Examination:
    """What was found out about a model's output."""

    readout: ReadoutName
    findings: tuple[str, ...]
    """A sentence for each oddity; empty for a sound softmax classifier in float32."""
    outputs: tuple[tuple[float, ...], ...] = ()
    """Of each random picture, of some classes; empty where one is not finite. They tell the model again."""


@dataclass(frozen=True)
class _Output:
    """The outputs [N, K] of some images in float64."""

    together: Tensor
    again: Tensor
    """Of the same pass once more."""
    alone: Tensor
    """Of the same images, each in a pass of its own."""
    dtype: torch.dtype
    is_squashed: bool
    """A sigmoid or a softmax gave a result of the output's shape, as far as it can be seen."""
    is_logarithm: bool
    """The last function was a log-sigmoid, as far as it can be seen."""
    num_real: int
    """The first so many images are of the data set."""

    mode: str | None
    """A clause, if the forward put a layer into training mode."""

    @property
    def finite(self) -> Tensor:
        """The outputs [M, K] of the images whose outputs are all finite."""
        return self.together[self.together.isfinite().all(1)]

    @property
    def range(self) -> float:
        """The largest difference of two finite outputs."""
        return float(self.finite.max() - self.finite.min())

    def difference(self, other: Tensor) -> float:
        """The largest difference to other passes of the images, relative to the range."""
        if not torch.equal(self.together.isfinite(), other.isfinite()):
            return torch.inf
        apart = float((self.finite - other[other.isfinite().all(1)]).abs().max())
        return apart / self.range if self.range else (torch.inf if apart else 0.0)


def examine(
    adapter: ModelAdapter,
    inputs_nchw: Tensor,
    asked: ReadoutName | None = None,
    num_real: int = 0,
) -> Examination:
    """Runs the model on normalised inputs [N, 3, H, W], of which the first `num_real` are images of the data set.

    `asked` is the user's readout; None: it is told from the outputs, a softmax unless they look otherwise. Raises
    ModelError if the model fails, if its output holds no finite number, or if the output of an image depends on the
    call or on the other images of its pass: no map could be made twice.
    """
    output = _run(adapter, inputs_nchw, num_real)
    _refuse_non_finite(adapter, output)
    _refuse_changing(adapter, output)
    finite = output.finite
    readout, told = _readout(output, finite) if asked is None else (asked, _contradiction(adapter, asked, finite))
    return Examination(readout, (*told, *_oddities(adapter, output)), _some_outputs(output.together[num_real:]))


def refuse_other_function(
    adapter: ModelAdapter, outputs: Sequence[Sequence[float]], known: Sequence[Sequence[float]]
) -> None:
    """Raises ModelError if outputs are not those that the model gave on the same pictures before.

    Both are `Examination.outputs`; without known ones nothing is compared.
    """
    pairs = [(mine, theirs) for mine, theirs in zip(outputs, known, strict=False) if theirs]
    if not pairs:
        return
    if any(len(mine) != len(theirs) for mine, theirs in pairs):
        apart = "in their number or because they are not finite"
    else:
        ours, theirs = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
        scale = theirs.max() - theirs.min() or theirs.abs().max()
        difference = float((ours - theirs).abs().max() / scale) if scale else float((ours - theirs).abs().max())
        if difference <= MAX_DIFFERENCE:
            return
        apart = f"by {percent(difference)} of their range"
    raise ModelError(
        f"the outputs of {adapter.name} on the same pictures differ from those of the time when the output was begun, "
        f"{apart}: its weights are the same, so the code of its forward, or of a library in it, was changed; take the "
        "code of then, or a new output"
    )


class _Squashed(TorchFunctionMode):
    """Remembers the shapes of all results of a sigmoid or softmax, and the last result of a log-sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()
        self.last: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _SQUASHING:
            self.shapes.add(result.shape)
        if func is functional.logsigmoid:
            self.last = result
        return result


def _run(adapter: ModelAdapter, inputs: Tensor, num_real: int) -> _Output:
    given = inputs.clone()
    try:
        with adapter.borrowed(), torch.inference_mode():
            with _Squashed() as squashed:
                together = adapter.of_classes(adapter.logits(inputs))
            _refuse_other_input(adapter, inputs, given)
            mode = _training_mode(adapter)
            again = adapter.of_classes(adapter.logits(inputs))
            alone = adapter.of_classes(torch.cat([adapter.logits(one) for one in inputs.split(1)]))
    except Exception as error:  # a user's model may raise anything
        if isinstance(error, ModelError) or device_trouble(error) is not None:
            raise
        joining = _batch_statistics(adapter)
        if joining:  # torch refuses one image alone
            raise ModelError(_joins_images(adapter, f"depends on the other images of the pass: {joining}")) from error
        raise ModelError(
            f"model {adapter.name!r} fails on {len(inputs)} images together or on one alone: {first_line_of(error)}"
        ) from error
    return _Output(
        together=together.detach().double().cpu(),
        again=again.detach().double().cpu(),
        alone=alone.detach().double().cpu(),
        dtype=together.dtype,
        is_squashed=together.shape in squashed.shapes,
        is_logarithm=squashed.last is together,
        num_real=num_real,
        mode=mode,
    )


def _refuse_other_input(adapter: ModelAdapter, inputs: Tensor, given: Tensor) -> None:
    """Raises ModelError if the forward changed its input."""
    if not torch.equal(inputs, given):
        raise ModelError(
            f"the forward of {adapter.name} changes its input in place, so that a second pass sees other images: begin "
            "it with x = x.clone(), or write x = x - 1 for x -= 1"
        )


def _training_mode(adapter: ModelAdapter) -> str | None:
    """A clause that names a layer that the forward put into training mode, although it was called in eval mode."""
    name = next((name or "the model" for name, one in adapter.module.named_modules() if one.training), None)
    return None if name is None else f"its forward puts {name} into training mode"


def _refuse_non_finite(adapter: ModelAdapter, output: _Output) -> None:
    if not output.together.isfinite().all(1).any():
        raise ModelError(
            f"the output of {adapter.name} holds NaN or infinity for each of {len(output.together)} images"
            f"{_at_classes(output.together)}: check its weights and its normalisation (mean and std), and return "
            "model.float() if it computes in half precision"
        )


def _at_classes(outputs: Tensor) -> str:
    """A clause that names the classes, if others have finite outputs [N, K]; a class that is ruled out is -infinity."""
    never = (~outputs.isfinite()).all(0).nonzero().flatten().tolist()
    if not never or len(never) == outputs.shape[1]:
        return ""
    shown = ", ".join(map(str, never[:MAX_SHOWN]))
    return f", always at the classes {shown}{' ...' if len(never) > MAX_SHOWN else ''} (leave them out of the output)"


def _refuse_changing(adapter: ModelAdapter, output: _Output) -> None:
    if output.difference(output.again) > ROUNDING:
        raise ModelError(
            f"the output of {adapter.name} changes from call to call, by {percent(output.difference(output.again))} of "
            f"its range for the same images: {output.mode or RANDOM}; no map of it could be made twice, so make it a "
            "fixed function"
        )
    if output.difference(output.alone) > MAX_DIFFERENCE:
        by = f"changes by {percent(output.difference(output.alone))} of its range with the other images of the pass"
        cause = _batch_statistics(adapter) or output.mode or "something in it joins the images of a pass"
        raise ModelError(_joins_images(adapter, f"{by}: {cause}"))


def _some_outputs(outputs: Tensor) -> tuple[tuple[float, ...], ...]:
    """Six digits of the outputs [N, K] of at most `MAX_KNOWN` classes, spread over all."""
    step = -(-outputs.shape[1] // MAX_KNOWN)
    rows = outputs[:, ::step].tolist()
    finite = outputs[:, ::step].isfinite().all(1).tolist()
    return tuple(
        tuple(float(f"{value:.6g}") for value in row) if is_finite else ()
        for row, is_finite in zip(rows, finite, strict=True)
    )


def percent(share: float) -> str:
    """A share with two digits: 0.012 %, 4 %, 120 %."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _batch_statistics(adapter: ModelAdapter) -> str | None:
    """A clause that names a batch norm without running statistics, if there is one."""
    layers = ((name, one) for name, one in adapter.module.named_modules() if isinstance(one, _BatchNorm))
    name = next((name for name, one in layers if one.running_mean is None), None)
    return None if name is None else f"{name} has no running statistics"


def _joins_images(adapter: ModelAdapter, how: str) -> str:
    return (
        f"the output of {adapter.name} for an image {how}; its maps would depend on how images are packed. Train it "
        "with running statistics, replace such layers by GroupNorm, or quantise it with fixed scales"
    )


def _readout(output: _Output, finite: Tensor) -> tuple[ReadoutName, tuple[str, ...]]:
    """The readout that the outputs look like, and sentences if it is not a softmax."""
    if _is_in_unit_range(finite) and (finite.sum(1) - 1).abs().max() <= NEAR_ONE:
        return "probabilities", (
            "the outputs are probabilities already (in [0, 1], sum 1: a softmax is inside): a score is the output "
            "itself, no second softmax is taken; without the last softmax gradients are sharper (--readout softmax "
            "takes it twice)",
        )
    if _is_in_unit_range(finite) and (output.is_squashed or _is_decided(finite)):
        return "probabilities", (
            "the outputs are probabilities of independent labels already (in [0, 1], sums other than 1: a sigmoid is "
            "inside, or a softmax that was changed): a score is the output itself (--readout softmax for classes that "
            "exclude each other)",
        )
    if _are_independent(output):
        return "sigmoid", (
            f"several labels hold at once on images of the data set (two sigmoids above {SURE:g}), so the outputs are "
            "taken for independent labels: a score is the sigmoid of the label's own output. This is a guess: if the "
            "classes exclude each other say --readout softmax",
        )
    _refuse_negative_logarithms(finite)
    if output.is_logarithm:
        return "softmax", (
            "a log-sigmoid gives the outputs, and a softmax is taken of them: for independent labels leave it out of "
            "the model and say --readout sigmoid",
        )
    if _are_shares(finite):
        return "softmax", (
            f"the outputs are never negative and sum to {finite.sum(1).mean():.4g} for every image, as percentages do, "
            "and a softmax is taken of them: divide them by their sum in the model, and they are probabilities",
        )
    if _is_in_unit_range(finite):
        return "softmax", (
            "all outputs lie in [0, 1] and a softmax is taken of them: if they are probabilities already say "
            "--readout probabilities",
        )
    return "softmax", ()


def _refuse_negative_logarithms(finite: Tensor) -> None:
    """Raises ModelError for outputs whose smallest is the prediction."""
    if finite.min() >= 0 and finite.shape[1] > 1 and (finite.neg().exp().sum(1) - 1).abs().max() <= NEAR_ONE:
        raise ModelError(
            "the outputs are negative logarithms of probabilities, of which the smallest is the prediction: every map "
            "would be of the wrong class; return them with the other sign (--readout identity takes them as they are)"
        )


def _are_shares(values: Tensor) -> bool:
    """True for outputs above 1 that are not negative and sum to the same number for every image."""
    sums = values.sum(1)
    is_same = (sums - sums.mean()).abs().max() <= NEAR_ONE * sums.mean()
    varies = values.std(0, correction=0).max() > NEAR_ONE * sums.mean()  # else it is constant, which is told
    return bool(values.min() >= 0) and values.shape[1] > 1 and bool(is_same) and bool(varies)


def _is_in_unit_range(values: Tensor) -> bool:
    return bool(values.min() >= 0) and bool(values.max() <= 1 + NEAR_ONE)


def _is_decided(values: Tensor) -> bool:
    """True if outputs in [0, 1] come near both ends, as sigmoids do."""
    return bool(values.min() < 1 - SURE) and bool(values.max() > SURE)


def _are_independent(output: _Output) -> bool:
    """True if on half of the data set's images two labels are sure at once, which a softmax could not say.

    Uncertain softmax classifiers also have two large logits; `LEAST_DRIFT` tells them apart.
    """
    real = output.together[: output.num_real]
    real = real[real.isfinite().all(1)]
    if not len(real) or real.shape[1] < 2:
        return False
    second = real.sigmoid().topk(2, 1).values[:, 1]
    several = (second > SURE) & (real.softmax(1).amax(1) < SURE)
    finite = output.finite
    drift = finite.mean(1).std(correction=0) / finite.std(correction=0).clamp(min=1e-12)
    return bool(several.double().mean() >= 0.5) and float(drift) >= LEAST_DRIFT


def _contradiction(adapter: ModelAdapter, asked: ReadoutName, finite: Tensor) -> tuple[str, ...]:
    """Sentences if the outputs do not look like the readout asked for. Raises ModelError if they cannot be it."""
    is_probability = _is_in_unit_range(finite)
    if asked == "probabilities" and not is_probability:
        low, high = float(finite.min()), float(finite.max())
        raise ModelError(
            f"--readout probabilities, and the outputs of {adapter.name} lie in [{low:.3g}, {high:.3g}] and not in "
            "[0, 1]: say softmax, sigmoid or identity"
        )
    if asked in ("softmax", "sigmoid") and is_probability:
        return (f"all outputs lie in [0, 1] already, and a {asked} is taken of them, as it was asked",)
    return ()


def _oddities(adapter: ModelAdapter, output: _Output) -> Iterator[str]:
    """Sentences on what does not stop a job."""
    num_odd = int((~output.together.isfinite().all(1)).sum())
    if num_odd:
        yield f"the output holds NaN or infinity for {num_odd} of {len(output.together)} images: those are rejected"
    finite = output.finite
    if len(finite) > 1 and bool((finite - finite[:1]).abs().max() <= 1e-6 * finite.abs().max()):
        yield (
            f"the output is the same for all {len(finite)} images it was tried on: the model does not look at them, "
            "and its maps will show nothing"
        )
    difference = output.difference(output.alone)
    if difference > ROUNDING:
        yield f"the output for an image changes by {percent(difference)} of its range with the other images of its pass"
    if output.dtype != torch.float32:
        yield f"the outputs are {name_of(output.dtype)}"
    weights = _types(adapter.module)
    if weights:
        yield f"weights are {', '.join(weights)}: scores have fewer digits than in float32"


def _types(module: nn.Module) -> list[str]:
    """The types of weights of fewer bits than float32, and int8 for packed weights."""
    kinds = {one.dtype for one in module.parameters() if one.is_floating_point() and one.element_size() < 4}
    quantised = any("quantized" in type(one).__module__ for one in module.modules())
    return sorted(map(name_of, kinds)) + (["int8"] if quantised else [])
