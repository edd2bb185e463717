"""Several devices: the tests proper are in tests/eight_devices.py, for a process has its devices from its start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(marks: str) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, "tests/eight_devices.py"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags})
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]


def test_eight_devices():
    run("not slow")


@pytest.mark.slow
def test_eight_devices_at_length():
    run("slow")
