"""A job is resumed only with the weights that it began with: other bytes are another job."""

import pytest

from blocksight.jobs.plan.config import Execution
from blocksight.jobs.plan.plan import DriftError, ensure_plan
from blocksight.jobs.run.job import plan_job
from blocksight.storage.stores.store import StoreError
from tests.jobs.jobs_of import config_of
from tests.jobs.tiny import folder_of_images


def test_weights_that_change_under_one_name_are_refused(tmp_path):
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"first")
    data = folder_of_images(tmp_path / "in", 1, bad=False)
    config, execution = config_of(data, tmp_path / "out", weights=str(weights)), Execution(runner="local")
    ensure_plan(*plan_job(config, execution))
    _, plan = plan_job(config, execution)
    weights.write_bytes(b"other")
    with pytest.raises(DriftError, match="weights: "):
        plan_job(config, execution)
    weights.write_bytes(b"first")
    assert plan_job(config, execution)[1].fingerprint == plan.fingerprint


def test_a_plan_that_exists_and_cannot_be_read_is_no_traceback(tmp_path):
    """A dangling link: nothing can be read there, and nothing created."""
    (tmp_path / "out/_job/plan").mkdir(parents=True)
    (tmp_path / "out/_job/plan/plan.json").symlink_to(tmp_path / "nowhere")
    config = config_of(folder_of_images(tmp_path / "in", 1, bad=False), tmp_path / "out")
    with pytest.raises(StoreError, match=r"plan\.json exists and cannot be read"):
        ensure_plan(*plan_job(config, Execution(runner="local")))
