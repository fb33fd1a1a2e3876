"""The preflight: examines a job's model, and tries its explainer, on a few images before the first unit."""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from blocksight.engine.catalog.readouts import ReadoutName
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import make_explainer
from blocksight.engine.explainers.gradients import IntegratedGradients
from blocksight.engine.judging.preflight import (
    check_balance,
    quick,
    refuse_without_gradients,
    run_tails_once,
    scored_once,
    try_explainer,
)
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.device_errors import device_trouble
from blocksight.engine.model.examination import Examination, examine
from blocksight.engine.model.failures import first_line_of
from blocksight.engine.model.targets import Target
from blocksight.engine.scoring.setting_choice import drawn_pictures
from blocksight.jobs.explain.step import load, model_facts
from blocksight.jobs.explain.target_names import formulas_of_pictures
from blocksight.jobs.plan.config import ConfigError, JobConfig
from blocksight.jobs.plan.plan import Plan, source_of
from blocksight.jobs.plan.preflight import Preflight
from blocksight.jobs.plan.records import ModelFacts, UnreconciledError
from blocksight.jobs.plan.text import counted, printable
from blocksight.jobs.worker.attempts import WorkerStores, job_step
from blocksight.jobs.worker.isolation import isolated_if
from blocksight.jobs.worker.unit import decoded, decoded_or_rejected
from blocksight.jobs.worker.watchdog import watchdog
from blocksight.storage.inputs.loose import read_images
from blocksight.storage.inputs.records import RawRecord
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.stores.object_columns import evenly_spread
from blocksight.storage.stores.store import ObjectInfo, ObjectStore, StoreError

NUM_REAL, NUM_DRAWN = 4, 4
"""Images of the data set and random pictures that the model is examined on."""
CHEAP_BYTES = 16 << 20
"""Larger images are not read for the preflight; shards are not either."""
STEP = "preflight/try"
"""Names its attempt markers."""

OF_THE_USER = (ModelError, ConfigError, StoreError, UnreconciledError)
"""Errors that are sentences already."""


@contextmanager
def in_a_sentence(name: str) -> Iterator[None]:
    """Raises any exception of the body as a ModelError, because a user's model may raise anything.

    Errors of the device are raised unchanged: they are not the model's.
    """
    try:
        yield
    except OF_THE_USER:
        raise
    except (Exception, SystemExit) as error:
        if device_trouble(error) is not None:
            raise
        raise ModelError(
            f"model {name!r} cannot be used: {type(error).__name__} while it was examined: {first_line_of(error)}"
        ) from error


def load_examined(config: JobConfig, state: bytes | None, device: str, console: Console) -> ModelAdapter:
    """The configured model on a device, examined on random pictures; prints what is odd about it. Raises ModelError."""
    with in_a_sentence(config.model):
        adapter = load(config, state, device, str(Path.cwd()))
    print_findings(check_output(adapter, config.asked_readout).findings, console)
    return adapter


def check_output(adapter: ModelAdapter, asked: ReadoutName | None) -> Examination:
    """Examines a loaded model on random pictures; the adapter reads scores as found. Raises ModelError."""
    with in_a_sentence(adapter.name):
        found = examine(adapter, drawn_pictures(adapter)[:NUM_DRAWN], _said(adapter, asked))
    adapter.readout = found.readout
    return found


def _said(adapter: ModelAdapter, asked: ReadoutName | None) -> ReadoutName | None:
    """The readout that is known: as asked, or what the model says, also of prompts."""
    is_said = adapter.says_readout or adapter.prompt_embeddings is not None
    return adapter.readout if asked is None and is_said else asked


def print_findings(findings: Sequence[str], console: Console) -> None:
    """Prints a warning for each."""
    for sentence in findings:
        console.print(f"[bold red]WARNING[/] {printable(sentence)}")


def examined_for(
    adapter: ModelAdapter, config: JobConfig, facts: ModelFacts, plan: Plan, output: ObjectStore, *, careful: bool
) -> Preflight:
    """Examines the model and tries the explainer; the adapter reads scores as found. Raises ModelError.

    `careful`: images are decoded in a child process, so that one that kills it does not end the driver. If a process
    died in the preflight of this output before, no image of the data set is read.
    """
    stores = WorkerStores(source_of(plan, config.endpoint_url), output, uuid.uuid4().hex)
    with job_step(stores, STEP) as num_deaths, watchdog(), in_a_sentence(config.model):
        real = [] if num_deaths else list(_sample(plan, config, adapter.input_size, stores.source, careful))
        return examined_on(adapter, config, facts, real)


def examined_on(
    adapter: ModelAdapter, config: JobConfig, facts: ModelFacts, real: Sequence[NDArray[np.uint8]]
) -> Preflight:
    """As `examined_for`, on these pictures [H, W, 3] of the model's input size and on random ones."""
    drawn = drawn_pictures(adapter)[:NUM_DRAWN]
    inputs = [adapter.normalise(torch.from_numpy(one.copy()).permute(2, 0, 1)[None]) for one in real]
    shown = [one for one in inputs if _passes(adapter, one)]
    found = examine(adapter, torch.cat([*shown, drawn]), _said(adapter, config.asked_readout), len(shown))
    adapter.readout = found.readout
    findings = (
        *found.findings,
        *_no_classes(adapter, config),
        *_tried(adapter, config, facts, torch.cat(shown) if shown else drawn),
    )
    images = f"{counted(len(shown), 'image')} of the data set" if shown else "random pictures"
    return Preflight(found.readout, images, findings, found.outputs, _proofs(adapter, facts))


def _no_classes(adapter: ModelAdapter, config: JobConfig) -> tuple[str, ...]:
    """A sentence if features are explained as if they were classes."""
    is_meant = adapter.features or getattr(config.explainer_parameters(), "of", None) == "feature"
    if is_meant or not adapter.gives_features:
        return ()
    text = "'text:a photo of a dog', " if adapter.texts is not None else ""
    return (
        f"the {adapter.num_classes:,} outputs are features of the picture and no classes, so that target "
        f"{config.target!r} is one of these numbers: take --target {text}feature:7 or similar:PICTURE, or make a "
        "classifier with `blocksight bank`",
    )


def refuse_untaken(adapter: ModelAdapter, config: JobConfig, image_nchw: Tensor) -> None:
    """Raises ModelError if the model lacks what the configured explainer needs: blocks, attention, gradients.

    Cheaper than a trial: the explainer is made ready, and explains nothing.
    """
    blocks = [block["name"] for block in model_facts(adapter, config).blocks]
    refuse_without_gradients(adapter, config.method, blocks, image_nchw, _target(adapter, config, image_nchw))


def _proofs(adapter: ModelAdapter, facts: ModelFacts) -> tuple[str, ...]:
    """Each block that the explainer uses, with how it was proved, and what lies deeper and could not be read."""
    names = [block["name"] for block in facts.blocks]
    places = adapter.network.blocks(names) if names else ()
    beyond = adapter.network.beyond(places[-1]) if places else ""
    found = [f"{place.name}, {place.layout.kind}: {place.proof}" for place in places if place.layout is not None]
    return (*found, *([f"deeper, {beyond}"] if beyond else []))


def _passes(adapter: ModelAdapter, image_nchw: Tensor) -> bool:
    """False if the model fails on this image, which its unit will tell of."""
    try:
        with adapter.borrowed(), torch.inference_mode():
            adapter.logits(image_nchw)
    except Exception as error:  # a user's model may raise anything
        if device_trouble(error) is not None:
            raise
        return False
    return True


def _tried(adapter: ModelAdapter, config: JobConfig, facts: ModelFacts, inputs_nchw: Tensor) -> tuple[str, ...]:
    """Tries the configured explainer, made short by `quick`."""
    method, blocks = config.method, [block["name"] for block in facts.blocks]
    parameters = quick(method, config.explainer_parameters())
    explainer = make_explainer(config.explainer, adapter, parameters, blocks=blocks, forward=scored_once(adapter))
    run_tails_once(explainer)
    target = _target(adapter, config, inputs_nchw)
    findings = try_explainer(explainer, method, blocks, inputs_nchw, target)
    return (*findings, *_balanced(adapter, config, inputs_nchw, target))


def _balanced(adapter: ModelAdapter, config: JobConfig, inputs_nchw: Tensor, target: Target) -> tuple[str, ...]:
    """Whether the innermost method's attributions are complete, with the job's own parameters."""
    method, parameters = config.method, config.explainer_parameters()
    while method.base is not None:
        method, parameters = method.base, parameters.base
    if method.name != "integrated_gradients":
        return ()
    explainer = IntegratedGradients(adapter, parameters, images_per_pass=1)
    return check_balance(explainer, inputs_nchw, target)


def _target(adapter: ModelAdapter, config: JobConfig, inputs_nchw: Tensor) -> Target:
    """What is explained of each image: the first target of each kind; the prediction stands in for the label."""
    found = formulas_of_pictures(config, adapter, inputs_nchw)
    kinds = {
        (one.is_score, one.reading, bool(one.classes), bool(one.features)): place
        for place, one in reversed(list(enumerate(found[0])))
    }
    return adapter.target_of([[own[place] for place in sorted(kinds.values())] for own in found])


def _sample(
    plan: Plan, config: JobConfig, input_size: tuple[int, int], source: ObjectStore, careful: bool
) -> Iterator[NDArray[np.uint8]]:
    """Yields the pixels [H, W, 3] of a few loose images, spread over the data set; unreadable ones are left out."""
    if plan.layout is not Layout.IMAGES:
        return
    spread = evenly_spread(
        lambda: (info for unit in plan.units for info in unit.objects if info.size <= CHEAP_BYTES), NUM_REAL
    )
    decode = partial(decoded, config=config, input_size=input_size)
    with isolated_if(decode, careful) as decoding:
        for raw in _raw(source, spread):
            _, pixels = decoded_or_rejected(decoding, raw, source)
            if pixels is not None:
                yield pixels


def _raw(source: ObjectStore, objects: Sequence[ObjectInfo]) -> Iterator[RawRecord]:
    """The images that can be read; the read step reports the others later."""
    for info in objects:
        with suppress(StoreError):
            yield from islice(read_images(source, [info]), 1)
