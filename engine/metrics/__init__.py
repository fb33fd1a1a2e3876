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

MASKED: Mapping[str, Callable[..., MaskedMetric]] = {
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

OF_MAPS: Mapping[str, Callable[[], MapMetric]] = {"complexity": Complexity}
"""Metrics that read the map alone."""
