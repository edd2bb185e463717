"""Run by tests/test_sharding.py in a process of eight CPU devices; by hand:

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/eight_devices.py
"""

from __future__ import annotations

import dataclasses
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import envs
from envs.physics.native import calling_devices
from rlx import data, learners
from rlx.algorithms import ALGORITHMS, bc, ppo, sac
from rlx.collection import Part, collect, random_policy
from rlx.compilation import compile_run
from rlx.errors import UserError
from rlx.footprint import collectives
from rlx.learners import maker
from rlx.logging import Progress
from rlx.schedule import TrainConfig, make_schedule
from rlx.sharding import make_mesh, on_parts
from rlx.training import train, train_many
from tests.kinds import OF_EACH_KIND
from tests.test_training import assert_same_state, without_time
from tests.worlds import Counter

NUM_DEVICES = 8
SMALL = TrainConfig(
    total_steps=16 * 8 * 6, num_envs=16, unroll_length=8, iterations_per_epoch=2, num_evals=3, eval_episodes=16
)
CONFIG = ppo.Config(actor_hidden=(8,), critic_hidden=(8,), num_epochs=2, num_minibatches=2)
RECURRENT = dataclasses.replace(CONFIG, recurrent=True, memory_size=8)


def quiet():
    return Progress(quiet=True)


def run(num_devices, config=CONFIG, env=None, sizes=SMALL, **keywords):
    sizes = dataclasses.replace(sizes, num_devices=num_devices)
    return train(env or Counter(5), ppo, sizes, config, progress=quiet(), **keywords)


def assert_close(tree, expected, tolerance=1e-5):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
        x, y = (jax.random.key_data(z) if jnp.issubdtype(z.dtype, jax.dtypes.prng_key) else z for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def messages_of(module, config, sizes, found=None, **plan):
    """Between devices in one iteration of the program that runs, and the bytes of the parameters."""
    env, sizes = Counter(5), dataclasses.replace(sizes, iterations_per_epoch=1, split="envs")
    schedule = make_schedule(env, sizes)
    schedule = schedule._replace(plan=schedule.plan._replace(**plan))
    assert schedule.num_devices == NUM_DEVICES
    make = maker(module, config, env, schedule.plan)
    programs = compile_run(env, make, schedule, sizes, jax.random.key(0), {}, None, quiet(), found)
    state = programs.abstract_state
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.learner.params))
    return collectives(programs.epoch.as_text()), size


def small(config):
    """The same settings with networks much smaller than the experience of an iteration."""
    fields = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: (8,) for name in ("actor_hidden", "critic_hidden") if name in fields})


SETTINGS = [
    pytest.param(
        name,
        small(importlib.import_module(ALGORITHMS[name]).Config()),
        marks=[pytest.mark.slow] * (name not in OF_EACH_KIND),
    )
    for name in ALGORITHMS
]
OFF_POLICY = sac.Config(
    actor_hidden=(8,),
    critic_hidden=(8,),
    batch_size=32,
    utd_ratio=(4, 128),
    replay_size=300,
    prefill_steps=2 * 128,
    n_step=3,
)
OTHERS = [("ppo", RECURRENT), ("ppo", dataclasses.replace(CONFIG, gae_per_minibatch=True, adaptive_lr=True))]
SETTINGS += [pytest.param(*settings, marks=pytest.mark.slow) for settings in OTHERS]
WIDE = dataclasses.replace(SMALL, num_envs=256, unroll_length=64)


@pytest.mark.parametrize(("name", "config"), SETTINGS)
def test_one_iteration_sends_nothing_larger_than_the_parameters(name, config):
    found, size = messages_of(importlib.import_module(ALGORITHMS[name]), config, WIDE)
    assert any(c.kind == "all-reduce" and c.times > 1 and c.bytes > size // 8 for c in found), "gradients"
    # Scalars of metrics may travel with the gradients.
    assert max(c.bytes for c in found) <= size + 64 < WIDE.num_envs * WIDE.unroll_length, found
    assert {c.kind for c in found} == {"all-reduce"}, found


@pytest.mark.slow
def test_data_beside_environments_are_drawn_on_every_device_for_itself(tmp_path):
    """The batch, 1,024 transitions, is larger than the parameters: as a message it would be seen."""
    env, config = Counter(5), dataclasses.replace(OFF_POLICY, batch_size=1024, data_batch=512)
    collect(env, [Part(random_policy(env.spec), (), 2000)], tmp_path / "a.npz", progress=quiet())
    found = data.read([(tmp_path / "a.npz", None)], env)
    messages, size = messages_of(sac, config, WIDE, found._replace(source=None))
    assert {c.kind for c in messages} == {"all-reduce"} and max(c.bytes for c in messages) <= size + 64, messages
    eight, one = (
        train(env, sac, dataclasses.replace(SMALL, num_devices=n), config, data=found, progress=quiet()) for n in (8, 1)
    )
    assert_close(eight.state.learner.params, one.state.learner.params, 1e-4)


def test_a_shuffle_over_all_devices_would_be_seen():
    found, size = messages_of(ppo, small(ppo.Config()), WIDE, num_groups=1)
    assert max(c.bytes for c in found) > size + 64 or {c.kind for c in found} != {"all-reduce"}


@pytest.mark.slow
def test_data_are_read_on_every_device_for_itself(tmp_path):
    env = Counter(5)
    collect(env, [Part(random_policy(env.spec), (), 2000)], tmp_path / "a.npz", progress=quiet())
    found = data.read([(tmp_path / "a.npz", None)], env)
    messages, size = messages_of(bc, small(bc.Config()), WIDE, found)
    assert {c.kind for c in messages} == {"all-reduce"} and max(c.bytes for c in messages) <= size + 64, messages
    eight, one = (
        train(env, bc, dataclasses.replace(SMALL, num_devices=n), small(bc.Config()), data=found, progress=quiet())
        for n in (8, 1)
    )
    assert_close(eight.state, one.state, 1e-4)


@pytest.mark.parametrize("config", [CONFIG, pytest.param(RECURRENT, marks=pytest.mark.slow)])
def test_a_run_on_eight_devices_equals_that_on_one(config):
    eight, one = run(8, config), run(1, config)
    assert len(eight.state.source.episodes.returns.sharding.device_set) == NUM_DEVICES
    assert eight.state.source.episodes.returns.addressable_shards[0].data.shape == (2,)
    assert_close(eight.state, one.state, 1e-4)
    for row, expected in zip(without_time(eight.history), without_time(one.history), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_run_with_replay_on_eight_devices_equals_that_on_one():
    eight, one = (
        train(Counter(5), sac, dataclasses.replace(SMALL, num_devices=n), OFF_POLICY, progress=quiet()) for n in (8, 1)
    )
    rows = eight.state.learner.experience.rows
    assert rows.reward.shape == (16, 24, 1) and rows.reward.addressable_shards[0].data.shape == (2, 24, 1)
    assert len(rows.obs.sharding.device_set) == NUM_DEVICES
    assert_close(eight.state, one.state, 1e-4)
    for row, expected in zip(without_time(eight.history), without_time(one.history), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_the_learning_curve_of_a_longer_run_is_that_of_one_device():
    env = envs.make("gymnax/CartPole-v1")
    sizes = TrainConfig(total_steps=30_000, num_envs=32, unroll_length=32, num_evals=5, eval_episodes=32)
    config = ppo.Config(learning_rate=1e-3, num_epochs=4, num_minibatches=8)
    eight, one = (
        [row["eval/return"] for row in run(n, config, env, sizes).history if "eval/return" in row] for n in (8, 1)
    )
    np.testing.assert_allclose(eight[:2], one[:2], rtol=0.05)  # then rounding has grown, as between two seeds
    runs = {str(seed): (dataclasses.replace(sizes, seed=seed, num_devices=1), config) for seed in range(1, 5)}
    others = train_many(env, ppo, runs, progress=quiet())
    last = [one[-1], *(other.history[-1]["eval/return"] for other in others.values())]
    assert one[0] < 50 < min(last) <= eight[-1] * 1.1 and eight[-1] <= max(last) * 1.1


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"reset": "always"}, {"eval_episodes": 12}, {"stagger": False, "num_groups": 8}])
def test_other_settings_equal_those_of_one_device(change):
    sizes = dataclasses.replace(SMALL, **change)
    eight, one = run(8, sizes=sizes), run(1, sizes=sizes)
    assert_close(eight.state, one.state, 1e-4)
    assert eight.history[-1]["eval/return"] == pytest.approx(one.history[-1]["eval/return"], rel=1e-4)


@pytest.mark.slow
def test_a_policy_starts_a_run_on_other_devices():
    first = run(8)
    for num_devices in (8, 4, 1):
        second = run(num_devices, init_policy=first.policy)
        assert second.history[0]["eval/return"] == pytest.approx(first.history[-1]["eval/return"], rel=1e-4)


@pytest.mark.slow
def test_native_physics_steps_on_every_device():
    env = envs.make("playground/CartpoleBalance", physics="mujoco")
    sizes = dataclasses.replace(SMALL, total_steps=16 * 8 * 2, eval_decisions=10, num_evals=1)
    eight, one = run(8, env=env, sizes=sizes), run(1, env=env, sizes=sizes)
    assert_close(eight.state.learner.params, one.state.learner.params, 1e-4)
    assert_close(eight.state.source.episodes.obs, one.state.source.episodes.obs, 1e-3)


def test_the_state_is_donated():
    env, sizes = Counter(5), dataclasses.replace(SMALL, split="envs")
    schedule = make_schedule(env, sizes)
    assert schedule.num_devices == NUM_DEVICES
    built = ppo.make(CONFIG, env.spec, schedule.plan)
    programs = compile_run(env, lambda varied, draw: built, schedule, sizes, jax.random.key(0), {}, None, quiet())
    state = programs.init(jax.random.key(0), {}, None, ())
    programs.epoch(state, {}, ())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("before", "after"), [(8, 1), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((1, 8), (8, 8)))]
)
def test_a_run_goes_on_on_another_number_of_devices(tmp_path, before, after):
    stop_at = 16 * 8 * 4
    run(before, run_dir=tmp_path / "run", on_epoch=lambda row: row["step"] >= stop_at)
    resumed = run(after, run_dir=tmp_path / "run", resume=True)
    whole = run(before)
    if before == after:
        assert_same_state(resumed.state, whole.state)
    else:
        assert_close(resumed.state, whole.state, 1e-4)
    assert len(resumed.state.source.episodes.returns.sharding.device_set) == after


def many(num_runs, split, run_dir=None, **keywords):
    sizes = dataclasses.replace(SMALL, split=split)
    runs = {f"seed-{s}": (dataclasses.replace(sizes, seed=s), CONFIG) for s in range(num_runs)}
    return train_many(Counter(5), ppo, runs, run_dir=run_dir, progress=quiet(), **keywords)


@pytest.mark.slow
@pytest.mark.parametrize(("num_runs", "split"), [(8, "runs"), (3, "envs")])
def test_many_runs_on_eight_devices_equal_each_alone_and_resume_bit_for_bit(tmp_path, num_runs, split):
    whole = many(num_runs, split)
    many(num_runs, split, tmp_path / "runs", on_epoch=lambda rows: rows["seed-0"]["step"] >= 16 * 8 * 4)
    resumed = many(num_runs, split, tmp_path / "runs", resume=True)
    for seed in range(num_runs):
        assert_same_state(resumed[f"seed-{seed}"].state, whole[f"seed-{seed}"].state)
    alone = run(1, sizes=dataclasses.replace(SMALL, seed=1))
    assert_close(whole["seed-1"].state, alone.state._replace(stopped=None), 1e-5 if split == "runs" else 1e-4)


@pytest.mark.slow
def test_runs_on_devices_of_their_own_step_native_physics_as_alone_and_resume_bit_for_bit(tmp_path):
    """As every study on a CPU: callbacks of several devices at once."""
    env = envs.make("playground/PointMass", physics="mujoco")
    sizes = dataclasses.replace(SMALL, total_steps=16 * 8 * 4, eval_decisions=10, num_evals=1)
    both = {f"seed-{s}": (dataclasses.replace(sizes, split="runs", seed=s), CONFIG) for s in range(3)}

    def many(run_dir=None, **keywords):
        return train_many(env, ppo, both, run_dir=run_dir, progress=quiet(), **keywords)

    whole = many()
    many(tmp_path / "runs", on_epoch=lambda rows: rows["seed-0"]["step"] >= 16 * 8 * 2)
    resumed = many(tmp_path / "runs", resume=True)
    alone = run(1, env=env, sizes=dataclasses.replace(sizes, seed=1))
    for name in both:
        assert_same_state(resumed[name].state, whole[name].state)
    assert_close(whole["seed-1"].state.learner.params, alone.state.learner.params, 1e-5)


def test_threads_of_native_physics_are_shared_out_over_the_devices_of_the_program_that_calls():
    found = []

    def seen(x):
        found.append(calling_devices())
        return x

    jax.jit(on_parts(seen, make_mesh(4))).lower(jnp.zeros(8))
    jax.jit(seen).lower(jnp.zeros(8))
    assert found == [4, 1]


def test_runs_on_devices_of_their_own_send_nothing():
    env, sizes = Counter(5), dataclasses.replace(SMALL, split="runs")
    schedule = make_schedule(env, sizes, 8)
    assert (schedule.plan.num_devices, schedule.num_run_devices) == (1, 8)
    built = ppo.make(CONFIG, env.spec, schedule.plan)
    keys = jax.random.split(jax.random.key(0), 8)
    programs = compile_run(env, lambda varied, draw: built, schedule, sizes, keys, {}, None, quiet())
    assert not collectives(programs.epoch.as_text())
    leaves = jax.tree.leaves((programs.abstract_state.learner, programs.abstract_state.source))
    assert {(leaf.sharding.spec, leaf.sharding.num_devices) for leaf in leaves} == {(PartitionSpec("devices"), 8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_devices": 9}, "num_devices = 9 .* from 1 to 8"),
        ({"num_devices": 8, "num_envs": 12}, "num_devices = 8 .* a divisor of num_groups = 4"),
        ({"num_devices": 2, "split": "runs"}, "num_devices = 2 .* a divisor of the 1 runs"),
        ({"num_devices": 8, "num_groups": 2}, "num_devices = 8 .* a divisor of num_groups = 2"),
    ],
)
def test_sizes_that_do_not_split_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        make_schedule(Counter(5), dataclasses.replace(SMALL, **change))


@pytest.mark.parametrize(
    ("num_envs", "num_groups", "num_runs", "split", "expected"),
    [(16, 0, 1, "auto", (8, 1)), (12, 0, 1, "auto", (4, 1)), (5, 0, 1, "auto", (1, 1)), (18, 6, 1, "auto", (6, 1))]
    + [(16, 0, 16, "auto", (1, 8)), (16, 0, 12, "auto", (8, 1)), (16, 0, 12, "runs", (1, 6))],
)
def test_without_a_number_as_many_devices_are_used_as_divide(
    num_envs, num_groups, num_runs, split, expected, monkeypatch
):
    devices = [types.SimpleNamespace(platform="tpu")] * NUM_DEVICES
    monkeypatch.setattr(jax, "devices", lambda: devices)
    sizes = dataclasses.replace(SMALL, num_envs=num_envs, num_groups=num_groups, split=split)
    schedule = make_schedule(Counter(5), sizes, num_runs)
    assert (schedule.plan.num_devices, schedule.num_run_devices) == expected


@pytest.mark.parametrize(
    ("num_runs", "split", "expected"),
    [(1, "auto", (1, 1)), (12, "auto", (1, 6)), (3, "auto", (1, 3)), (11, "auto", (1, 1)), (1, "envs", (8, 1))],
)
def test_on_a_cpu_runs_are_split_and_environments_on_request_alone(num_runs, split, expected):
    schedule = make_schedule(Counter(5), dataclasses.replace(SMALL, split=split), num_runs)
    assert (schedule.plan.num_devices, schedule.num_run_devices) == expected


def test_runs_are_not_split_unasked_where_random_numbers_would_change():
    with jax.default_prng_impl("rbg"):
        assert make_schedule(Counter(5), SMALL, 8).num_run_devices == 1


def test_minibatches_that_would_need_parts_of_a_group_are_refused():
    env = Counter(5)
    plan = make_schedule(env, dataclasses.replace(SMALL, split="envs")).plan
    config = dataclasses.replace(RECURRENT, num_minibatches=4)
    with pytest.raises(UserError, match="8 devices need whole groups"):
        learners.build_algorithm(ppo, config, env, plan)
