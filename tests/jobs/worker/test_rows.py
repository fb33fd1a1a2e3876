"""Opening an output to read it back."""

import pytest

from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.plan import load_plan
from blocksight.jobs.worker.rows import all_rows, existing_output
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import rows_in, run_here
from tests.jobs.tiny import folder_of_images


def test_an_output_opens_by_its_name(tmp_path):
    run_here(folder_of_images(tmp_path / "in"), tmp_path / "out")
    opened = existing_output(str(tmp_path / "out"))
    assert opened.name == str(tmp_path / "out")
    assert opened.plan == load_plan(LocalStore(tmp_path / "out"))
    assert list(all_rows(opened.store, opened.plan)) == rows_in(LocalStore(tmp_path / "out"))


def test_a_folder_that_holds_none_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"no blocksight output in {tmp_path}"):
        existing_output(str(tmp_path))
