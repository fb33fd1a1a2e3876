"""Limits: what one record, one shard and one stored map may cost at most. Every reader takes its bounds from here."""

MAX_IMAGE_BYTES = 256 << 20
"""Encoded bytes of one image. A larger one is rejected before its body is read."""

MAX_IMAGE_PIXELS = 89_478_485
"""Width times height of one image, read from its header; Pillow's own bound, 268 MB of RGB."""

MAX_DECODE_SECONDS = 30.0
"""Time for decoding one image."""

MAX_MAP_SIDE = 4096
"""Height or width of one stored map, in pixels."""

MAX_TAR_HEADER_BYTES = 1 << 20
"""One PAX or GNU header of a tar shard: it is held in memory."""

MAX_MEMBER_NAME_BYTES = 512
"""The name of one tar member."""

MAX_LABEL_BYTES = 1024
"""The label of one record."""

MAX_SHARD_RECORDS = 1_000_000
"""Records of one tar shard: their keys are held in memory to find duplicates."""
