"""The benchmark scripts run and write what they say; their numbers are not tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "experiments" / "benchmarks" / "throughput.py"


def test_throughput_measures_training_and_the_environment_alone(tmp_path):
    out = tmp_path / "result.json"
    sizes = ["--num-envs", "8", "--unroll-length", "4", "--num-minibatches", "2", "--iterations", "1", "--repeats", "1"]
    subprocess.run([sys.executable, SCRIPT, "probe/lqr", *sizes, "--out", out], check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert result["steps_per_second"]["environment"]["median"] > 0 < result["steps_per_second"]["training"]["median"]
    assert result["command"].startswith("python experiments/benchmarks/throughput.py probe/lqr --num-envs 8 ")
    assert str(tmp_path) not in result["command"]
