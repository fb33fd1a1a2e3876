"""The advice to make shards: when it is given, its figures, and that its command makes shards that are read alike."""

import subprocess
from functools import partial

import pytest

from blocksight.jobs.plan import plan
from blocksight.jobs.plan import shard_advice as advice
from blocksight.jobs.plan.config import load_config
from blocksight.jobs.plan.estimate import MeasuredRate
from blocksight.jobs.plan.units import Workforce
from blocksight.storage.inputs.loose import read_images
from blocksight.storage.inputs.survey import Layout, Survey, survey
from blocksight.storage.inputs.tars import read_tar
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.store import ObjectInfo
from tests.jobs.tiny import picture


@pytest.mark.parametrize(("data", "count"), [("s3://b/d", 99), ("/data/d", 100)])
def test_no_advice_for_few_images_or_a_local_folder(data, count):
    assert advice.shard_advice(data, count, 0.5, 8, many=100) is None


@pytest.mark.parametrize("count", [99, 100])
def test_a_plan_has_the_advice_from_so_many_images_on(count, monkeypatch):
    monkeypatch.setattr(plan, "shard_advice", partial(advice.shard_advice, many=100))
    config, _ = load_config(None, {"data": "s3://b/d", "output": "out"})
    objects = tuple(ObjectInfo(f"{number}.jpg", 9, "e") for number in range(count))
    found = plan.FoundInput(config, config.identity(None), Survey(Layout.IMAGES, objects, {}), (), None)
    notes = found.cut(Workforce(16, on_gpu=False, rate=MeasuredRate(0.01, "measured"))).notes
    assert [note.partition(" and one")[0] for note in notes] == [
        "100 loose images: about 1,600 GET/s wanted at the planned speed,"
    ] * (count == 100)


def test_the_advice_says_the_requests_a_second_and_the_command():
    said = advice.shard_advice("s3://b/d", 1_234_567, 0.001, 8)
    assert said is not None
    assert said.startswith(
        "1,234,567 loose images: about 8,000 GET/s wanted at the planned speed, and one prefix gives"
    )
    assert "about 5,500" in said
    assert advice.SHARD_COMMAND in said


def test_the_command_makes_shards_that_hold_the_same_records(tmp_path):
    images, shards = tmp_path / "images", tmp_path / "shards"
    shards.mkdir()
    for name in ("cat/1.png", "cat/a b.png", "dog/é.png"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(picture(1))
    command = advice.SHARD_COMMAND.replace("10000", "2")
    subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=images, check=True, timeout=60)
    loose, packed = LocalStore(str(images)), LocalStore(str(shards))
    found = survey(packed)
    assert (found.layout, len(found.objects)) == (Layout.TAR, 2)
    records = [one for info in found.objects for one in read_tar(packed, info, 0, info.size)]
    wanted = [(one.label, one.data) for one in read_images(loose, survey(loose).objects)]
    assert [(one.label, one.data) for one in records] == wanted
