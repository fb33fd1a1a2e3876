"""Makes a memory bank: features of labelled images by a model, written as the weights file of `knn(MODEL)`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from torch import Tensor

from blocksight.engine.catalog.sources import backbone_of
from blocksight.engine.explainers.explainer import chunks, pad
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.features import without_head
from blocksight.engine.model.neighbours import NeighbourClassifier
from blocksight.engine.scoring.forward import release_memory
from blocksight.jobs.bench.curve import Picture, pictures
from blocksight.jobs.explain.preflight import check_output, in_a_sentence, print_findings
from blocksight.jobs.explain.step import images_at_once, load
from blocksight.jobs.plan.config import ConfigError, JobConfig
from blocksight.jobs.plan.context import sha256_of, weights_bytes
from blocksight.jobs.plan.model_input import with_model_file
from blocksight.jobs.plan.plan import check_place, make_plan
from blocksight.jobs.plan.text import printable
from blocksight.jobs.plan.units import Workforce
from blocksight.jobs.run.workers import device_here
from blocksight.jobs.worker.memory import with_less_at_once
from blocksight.jobs.worker.progress import Tally, progress
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.stores.opening import open_file

MAX_NUMBERED = 100_000
"""Labels that are numbers are below this; the largest plus one is the number of classes."""


@dataclass(frozen=True)
class Bank:
    """The facts of a bank that was written."""

    model: str
    """The value for `--model`."""
    num_images: int
    num_left_out: int
    """Images without a label or a finite feature."""
    class_names: tuple[str, ...]
    dimensions: int


def make_bank(config: JobConfig, console: Console) -> Bank:
    """Runs the model without its head on every labelled image and writes the bank to the configured output.

    Raises ConfigError if labels are missing or all the same, ModelError and StoreError.
    """
    backbone = backbone_of(config.model)
    if backbone is not None:
        raise ConfigError(f"model {config.model} has a bank already; to make another name the model inside: {backbone}")
    config = with_model_file(config)
    check_place(config.output, {"data": config.data})
    _check_output(config)
    state = weights_bytes(config)
    with in_a_sentence(config.model):
        adapter = without_head(load(config, state, device_here("auto"), str(Path.cwd())))
    for note in adapter.assumptions:
        console.print(f"model: {printable(note)}", style="yellow", highlight=False)
    print_findings(check_output(adapter, "identity").findings, console)  # features are no scores
    plan = make_plan(config, weights_sha256=sha256_of(state), workforce=Workforce(1, on_gpu=False))
    if plan.layout is Layout.IMAGES:
        class_names_of([_as_text(folder) for folder in plan.label_counts()], config.data)  # before any work
    labels: list[str] = []
    features: list[Tensor] = []
    num_seen = 0
    with progress(console, Tally(plan.num_records, None, verb="gather")) as update:
        of = _Features(adapter)
        for some in chunks(pictures(plan, config, adapter.input_size), images_at_once(adapter)):
            for picture, feature in zip(some, of(some), strict=True):
                if picture.facts.label is not None and feature.isfinite().all():
                    labels.append(_as_text(picture.facts.label))
                    features.append(feature)
            num_seen += len(some)
            update(len(some))
    class_names = class_names_of(labels, config.data)
    index = {name: number for number, name in enumerate(class_names)}
    numbers = torch.tensor([index[label] for label in labels])
    whole = NeighbourClassifier(adapter.module.cpu(), torch.stack(features), numbers, class_names)
    _write(whole, config)
    return Bank(f"knn({config.model})", len(labels), num_seen - len(labels), tuple(class_names), features[0].shape[0])


class _Features:
    """Computes features by forward passes of one shape, with fewer images at once if memory is short."""

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter
        self.size = images_at_once(adapter)

    def __call__(self, some: Sequence[Picture]) -> Iterator[Tensor]:
        """The pictures' features [D] on the CPU."""
        found = with_less_at_once(
            lambda: [self._pass(part) for part in chunks(some, self.size)], lambda: self.size > 1, self._halve
        )
        return iter(torch.cat(found))

    def _halve(self) -> None:
        self.size //= 2
        release_memory(self.adapter)

    def _pass(self, some: Sequence[Picture]) -> Tensor:
        pixels = torch.from_numpy(np.stack([one.pixels for one in some])).permute(0, 3, 1, 2)
        inputs = pad(self.adapter.normalise(pixels), self.size)
        with self.adapter.borrowed(), torch.inference_mode():
            found = self.adapter.logits(inputs)[: len(some)].float().cpu()
        return found.clone()


def class_names_of(labels: Sequence[str], data: str) -> list[str]:
    """The classes by index: names in sorted order; labels that are all numbers are the indices themselves.

    Raises ConfigError if labels are missing, all the same, a mix of names and numbers, or too large.
    """
    known = sorted(set(labels))
    numbers = [int(label) for label in known if _is_number(label)]
    if not known:
        raise ConfigError(
            f"no image of {data} that can be read has a label: put images into a folder per class, give tar shards "
            ".cls members, or tables a column label"
        )
    if len(known) == 1:
        raise ConfigError(f"all images of {data} have the label {known[0]!r}; a bank tells at least two classes apart")
    if not numbers:
        return known
    if len(numbers) < len(known):
        names = next(label for label in known if not _is_number(label))
        raise ConfigError(
            f"labels of {data} are numbers and names, such as {numbers[0]} and {names!r}; wanted one kind"
        )
    if max(numbers) >= MAX_NUMBERED:
        raise ConfigError(f"label {max(numbers)} of {data} is no class number; wanted below {MAX_NUMBERED}")
    return [str(number) for number in range(max(numbers) + 1)]


def _as_text(label: str | int) -> str:
    """The label as text, numbers without leading zeros: 007 is 7."""
    text = str(label)
    return str(int(text)) if _is_number(text) else text


def _is_number(text: str) -> bool:
    return text.isdecimal() and text.isascii()


def _check_output(config: JobConfig) -> None:
    """Raises ConfigError if the output exists, and StoreError if it cannot be written."""
    store, name = open_file(config.output, config.endpoint_url)
    if store.head(name) is not None or Path(config.output).is_dir():
        raise ConfigError(f"{config.output} exists already; remove it, or name another file")
    store.create(f"{name}.probe", b"")
    store.delete(f"{name}.probe")


def _write(whole: NeighbourClassifier, config: JobConfig) -> None:
    """Writes the complete state dict."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in whole.state_dict().items()}
    store, name = open_file(config.output, config.endpoint_url)
    store.put(name, safetensors.torch.save(tensors))
