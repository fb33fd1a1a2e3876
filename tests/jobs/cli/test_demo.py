"""The demo through a real bucket: real weights, real photographs, real pictures."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.jobs_of import ROOT

pytestmark = pytest.mark.servers


SOME = ("chelsea.png", "coffee.png")
DEMO = f"""
import sys
from blocksight.jobs.cli import main as cli; from blocksight.jobs.bench import photographs
photographs.PHOTOGRAPHS = {SOME}
sys.argv[1:] = ["demo", "--bucket", "--output", sys.argv[1]]
cli.main()
"""


def test_the_demo_through_a_bucket(tmp_path):
    """Two of its photographs; masks are scored as users have it."""
    from PIL import Image

    program = [sys.executable, "-c", DEMO, tmp_path / "demo"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for said in ("Egyptian cat", "espresso", "2 of 2 committed", "masked forwards/s", "SeaweedFS"):
        assert said in done.stdout
    assert "Traceback" not in done.stderr
    pictures = {path.stem for path in (tmp_path / "demo" / "pictures").glob("*.png")}
    assert pictures == {Path(name).stem for name in SOME} | {"contact-sheet"}
    with Image.open(tmp_path / "demo" / "pictures" / "contact-sheet.png") as sheet:
        assert sheet.width > 800
    assert (tmp_path / "demo" / "bucket").is_dir()
