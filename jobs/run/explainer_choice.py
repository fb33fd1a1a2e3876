"""`--explainer auto`: chooses the explainer for the model, so that the plan holds its name."""

from pathlib import Path

from blocksight.engine.catalog.composition import AUTO
from blocksight.jobs.plan.config import JobConfig
from blocksight.jobs.plan.context import weights_bytes
from blocksight.jobs.plan.plan import load_plan, open_output
from blocksight.storage.stores.retrying import SHORT_PATIENCE_SECONDS, PatientStore


def with_explainer(config: JobConfig) -> tuple[JobConfig, str | None]:
    """The configuration with an explainer in the place of `auto`, and a sentence that says which and why.

    None: it was named. An output that was begun with one of the choices keeps it; else the model is loaded, with any
    weights, for its architecture alone counts. Raises ModelError and ConfigError.
    """
    if config.explainer != AUTO:
        return config, None
    from blocksight.engine.judging.method_choice import CHOICES, chosen_explainer
    from blocksight.jobs.explain.preflight import in_a_sentence
    from blocksight.jobs.explain.step import load

    stored = load_plan(PatientStore(open_output(config), SHORT_PATIENCE_SECONDS))
    if stored is not None and stored.identity["explainer"] in CHOICES:
        name = stored.identity["explainer"]
        return config.explained_by(name), f"{name}, as auto chose for this output"
    state = weights_bytes(config)
    is_named = state is None and config.weights is not None  # such weights would be downloaded
    named = config.model_copy(update={"weights": "random"}) if is_named else config
    with in_a_sentence(config.model):
        choice = chosen_explainer(load(named, state, "cpu", str(Path.cwd())))
    return config.explained_by(choice.explainer), f"{choice} (auto)"
