"""The forward setting of a job: chosen once, kept to by all, and in nobody's way."""

import json
from dataclasses import asdict

import pytest
import torch

from engine.forward import ForwardSetting
from engine.probe import Measured
from jobs import explain, pace, run
from jobs.pace import FORWARD_KEY
from storage.stores import open_store
from tests.jobs.jobs_of import rows_in, run_here
from tests.jobs.tiny import folder_of_images, red

PLAIN = ForwardSetting(batch_size=3)


@pytest.fixture(autouse=True)
def _every_job_probes(monkeypatch):
    monkeypatch.setattr(run, "PROBE_FROM_SECONDS", 0.0)


@pytest.fixture
def probed(monkeypatch):
    """The images that each probe was shown, and PLAIN is what it finds."""
    seen = []

    def probe(adapter, inputs, *, exact, batch_size):
        seen.append(len(inputs))
        return adapter.logits, [Measured(PLAIN, forwards_per_second=1.0)]

    monkeypatch.setattr(pace, "probe", probe)
    return seen


def receipts(output):
    store = open_store(str(output), None)
    return [json.loads(store.read(info.key)) for info in store.list("_job/receipts/")]


def test_the_first_worker_probes_and_the_rest_keep_to_it(tmp_path, probed):
    data = folder_of_images(tmp_path / "data")
    outcome = run_here(data, tmp_path / "maps")
    assert outcome.manifest is not None
    assert len(probed) == 1
    assert 1 <= probed[0] <= pace.IMAGES_TO_PROBE
    written = json.loads(open_store(str(tmp_path / "maps"), None).read(FORWARD_KEY))
    assert written["setting"] == asdict(PLAIN)
    assert {one["forward"] for one in receipts(tmp_path / "maps")} == {str(PLAIN)}


def test_what_stands_is_kept_to_without_a_probe(tmp_path, probed):
    data = folder_of_images(tmp_path / "data")
    store = open_store(str(tmp_path / "maps"), None)
    kept = ForwardSetting(batch_size=5)
    store.create(FORWARD_KEY, json.dumps({"setting": asdict(kept)}).encode())
    run_here(data, tmp_path / "maps")
    assert not probed
    assert {one["forward"] for one in receipts(tmp_path / "maps")} == {str(kept)}


def test_a_machine_that_cannot_leaves_the_units_open_and_rejects_nobody(tmp_path):
    data = folder_of_images(tmp_path / "data", bad=False)
    store = open_store(str(tmp_path / "maps"), None)
    store.create(FORWARD_KEY, json.dumps({"setting": asdict(ForwardSetting("graphed"))}).encode())
    outcome = run_here(data, tmp_path / "maps")
    assert outcome.standing.open_units
    assert not rows_in(store)
    assert "run it on a machine like the one" in outcome.ran.failures[0].error


def test_an_image_that_the_model_cannot_read_is_no_part_of_the_probe(tmp_path, probed):
    data = folder_of_images(tmp_path / "data", count=4, bad=False)
    (data / "ant" / "000.png").write_bytes(red())
    run_here(data, tmp_path / "maps", model="tests.jobs.tiny:make_raising")
    statuses = {row["key"]: row["reject_code"] for row in rows_in(open_store(str(tmp_path / "maps"), None))}
    assert statuses.pop("ant/000.png") == "model_failed"
    assert set(statuses.values()) == {None}
    assert len(probed) == 1


def test_without_an_image_that_can_be_read_nothing_is_settled(tmp_path, probed, monkeypatch):
    monkeypatch.setattr(explain.ExplainStep, "_sound", lambda *_: iter(()))
    outcome = run_here(folder_of_images(tmp_path / "data", count=2, bad=False), tmp_path / "maps")
    assert outcome.manifest is not None
    assert not probed
    assert FORWARD_KEY not in {info.key for info in open_store(str(tmp_path / "maps"), None).list("_job/plan/")}


def test_out_of_memory_halves_and_remembers(tmp_path, probed, monkeypatch):
    monkeypatch.setattr(pace, "IMAGES_TO_PROBE", 1)
    real, failed = explain.ExplainStep._whole, []

    def short(self, unit_input):
        if self.setting.batch_size > 1:
            failed.append((self.setting.batch_size, self.images_per_pass))
            raise torch.OutOfMemoryError("no room")
        return real(self, unit_input)

    monkeypatch.setattr(explain.ExplainStep, "_whole", short)
    outcome = run_here(folder_of_images(tmp_path / "data", bad=False), tmp_path / "maps")
    assert outcome.manifest is not None
    assert failed == [(3, 4)]  # once, for all units
    assert {row["status"] for row in rows_in(open_store(str(tmp_path / "maps"), None))} == {"ok"}
