"""Imports point one way: types <- environment, algorithm <- shared maths <- algorithms; the driver names none."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import rlx
from rlx.algorithms import ALGORITHMS

ROOT = Path(__file__).resolve().parent.parent
BASE = {"rlx.errors", "rlx.types", "rlx.machine"}
CONTRACT = BASE | {"rlx.environment", "rlx.algorithm"}
SHARED = {"returns", "replay", "normalize", "distributions", "networks", "statistics", "minibatches", "comparison"}
SHARED |= {"off_policy", "on_policy", "optimization", "sharding", "actors", "agents", "flow", "diffusion"}
DRIVER = {"training", "rollout", "evaluation", "checkpoint", "checkpoint_store", "compilation", "data", "logging"}
DRIVER |= {
    "epoch",
    "files",
    "footprint",
    "schedule",
    "place",
    "plotting",
    "recording",
    "records",
    "run_directory",
    "signals",
    "video",
    "benchmark",
    "measuring",
    "group",
    "storage",
    "sweep",
}
MEASURED = {"experiments.benchmarks.against_peers", "experiments.benchmarks.sac_updates"}  # beside brax's trainers
DRIVER |= {"data_checks", "data_file", "collection", "rolling", "distributed", "export", "gymnasium", "learners"}
DRIVER |= {"study", "results", "findings", "documents", "pictures", "report"}


def modules(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def imports(path):
    """Full names that a file imports, at any depth: `from rlx import a` is both `rlx` and `rlx.a`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path, package="rlx"):
    """The modules of `package` among a file's imports."""
    existing = {name for name, _ in modules(package)}
    return {name for name in imports(path) if name in existing} - {package}


ALL = dict([*modules("rlx"), *modules("envs")])
SCRIPTS = dict([*ALL.items(), *modules("experiments"), *modules("tests")])


def test_this_test_sees_the_code():
    assert {"rlx.training", "rlx.cli", "rlx.algorithms.ppo"} <= set(ALL)
    assert "rlx.rollout" in own(ALL["rlx.compilation"]) and "rlx.on_policy" in own(ALL["rlx.algorithms.ppo"])


def test_errors_and_types_import_nothing_above_them():
    assert own(ALL["rlx.errors"]) == set()
    assert own(ALL["rlx.types"]) <= {"rlx.errors"}


@pytest.mark.parametrize("name", ["rlx.environment", "rlx.algorithm"])
def test_the_contract_imports_types_alone(name):
    assert own(ALL[name]) <= BASE


@pytest.mark.parametrize("name", sorted(n for n in ALL if n.removeprefix("rlx.") in SHARED))
def test_shared_maths_imports_the_contract_and_shared_maths_alone(name):
    assert own(ALL[name]) <= CONTRACT | {f"rlx.{module}" for module in SHARED}


@pytest.mark.parametrize("name", sorted(n for n in ALL if n.startswith("rlx.algorithms.")))
def test_an_algorithm_imports_no_driver_and_no_other_algorithm(name):
    assert own(ALL[name]) <= CONTRACT | {f"rlx.{module}" for module in SHARED}


@pytest.mark.parametrize("name", sorted(n for n in ALL if n.removeprefix("rlx.") in DRIVER))
def test_the_driver_names_no_algorithm(name):
    assert not {n for n in imports(ALL[name]) if n.startswith("rlx.algorithms")}
    words = {n.value for n in ast.walk(ast.parse(ALL[name].read_text())) if isinstance(n, ast.Constant)}
    assert not words & set(ALGORITHMS)


@pytest.mark.parametrize("name", sorted(n for n in ALL if n.startswith("rlx") and not n.startswith("rlx.cli")))
def test_the_library_imports_no_environment_but_in_the_command_line(name):
    assert not {n for n in imports(ALL[name]) if n.partition(".")[0] == "envs"}


@pytest.mark.parametrize("name", sorted(n for n in ALL if n.partition(".")[0] == "envs"))
def test_environments_import_the_contract_alone(name):
    assert own(ALL[name]) <= CONTRACT | ({"rlx.external"} if name == "envs.external" else set())


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - MEASURED))
def test_the_training_code_of_brax_is_imported_nowhere_but_where_it_is_measured(name):
    found = imports(SCRIPTS[name])
    assert not {n for n in found if n.startswith("brax.training")}
    assert not {n for n in found if n.startswith("mujoco_playground.") and "wrapper" in n and "training" in n}


def test_importing_rlx_loads_nothing_else():
    code = "import json, sys; import rlx; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "rlx" in loaded and not loaded & {"jax", "numpy", "flax", "envs", "tyro", "rich"}


@pytest.mark.parametrize("name", [*rlx.__all__, *ALGORITHMS])
def test_what_rlx_exports_exists(name):
    assert getattr(rlx, name).__name__.rpartition(".")[2] == name
    assert name in dir(rlx)


def test_another_attribute_of_rlx_does_not_exist():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        rlx.trian  # noqa: B018
