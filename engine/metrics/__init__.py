"""Metrics by name."""

from collections.abc import Callable, Mapping

from blocksight.engine.metrics.complexity import Complexity
from blocksight.engine.metrics.faithfulness import (
    Deletion,
    Density,
    Insertion,
    KeepTop,
    LevelDrop,
    MaskedMetric,
    Negative,
    Positive,
)
from blocksight.engine.metrics.metric import MapMetric
from blocksight.engine.metrics.road import LeastRelevantFirst, MostRelevantFirst
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.scoring.dropping import make_scorer
from blocksight.engine.scoring.forward import Forward
from blocksight.engine.scoring.perturb import DROP

MASKED: Mapping[str, type[MaskedMetric]] = {
    "faithfulness": KeepTop,
    "levels": LevelDrop,
    "insertion": Insertion,
    "deletion": Deletion,
    "pos": Positive,
    "neg": Negative,
    "road_morf": MostRelevantFirst,
    "road_lerf": LeastRelevantFirst,
    "density": Density,
}
"""Metrics that call the model, through a scorer."""


def masked_metrics(
    adapter: ModelAdapter, baseline: str, batch_size: int, forward: Forward | None = None
) -> list[MaskedMetric]:
    """All of `MASKED` with this baseline; with `drop`, those that paint pixels in shares take `zero`.

    Raises ModelError if the model cannot do without tokens.
    """
    scorer = make_scorer(adapter, baseline, batch_size, forward)
    painted = "zero" if baseline == DROP else baseline
    painter = make_scorer(adapter, painted, batch_size, forward)
    return [make(painter, painted) if make.is_painted else make(scorer, baseline) for make in MASKED.values()]


OF_MAPS: Mapping[str, Callable[[], MapMetric]] = {"complexity": Complexity}
"""Metrics that read the map alone."""
