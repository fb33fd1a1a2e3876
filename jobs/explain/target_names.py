"""Finds the class that a target names."""

from dataclasses import replace

from blocksight.engine.model.adapter import ModelAdapter
from blocksight.jobs.plan.config import TARGET_FORMS, ConfigError, JobConfig, TargetChoice
from blocksight.jobs.plan.labels import Labels, Rule


def resolved_target(config: JobConfig, adapter: ModelAdapter) -> TargetChoice:
    """The job's target with its classes as numbers; a name is read as a label is.

    Raises ConfigError, with the nearest names, for a name of no class or of more than one.
    """
    choice = config.target_choice
    if choice.name is None:
        return choice
    labels = Labels((), adapter.class_names, adapter.num_classes, config.label_classes)
    meaning = labels.read(choice.name)
    if meaning.index is None:
        raise ConfigError(_refusal(labels, choice.name, meaning.rule))
    return replace(choice, classes=(meaning.index,))


def _refusal(labels: Labels, name: str, rule: Rule) -> str:
    if rule is Rule.AMBIGUOUS:
        classes = ", ".join(labels.nearest(name)) or "see the class map"
        return f"target {name!r} means more than one class: {classes}; name one by its number"
    if not labels.class_names:
        return f"target {name!r} is not known, and the model has no class names; known: {TARGET_FORMS}"
    near = labels.nearest(name)
    nearest = f"nearest: {', '.join(map(repr, near))}; " if near else ""
    return f"target {name!r} is no class of the model; {nearest}known: {TARGET_FORMS}, or a class name"
