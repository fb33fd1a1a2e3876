"""The Arrow schema of the output: one row per record and target, rejected records included."""

import pyarrow as pa

SCHEMA_VERSION = "5"
"""Increase it whenever a column changes its name, type or meaning, or the fragments their places."""
FLAT_VERSIONS = frozenset("1234")
"""The versions whose fragments all lie in one folder."""
RANKS_FROM_0 = "3"
"""The version whose `target_rank` begins at 0, and that has no `label_rank`. Readers add both."""


def _field(name: str, kind: pa.DataType, meaning: str, *, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"meaning": meaning})


BLOCK = pa.struct(
    [
        _field("name", pa.string(), "place in the network", nullable=False),
        _field("candidates", pa.int32(), "feature maps of the block", nullable=False),
        _field(
            "kept",
            pa.int32(),
            "feature maps that passed the selection; 0: the block was left out",
            nullable=False,
        ),
    ]
)

CROP = pa.struct(
    [
        _field("top", pa.int32(), "pixels of the model's input, as the next three", nullable=False),
        _field("left", pa.int32(), "pixels", nullable=False),
        _field("height", pa.int32(), "pixels", nullable=False),
        _field("width", pa.int32(), "pixels", nullable=False),
        _field("score", pa.float64(), "softmax probability of the target on the crop, 0 to 1", nullable=False),
        _field("weight", pa.float64(), "what the crop's map counts, at most 1", nullable=False),
    ]
)

FIXATION = pa.struct(
    [
        _field("row", pa.float64(), "from -1 (top of the model's input) to 1 (bottom)", nullable=False),
        _field("column", pa.float64(), "from -1 (left) to 1 (right)", nullable=False),
        _field(
            "loss", pa.float64(), "cross entropy of the target with this place seen sharply, from 0", nullable=False
        ),
    ]
)

GRID_MAP = pa.struct(
    [
        _field("name", pa.string(), "the block, or the family of baselines, that the map is of", nullable=False),
        _field("value", pa.float64(), "of the metric in selected_by; null where no metric chose"),
        _field("height", pa.int32(), "cells", nullable=False),
        _field("width", pa.int32(), "cells", nullable=False),
        _field("values", pa.list_(pa.float32()), "row by row, linear and unscaled", nullable=False),
    ]
)

METRICS = pa.struct(
    [
        _field("drop", pa.float64(), "percent, 0 to 100, lower is better"),
        _field("increase", pa.bool_(), "the score grew; the share of true is Increase %, higher is better"),
        _field("protocol", pa.string(), "hash of how drop and increase were measured; never average over two"),
    ]
)

SCHEMA = pa.schema(
    [
        _field(
            "key",
            pa.string(),
            "the record's name, unique in the data set save for rejected duplicates",
            nullable=False,
        ),
        _field("shard", pa.string(), "URI of the input object", nullable=False),
        _field("shard_index", pa.int64(), "position of the record in its shard, from 0", nullable=False),
        _field("unit_id", pa.string(), "the piece of work that this fragment commits", nullable=False),
        _field("status", pa.string(), "ok or rejected", nullable=False),
        _field("reject_code", pa.string(), "why there is no map, from a closed list; null where status is ok"),
        _field("reject_stage", pa.string(), "read, decode, explain or encode"),
        _field("error", pa.string(), "one sentence, at most 500 characters"),
        _field("sha256", pa.string(), "of the image's bytes, hex; null where there are none"),
        _field("num_bytes", pa.int64(), "length of the image's bytes"),
        _field(
            "format",
            pa.string(),
            "of the image, by content; with a comma and what is odd: 12 of 16 bits (stretched to the full range), or "
            "nearly black",
        ),
        _field("width", pa.int32(), "pixels, upright"),
        _field("height", pa.int32(), "pixels, upright"),
        _field("label", pa.int32(), "ground-truth class index; null where unknown"),
        _field("label_name", pa.string(), "as the data set writes it"),
        _field("target_index", pa.int32(), "class that is explained; null where the target is of no single class"),
        _field("target_name", pa.string(), "its name; of a sum of classes their names"),
        _field("target_source", pa.string(), "how it was chosen: predicted, label, top or given; expression for a sum"),
        _field(
            "target_rank",
            pa.int32(),
            "place of the target among the model's classes, 1 is the prediction; null where it is none",
        ),
        _field("target", pa.string(), "what is explained, as `--target` writes it: with key the join of outputs"),
        _field("target_formula", pa.string(), "the same for this record, with class numbers alone"),
        _field("label_rank", pa.int32(), "place of the label among them; null where the label is unknown"),
        _field(
            "score",
            pa.float64(),
            "probability of the target on the whole image, 0 to 1; with `--readout identity` the output itself; of a "
            "sum of classes its value",
        ),
        _field("explainer", pa.string(), "registered name"),
        _field("parameters", pa.string(), "hash of the explainer's parameters, the model and its blocks"),
        _field("map", pa.binary(), "saliency map over the model's input, codec below"),
        _field("map_codec", pa.string(), "png-u8: 8-bit grey PNG, value / 255 in [0, 1], error at most 1/510"),
        _field("map_height", pa.int32(), "pixels"),
        _field("map_width", pa.int32(), "pixels"),
        _field("map_low", pa.float64(), "least value before scaling to [0, 1]"),
        _field("map_high", pa.float64(), "greatest value before scaling to [0, 1]"),
        _field("is_flat", pa.bool_(), "the map is constant: it says nothing"),
        _field("is_saturated", pa.bool_(), "more than half of the map lies within 1 % of its greatest value"),
        _field("blocks", pa.list_(BLOCK), "what each block gave, shallow to deep"),
        _field("num_forwards", pa.int32(), "masked forwards made for the record, shared by its targets"),
        _field(
            "score_r2",
            pa.float64(),
            "how well each mask score that was run follows from the others, at most 1; null where none was predicted",
        ),
        _field(
            "map_error",
            pa.float64(),
            "largest predicted relative error of a block map, from 0; null where no score was predicted",
        ),
        _field(
            "fidelity",
            pa.string(),
            "preview, balanced or full: how many of the masks were scored; null for other methods and budgets of "
            "the user's own",
        ),
        _field(
            "fidelity_reason",
            pa.string(),
            "as asked; or, where the job chose: wrong, uncertain, rare, poor map, joined by commas, or sound",
        ),
        _field("metrics", METRICS, "faithfulness of the map"),
        _field(
            "channel_importance",
            pa.list_(pa.float32()),
            "a-fmi: what each feature map of the last block brings the score",
        ),
        _field("crops", pa.list_(CROP), "ucag: the parts that were explained by themselves, row by row"),
        _field("scan_path", pa.list_(FIXATION), "fovex: the places that were looked at, in order"),
        _field(
            "accumulated_maps", pa.list_(GRID_MAP), "daam: the blocks' maps, summed up to each block, shallow to deep"
        ),
        _field("map_family", pa.list_(GRID_MAP), "bee: all candidates for the map, in the order of their draws"),
        _field(
            "selected_by",
            pa.string(),
            "the metric that picked the map among several: never a measure of its quality; null where none did",
        ),
        _field("edge_detector", pa.string(), "feature-cam: hed or scharr, whichever found the edges"),
        _field("map_negative", pa.binary(), "with `--signed` what speaks against the target, as `map`; else null"),
        _field("map_negative_low", pa.float64(), "its least value before scaling to [0, 1], in the units of `map_low`"),
        _field("map_negative_high", pa.float64(), "its greatest value before scaling to [0, 1]"),
    ],
    metadata={"blocksight.schema": SCHEMA_VERSION},
)
"""Columns in order. Facts that differ from run to run (host, times, attempt) are in the receipt instead."""

EVALUATION = pa.schema(
    [
        _field("key", pa.string(), "the record's name", nullable=False),
        _field("shard", pa.string(), "URI of the input object", nullable=False),
        _field("shard_index", pa.int64(), "position of the record in its shard, from 0", nullable=False),
        _field("target_index", pa.int32(), "class that is explained; null where the target is of no single class"),
        _field("target", pa.string(), "what is explained, as in the output's rows"),
        _field("explainer", pa.string(), "registered name, of a control too", nullable=False),
        _field(
            "parameters", pa.string(), "hash of the explainer's parameters, the model and its blocks", nullable=False
        ),
        _field("metric", pa.string(), "registered name", nullable=False),
        _field("protocol", pa.string(), "hash of how it was measured; never average over two", nullable=False),
        _field("value", pa.float64(), "null where the metric is not defined for the map"),
        _field("reason", pa.string(), "why there is no value"),
        _field("curve", pa.list_(pa.float64()), "the points that the value sums up, where it sums up a curve"),
    ],
    metadata={"blocksight.schema": SCHEMA_VERSION},
)
"""Rows of an evaluation: one per map and metric."""

REGION_PART = pa.struct(
    [
        _field("left", pa.int32(), "pixels of the upright original, as the next three", nullable=False),
        _field("top", pa.int32(), "pixels", nullable=False),
        _field("right", pa.int32(), "pixels, one past the last", nullable=False),
        _field("bottom", pa.int32(), "pixels, one past the last", nullable=False),
        _field("pixels", pa.int64(), "area in pixels of the upright original", nullable=False),
        _field("area", pa.float64(), "share of the map's pixels, 0 to 1", nullable=False),
        _field("energy", pa.float64(), "share of the map's sum, 0 to 1", nullable=False),
        _field("counts", pa.string(), "the pixels as COCO's compressed run lengths", nullable=False),
    ]
)

REGIONS = pa.schema(
    [
        _field("key", pa.string(), "the record's name", nullable=False),
        _field("shard", pa.string(), "URI of the input object", nullable=False),
        _field("shard_index", pa.int64(), "position of the record in its shard, from 0", nullable=False),
        _field("target_index", pa.int32(), "class that is explained; null for other targets and rejected records"),
        _field("target", pa.string(), "what is explained, as in the output's rows"),
        _field("target_name", pa.string(), "its name"),
        _field("score", pa.float64(), "of the target, as in the map's row"),
        _field("explainer", pa.string(), "registered name"),
        _field("parameters", pa.string(), "hash of the explainer's parameters, the model and its blocks"),
        _field("width", pa.int32(), "of the upright original, in pixels"),
        _field("height", pa.int32(), "of the upright original, in pixels"),
        _field("threshold", pa.float64(), "least value inside, of the smoothed map scaled to 0..1; null without a map"),
        _field("num_parts", pa.int32(), "connected parts above the threshold, listed or not", nullable=False),
        _field("parts", pa.list_(REGION_PART), "the listed parts, the largest first", nullable=False),
        _field("reason", pa.string(), "why there is no part: the map is flat, or the record was rejected"),
    ],
    metadata={"blocksight.schema": SCHEMA_VERSION},
)
"""Rows of `blocksight regions`: one per row of the output."""

RECORD_COLUMNS = SCHEMA.names[: SCHEMA.names.index("label_name") + 1]
"""The columns of every record, explained or not."""

PRODUCT_COLUMNS = SCHEMA.names[SCHEMA.names.index("channel_importance") : SCHEMA.names.index("edge_detector") + 1]
"""Columns with a method's other results: lists that may hold thousands of numbers per row, and facts about them."""

REJECTED = "rejected"
OK = "ok"
MAX_ERROR_LENGTH = 500
