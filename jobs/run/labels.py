"""Says before any work how a data set's labels are read, and refuses labels that cannot be meant as they are."""

from pathlib import Path
from typing import TYPE_CHECKING

from blocksight.engine.catalog.entries import factory_of
from blocksight.jobs.plan.config import NO_LABELS, ConfigError, JobConfig
from blocksight.jobs.plan.context import let_import_from, weights_bytes
from blocksight.jobs.plan.label_counts import counted_labels
from blocksight.jobs.plan.labels import FoundLabels, Labels, label_fault, reading_of
from blocksight.jobs.plan.plan import Plan, source_of
from blocksight.storage.inputs.label_file import LabelFile

if TYPE_CHECKING:
    from blocksight.engine.model.adapter import ModelAdapter  # which needs torch

NOTHING = "none in the data"
LEFT_OUT = "left out, as asked"


def read_labels(config: JobConfig, plan: Plan, adapter: "ModelAdapter", file: LabelFile | None = None) -> str:
    """One line on how the labels are read, of the data or of the user's file. Raises ConfigError with what to do."""
    if config.labels == NO_LABELS:
        return LEFT_OUT
    return _read(config, plan, counted_labels(source_of(plan, config.endpoint_url), plan, file), adapter)


def preview_labels(config: JobConfig, plan: Plan, file: LabelFile | None = None) -> str:
    """The same for a plan, which loads no trained weights: a model's own names and number of classes are enough.

    A model that cannot be loaded is no error yet: the line says so. Raises ConfigError as `read_labels`, and
    RandomWeightsError for a model whose weights nobody named, with or without labels.
    """
    _refuse_random_weights(config)
    if config.labels == NO_LABELS:
        return LEFT_OUT
    found = counted_labels(source_of(plan, config.endpoint_url), plan, file)
    if not any(label is not None for label in found.counts) and config.target_choice.name is None:
        return NOTHING
    from blocksight.engine.errors import ModelError
    from blocksight.jobs.explain.step import load
    from blocksight.jobs.explain.target_names import resolved_targets

    state = weights_bytes(config)
    is_named = state is None and config.weights is not None  # such weights would be downloaded
    named = config.model_copy(update={"weights": "random"}) if is_named else config
    try:
        adapter = load(named, state, "cpu", str(Path.cwd()))
        resolved_targets(config, adapter)
        return _read(config, plan, found, adapter)
    except ModelError as error:
        return f"not compared with the model's classes, because it cannot be loaded: {error}"


def _refuse_random_weights(config: JobConfig) -> None:
    if config.weights is not None or factory_of(config.model) != config.model:
        return
    from blocksight.engine.errors import ModelError, RandomWeightsError
    from blocksight.engine.model.loading import refuse_unnamed_weights

    let_import_from(str(Path.cwd()))
    try:
        refuse_unnamed_weights(config.model, config.seed)
    except RandomWeightsError:
        raise
    except ModelError:
        return  # the line on the labels says it


def _read(config: JobConfig, plan: Plan, found: FoundLabels, adapter: "ModelAdapter") -> str:
    is_named = config.labels is not None
    folders = () if is_named else plan.class_folders or tuple(sorted(plan.label_counts()))
    number_names = () if is_named else plan.number_names
    labels = Labels(folders, adapter.class_names, adapter.num_classes, config.label_classes, number_names)
    fault = label_fault(labels, found, folders, is_target=config.target_choice.has_label)
    if fault is not None:
        raise ConfigError(fault)
    return reading_of(labels, found).text
