"""What this machine has, and what each missing piece costs. Every line is the result of a check."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from rlx.machine import DRAWING, OFFSCREEN, available_memory, draws, menagerie_path, mib, usable_cores, versions


def examine() -> Iterator[str]:
    """The report, line by line, as the checks end."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions", check_versions),
        ("devices", check_devices),
        ("processors", check_processors),
        ("memory", check_memory),
        ("disk", check_disk),
        ("rendering", check_rendering),
        ("warp", check_warp),
        ("robot models", check_robot_models),
        ("wandb", check_wandb),
        ("compile cache", check_compile_cache),
    ]
    for name, check in checks:
        try:
            text = check()
        except Exception as error:  # a broken installation is what this command is for
            text = f"FAILS: {type(error).__name__}: {error}"
        yield f"{name:<14}{text}"


def check_versions() -> str:
    return ", ".join(f"{name} {version}" for name, version in versions().items())


def check_devices() -> str:
    """Runs a sum on every device: one that is listed may still not work."""
    import jax

    devices = jax.devices()
    for device in devices:
        total = float(jax.device_put(jax.numpy.arange(4.0), device).sum())
        if total != 6.0:
            return f"FAILS: {device} adds 0 + 1 + 2 + 3 to {total}"
    kinds = {device.device_kind for device in devices}
    text = f"{len(devices)} x {', '.join(sorted(kinds))} ({jax.default_backend()})"
    if jax.default_backend() != "cpu":
        return text
    nvidia = shutil.which("nvidia-smi") is not None
    cure = (
        "jax has no CUDA here: pip install 'rlx[cuda]'" if nvidia else "no accelerator: physics runs on the processor"
    )
    return f"{text}; {cure}"


def check_processors() -> str:
    usable, present = usable_cores(), os.cpu_count() or 1
    names = ("OMP_NUM_THREADS", "XLA_FLAGS", "JAX_PLATFORMS")
    limits = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    text = f"{usable} of {present} cores usable"
    if usable < 4:
        text += "; rollouts on the processor scale with cores: expect minutes for small tasks, hours for humanoids"
    return "; ".join([text, *limits])


def check_memory() -> str:
    free = available_memory()
    if free is None:
        return "unknown: neither /proc/meminfo nor a container says"
    return f"{mib(free)} available" + ("" if free > 2**32 else "; compiling a humanoid needs about 4 GiB")


def check_disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return f"{free:.1f} GiB free in {Path.cwd()}" + ("" if free > 2 else "; checkpoints stop when it is full")


def check_rendering() -> str:
    """Draws as MuJoCo would without a screen."""
    chosen = os.environ.get("MUJOCO_GL", "")
    setting = f"MUJOCO_GL={chosen}" if chosen else "MUJOCO_GL is not set"
    if chosen in ("off", "disable", "disabled", "0", "false"):
        return f"{setting}: no videos"
    if chosen and chosen not in OFFSCREEN:
        return f"{setting}: draws where there is a screen"
    ways = [chosen] if chosen else list(OFFSCREEN)
    found = [way for way in ways if draws(way)]
    if not found:
        return f"{setting}; {' and '.join(ways)} cannot draw here: training works, videos may not. {DRAWING}"
    return f"{setting}; draws without a screen: {', '.join(found)}"


def check_warp() -> str:
    if importlib.util.find_spec("warp") is None:
        return "missing: on CUDA physics runs in XLA, some times slower in scenes with contacts"
    return f"{importlib.metadata.version('warp-lang')} (made for CUDA: elsewhere it is slow)"


def check_robot_models() -> str:
    """Playground's locomotion and manipulation tasks keep their models apart from the package."""
    if importlib.util.find_spec("mujoco_playground") is None:
        return "mujoco_playground is missing: no playground/* environments"
    folder, chosen = menagerie_path(), os.environ.get("RLX_MENAGERIE_PATH")
    if folder.is_dir():
        return f"in {folder}"
    tasks = "playground's locomotion and manipulation tasks"
    if chosen:
        return f"RLX_MENAGERIE_PATH={chosen} is no directory: {tasks} cannot be built"
    return f"not downloaded: {tasks} need a copy of mujoco_menagerie, in RLX_MENAGERIE_PATH"


def check_wandb() -> str:
    if importlib.util.find_spec("wandb") is None:
        return "missing: metrics go to metrics.jsonl and TensorBoard alone (pip install 'rlx[wandb]')"
    return importlib.metadata.version("wandb")


def check_compile_cache() -> str:
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not folder:
        return "off: every run compiles anew (set JAX_COMPILATION_CACHE_DIR to a folder)"
    path = Path(folder).absolute()
    writable = os.access(next(p for p in (path, *path.parents) if p.exists()), os.W_OK)
    return folder + ("" if writable else ": not writable, so every run compiles anew")
