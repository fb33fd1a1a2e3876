"""Upper limits for one record, one shard, one stored map and one document. Every reader takes its bounds from here."""

MAX_IMAGE_BYTES = 256 << 20
"""Encoded bytes of one image. A larger one is rejected before its body is read."""

MAX_IMAGE_PIXELS = 89_478_485
"""Width times height of one image, read from its header. Pillow's own bound: 268 MB of RGB."""

MAX_DECODE_SECONDS = 30.0
"""CPU time for decoding one image."""

MAX_JPEG_SEGMENTS = 1 << 14
"""Segments of one JPEG before its pixels. Pillow keeps an object for each."""

MAX_TIFF_PIECES = 1 << 16
"""Strips or tiles of one TIFF. Pillow keeps an object for each."""

MAX_MAP_SIDE = 4096
"""Height or width of one stored map, in pixels."""

MAX_TAR_HEADER_BYTES = 1 << 20
"""One PAX or GNU header of a tar shard. It is held in memory."""

MAX_MEMBER_NAME_BYTES = 512
"""The name of one tar member."""

MAX_LABEL_BYTES = 1024
"""The label of one record."""

MAX_LABEL_FILE_BYTES = 256 << 20
"""A file of labels. It is read whole."""

MAX_LABEL_ROWS = 1_000_000
"""Rows of a file of labels. Each worker holds them, with an index, in about a kilobyte each."""

MAX_INVENTORY_LINE_BYTES = 64 << 10
"""One line of an S3 inventory in CSV. A key has 1,024 bytes at most, three times as many where it is encoded."""

MAX_SHARD_RECORDS = 1_000_000
"""Records of one tar shard. Their keys are held in memory to find duplicates."""

MAX_SIDECARS = 10_000
"""JSON files beside tar shards that are read for the number of records."""

MAX_SIDECAR_BYTES = 4 << 20
"""One such file. A larger one is not read."""

MAX_KEY_BYTES = 4096
"""The key of one row of a table."""

MAX_PARQUET_FOOTER_BYTES = 8 << 20
"""The footer of one Parquet file. Arrow needs up to 240 times as much memory for it."""

MAX_PARQUET_COLUMNS = 10_000
"""Leaf columns of one Parquet file: those inside structs and lists are counted one by one."""

MAX_PAGES_BYTES = 3 * MAX_IMAGE_BYTES // 2
"""Pages of one Parquet row group that are in memory at once, after decompression, dictionaries included.

Arrow and Python copy them up to four times, so reading a Parquet file takes at most 8 times `MAX_IMAGE_BYTES`.
"""

MAX_BATCH_BYTES = MAX_IMAGE_BYTES
"""Rows of a Parquet file that are decoded at once. One row may be larger."""

MAX_FRAGMENT_BYTES = 4 * MAX_IMAGE_BYTES
"""One table of an output, stored and in memory. A unit is planned for 64 MiB."""

MAX_UNFOLDING = 64
"""Bytes in memory per stored byte of the plan's units, of which a whole data set's names are part."""

MAX_LEARNED_BYTES = 1 << 30
"""The stored first pass of a method. It holds tensors, which need as much memory."""

MAX_UNPLANNED_RECORDS = 4096
"""Records of a table that was unreadable when the plan was made. They form one unit, and are in memory at once."""

MAX_DOCUMENT_BYTES = 16 << 20
"""One JSON document of an output: plan, model or audit. Parsed, it needs up to 25 times as much memory."""

MAX_MODEL_SETTING_BYTES = 64 << 20
"""Of one settings file of a model's folder; the tokenizer of SigLIP 2 has 34 MB."""

MAX_MODEL_FILE_BYTES = 2 << 20
"""`model.toml` beside the weights, or a file of class names."""

MAX_RECEIPT_BYTES = 1 << 20
"""A receipt or a dead letter. Many are read at once."""

MAX_RECEIPT_BATCH_BYTES = 16 << 20
"""Receipts that a driver writes together."""

MAX_METADATA_BYTES = 2 << 10
"""User metadata of one object, names and values: the limit of S3."""

MAX_MARKER_BYTES = 16 << 10
"""The marker of one attempt."""

MAX_MANIFEST_BYTES_PER_UNIT = 2 << 10
"""The final manifest's share for one unit."""

MAX_CLASSES = 1 << 20
"""Classes of a model. An export holds a number for each."""

MAX_COCO_BYTES = 64 << 20
"""One document of regions in COCO's form: it is held in memory, and the next one begins beyond it."""
