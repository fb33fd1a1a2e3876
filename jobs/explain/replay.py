"""Replays a stored record: same model, same settings as the job."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from rich.console import Console

from blocksight.engine.catalog.composition import blocks_of, parse_method
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.explanation import Explanation
from blocksight.engine.saliency import Map, minmax
from blocksight.engine.scoring.setting_choice import eager_setting
from blocksight.jobs.explain.fidelity import POOR_MAP
from blocksight.jobs.explain.forward_pass import stored_forward
from blocksight.jobs.explain.learned import num_learning_images, stored_state
from blocksight.jobs.explain.step import make_explainer, model_facts, seed_of
from blocksight.jobs.explain.stored_model import model_of_output
from blocksight.jobs.explain.target_names import formulas_of
from blocksight.jobs.ledger.output import map_of
from blocksight.jobs.plan.config import ConfigError, JobConfig, load_config
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.plan.stored_config import NamedModel
from blocksight.storage.images.decode import fit
from blocksight.storage.outputs.map_codec import MAX_ERROR
from blocksight.storage.outputs.pictures import Pixels
from blocksight.storage.stores.store import ObjectStore

ROUNDING = 1e-6
"""Of a map in [0, 1], in addition to the codec's error."""

Row = Mapping[str, Any]


class Replay:
    """Holds the model of an output, on the CPU with one thread, as a worker does."""

    def __init__(self, store: ObjectStore, plan: Plan, named: NamedModel, console: Console) -> None:
        """Raises ConfigError if the output was made with another model or weights, ModelError and StoreError."""
        torch.set_num_threads(1)
        self.config, self.adapter = model_of_output(store, plan, named, console)
        self.learned, _ = stored_state(store, self.config) or (None, None)
        self.forward, self.setting = None, eager_setting("cpu")
        with suppress(ModelError):  # the job ran on other hardware: `replay_error` shows how far its maps differ
            self.forward, self.setting = stored_forward(store, self.adapter) or (None, self.setting)

    def config_of_row(self, row: Row) -> JobConfig:
        """The configuration that made the row's map; with fidelity `auto` it is full or balanced, record by record."""
        in_doubt = row["fidelity"] == "full" and row["fidelity_reason"] != POOR_MAP
        return self.config.in_full() if self.config.level == "auto" and in_doubt else self.config

    def config_of_explainer(self, explainer: str) -> JobConfig:
        """The same job with another explainer and its defaults. Raises ConfigError for an unknown name."""
        try:
            uses_blocks = blocks_of(parse_method(explainer)) != "none"
        except ValueError as error:
            raise ConfigError(str(error)) from error
        asked = {
            **self.config.model_dump(),
            "explainer": explainer,
            "parameters": {},
            "fidelity": "full",
            "signed": False,
            "blocks": self.config.blocks if uses_blocks else (),
        }
        config, _ = load_config(None, asked)
        if num_learning_images(config):
            raise ConfigError(
                f"{explainer} learns from many images first: explain the data with it, and name that output "
                "with --beside"
            )
        return config

    def explanations(self, config: JobConfig, rows: Sequence[Row], pixels: Pixels) -> list[Explanation]:
        """One Explanation per row of one record; `pixels` is its upright original [H, W, 3]. Raises ModelError."""
        blocks = [block["name"] for block in model_facts(self.adapter, config).blocks]
        explainer = make_explainer(
            self.adapter, config, blocks, self.setting.batch_size, self.forward, state=self.learned
        )
        seen = np.array(fit(pixels, self.adapter.input_size, config.resize))
        inputs = self.adapter.normalise(torch.from_numpy(seen[None]).permute(0, 3, 1, 2))
        target = self.adapter.target_of([formulas_of(rows, self.adapter)])
        (own,) = explainer.explain(inputs, target, [seed_of(config, rows[0]["key"])])
        return own


def replay_error(explanation: Explanation, row: Row) -> float | None:
    """The largest difference of the replayed map to the stored one, both in [0, 1]; None within the codec's error.

    Raises UnreconciledError if the stored map is damaged.
    """
    error = float(np.abs(in_unit_range(explanation.saliency_hw) - map_of(row)).max())
    return error if not error <= MAX_ERROR + ROUNDING else None


def in_unit_range(saliency_hw: Map) -> Map:
    """The map, scaled to [0, 1]."""
    return minmax(saliency_hw.astype(np.float32).astype(np.float64))
