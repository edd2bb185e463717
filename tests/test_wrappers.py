"""Time limit, action repeat, action chunk, action scaling and fixed types, by hand."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.wrappers import ActionChunk, ActionRepeat, FixedPoint, ScaleAction, TimeLimit
from rlx.errors import UserError
from rlx.types import Box, Discrete, Spec, TimeStep

KEY = jax.random.key(0)


class CountState(NamedTuple):
    t: jax.Array
    total: jax.Array  # of the actions received


class Count:
    """After step t: obs = [t], reward = 10^(t-1); terminates at `end`; `total` adds up the actions."""

    def __init__(self, end: int = 100, action: Box | Discrete = Box((2,))):  # noqa: B008  (frozen)
        self.end, self.spec = end, Spec(jax.ShapeDtypeStruct((1,), jnp.float32), action)

    def reset(self, key, params):
        return CountState(jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.float32)), jnp.zeros(1, jnp.float32)

    def step(self, state, action, key):
        state = CountState(state.t + 1, state.total + action)
        obs = state.t.astype(jnp.float32).reshape(1)
        reward = 10.0 ** (obs[0] - 1.0)
        info = {"reward/part": 2.0 * reward, "t": obs[0]}
        return state, TimeStep(obs, reward, state.t >= self.end, jnp.zeros((), bool), obs, info)


class Digits(Count):
    """`total` has the actions received as its digits, the last one last."""

    def step(self, state, action, key):
        return super().step(state._replace(total=10.0 * state.total), action, key)


class Noisy(Count):
    """`total` adds up the actions and the noise of every step."""

    def step(self, state, action, key):
        return super().step(state, action + jax.random.normal(key, (2,)), key)


def play(env, num_steps, action=(0.25, -0.5)):
    """The states and time steps of `num_steps` decisions."""
    state, _ = env.reset(KEY, ())
    step, out = jax.jit(env.step), []
    for _ in range(num_steps):
        state, timestep = step(state, jnp.array(action, jnp.float32), KEY)
        out.append((state, timestep))
    return out


def endings(steps):
    return [(bool(t.terminated), bool(t.truncated)) for _, t in steps]


def test_a_time_limit_truncates_at_its_step_and_not_before():
    assert endings(play(TimeLimit(Count(), 3), 3)) == [(False, False), (False, False), (False, True)]


def test_a_termination_at_the_limit_wins_over_truncation():
    assert endings(play(TimeLimit(Count(end=3), 3), 3))[-1] == (True, False)


def test_a_time_limit_keeps_the_final_observation_and_names_itself_in_the_spec():
    env = TimeLimit(Count(), 3)
    assert play(env, 3)[-1][1].final_obs == 3.0 and env.spec.episode_length == 3
    assert TimeLimit(TimeLimit(Count(), 3), 5).spec.episode_length == 3


def test_an_action_repeat_sums_rewards_undiscounted_and_counts_steps():
    env = ActionRepeat(Count(), 3)
    (state, first), (_, second) = play(env, 2)
    assert (first.reward, second.reward) == (111.0, 111000.0)
    assert first.info == {"reward/part": 222.0, "t": 3.0, "steps": 3.0}
    assert first.obs == 3.0 and state.t == 3 and env.spec.action_repeat == 3
    assert first.info["steps"].dtype == jnp.float32
    np.testing.assert_allclose(state.total, [0.75, -1.5])


def test_nothing_counts_behind_the_first_end_of_an_action_repeat():
    state, timestep = play(ActionRepeat(Count(end=2), 4), 1)[0]
    assert timestep.reward == 11.0 and timestep.info["steps"] == 2.0 and timestep.final_obs == 2.0
    assert state.t == 2 and bool(timestep.terminated) and not bool(timestep.truncated)
    np.testing.assert_allclose(state.total, [0.5, -1.0])


def test_a_time_limit_counts_inner_steps_on_either_side_of_an_action_repeat():
    inside, outside = ActionRepeat(TimeLimit(Count(), 4), 3), TimeLimit(ActionRepeat(Count(), 3), 4)
    assert [float(t.info["steps"]) for _, t in play(inside, 2)] == [3.0, 1.0]
    assert endings(play(inside, 2)) == endings(play(outside, 2)) == [(False, False), (False, True)]
    assert inside.spec.decisions == outside.spec.decisions == 2 and Count().spec.decisions == 1000


def test_nested_action_repeats_multiply():
    env = ActionRepeat(ActionRepeat(Count(), 2), 3)
    assert env.spec.action_repeat == 6 and play(env, 1)[0][1].info["steps"] == 6.0


def test_an_action_chunk_plays_its_actions_in_turn_as_one_decision():
    env = ActionChunk(Digits(), 3)
    (state, first), (_, second) = play(env, 2, (1, 2, 3, 4, 5, 6))
    np.testing.assert_array_equal(state.total, [135.0, 246.0])
    assert (first.reward, second.reward) == (111.0, 111000.0) and first.obs == 3.0
    assert first.info == {"reward/part": 222.0, "t": 3.0, "steps": 3.0} and first.info["steps"].dtype == jnp.float32
    assert (env.spec.action, env.spec.action_repeat, env.spec.action_chunk) == (Box((6,)), 3, 3)


@pytest.mark.parametrize(("end", "limit", "ending"), [(2, 9, (True, False)), (9, 2, (False, True))])
def test_nothing_is_played_behind_an_end_within_an_action_chunk(end, limit, ending):
    steps = play(ActionChunk(TimeLimit(Digits(end=end), limit), 3), 1, (1, 2, 3, 4, 5, 6))
    state, timestep = steps[0]
    assert endings(steps) == [ending]
    np.testing.assert_array_equal(state.env.total, [13.0, 24.0])
    assert timestep.reward == 11.0 and timestep.info["steps"] == 2.0 and timestep.final_obs == 2.0
    assert timestep.info["reward/part"] == 22.0 and timestep.info["t"] == 2.0 and state.steps == 2


def test_an_action_chunk_without_an_end_is_as_many_steps():
    env, actions = ActionChunk(Noisy(), 4), jax.random.uniform(KEY, (4, 2))
    state, _ = Noisy().reset(KEY, ())
    reward = 0.0
    for action, key in zip(actions, jax.random.split(KEY, 4), strict=True):
        state, timestep = Noisy().step(state, action, key)
        reward += timestep.reward
    chunk_state, chunk = env.step(env.reset(KEY, ())[0], actions.ravel(), KEY)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), chunk_state, state)
    assert chunk.reward == reward and chunk.obs == timestep.obs == 4.0 and chunk.info["t"] == timestep.info["t"]


@pytest.mark.parametrize("end", [2, 100])
def test_an_action_chunk_of_equal_actions_is_an_action_repeat(end):
    repeated = play(ActionRepeat(Noisy(end), 3), 1)[0]
    chunk = play(ActionChunk(Noisy(end), 3), 1, (0.25, -0.5) * 3)[0]
    jax.tree.map(np.testing.assert_array_equal, repeated, chunk)


def test_action_chunks_go_around_action_repeats_and_around_each_other():
    env = ActionChunk(ActionRepeat(Digits(), 2), 2)
    state, timestep = play(env, 1, (1, 2, 3, 4))[0]
    np.testing.assert_array_equal(state.total, [1133.0, 2244.0])
    assert timestep.info["steps"] == 4.0 and (env.spec.action_repeat, env.spec.action_chunk) == (4, 2)
    nested, flat = ActionChunk(ActionChunk(Digits(), 2), 3), ActionChunk(Digits(), 6)
    assert nested.spec == flat.spec
    jax.tree.map(np.testing.assert_array_equal, *(play(e, 1, np.arange(12) % 10)[0] for e in (nested, flat)))
    with pytest.raises(UserError, match="action_repeat = 2 .* inside of action chunks"):
        ActionRepeat(env, 2)


def test_the_bounds_of_an_action_chunk_are_those_of_each_of_its_actions():
    scaled = ScaleAction(Digits(), (-3.0, 0.0), (3.0, 8.0))
    assert ActionChunk(scaled, 2).spec.action == Box((4,), low=(-3.0, 0.0, -3.0, 0.0), high=(3.0, 8.0, 3.0, 8.0))
    np.testing.assert_allclose(play(ActionChunk(scaled, 2), 1, (1, 1, 0, -1))[0][0].total, [30.0, 80.0])


@pytest.mark.parametrize("action", [Discrete(2), Box(()), Box((2, 3))])
def test_only_continuous_vectors_come_in_chunks(action):
    with pytest.raises(UserError, match="action_chunk = 2 needs continuous actions"):
        ActionChunk(Count(action=action), 2)


def test_a_scaled_action_reaches_the_bounds_and_the_centre():
    env = ScaleAction(Count(), (-3.0, 0.0), (3.0, 8.0))
    for action, received in (((-1, -1), (-3, 0)), ((1, 1), (3, 8)), ((0, 0), (0, 4)), ((0.5, -0.5), (1.5, 2))):
        np.testing.assert_allclose(play(env, 1, action)[0][0].total, received)
    assert env.spec.action == Box((2,), low=(-3.0, 0.0), high=(3.0, 8.0))


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (-np.inf, 1.0), (0.0, np.nan)])
def test_impossible_bounds_are_refused(low, high):
    with pytest.raises(UserError, match="bounds"):
        ScaleAction(Count(), low, high)


def test_discrete_actions_cannot_be_scaled():
    with pytest.raises(UserError, match="Discrete"):
        ScaleAction(Count(action=Discrete(2)), -1.0, 1.0)


@pytest.mark.parametrize("wrapper", [TimeLimit, ActionRepeat, ActionChunk])
@pytest.mark.parametrize("count", [0, -1, 1.5, True, "3"])
def test_counts_must_be_whole_and_positive(wrapper, count):
    with pytest.raises(UserError, match="at least 1"):
        wrapper(Count(), count)


class Loose(Count):
    """Weakly typed, an int after reset and a float after step, flags that are floats."""

    def reset(self, key, params):
        return {"x": jnp.asarray(0), "key": key}, jnp.full((1,), 0.0)

    def step(self, state, action, key):
        obs = jnp.full((1,), 2.0)
        state = {"x": state["x"] + 0.5, "key": key}
        return state, TimeStep(obs, jnp.asarray(1), jnp.zeros(()), jnp.zeros(()), obs, {"n": jnp.asarray(2)})


def test_a_fixed_point_agrees_in_dtype_and_weak_type():
    env = FixedPoint(Loose())
    state, obs = env.reset(KEY, ())
    after, timestep = env.step(state, jnp.zeros(2), KEY)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, after)
    assert state["x"].dtype == jnp.float32 and after["x"] == 0.5
    assert jax.typeof(obs) == jax.typeof(timestep.obs) == jax.typeof(timestep.final_obs)
    assert timestep.reward.dtype == jnp.float32 and timestep.terminated.dtype == jnp.bool_
    assert env.spec.obs == jax.ShapeDtypeStruct((1,), jnp.float32)


class Growing(Count):
    def step(self, state, action, key):
        state, timestep = super().step(state, action, key)
        return state, timestep._replace(obs=jnp.zeros(2))


class Forgetful(Count):
    def step(self, state, action, key):
        state, timestep = super().step(state, action, key)
        return state._replace(total={"sum": state.total}), timestep


def test_a_leaf_that_changes_shape_is_named():
    with pytest.raises(UserError, match=r"obs has shape \(1,\) after reset and \(2,\) after step"):
        FixedPoint(Growing())


def test_a_state_that_changes_structure_is_named():
    with pytest.raises(UserError, match=r"they differ in .*\.total"):
        FixedPoint(Forgetful())


def test_an_environment_without_a_renderer_says_so():
    with pytest.raises(UserError, match="Count cannot be rendered"):
        ActionRepeat(TimeLimit(Count(), 3), 2).render([])
