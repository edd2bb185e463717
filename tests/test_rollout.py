"""The environment source: transitions, endings, the reset pool, statistics."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.wrappers import TimeLimit
from rlx.algorithm import Plan
from rlx.rollout import make_source, nonfinite_envs, where_done
from rlx.types import Box, Spec, TimeStep
from tests.worlds import Counter, constant_algorithm

PLAN = Plan(num_envs=4, unroll_length=7, num_iterations=1)


def collect(env, reset="pool", pool_size=2, plan=PLAN, seed=0):
    algorithm = constant_algorithm(plan)
    source = make_source(env, plan, reset, pool_size)
    learner = algorithm.init(jax.random.key(9))
    start = source.init(algorithm, jax.random.key(seed))
    step = jax.jit(lambda state, key: source.collect(algorithm, learner, state, key))
    return source, start, step


@pytest.mark.parametrize("reset", ["pool", "always"])
def test_next_obs_is_the_true_successor_and_obs_the_reset_observation(reset):
    _, start, step = collect(Counter(3), reset)
    _, trajectory, _ = step(start, jax.random.key(1))
    t = np.asarray(trajectory.obs[..., 1])
    np.testing.assert_array_equal(t[:, 0], [0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(trajectory.next_obs[:, 0, 1], [1, 2, 3, 1, 2, 3, 1])
    # the successor belongs to the same episode as the observation, at endings too
    np.testing.assert_array_equal(trajectory.next_obs[..., 0], trajectory.obs[..., 0])


@pytest.mark.parametrize("ending", ["terminated", "truncated"])
def test_the_two_endings_are_kept_apart(ending):
    _, start, step = collect(Counter(3, ending))
    _, trajectory, _ = step(start, jax.random.key(1))
    ends = np.array([0, 0, 1, 0, 0, 1, 0], bool)
    other = "truncated" if ending == "terminated" else "terminated"
    np.testing.assert_array_equal(getattr(trajectory, ending)[:, 1], ends)
    assert not np.asarray(getattr(trajectory, other)).any()


def test_memory_starts_anew_after_an_ending():
    _, start, step = collect(Counter(3))
    _, trajectory, _ = step(start, jax.random.key(1))
    np.testing.assert_array_equal(trajectory.extras[:, 2], [0, 1, 2, 0, 1, 2, 0])


def test_episode_statistics_are_the_sums_over_ended_episodes():
    _, start, step = collect(Counter(3))
    state, _, stats = step(start, jax.random.key(1))
    assert float(stats.episodes) == 8
    assert float(stats.returns) == 8 * (1 + 2 + 3)
    assert float(stats.lengths) == 8 * 3
    assert float(stats.info["t"]) == pytest.approx((1 + 2 + 3 + 1 + 2 + 3 + 1) / 7)
    np.testing.assert_array_equal(
        state.episodes.returns, np.full(4, 1.0)
    )  # the running episodes go on in the next collect
    np.testing.assert_array_equal(state.episodes.lengths, np.full(4, 1.0))
    state, _, stats = step(state, jax.random.key(2))
    assert float(stats.returns) == 8 * 6


def test_pool_resets_take_states_of_the_pool():
    source, start, step = collect(Counter(3), "pool", pool_size=2)
    _, trajectory, _ = step(start, jax.random.key(1))
    pool = set(np.asarray(start.pool_obs[:, 0]).tolist())
    assert set(np.asarray(trajectory.obs[3:, :, 0]).ravel().tolist()) <= pool


@pytest.mark.parametrize(("pool_size", "num_new"), [(1, 1), (4, 1), (5, 2), (8, 2), (21, 6)])
def test_a_refresh_replaces_the_oldest_quarter_of_the_pool_by_new_states(pool_size, num_new):
    source, start, _ = collect(Counter(3), "pool", pool_size, PLAN._replace(num_envs=8))
    state, seen = start, set(np.asarray(start.pool_obs[:, 0]).tolist())
    assert len(seen) == pool_size  # states of its own, however few environments there are
    for i in range(4):
        refreshed = source.refresh(state, jax.random.key(i))
        for pool in ("pool_obs", "pool_env"):
            before, after = (jax.tree.leaves(getattr(s, pool))[-1] for s in (state, refreshed))
            np.testing.assert_array_equal(after[:-num_new], before[num_new:])
        new = set(np.asarray(refreshed.pool_obs[-num_new:, 0]).tolist())
        assert len(new) == num_new and not new & seen
        np.testing.assert_array_equal(refreshed.pool_obs[:, 0], refreshed.pool_env.start)
        np.testing.assert_array_equal(refreshed.episodes.obs, state.episodes.obs)
        state, seen = refreshed, seen | new
    assert not set(np.asarray(start.pool_obs[:, 0]).tolist()) & set(np.asarray(state.pool_obs[:, 0]).tolist())


def test_true_resets_are_all_different():
    _, start, step = collect(Counter(1), "always")
    _, trajectory, _ = step(start, jax.random.key(1))
    starts = np.asarray(trajectory.obs[..., 0]).ravel()
    assert len(set(starts.tolist())) == starts.size


class KeyLogger:
    """Observes the key that it was reset or stepped with. Every step ends an episode."""

    spec = Spec(obs=jax.ShapeDtypeStruct((2,), jnp.uint32), action=Box((1,)), episode_length=1)

    def reset(self, key, params):
        return (), jax.random.key_data(key)

    def step(self, state, action, key):
        obs = jax.random.key_data(key)
        never = jnp.zeros((), bool)
        return state, TimeStep(obs, jnp.zeros(()), never, ~never, obs, {})


def test_no_key_is_used_twice():
    plan = Plan(num_envs=3, unroll_length=5, num_iterations=1)

    def act(policy, memory, obs, key, mode):
        return memory, jnp.zeros((3, 1)), jnp.broadcast_to(jax.random.key_data(key), (3, 2))

    algorithm = constant_algorithm(plan)._replace(act=act)
    source = make_source(KeyLogger(), plan, "always")
    start = source.init(algorithm, jax.random.key(0))
    state, trajectory, _ = source.collect(algorithm, (), start, jax.random.key(1))
    obs, next_obs = trajectory.obs.reshape(-1, 2), trajectory.next_obs.reshape(-1, 2)
    keys = [obs, state.episodes.obs, next_obs, trajectory.extras[:, 0]]
    keys = np.concatenate([*map(np.asarray, keys), np.asarray(jax.random.key_data(jax.random.key(1)))[None]])
    assert len(np.unique(keys, axis=0)) == len(keys)


def test_the_key_decides_everything():
    _, start, step = collect(Counter(3))
    one, two = step(start, jax.random.key(1)), step(start, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_an_environment_that_is_not_finite_is_named():
    tree = {"position": jnp.zeros((3, 4, 2)).at[1, 2, 0].set(jnp.nan), "on": jnp.zeros((3, 4), bool)}
    assert {k: int(v) for k, v in nonfinite_envs(tree, "obs").items()} == {"obs['position']": 2}
    _, start, step = collect(Counter(50))
    assert int(step(start, jax.random.key(1))[2].nonfinite["obs"]) == -1


def test_where_done_broadcasts_over_trailing_axes_and_keys():
    done = jnp.array([True, False])
    keys = jax.random.split(jax.random.key(0), 2)
    x = where_done(done, (jnp.ones((2, 3)), keys[::-1]), (jnp.zeros((2, 3)), keys))
    np.testing.assert_array_equal(x[0], [[1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(jax.random.key_data(x[1]), jax.random.key_data(keys[jnp.array([1, 1])]))


def test_no_key_is_consumed_twice_anywhere_in_a_collect():
    """jax's own checker, which also follows keys through splits and scans."""
    plan = Plan(num_envs=3, unroll_length=5, num_iterations=1)
    algorithm = constant_algorithm(plan)
    source = make_source(Counter(2), plan)
    policy = algorithm.init(jax.random.key(9))
    with jax.debug_key_reuse(True):
        state = jax.jit(lambda key: source.init(algorithm, key))(jax.random.key(0))
        jax.jit(lambda state, key: source.collect(algorithm, policy, state, key))(state, jax.random.key(1))


def staggered(env, num_envs=64, length=40):
    plan = PLAN._replace(num_envs=num_envs, unroll_length=length)
    algorithm = constant_algorithm(plan)
    source = make_source(env, plan, stagger=True)
    state = source.init(algorithm, jax.random.key(0))
    return state, *source.collect(algorithm, algorithm.init(jax.random.key(9)), state, jax.random.key(1))


def test_a_staggered_first_episode_is_cut_once_as_a_truncation_and_later_ones_are_whole():
    length = 10
    start, state, trajectory, stats = staggered(TimeLimit(Counter(1000), length))
    cuts = np.asarray(start.episodes.cuts).astype(int)
    assert set(cuts) == set(range(1, length + 1))  # 64 draws of 10: all there
    assert not np.asarray(trajectory.terminated).any()
    for env, cut in enumerate(cuts):
        ends = np.flatnonzero(trajectory.truncated[:, env]) + 1
        np.testing.assert_array_equal(ends, np.arange(cut, 41, length))
    t = np.asarray(trajectory.next_obs[..., 1])
    assert t[cuts - 1, np.arange(64)].tolist() == cuts.tolist()  # the true successor at the cut
    assert np.isinf(np.asarray(state.episodes.cuts)).all()
    # Statistics are those of whole episodes: a first one that was cut at its limit counts, a shorter one does not.
    whole = sum((40 - cut) // length + (cut == length) for cut in cuts)
    assert float(stats.episodes) == whole
    assert float(stats.lengths) == whole * length


def test_without_a_time_limit_nothing_is_cut():
    endless = Counter(3)
    endless.spec = dataclasses.replace(endless.spec, episode_length=None)
    start, *_ = staggered(endless)
    assert np.isinf(np.asarray(start.episodes.cuts)).all()
