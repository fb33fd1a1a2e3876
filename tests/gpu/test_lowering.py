"""Inductor and Triton make machine code for each compute capability that the READMEs name, without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.lowering import CAPABILITIES, reason_to_skip

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_are_compiled_for_each_capability():
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.gpu.lowering"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [one["capability"] for one in found] == [f"{major}.{minor}" for major, minor in CAPABILITIES]
    assert all(one["kernels"] > 0 and one["machine_code_bytes"] > 0 for one in found), found


def test_the_reason_to_skip_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.version.cuda", None)
    assert "without CUDA" in str(reason_to_skip())
