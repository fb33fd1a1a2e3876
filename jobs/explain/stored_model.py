"""Loads the model that made an output, and proves that it is still the same one."""

from contextlib import suppress
from pathlib import Path

from rich.console import Console

from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.examination import refuse_other_function
from blocksight.jobs.explain.preflight import check_output, in_a_sentence, print_findings
from blocksight.jobs.explain.step import load, model_facts
from blocksight.jobs.plan.config import JobConfig
from blocksight.jobs.plan.context import sha256_of, weights_bytes
from blocksight.jobs.plan.plan import Plan, refuse_other_configuration, refuse_other_model
from blocksight.jobs.plan.preflight import UNEXAMINED, Preflight, stored_preflight
from blocksight.jobs.plan.records import ModelFacts
from blocksight.jobs.plan.stored_config import NamedModel, config_of
from blocksight.jobs.plan.target_files import vectors_of_output
from blocksight.storage.stores.store import MissingError, ObjectStore


def model_of_output(
    store: ObjectStore, plan: Plan, named: NamedModel, console: Console, device: str = "cpu"
) -> tuple[JobConfig, ModelAdapter]:
    """The output's configuration and its model on a device; scores are read as in the job.

    Configuration, weights, blocks, normalisation and the outputs on random pictures must be those of the output.
    Raises ConfigError, which names the model or the weights to type again, ModelError and StoreError.
    """
    config = config_of(plan, store.uri, named)
    state = weights_bytes(config)
    refuse_other_configuration(config.identity(sha256_of(state)), plan)
    stored = stored_preflight(store) or UNEXAMINED
    with in_a_sentence(config.model):
        adapter = load(config, state, device, str(Path.cwd()), stored.readout, vectors_of_output(store, config))
        facts = model_facts(adapter, config)
    print_findings(refuse_changed(store, adapter, facts, stored), console)
    return config, adapter


def refuse_changed(store: ObjectStore, adapter: ModelAdapter, facts: ModelFacts, stored: Preflight) -> tuple[str, ...]:
    """Examines a loaded model and compares it with the output's; returns what no preflight told of it yet.

    Raises DriftError for other weights, blocks or normalisation, and ModelError for an output that cannot be explained
    or is another one on the same pictures.
    """
    found = check_output(adapter, stored.readout)
    with suppress(MissingError):  # the run that wrote the preflight ended before it wrote the model's facts
        refuse_other_model(store, facts)
    refuse_other_function(adapter, found.outputs, stored.outputs)
    return () if stored.images else found.findings
