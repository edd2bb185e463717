"""Replay on rows that say who they are: what is stored and drawn, where windows stop, and that nothing is copied."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx import replay as replay_module
from rlx.algorithm import Plan
from rlx.algorithms import sac
from rlx.compilation import compile_run
from rlx.logging import Progress
from rlx.replay import check_replay, make_replay, mix
from rlx.returns import n_step_returns
from rlx.schedule import TrainConfig, make_schedule
from rlx.training import train_many
from rlx.types import Box, Spec, Transition, UserError
from tests.worlds import Counter

PLAN = Plan(num_envs=6, unroll_length=3, num_iterations=100, num_groups=2)
SPEC = Spec(obs=jax.ShapeDtypeStruct((2,), jnp.float32), action=Box((1,)))
SIZE = 50  # of 6 environments and unrolls of 3: 9 rows each, 54 in all
GAMMA = 0.5


def ending(time, env):
    """Whether the step of `env` at `time` terminated, and whether it was truncated."""
    return (time + env) % 7 == 0, (time + 2 * env) % 5 == 0 and (time + env) % 7 != 0


def trajectory_at(iteration, plan=PLAN):
    """obs = [time, env], next_obs = [time + 1/2, env], reward = time + env / 8, action = minus the reward."""
    times = iteration * plan.unroll_length + np.arange(plan.unroll_length)
    time, env = np.meshgrid(times, np.arange(plan.num_envs), indexing="ij")
    obs = np.stack([time, env], -1).astype(np.float32)
    ends = np.array([[ending(t, e) for e in range(plan.num_envs)] for t in times])
    reward = (time + env / 8).astype(np.float32)
    next_obs = obs + np.array([0.5, 0], np.float32)
    return jax.tree.map(
        jnp.asarray, Transition(obs, -reward[..., None], reward, ends[..., 0], ends[..., 1], next_obs, ())
    )


def filled(iterations, size=SIZE, plan=PLAN, obs_dtype="float32", batch=8):
    replay = make_replay(size, (batch,), plan, SPEC, obs_dtype)
    insert = jax.jit(replay.insert)
    rows = replay.init()
    for iteration in range(iterations):
        rows = insert(rows, trajectory_at(iteration, plan), jnp.int32(iteration))
    return replay, rows


def draws(replay, rows, iterations, n_step=1, size=4096):
    key = jax.random.key(0)
    return jax.jit(replay.sample, static_argnums=(3, 4))(rows, jnp.int32(iterations - 1), key, size, n_step, GAMMA)


def expected(time, env, newest, n_step):
    """Reward, discount and the time of the bootstrap of the window that begins at `time`, by a loop."""
    reward, discount = 0.0, 1.0
    for step in range(n_step):
        reward += discount * (time + step + env / 8)
        discount *= GAMMA
        terminated, truncated = ending(time + step, env)
        if terminated or truncated or time + step == newest or step == n_step - 1:
            return reward, 0.0 if terminated else discount, time + step + 0.5
    raise AssertionError


@pytest.mark.parametrize("n_step", [1, 3, 5])
def test_windows_are_those_of_a_loop_and_every_slot_is_drawn(n_step):
    """After every insert until the ring of three unrolls has gone around twice."""
    replay = make_replay(SIZE, (8,), PLAN, SPEC)
    insert, sample = jax.jit(replay.insert), jax.jit(replay.sample, static_argnums=(3, 4))
    rows = replay.init()
    for iteration in range(8):
        rows = insert(rows, trajectory_at(iteration), jnp.int32(iteration))
        batch = sample(rows, jnp.int32(iteration), jax.random.key(iteration), 2048, n_step, GAMMA)
        batch = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), batch)
        newest = (iteration + 1) * PLAN.unroll_length - 1
        oldest = max(0, newest + 1 - replay.num_rows)
        found = {}
        for i, (time, env) in enumerate(batch.obs.astype(int).tolist()):
            found[time, env] = (batch.reward[i], batch.discount[i], *batch.next_obs[i])
            assert batch.action[i, 0] == -(time + env / 8)
        assert set(found) == {(t, e) for t in range(oldest, newest + 1) for e in range(PLAN.num_envs)}
        for (time, env), parts in found.items():
            assert parts == pytest.approx((*expected(time, env, newest, n_step), env), rel=1e-6)


def test_sizes_are_rounded_up_to_whole_iterations():
    assert make_replay(SIZE, (8,), PLAN, SPEC).num_rows == 9
    assert make_replay(54, (8,), PLAN, SPEC).num_rows == 9
    assert make_replay(55, (8,), PLAN, SPEC).num_rows == 12
    assert make_replay(1, (8,), PLAN, SPEC).num_rows == 3


def test_draws_are_uniform():
    replay, rows = filled(7)
    time, env = np.asarray(draws(replay, rows, 7, size=54 * 400).obs).reshape(-1, 2).astype(int).T
    counts = np.bincount((time - time.min()) * PLAN.num_envs + env, minlength=54)
    assert counts.size == 54 and abs(counts - 400).max() < 5 * 20  # standard deviations


def test_each_group_gives_an_equal_part_from_its_own_environments():
    replay, rows = filled(4)
    assert replay.num_groups == 2
    envs = np.asarray(draws(replay, rows, 4, size=64).obs)[..., 1]
    assert envs.shape == (2, 32)
    assert set(envs[0].astype(int)) == {0, 1, 2} and set(envs[1].astype(int)) == {3, 4, 5}


def test_windows_are_n_step_returns():
    """Over one stream, inserted at once: `reward + discount * value(next_obs)` is what `n_step_returns` gives."""
    plan = PLAN._replace(num_envs=2, unroll_length=20, num_groups=1)
    trajectory = trajectory_at(0, plan)
    replay, rows = filled(1, 1, plan)
    batch = jax.tree.map(lambda x: x[0], draws(replay, rows, 1, n_step=4))
    targets = batch.reward + batch.discount * jnp.sin(batch.next_obs[:, 0])
    columns = (trajectory.reward, jnp.sin(trajectory.next_obs[..., 0]), trajectory.terminated, trajectory.truncated)
    returns = jax.vmap(lambda *x: n_step_returns(*x, GAMMA, 4), 1, 1)(*columns)
    time, env = np.asarray(batch.obs).astype(int).T
    np.testing.assert_allclose(targets, returns[time, env], rtol=1e-5)


def test_the_key_decides_and_other_keys_draw_others():
    replay, rows = filled(4)
    one, two, other = (replay.sample(rows, jnp.int32(3), jax.random.key(seed), 64, 1, GAMMA).obs for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert (np.asarray(one) != np.asarray(other)).any()


@pytest.mark.parametrize(("obs_dtype", "scale"), [("bfloat16", 2**-8), ("uint8", 0.5 / 3)])
def test_stored_types_cost_their_rounding_alone(obs_dtype, scale):
    replay, rows = filled(3, obs_dtype=obs_dtype)
    assert rows.obs.dtype == rows.next_obs.dtype == obs_dtype and rows.reward.dtype == jnp.float32
    batch = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), draws(replay, rows, 3))
    assert batch.obs.dtype == batch.next_obs.dtype == np.float32
    true = -batch.action[:, 0] - batch.obs[:, 1] / 8
    np.testing.assert_allclose(batch.obs[:, 0], true, rtol=scale, atol=1e-6)
    assert abs(batch.next_obs[:, 0] - true).max() <= 1


@pytest.mark.parametrize(
    ("obs_dtype", "kept"), [("uint8", [3.0, 0.0, 255.0, 1.0]), ("bfloat16", [2.59375, -3.0, 300.0, 1.2265625])]
)
def test_stored_observations_are_rounded_to_the_nearest_and_kept_within_bounds(obs_dtype, kept):
    obs = jnp.broadcast_to(jnp.array([2.6, -3.0, 300.0, 1.23]), (PLAN.unroll_length, PLAN.num_envs, 4))
    replay = make_replay(SIZE, (8,), PLAN, Spec(jax.ShapeDtypeStruct((4,), jnp.float32), SPEC.action), obs_dtype)
    trajectory = trajectory_at(0, PLAN)._replace(obs=obs, next_obs=obs)
    rows = replay.insert(replay.init(), trajectory, jnp.int32(0))
    batch = replay.sample(rows, jnp.int32(0), jax.random.key(0), 8, 1, GAMMA)
    np.testing.assert_array_equal(batch.obs.reshape(-1, 4), np.tile(kept, (8, 1)))
    np.testing.assert_array_equal(batch.next_obs.reshape(-1, 4), np.tile(kept, (8, 1)))


def test_observations_that_are_dictionaries_or_integers_keep_their_kind():
    spec = Spec({"state": SPEC.obs, "pixels": jax.ShapeDtypeStruct((4, 4), jnp.uint8)}, SPEC.action)
    rows = make_replay(SIZE, (8,), PLAN, spec, "bfloat16").init()
    assert rows.obs["pixels"].dtype == jnp.uint8 and rows.obs["state"].dtype == jnp.bfloat16
    assert rows.obs["pixels"].shape == (2, 9, 3, 4, 4)


@pytest.mark.parametrize("runs", [0, 3], ids=["one run", "three runs"])
def test_an_insert_into_a_donated_ring_copies_nothing(runs):
    replay = make_replay(60_000, (8,), PLAN, SPEC)

    def insert_many(rows, trajectory, iteration):
        def body(i, rows):
            rows = replay.insert(rows, trajectory, i)
            drawn = replay.sample(rows, i, jax.random.key(0), 8, 3, GAMMA)
            return rows._replace(reward=rows.reward.at[0, 0, 0].set(drawn.reward.sum()))  # drawing is not left out

        return jax.lax.fori_loop(iteration, iteration + 5, body, rows)

    rows, trajectory = replay.init(), trajectory_at(0)
    if runs:
        rows, trajectory = jax.tree.map(lambda x: jnp.stack([x] * runs), (rows, trajectory))
        insert_many = jax.vmap(insert_many, (0, 0, None))
    compiled = jax.jit(insert_many, donate_argnums=0).lower(rows, trajectory, jnp.int32(0)).compile()
    found, size = compiled.memory_analysis(), sum(x.nbytes for x in jax.tree.leaves(rows))
    assert found.temp_size_in_bytes < size / 50
    assert found.output_size_in_bytes - found.alias_size_in_bytes < size / 50
    shape = f"f32[{','.join(map(str, rows.obs.shape))}]"
    copies = [line for line in compiled.as_text().splitlines() if f"= {shape}" in line and " copy(" in line]
    assert not copies


def test_a_batch_is_mixed_of_replay_and_of_other_draws_in_equal_parts_of_every_group():
    replay, rows = filled(4)
    online = replay.sample(rows, jnp.int32(3), jax.random.key(0), 40, 3, GAMMA)
    other = jax.tree.map(lambda x: jnp.full_like(x[:, :12], 9), online)
    batch = mix([online, other])
    assert batch.reward.shape == (64,) and batch.obs.shape == (64, 2)
    for half in (batch.obs[:32], batch.obs[32:]):
        assert (np.asarray(half[:, 1]) == 9).sum() == 12


@pytest.mark.parametrize(
    ("size", "batch", "dtype", "message"),
    [
        (0, (8,), "float32", "replay_size = 0"),
        (50, (7,), "float32", "batch_size = .*2 devices need whole groups.*leaves 1; a multiple of 2"),
    ],
)
def test_sizes_that_cannot_be_are_refused(size, batch, dtype, message):
    with pytest.raises(UserError, match=message):
        check_replay(PLAN._replace(num_devices=2), SPEC, size, batch, dtype)


def test_a_ring_that_does_not_fit_is_refused_with_the_largest_that_does(monkeypatch):
    monkeypatch.setattr(replay_module, "free_memory", lambda num_devices: 10_000)
    row = 4 * 2 + 4 + 4 + 1 + 1 + 4 * 2
    largest = int(0.9 * 10_000 / 2) // row // 18 * 18  # twice: a checkpoint begins with a copy
    with pytest.raises(UserError, match=f"replay_size = 1000000 .* of a single run about {largest} fit"):
        check_replay(PLAN, SPEC, 1_000_000, (8,), "float32")
    check_replay(PLAN, SPEC, largest, (8,), "float32")


@pytest.mark.parametrize("num_runs", [pytest.param(1, marks=pytest.mark.slow), 2], ids=["one run", "two runs"])
def test_a_whole_epoch_of_a_learner_copies_no_ring(num_runs):
    """Neither the loop around it, nor drawing, nor the guard against values that are not finite, needs a second one."""
    sizes = TrainConfig(total_steps=16 * 12, num_envs=4, unroll_length=4, iterations_per_epoch=6, num_evals=0)
    config = sac.Config(
        actor_hidden=(8,),
        critic_hidden=(8,),
        batch_size=16,
        utd_ratio=(2, 16),
        replay_size=200_000,
        prefill_steps=32,
    )
    env = Counter(5)
    schedule = make_schedule(env, sizes, num_runs)
    algorithm = sac.make(config, env.spec, schedule.plan)
    key = jax.random.key(0) if num_runs == 1 else jax.random.split(jax.random.key(0), num_runs)
    programs = compile_run(env, lambda varied, draw: algorithm, schedule, sizes, key, {}, None, Progress(quiet=True))
    ring = programs.abstract_state.learner.experience.rows
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(ring))
    found = programs.epoch.memory_analysis()
    assert size > 5_000_000 * num_runs > 20 * found.temp_size_in_bytes
    assert found.output_size_in_bytes - found.alias_size_in_bytes < size / 20


def test_of_many_runs_one_that_fails_is_stopped_and_the_others_learn_on():
    """A NaN gets into its ring, which is not taken back; its parameters are."""
    sizes = TrainConfig(total_steps=16 * 12, num_envs=4, unroll_length=4, iterations_per_epoch=4, num_evals=0)
    sizes = dataclasses.replace(sizes, reset_pool_size=4)  # of many more each run would meet one that breaks
    config = sac.Config(
        actor_hidden=(8,), critic_hidden=(8,), batch_size=16, utd_ratio=(2, 16), replay_size=200, prefill_steps=16
    )
    runs = {f"seed-{seed}": (dataclasses.replace(sizes, seed=seed), config) for seed in range(4)}
    found = train_many(Counter(5, nan_at=0.9), sac, runs, progress=Progress(quiet=True))
    failed = {name for name, run in found.items() if run.error}
    assert 0 < len(failed) < 4
    for name, run in found.items():
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.state.learner.learned))
        assert (int(run.state.iteration) == 12) == (name not in failed)
