"""What this machine and its Python have. Free of jax."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

PACKAGES = "rlx jax jaxlib flax optax numpy orbax-checkpoint brax mujoco mujoco-mjx playground gymnax".split()


def usable_cores() -> int:
    """Cores that this process may run on; a container may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of this source tree, with "+" where the library differs from it; empty where there is none to ask."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        found = _git(root, "rev-parse", "--short=12", "HEAD")
        return found + "+" * bool(_git(root, "status", "--porcelain", "--", "rlx", "envs"))
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def menagerie_path(chosen: str | None = None) -> Path:
    """Where Playground looks for robot models: `chosen`, else RLX_MENAGERIE_PATH, else in its own package."""
    chosen = chosen or os.environ.get("RLX_MENAGERIE_PATH")
    if chosen:
        return Path(chosen).expanduser()
    spec = importlib.util.find_spec("mujoco_playground")
    package = Path(spec.origin).parent if spec and spec.origin else Path()
    return package / "external_deps" / "mujoco_menagerie"


def available_memory() -> int | None:
    """Bytes that this process may still take; a container may have less than the machine. None if nothing says."""
    found = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 2**10)
    with contextlib.suppress(OSError, ValueError):
        cgroup = Path("/sys/fs/cgroup")
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        used = int((cgroup / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))  # it can be freed
        found.append(int((cgroup / "memory.max").read_text()) - used)
    return min(found, default=None)


def mib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


OFFSCREEN = ("egl", "osmesa")  # MuJoCo's ways to draw without a screen
DRAWING = (
    "On a machine without a screen it takes Debian's libegl1 and libgl1-mesa-dri and MUJOCO_GL=egl, or libosmesa6 and "
    "MUJOCO_GL=osmesa, set before MuJoCo is imported."
)


def draws(way: str) -> bool:
    """Whether MuJoCo can draw in this way here, found out in a process of its own in a second or two."""
    code = f"import mujoco.{way} as gl; gl.GLContext(8, 8).make_current()"
    environment = os.environ | {"MUJOCO_GL": way}
    try:
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:  # a driver may hang
        return False
    return not done.returncode
