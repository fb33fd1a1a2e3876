"""Explains a record of an output again, with the model, and in the way, that the output was made with."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blocksight.engine.catalog.composition import blocks_of, method_of
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.explanation import Explanation
from blocksight.engine.model.targets import ClassProbability
from blocksight.engine.saliency import Map, minmax
from blocksight.engine.scoring.probe import plain_setting
from blocksight.jobs.explain.fidelity import POOR_MAP
from blocksight.jobs.explain.forward_pass import stored_forward
from blocksight.jobs.explain.learned import stored_state, wanted_images
from blocksight.jobs.explain.step import load, make_explainer, model_facts, seed_of
from blocksight.jobs.ledger.output import map_of
from blocksight.jobs.plan.config import ConfigError, JobConfig, load_config
from blocksight.jobs.plan.context import sha256_of, weights_bytes
from blocksight.jobs.plan.plan import Plan, refuse_drift, refuse_other_model
from blocksight.jobs.plan.stored_config import NamedAgain, config_of
from blocksight.storage.images.decode import fit
from blocksight.storage.outputs.map_codec import MAX_ERROR
from blocksight.storage.outputs.pictures import Pixels
from blocksight.storage.stores.store import ObjectStore

ROUNDING = 1e-6
"""Of a map in [0, 1], beside the codec's error."""

Row = Mapping[str, Any]


class Again:
    """The model of an output, on the CPU with one thread, as a job has it there."""

    def __init__(self, store: ObjectStore, plan: Plan, named: NamedAgain) -> None:
        """Raises ConfigError where `named` is not what the output was made with, ModelError and StoreError."""
        self.config = config_of(plan, store.uri, named)
        state = weights_bytes(self.config)
        refuse_drift(self.config.identity(sha256_of(state)), plan.identity, "configuration")
        torch.set_num_threads(1)
        self.adapter = load(self.config, state, "cpu", str(Path.cwd()))
        self.learned, _ = stored_state(store, self.config) or (None, None)
        refuse_other_model(store, model_facts(self.adapter, self.config))
        self.forward, self.setting = None, plain_setting("cpu")
        with suppress(ModelError):  # the job ran on another kind of machine: its maps may differ, and that will show
            self.forward, self.setting = stored_forward(store, self.adapter) or (None, self.setting)

    def stored_way(self, row: Row) -> JobConfig:
        """The configuration that made the row's map: where the job chose by record, full SISE or its tenth."""
        in_doubt = row["fidelity"] == "full" and row["fidelity_reason"] != POOR_MAP
        return self.config.in_full() if self.config.level == "auto" and in_doubt else self.config

    def other_way(self, explainer: str) -> JobConfig:
        """The same job by another explainer with its defaults. Raises ConfigError for an unknown name."""
        try:
            looks = blocks_of(method_of(explainer)) != "none"
        except ValueError as error:
            raise ConfigError(str(error)) from error
        asked = {
            **self.config.model_dump(),
            "explainer": explainer,
            "parameters": {},
            "fidelity": "full",
            "blocks": self.config.blocks if looks else (),
        }
        config, _ = load_config(None, asked)
        if wanted_images(config):
            raise ConfigError(
                f"{explainer} learns from many images before it explains one: explain the data by it, and name that "
                "output with --beside"
            )
        return config

    def explanations(self, config: JobConfig, rows: Sequence[Row], pixels: Pixels) -> list[Explanation]:
        """One per row, for the rows of one record; `pixels` is its upright original [H, W, 3]. Raises ModelError."""
        blocks = [block["name"] for block in model_facts(self.adapter, config).blocks]
        explainer = make_explainer(
            self.adapter, config, blocks, self.setting.batch_size, self.forward, state=self.learned
        )
        seen = np.array(fit(pixels, self.adapter.input_size, config.resize))
        inputs = self.adapter.normalise(torch.from_numpy(seen[None]).permute(0, 3, 1, 2))
        target = ClassProbability(torch.tensor([[row["target_index"] for row in rows]]))
        (own,) = explainer.explain(inputs, target, [seed_of(config, rows[0]["key"])])
        return own


def error_of(explanation: Explanation, row: Row) -> float | None:
    """How far the map that was made again lies from the stored one, of maps in [0, 1]; None: as near as the codec.

    Raises UnreconciledError where the stored map is damaged.
    """
    error = float(np.abs(in_unit(explanation.saliency_hw) - map_of(row)).max())
    return error if not error <= MAX_ERROR + ROUNDING else None


def in_unit(saliency_hw: Map) -> Map:
    """The map as it is drawn, scaled to [0, 1]."""
    return minmax(saliency_hw.astype(np.float32).astype(np.float64))
