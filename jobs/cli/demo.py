"""The demo: explains photographs that come with a package, and draws the maps."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from blocksight.cluster.bucket import EmbeddedBucket
from blocksight.jobs.bench.photographs import photographs
from blocksight.jobs.cli.job_tables import outcome_table
from blocksight.jobs.cli.record_tables import kept_text, meanings
from blocksight.jobs.plan.config import Execution, JobConfig
from blocksight.jobs.plan.text import percent, printable
from blocksight.jobs.run.job import run_job
from blocksight.jobs.worker.rows import all_rows, picture
from blocksight.storage.outputs.file_names import file_name
from blocksight.storage.outputs.pictures import Tile, contact_sheet, overlay, side_by_side
from blocksight.storage.stores.opening import open_store
from blocksight.storage.stores.retrying import PatientStore
from blocksight.storage.stores.store import AlreadyExistsError, ObjectStore

SHEET_COLUMNS = 3
COLUMNS = ("image", "the model sees", "probability", "with the top 15 %", "model runs")


def run_demo(folder: Path, *, through_bucket: bool, console: Console) -> None:
    """Explains the photographs into `folder` and writes overlays and a contact sheet there.

    With `through_bucket`, an S3 server on loopback holds photographs and result while the demo runs; its data are in
    the folder too. A second run finds the finished work and only draws the pictures.
    """
    files = photographs()
    with _root(folder, through_bucket, console) as (root, endpoint_url):
        job = JobConfig(data=f"{root}/photographs", output=f"{root}/maps", endpoint_url=endpoint_url)
        _upload(files, PatientStore(open_store(job.data, endpoint_url)))
        outcome = run_job(job, Execution(), console)
        store, plan = PatientStore(open_store(job.output, endpoint_url)), outcome.job_state.plan
        rows = [row for row in all_rows(store, plan) if row["map"] is not None]
        pictures = folder / "pictures"
        pictures.mkdir(parents=True, exist_ok=True)
        tiles = []
        table = Table()
        for name in COLUMNS:
            table.add_column(name, overflow="fold")
        for row in rows:
            shown = picture(plan, endpoint_url, row)
            side_by_side(shown.pixels, shown.saliency_hw).save(pictures / f"{file_name(Path(row['key']).stem)}.png")
            caption = f"{row['target_name']}, {percent(row['score'])} sure\n{row['key']}"
            tiles.append(Tile(overlay(shown.pixels, shown.saliency_hw), caption))
            table.add_row(printable(row["key"]), *_cells(row))
    contact_sheet(tiles, SHEET_COLUMNS).save(pictures / "contact-sheet.png")
    console.print(table)
    console.print(meanings(COLUMNS))
    console.print(outcome_table(job, outcome))
    console.print(f"pictures: {printable(pictures)}/ (begin with contact-sheet.png)")


@contextmanager
def _root(folder: Path, through_bucket: bool, console: Console) -> Iterator[tuple[str, str | None]]:
    """Yields the place of photographs and maps, and the endpoint: the folder, or a bucket that runs inside."""
    if not through_bucket:
        yield str(folder), None
        return
    with EmbeddedBucket("blocksight-demo", folder / "bucket") as bucket:
        console.print(f"bucket: {bucket.uri} at {bucket.endpoint_url} (SeaweedFS, loopback, stopped afterwards)")
        before = dict(os.environ)
        os.environ.update(bucket.environment)
        try:
            yield bucket.uri, bucket.endpoint_url
        finally:
            os.environ.clear()
            os.environ.update(before)


def _upload(photographs: dict[str, bytes], store: ObjectStore) -> None:
    """Uploads the photographs that are missing. Existing ones stay, because the plan holds their versions."""
    for name, body in photographs.items():
        try:
            store.create(name, body)
        except AlreadyExistsError:
            continue


def _cells(row: Mapping[str, Any]) -> list[str]:
    """The values of `COLUMNS` after the image."""
    return [printable(row["target_name"]), percent(row["score"]), kept_text(row), f"{row['num_forwards']:,}"]
