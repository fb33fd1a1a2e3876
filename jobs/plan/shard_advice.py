"""Advises shards for a bucket with very many loose images: each image is a request, and a prefix gives few a second."""

from blocksight.jobs.plan.text import counted
from blocksight.storage.stores.locations import S3

MANY_IMAGES = 1_000_000
"""Loose images from which shards are advised."""
GETS_OF_A_PREFIX = 5_500
"""GET requests a second that S3 serves for one prefix before it divides it, as its documentation says."""

SHARD_COMMAND = (
    r"""find . -type f -printf '%P\n' | LC_ALL=C sort | split -l 10000 -a 6 --filter """
    r"""'tar -cf ../shards/$FILE.tar --transform "s,\([^/]*\)/\([^/]*\)$,label=\1/\2," -T -' - part-"""
)
"""Run in the images' folder with GNU tools: writes shards of 10,000 images, whose class folders stay labels."""


def shard_advice(
    data: str, num_images: int, seconds_per_record: float, num_workers: int, *, many: int = MANY_IMAGES
) -> str | None:
    """One sentence on the requests that so many loose images cost, and the command that makes shards of them.

    `seconds_per_record`: of one worker. None for fewer images than `many`, and for a local folder.
    """
    if num_images < many or not data.startswith(S3):
        return None
    wanted = num_workers / seconds_per_record
    return (
        f"{counted(num_images, 'loose image')}: about {wanted:,.0f} GET/s wanted at the planned speed, and one prefix "
        f"gives about {GETS_OF_A_PREFIX:,}; tar shards cost fewer: in a copy of the folder, beside an empty folder "
        f"shards, run {SHARD_COMMAND} and put the shards into the bucket"
    )
