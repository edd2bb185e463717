"""Videos of episodes: played on the device a decision at a time, drawn by the environment on the host.

In a notebook: `IPython.display.Video("a.mp4", embed=True)`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlx.algorithm import Key, Policy
from rlx.environment import Environment, real_time, render
from rlx.errors import UserError, require
from rlx.evaluation import Player
from rlx.files import write_atomically
from rlx.machine import DRAWING, OFFSCREEN, draws
from rlx.types import Spec

# Frames a second: a gif counts in hundredths, and players skip 1.
FASTEST = {".mp4": 240, ".gif": 50, ".png": 1000, ".webp": 1000, ".html": 1000}
FORMATS = tuple(FASTEST)  # an .mp4 loses a little, a .gif all but 256 colours a frame


def check_video(path: str | Path, fps: float | None = None) -> None:
    """Raises UserError for a file that no video can be written to, and for `fps` that it cannot have."""
    require(Path(path).suffix in FORMATS, "video", str(path), f"it ends in {', '.join(FORMATS)}")
    require(Path(path).absolute().parent.is_dir(), "video", str(path), "the folder does not exist")
    require(not Path(path).is_dir(), "video", str(path), "it is a folder")
    fastest = FASTEST[Path(path).suffix]
    require(fps is None or 0 < fps <= fastest, "fps", fps, f"above 0, and at most {fastest} in a {Path(path).suffix}")


def pace(path: str | Path, spec: Spec, fps: float | None = None) -> tuple[float, int]:
    """Frames a second of a film, and of how many states one is drawn.

    Every state, at `fps`; without, as fast as what it shows passes, where a file has not so many frames a part of them.
    """
    if fps is not None:
        return fps, 1
    fastest = FASTEST[Path(path).suffix]
    every = max(1, math.ceil(real_time(spec) / fastest - 1e-6))
    return min(real_time(spec) / every, fastest), every


def choose_gl() -> None:
    """What MuJoCo draws with, before it is imported: without a screen and with no MUJOCO_GL, what works here.

    Raises UserError where MUJOCO_GL names a way that does not.
    """
    chosen = os.environ.get("MUJOCO_GL", "")
    if chosen in OFFSCREEN and not draws(chosen):
        raise UserError(f"MUJOCO_GL = {chosen!r} is not possible: MuJoCo cannot draw with it here. {DRAWING}")
    if sys.platform == "linux" and not chosen and not os.environ.get("DISPLAY"):
        way = next(filter(draws, OFFSCREEN), "")
        os.environ |= {"MUJOCO_GL": way} if way else {}


def check_drawn(env: Environment, path: str | Path) -> None:
    """Draws a first state. Raises UserError where an environment cannot be drawn, or not into such a file."""
    state, _ = jax.jit(env.reset)(jax.random.key(0), env.spec.params)
    render(env, [jax.device_get(state)], page=1.0 if Path(path).suffix == ".html" else None)


def film(
    env: Environment, player: Player, policy: Policy, key: Key, num_episodes: int, every: int = 1
) -> Iterator[np.ndarray]:
    """Frames [H, W, 3] uint8 of the first episodes of an evaluation, one behind the other: each from its reset to its
    ending, of `every` so many states one. They are drawn as they are asked for, an episode at a time. Raises UserError
    where there is nothing to draw.
    """
    for states in play(env, player, policy, key, num_episodes):
        yield from np.asarray(render(env, states[::every]), np.uint8)


def page(
    env: Environment, player: Player, policy: Policy, key: Key, num_episodes: int, fps: float, every: int = 1
) -> str:
    """The same states as a page of HTML that plays them. Raises UserError where the environment has no viewer."""
    episodes = play(env, player, policy, key, num_episodes, 1 / fps)
    return str(render(env, [state for states in episodes for state in states[::every]], 1 / fps))


def play(
    env: Environment, player: Player, policy: Policy, key: Key, num_episodes: int, page: float | None = None
) -> list[list[Any]]:
    """The states of each episode, on the host. What cannot be drawn is not played."""
    advance = jax.jit(player.advance)
    now = jax.jit(player.begin)(policy, key)
    states: list[list[Any]] = [[] for _ in range(num_episodes)]
    films = np.ones(num_episodes, bool)
    while True:
        shown = jax.device_get(jax.tree.map(lambda x: x[:num_episodes], now.env))
        for index in np.flatnonzero(films):
            states[index].append(jax.tree.map(lambda x: x[index], shown))  # noqa: B023
        if len(states[0]) == 1:
            render(env, states[0], page)
        films = ~np.asarray(now.ended[:num_episodes])
        if not films.any() or not player.running(now):
            return states
        now = advance(policy, now)


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Writes frames [H, W, 3] uint8: an .mp4 (H.264), or an animated picture that begins anew at its end.

    Raises UserError as `check_video` does, for a film without frames, and where ffmpeg fails.
    """
    check_video(path, fps)
    frames, suffix = iter(frames), Path(path).suffix
    first = next(frames, None)
    if first is None:
        raise UserError(f"{str(path)!r}: there are no frames to write.")
    data = _mp4(first, frames, fps) if suffix == ".mp4" else _picture(first, frames, fps, suffix)
    write_atomically(Path(path).absolute(), data)


def _mp4(first: np.ndarray, others: Iterable[np.ndarray], fps: float) -> bytes:
    from imageio_ffmpeg import get_ffmpeg_exe

    height, width, _ = first.shape
    with tempfile.TemporaryDirectory() as folder:
        target, said = Path(folder) / "a.mp4", Path(folder) / "errors"
        source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i -".split()
        even = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2"]  # x264 takes no odd sizes
        coded = "-c:v libx264 -crf 18 -pix_fmt yuv420p -movflags +faststart".split()  # as browsers play it
        command = [get_ffmpeg_exe(), "-loglevel", "error", *source, *even, *coded, str(target)]
        with said.open("wb") as errors, subprocess.Popen(command, stdin=subprocess.PIPE, stderr=errors) as process:
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # type: ignore[union-attr]
                for frame in itertools.chain([first], others):
                    pipe.write(frame.tobytes())
        if process.returncode:
            raise UserError(f"ffmpeg cannot write this video: {said.read_text().strip()}")
        return target.read_bytes()


def _picture(first: np.ndarray, others: Iterable[np.ndarray], fps: float, suffix: str) -> bytes:
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in others]
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    # Each frame ends at the nearest tick that the format has: what a duration is rounded by does not add up.
    tick = 10 if suffix == ".gif" else 1
    durations = tick * np.diff(np.rint(np.arange(len(pictures) + 2) * 1000 / fps / tick).astype(int))
    options |= {"save_all": True, "append_images": pictures, "duration": durations.tolist(), "loop": 0}
    Image.fromarray(first).save(buffer, format=suffix[1:], **options)
    return buffer.getvalue()
