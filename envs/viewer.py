"""Drawing bodies: by MuJoCo, where it can, and in a browser by brax's viewer."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import mujoco
import numpy as np
from brax.base import System, Transform
from brax.io import html, mjcf

from rlx.errors import UserError
from rlx.machine import DRAWING


def check_drawing(model: mujoco.MjModel) -> None:
    """Raises UserError, with what to install, where MuJoCo finds nothing to draw with."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GLFW's, on a machine without a screen
            mujoco.Renderer(model, 8, 8).close()
    except Exception as error:  # of any kind: each way of drawing has its own
        chosen = os.environ.get("MUJOCO_GL") or "not set"
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"MuJoCo cannot draw here (MUJOCO_GL is {chosen}; {why}). {DRAWING}") from error


def camera_of(model: mujoco.MjModel) -> str | int:
    """The model's first camera that moves with a body, so that films keep it in sight; -1: a free camera."""
    moving = np.flatnonzero(model.cam_mode == mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM)
    return model.camera(int(moving[0])).name or -1 if len(moving) else -1


def posed(model: mujoco.MjModel, data: Sequence[Any]) -> Iterator[mujoco.MjData]:
    """MuJoCo's own data in the pose of each of MJX's; engines leave out what no task asks them for."""
    own = mujoco.MjData(model)
    for one in data:
        own.qpos, own.mocap_pos, own.mocap_quat = one.qpos, one.mocap_pos, one.mocap_quat
        mujoco.mj_fwdPosition(model, own)
        yield own


def frames(model: mujoco.MjModel, data: Sequence[Any], camera: str | int = -1) -> np.ndarray:
    """Pictures [F, 240, 320, 3] uint8 of MJX's data, through a camera of the model or, at -1, a free one.

    Raises UserError as `check_drawing` does.
    """
    check_drawing(model)
    pictures = []
    with mujoco.Renderer(model, 240, 320) as renderer:
        for own in posed(model, data):
            renderer.update_scene(own, camera)
            pictures.append(renderer.render())
    return np.asarray(pictures, np.uint8).reshape(-1, 240, 320, 3)


def poses(model: mujoco.MjModel, data: Sequence[Any]) -> list[tuple[Any, Any]]:
    """As `page` takes them, of MJX's data."""
    return [(own.xpos[1:].copy(), own.xquat[1:].copy()) for own in posed(model, data)]


def page(model: System | mujoco.MjModel, poses: Sequence[tuple[Any, Any]], seconds: float) -> str:
    """A page that plays `poses`, `seconds` apart: positions [bodies, 3], quaternions [bodies, 4], the world left out.

    It loads brax's viewer and three.js from the network when it is looked at. Raises UserError for ellipsoids, which
    that viewer does not draw.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that brax's physics is not kept up; it is not used here
        sys = model if isinstance(model, System) else mjcf.load_model(drawable(model))
    states = [SimpleNamespace(x=Transform(*map(np.asarray, pose))) for pose in poses]
    return html.render(sys.tree_replace({"opt.timestep": seconds}), states, height="100vh", colab=False)


def drawable(model: mujoco.MjModel) -> mujoco.MjModel:
    """A copy, in which brax may write. Raises UserError for what its viewer does not draw."""
    if (model.geom_type == mujoco.mjtGeom.mjGEOM_ELLIPSOID).any():
        raise UserError("brax's viewer draws no ellipsoids, which this model has: take a .mp4 instead of a .html.")
    return copy.deepcopy(model)
