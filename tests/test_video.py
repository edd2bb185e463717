"""Videos: the episodes of an evaluation, drawn in their order, in files that others read."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
import subprocess
import sys
import zlib

import imageio_ffmpeg
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from PIL import Image

import envs
from envs import viewer
from envs.wrappers import ActionRepeat
from rlx import video
from rlx.algorithm import Plan
from rlx.environment import real_time, render
from rlx.evaluation import make_evaluate, make_player
from rlx.machine import OFFSCREEN, draws
from rlx.types import UserError
from rlx.video import check_drawn, check_video, choose_gl, film, pace, write_video
from tests.worlds import Counter, constant_algorithm

COLOURS = np.array([[0, 0, 0], [200, 30, 30], [30, 200, 30], [30, 30, 200]], np.uint8)
KEY = jax.random.key(0)


class Drawn(Counter):
    """A picture of one colour that tells of the step, and in its last pixel of the reset; ends at random."""

    def step(self, state, action, key):
        state, timestep = super().step(state, action, key)
        over = timestep.truncated | (state.start < 0.5) & (state.t == 1)
        return state, timestep._replace(truncated=over)

    def render(self, states):
        frames = np.stack([np.broadcast_to(COLOURS[int(state.t)], (4, 4, 3)) for state in states])
        frames[:, 3, 3] = [[int(255 * state.start)] * 3 for state in states]
        return frames


def test_the_episodes_of_an_evaluation_are_drawn_from_their_reset_to_their_end():
    algorithm = constant_algorithm(Plan(1, 1, 1))
    policy = algorithm.init(KEY)
    result = make_evaluate(Drawn(3), algorithm, 8, "sample")(policy, KEY)
    frames = np.stack(list(film(Drawn(3), make_player(Drawn(3), algorithm, 8, "sample", 0, None), policy, KEY, 4)))
    times = [t for length in result.lengths[:4].astype(int).tolist() for t in range(length + 1)]
    assert {1.0, 3.0} == set(result.lengths[:4].tolist())
    np.testing.assert_array_equal(frames[:, 0, 0], COLOURS[times])
    assert len(np.unique(frames[:, 3, 3, 0])) == 4


def test_an_environment_that_cannot_be_drawn_says_so():
    algorithm = constant_algorithm(Plan(1, 1, 1))
    player = make_player(Counter(3), algorithm, 2, "greedy", 0, None)
    with pytest.raises(UserError, match="Counter cannot be rendered"):
        next(film(Counter(3), player, algorithm.init(KEY), KEY, 1))
    with pytest.raises(UserError, match="Counter cannot be rendered"):
        check_drawn(ActionRepeat(Counter(3), 2), "a.mp4")
    with pytest.raises(UserError, match="has no viewer in HTML"):
        check_drawn(ActionRepeat(Drawn(3), 2), "a.html")
    check_drawn(ActionRepeat(Drawn(3), 2), "a.mp4")


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_a_file_holds_the_frames_in_their_colours_and_their_pace(tmp_path, suffix):
    frames = np.repeat(COLOURS, 16, axis=0).reshape(4, 4, 4, 3)
    path = tmp_path / f"a{suffix}"
    check_video(path, 20.0)
    write_video(path, frames, fps=20.0)
    with Image.open(path) as video:
        assert video.n_frames == 4
        for index, frame in enumerate(frames):
            video.seek(index)
            video.load()
            np.testing.assert_array_equal(np.asarray(video.convert("RGB")), frame)
            assert video.info["duration"] == 50
        assert video.info["loop"] == 0


def test_other_formats_and_folders_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(UserError, match="a.avi.*ends in .mp4, .gif, .png, .webp, .html"):
        check_video("a.avi", 20.0)
    with pytest.raises(UserError, match="the folder does not exist"):
        check_video(tmp_path / "nowhere" / "a.gif", 20.0)


@pytest.mark.parametrize(("suffix", "duration"), [(".gif", [30, 40, 30] * 3 + [30]), (".png", [33, 34, 33] * 3 + [33])])
def test_a_pace_that_the_format_cannot_hold_is_that_of_the_whole_film(tmp_path, suffix, duration):
    frames = np.stack([np.full((4, 4, 3), 10 * i, np.uint8) for i in range(10)])
    write_video(tmp_path / f"a{suffix}", frames, fps=30.0)
    with Image.open(tmp_path / f"a{suffix}") as video:
        found = []
        for index in range(10):
            video.seek(index)
            video.load()
            found.append(video.info["duration"])
    assert found == duration


def test_what_makes_no_film_is_refused_before_a_file_is_there(tmp_path):
    with pytest.raises(UserError, match="there are no frames"):
        write_video(tmp_path / "a.gif", [], fps=20.0)
    with pytest.raises(UserError, match="fps = 100.0 .* at most 50"):
        write_video(tmp_path / "a.gif", COLOURS.reshape(4, 1, 1, 3), fps=100.0)
    (tmp_path / "b.gif").mkdir()
    with pytest.raises(UserError, match="b.gif' is not possible: it is a folder"):
        check_video(tmp_path / "b.gif")
    assert [path.name for path in tmp_path.iterdir()] == ["b.gif"]


@pytest.mark.parametrize(("suffix", "fps", "most"), [(".gif", 60.0, 50), (".png", 2000.0, 1000), (".gif", 0.0, 50)])
def test_a_pace_beyond_the_format_is_refused(suffix, fps, most):
    with pytest.raises(UserError, match=f"fps = {fps} .*above 0, and at most {most}"):
        check_video(f"a{suffix}", fps)


def test_keys_in_a_state_are_no_obstacle():
    class Keyed(Drawn):
        def reset(self, key, params):
            state, obs = super().reset(key, params)
            return (state, key), obs

        def step(self, state, action, key):
            after, timestep = super().step(state[0], action, key)
            return (after, state[1]), timestep

        def render(self, states):
            return super().render([state for state, _ in states])

    algorithm = constant_algorithm(Plan(1, 1, 1))
    player = make_player(Keyed(2), algorithm, 2, "greedy", 0, None)
    assert next(film(Keyed(2), player, algorithm.init(KEY), KEY, 1)).shape == (4, 4, 3)
    assert jnp.issubdtype(player.begin(algorithm.init(KEY), KEY).env[1].dtype, jax.dtypes.prng_key)


@pytest.mark.filterwarnings("ignore:os.fork")  # of the library that reads it
def test_an_mp4_holds_every_frame_at_its_pace_in_even_sizes(tmp_path):
    frames = np.repeat(np.repeat(COLOURS, 40, axis=0).reshape(4, 1, 40, 3), 35, axis=1)
    frames[:, :, 20:] = 255 - frames[:, :, 20:]
    write_video(tmp_path / "a.mp4", frames, fps=25.0)
    (about, *read) = imageio_ffmpeg.read_frames(tmp_path / "a.mp4")
    assert about["size"] == (40, 36) and about["fps"] == 25.0 and about["codec"] == "h264" and len(read) == 4
    assert "yuv420p" in about["pix_fmt"]
    for found, frame in zip(read, frames, strict=True):
        found = np.frombuffer(found, np.uint8).reshape(36, 40, 3)[:35].astype(int)
        assert np.abs(found[:, 2:17] - frame[:, 2:17]).mean() < 12  # colours of four pixels together, and rounded


@pytest.mark.filterwarnings("ignore:os.fork")
def test_what_ffmpeg_refuses_is_told(tmp_path):
    with pytest.raises(UserError, match="ffmpeg cannot write this video: .+"):
        write_video(tmp_path / "a.mp4", np.zeros((1, 2, 20_000, 3), np.uint8), fps=10.0)  # wider than H.264 takes
    assert not list(tmp_path.iterdir())


def test_a_page_of_bodies_leaves_the_model_as_it_was_and_refuses_ellipsoids():
    body = "<body><joint name='a' type='hinge' {}/><geom type='{}' size='.1 .1 .1'/></body>"
    xml = f"<mujoco><worldbody>{body}</worldbody></mujoco>"
    model = mujoco.MjModel.from_xml_string(xml.format("limited='false'", "sphere"))
    before = model.jnt_range.copy()
    assert "<html" in viewer.page(model, viewer.poses(model, []), 0.1).lower()
    np.testing.assert_array_equal(model.jnt_range, before)
    with pytest.raises(UserError, match="ellipsoids, which this model has"):
        viewer.page(mujoco.MjModel.from_xml_string(xml.format("", "ellipsoid")), [], 0.1)


def test_what_has_no_viewer_says_so():
    with pytest.raises(UserError, match="Drawn has no viewer in HTML"):
        render(Drawn(3), [], page=0.1)


def test_films_pass_as_fast_as_what_they_show_unless_the_user_says_otherwise():
    spec = dataclasses.replace(Counter(3).spec, dt=0.0125, action_repeat=4)
    assert pace("a.mp4", spec) == (20.0, 1) and pace("a.mp4", spec, 5.0) == (5.0, 1)
    assert pace("a.mp4", ActionRepeat(Counter(3), 2).spec) == (20.0, 1)  # not known
    fast = dataclasses.replace(spec, action_repeat=1)
    assert pace("a.mp4", fast) == (80.0, 1) and pace("a.gif", fast) == (40.0, 2)  # which has 50 frames at most
    assert pace("a.gif", dataclasses.replace(spec, dt=0.01, action_repeat=2)) == (50.0, 1)
    assert pace("a.gif", dataclasses.replace(spec, dt=0.02 - 1e-9, action_repeat=1)) == (50.0, 1)  # but for rounding
    assert pace("a.mp4", dataclasses.replace(spec, dt=7200.0, action_repeat=1)) == (1 / 7200, 1)


def test_of_states_that_pass_too_fast_a_part_is_drawn():
    algorithm = constant_algorithm(Plan(1, 1, 1))
    player = make_player(Drawn(3), algorithm, 1, "sample", 0, None)
    policy = algorithm.init(KEY)
    every, second = (np.stack(list(film(Drawn(3), player, policy, KEY, 1, n))) for n in (1, 2))
    np.testing.assert_array_equal(second, every[::2])


def test_a_camera_that_moves_with_the_body_films_it():
    xml = "<mujoco><worldbody><camera name='fixed'/><body><joint/><geom size='1'/>{}</body></worldbody></mujoco>"
    for camera, found in (("<camera name='side' mode='trackcom'/>", "side"), ("", -1)):
        assert viewer.camera_of(mujoco.MjModel.from_xml_string(xml.format(camera))) == found


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("playground/CartpoleBalance", 0.01),
        ("brax/inverted_pendulum", 0.04),
        ("particle/simple", 0.1),
        ("brax/fast", 0.0),
        ("probe/memory", 0.0),
    ],
)
def test_a_spec_tells_how_long_a_step_lasts(name, seconds):
    assert envs.make(name).spec.dt == pytest.approx(seconds)
    env = envs.make(name, action_repeat=2)
    assert env.spec.dt == pytest.approx(seconds) and real_time(env.spec) == pytest.approx(
        0.5 / seconds if seconds else 20
    )


def test_a_page_shows_each_state_for_the_seconds_asked_for():
    env = envs.make("playground/CartpoleBalance", action_repeat=2)
    state, _ = env.reset(KEY, env.spec.params)
    shown = render(env, [jax.device_get(state)] * 2, page=1 / real_time(env.spec))
    (packed,) = re.findall(r'var system = "([^"]+)"', shown)
    content = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert content["opt"]["timestep"] == pytest.approx(0.02)


def test_mujoco_that_cannot_draw_says_what_to_install(monkeypatch):
    def no_context(*arguments):
        raise mujoco.FatalError("gladLoadGL error")

    monkeypatch.setattr(mujoco, "Renderer", no_context)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(UserError, match="MUJOCO_GL is not set; FatalError: gladLoadGL error.*libegl1.*libosmesa6"):
        viewer.check_drawing(None)


def test_without_a_screen_a_way_to_draw_is_found_and_one_that_does_not_work_is_refused(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(video.sys, "platform", "linux")
    monkeypatch.setattr(video, "draws", lambda way: way == "osmesa")
    monkeypatch.setenv("MUJOCO_GL", "")
    choose_gl()
    assert os.environ["MUJOCO_GL"] == "osmesa"
    choose_gl()
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(UserError, match="MUJOCO_GL = 'egl' .* libegl1"):
        choose_gl()


PICTURES = """
from types import SimpleNamespace
from rlx.video import choose_gl
choose_gl()
import mujoco, numpy as np
from envs import viewer

model = mujoco.MjModel.from_xml_string('''<mujoco><worldbody>
  <light pos="0 0 3"/><camera name="above" pos="0 0 3"/>
  <body><joint type="slide" axis="1 0 0"/><geom size=".2" rgba="1 0 0 1"/></body>
  <body mocap="true"><geom size=".2" rgba="0 1 0 1"/></body>
</worldbody></mujoco>''')
data = [SimpleNamespace(qpos=[x], mocap_pos=[[0, -x, 0]], mocap_quat=[[1, 0, 0, 0]]) for x in (0.5, -0.5)]
np.savez("frames", frames=viewer.frames(model, data, "above"), none=viewer.frames(model, []))
"""


@pytest.mark.slow
def test_pictures_show_the_poses_of_the_data_through_a_camera_of_the_model(tmp_path):
    if not any(map(draws, OFFSCREEN)):
        pytest.skip("neither EGL nor OSMesa draws here")
    subprocess.run([sys.executable, "-c", PICTURES], check=True, cwd=tmp_path)  # GL is chosen before MuJoCo is imported
    found = np.load(tmp_path / "frames.npz")
    assert found["frames"].shape == (2, 240, 320, 3) and found["frames"].dtype == np.uint8
    assert found["none"].shape == (0, 240, 320, 3)
    for frame, sign in zip(found["frames"].astype(int), (1, -1), strict=True):
        red, green = (np.argwhere(frame[..., c] > 50 + np.delete(frame, c, axis=-1).max(axis=-1)) for c in (0, 1))
        right, down = red.mean(axis=0)[1] - 160, green.mean(axis=0)[0] - 120
        assert 20 < sign * right < 80 and 20 < sign * down < 80  # a joint along x; a mocap body along y, down at -y


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:os.fork")
@pytest.mark.parametrize("name", ["playground/CheetahRun", "brax/ant", "particle/simple_spread"])
def test_a_film_of_bodies_and_particles_shows_something_that_moves(name, tmp_path):
    if "particle" not in name and not any(map(draws, OFFSCREEN)):
        pytest.skip("neither EGL nor OSMesa draws here")
    sizes = "--total-steps 512 --num-envs 8 --unroll-length 16 --num-evals 0 --quiet --run-dir run"
    learner = "mappo" if "particle" in name else "ppo"
    for command in (f"train {learner} {name} {sizes}", "evaluate run --episodes 2 --decisions 20 --video a.mp4"):
        subprocess.run([sys.executable, "-m", "rlx.cli", *command.split()], check=True, cwd=tmp_path)
    _, *frames = imageio_ffmpeg.read_frames(tmp_path / "a.mp4")
    frames = np.stack([np.frombuffer(frame, np.uint8) for frame in frames]).astype(int)
    assert len(frames) == 21 and frames[0].std() > 5 and np.abs(frames[-1] - frames[0]).max() > 50
    html = ["evaluate", "run", "--episodes", "1", "--decisions", "3", "--video", "a.html"]
    done = subprocess.run([sys.executable, "-m", "rlx.cli", *html], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    if "particle" in name:
        assert done.returncode == 2 and "has no viewer in HTML" in done.stderr
    else:
        assert done.returncode == 0 and "brax-viewer" in (tmp_path / "a.html").read_text()
