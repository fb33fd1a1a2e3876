"""The demo with real weights, real photographs and a real bucket."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from blocksight.jobs.bench import photographs
from blocksight.jobs.cli import demo
from blocksight.jobs.plan.config import Execution, JobConfig
from tests.jobs.jobs_of import ROOT, blocksight

pytestmark = pytest.mark.servers

SOME = ("chelsea.png", "coffee.png")
DEMO = f"""
import sys
from blocksight.jobs.cli import main as cli; from blocksight.jobs.bench import photographs
photographs.PHOTOGRAPHS = {SOME}
sys.argv[1:] = ["demo", "--bucket", "--output", sys.argv[1]]
cli.main()
"""


@pytest.mark.sweep
def test_the_demo_as_users_run_it(tmp_path):
    """The demo with two photographs, on Ray, with OpenVINO."""
    program = [sys.executable, "-c", DEMO, tmp_path / "demo"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert_shown(done, tmp_path / "demo", num_units=2)


def test_the_demo_through_a_bucket(tmp_path, monkeypatch):
    """The demo in this process, with fewer masks and eager PyTorch."""
    monkeypatch.setattr(photographs, "PHOTOGRAPHS", SOME)
    monkeypatch.setattr(demo, "Execution", partial(Execution, runner="local"))
    monkeypatch.setattr(demo, "JobConfig", partial(JobConfig, parameters={"mu": 0.9}))
    assert_shown(blocksight("demo", "--bucket", "--output", tmp_path / "demo"), tmp_path / "demo", num_units=1)


def assert_shown(done, folder, num_units):
    assert done.returncode == 0, done.stderr
    for word in (
        "Egyptian cat",
        "espresso",
        f"{num_units} of {num_units} committed",
        "a second of a worker",
        "SeaweedFS",
    ):
        assert word in done.stdout
    assert "Traceback" not in done.stderr
    pictures = {path.stem for path in (folder / "pictures").glob("*.png")}
    assert pictures == {Path(name).stem for name in SOME} | {"contact-sheet"}
    with Image.open(folder / "pictures" / "contact-sheet.png") as sheet:
        assert sheet.width > 800
    assert (folder / "bucket").is_dir()
