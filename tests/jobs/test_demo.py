"""The demo through a real bucket: real weights, real photographs, real pictures."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.demo import PHOTOGRAPHS
from tests.jobs.jobs_of import ROOT

pytestmark = pytest.mark.servers


@pytest.mark.timeout(600)
def test_the_demo_through_a_bucket(tmp_path):
    from PIL import Image

    program = [sys.executable, "-m", "jobs", "demo", "--bucket", "--output", tmp_path / "demo"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)  # as users run it: fast
    assert done.returncode == 0, done.stderr
    for said in ("Egyptian cat", "espresso", "6 of 6 committed", "masked forwards/s", "SeaweedFS"):
        assert said in done.stdout
    assert "Traceback" not in done.stderr
    pictures = {path.stem for path in (tmp_path / "demo" / "pictures").glob("*.png")}
    assert pictures == {Path(name).stem for name in PHOTOGRAPHS} | {"contact-sheet"}
    with Image.open(tmp_path / "demo" / "pictures" / "contact-sheet.png") as sheet:
        assert sheet.width > 1300
    assert (tmp_path / "demo" / "bucket").is_dir()
