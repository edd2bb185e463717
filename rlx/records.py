"""What config.json holds of a run, and whether a run that goes on is still the one that it describes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from rlx import external
from rlx.algorithm import Data, Policy
from rlx.environment import Environment
from rlx.errors import UserError, require
from rlx.files import write_atomically
from rlx.logging import Progress
from rlx.machine import commit, usable_cores, versions
from rlx.run_directory import RunDirectory
from rlx.schedule import Schedule

SHIPPED = "rlx.algorithms."
GIVEN = "a policy given in Python"  # what such a run started from: nothing else has it


def describe(
    algorithm: Any,
    env: Environment,
    train_config: Any,
    config: Any,
    schedule: Schedule,
    data: Data | None = None,
    init_policy: Policy | None = None,
) -> dict[str, Any]:
    """What config.json holds of a run that is begun from Python; the command line adds what builds own work again."""
    return {
        **rebuilding(algorithm, env),
        **({"data": data.record} if data else {}),
        **({} if init_policy is None else {"from": GIVEN}),
        "algorithm": getattr(algorithm, "__name__", type(algorithm).__name__).rpartition(".")[2],
        "env": env.spec.name or type(env).__name__,
        "physics": env.spec.physics or "auto",  # as the command line calls it where there is no choice
        "train": dataclasses.asdict(train_config),
        "algo": dataclasses.asdict(config),
        "plan": schedule.describe(),
        "commit": commit(),
        "machine": {
            "platform": jax.default_backend(),
            "devices": [device.device_kind for device in jax.devices()],
            "devices_used": schedule.num_devices,
            "processes": jax.process_count(),
            "cores": usable_cores(),
            "deterministic": env.spec.physics != "warp",
            "matmul_precision": str(jax.config.values["jax_default_matmul_precision"] or "default"),
        },
    }


def rebuilding(algorithm: Any, env: Environment) -> dict[str, Any]:
    """What lets the command line build both again; empty where it cannot, as of an environment that was wrapped.

    Work of one's own is found by its file. Overrides that name a file, or that JSON does not know, are left to Python.
    """
    name, env_name = reference_of(algorithm), env.spec.name
    overrides = getattr(env, "made", None)  # by `envs.make`, of that very object
    if not name or overrides is None or any(isinstance(value, str) and ":" in value for value in overrides.values()):
        return {}
    env_name = external.canonical(env_name) if ":" in env_name else env_name
    ships = getattr(algorithm, "__name__", "").startswith(SHIPPED)
    own = {"algorithm": "" if ships else name, "env": env_name if ":" in env_name else ""}
    try:
        files = {part: external.fingerprint(path, part) for part, path in own.items() if path}
        found = {"env_overrides": json.loads(json.dumps(overrides)), "files": files}
    except (TypeError, UserError):
        return {}
    return {**found, "built_from": {"algorithm": name, "env": env_name}}


def reference_of(algorithm: Any) -> str:
    """An algorithm's module as the command line names it; empty for what is none."""
    name, file = getattr(algorithm, "__name__", ""), getattr(algorithm, "__file__", None)
    if name.startswith(SHIPPED):
        return name.removeprefix(SHIPPED)
    if name == "__main__" or not file:
        return ""
    return name if "." in name else str(Path(file).absolute())  # a package's module imports its neighbours


def note_resume(directory: RunDirectory, progress: Progress) -> None:
    """Says, and adds to config.json as "resumed", that a run goes on with other versions or another commit."""
    now: dict[str, Any] = {"versions": versions(), "commit": commit()}
    earlier = [directory.config, *directory.config.get("resumed", [])][-1]
    old, new = earlier["versions"], now["versions"]
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    other = [f"{name} {old.get(name, 'missing')} then, {new.get(name, 'missing')} now" for name in changed]
    if earlier.get("commit") not in (None, now["commit"]):
        other.append(f"commit {earlier['commit']} then, {now['commit']} now")
    if other:
        progress.message(f"versions differ, so results may too: {'; '.join(other)}")
        directory.config["resumed"] = [*directory.config.get("resumed", []), now]
        write_atomically(directory.path / "config.json", json.dumps(directory.config, indent=2) + "\n")


def check_same_settings(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises UserError where a run is to be resumed with other settings than it was begun with."""
    given = json.loads(json.dumps(given))
    for name in ("algorithm", "env", "physics"):
        was = recorded.get(name) or "auto"  # early development versions recorded no engine where there is no choice
        require(was == given[name], name, given[name], f"the run to resume is of {was!r}")
    was, now = ([(d["sha256"], d["share"]) for d in entry.get("data", ())] for entry in (recorded, given))
    require(was == now, "data", now, f"the run to resume learns from other data: {was}")
    for part in ("train", "algo", "plan"):
        for name, value in given[part].items():
            if part == "train" and name in ("num_devices", "split"):
                continue  # they decide roundings, and may have to be others
            old = recorded.get(part, {}).get(name, value)
            require(old == value, f"{part}.{name}", value, f"the run to resume was begun with {old!r}")


def say_other_devices(recorded: Mapping[str, Any], given: Mapping[str, Any], progress: Progress) -> None:
    """One line where a run goes on on another number of devices."""
    was, now = (entry["machine"].get("devices_used", 1) for entry in (recorded, given))
    if was != now:
        progress.message(f"begun on {was} devices, goes on on {now}: results may differ in their last digits")
