"""Videos of episodes: played on the device a decision at a time, drawn by the environment on the host."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlx.algorithm import Key, Policy
from rlx.environment import Environment, render
from rlx.errors import require
from rlx.evaluation import Player
from rlx.logging import write_atomically

FASTEST = {".gif": 50, ".png": 1000, ".webp": 1000}  # frames a second: a gif counts in hundredths, and players skip 1
FORMATS = tuple(FASTEST)  # all without loss but for the 256 colours of a gif's frame


def check_video(path: str | Path, fps: float) -> None:
    """Raises UserError for a file that no video can be written to, and a pace that it cannot have."""
    allowed = f"it ends in {', '.join(FORMATS)} (animated pictures; other formats need programs of their own)"
    require(Path(path).suffix in FORMATS, "--video", str(path), allowed)
    require(Path(path).absolute().parent.is_dir(), "--video", str(path), "the folder does not exist")
    fastest = FASTEST[Path(path).suffix]
    require(0 < fps <= fastest, "--fps", fps, f"above 0, and at most {fastest} in a {Path(path).suffix}")


def film(env: Environment, player: Player, policy: Policy, key: Key, num_episodes: int) -> np.ndarray:
    """Frames [F, H, W, 3] uint8 of the first episodes of an evaluation, one behind the other: each from its reset to
    its ending. Raises UserError where the environment cannot be drawn.
    """
    advance = jax.jit(player.advance)
    now = jax.jit(player.begin)(policy, key)
    states: list[list[Any]] = [[] for _ in range(num_episodes)]
    films = np.ones(num_episodes, bool)
    while True:
        shown = jax.device_get(jax.tree.map(lambda x: x[:num_episodes], now.env))
        for index in np.flatnonzero(films):
            states[index].append(jax.tree.map(lambda x: x[index], shown))  # noqa: B023
        if len(states[0]) == 1:
            render(env, states[0])  # what cannot be drawn is not played
        films = ~np.asarray(now.ended[:num_episodes])
        if not films.any() or not player.running(now):
            return np.concatenate([np.asarray(render(env, of_one), np.uint8) for of_one in states])
        now = advance(policy, now)


def write_video(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Writes frames [F, H, W, 3] uint8 as an animated picture that begins anew at its end."""
    from PIL import Image

    first, *others = (Image.fromarray(frame) for frame in frames)
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if Path(path).suffix == ".webp" else {}
    # Each frame ends at the nearest tick that the format has: what a duration is rounded by does not add up.
    tick = 10 if Path(path).suffix == ".gif" else 1
    durations = tick * np.diff(np.rint(np.arange(len(frames) + 1) * 1000 / fps / tick).astype(int))
    options |= {"save_all": True, "append_images": others, "duration": durations.tolist(), "loop": 0}
    first.save(buffer, format=Path(path).suffix[1:], **options)
    write_atomically(Path(path).absolute(), buffer.getvalue())
