"""Settings of jax for every test and for every process that a test starts: hence the environment, not jax.config."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"


def pytest_configure(config):
    """Half of the time of these tests is XLA's, on programs that run for milliseconds; not so of the slow ones.

    An XLA that does not know a flag says so and ends the process.
    """
    if config.option.markexpr != "slow":
        quick = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
        os.environ.setdefault("XLA_FLAGS", quick)


def pytest_collection_modifyitems(items):
    """The longest files first: as the last ones they would leave the other processes idle."""
    items.sort(key=lambda item: item.path.stem not in ("test_sharding", "test_kill", "test_learning"))


@pytest.fixture(scope="session", autouse=True)
def one_device():
    """JAX begins before a command line of many runs in this process could give it more CPU devices."""
    import jax

    jax.devices()
