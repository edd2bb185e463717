"""Videos: the episodes of an evaluation, drawn in their order, in files that others read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rlx.algorithm import Plan
from rlx.evaluation import make_evaluate, make_player
from rlx.types import UserError
from rlx.video import check_video, film, write_video
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
    frames = film(Drawn(3), make_player(Drawn(3), algorithm, 8, "sample", 0, None), policy, KEY, 4)
    times = [t for length in result.lengths[:4].astype(int).tolist() for t in range(length + 1)]
    assert {1.0, 3.0} == set(result.lengths[:4].tolist())
    np.testing.assert_array_equal(frames[:, 0, 0], COLOURS[times])
    assert len(np.unique(frames[:, 3, 3, 0])) == 4


def test_an_environment_that_cannot_be_drawn_says_so():
    algorithm = constant_algorithm(Plan(1, 1, 1))
    player = make_player(Counter(3), algorithm, 2, "greedy", 0, None)
    with pytest.raises(UserError, match="Counter cannot be rendered"):
        film(Counter(3), player, algorithm.init(KEY), KEY, 1)


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
    with pytest.raises(UserError, match="a.mp4.*ends in .gif, .png, .webp"):
        check_video("a.mp4", 20.0)
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


@pytest.mark.parametrize(("suffix", "fps", "most"), [(".gif", 60.0, 50), (".png", 2000.0, 1000), (".gif", 0.0, 50)])
def test_a_pace_beyond_the_format_is_refused(suffix, fps, most):
    with pytest.raises(UserError, match=f"--fps = {fps} .*above 0, and at most {most}"):
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
    assert film(Keyed(2), player, algorithm.init(KEY), KEY, 1).shape[1:] == (4, 4, 3)
    assert jnp.issubdtype(player.begin(algorithm.init(KEY), KEY).env[1].dtype, jax.dtypes.prng_key)
