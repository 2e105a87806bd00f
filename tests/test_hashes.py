"""Refactoring changes no bit of what is written: a subset of `scripts/conversion_hashes.py`, which has all."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "conversion_hashes.py"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="recorded with instructions that every x86 processor has")
@pytest.mark.parametrize("only", ["coactivation-closed-form-S3A3E8", "specialists-closed-form-S2A1E6", "finetune"])
def test_weights_are_those_recorded(only):
    done = subprocess.run([sys.executable, SCRIPT, "--only", only], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 as recorded" in done.stdout
