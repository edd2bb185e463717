"""Data sets: what is collected is what is read, true successors included; faults are refused; runs on them resume."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs.probes import lqr_optimum
from envs.wrappers import ActionChunk, ActionRepeat
from rlx import collection, data, rolling
from rlx.algorithm import Algorithm, Plan
from rlx.algorithms import bc, ppo, sac
from rlx.collection import Part, random_policy, split_steps
from rlx.compilation import compile_run
from rlx.data import transitions
from rlx.data_file import column, describe_env, load, write
from rlx.errors import NonFiniteError, UserError
from rlx.evaluation import make_evaluate
from rlx.logging import Progress
from rlx.schedule import TrainConfig, make_schedule
from rlx.training import train, train_many
from rlx.types import Box, Discrete
from tests.test_training import assert_same_state, without_time
from tests.worlds import Counter, constant_algorithm

SMALL = TrainConfig(
    total_steps=4 * 8 * 6, num_envs=4, unroll_length=8, iterations_per_epoch=1, num_evals=2, eval_episodes=4
)
CONFIG = bc.Config(actor_hidden=(8,), num_minibatches=2)


def quiet():
    return Progress(quiet=True)


def collect(path, env=None, steps=20, num_envs=2, mode="greedy", bias=0.5, algorithm=None, **keywords):
    """A data set of the constant action `bias`, or of an algorithm without parameters."""
    env = env or Counter(3)
    if algorithm is None:
        algorithm = constant_algorithm(Plan(1, 1, 1), bias)
        policy = algorithm.init(None)
    else:
        policy = ()
    parts = [Part(algorithm, policy, steps)]
    return collection.collect(env, parts, path, mode=mode, num_envs=num_envs, progress=quiet(), **keywords)


def everything(found):
    """All steps, in the order of the file."""
    return jax.tree.map(np.asarray, transitions(found.arrays, jnp.arange(len(found.arrays.rewards))))


@pytest.mark.parametrize("ending", ["terminated", "truncated"])
@pytest.mark.parametrize("max_unroll", [1024, 4])
def test_what_is_collected_is_read_with_true_successors_at_every_ending(tmp_path, ending, max_unroll, monkeypatch):
    """Two environments of ten and nine steps, episodes of three: each ends with a piece that collecting cut."""
    monkeypatch.setattr(rolling, "MAX_UNROLL", max_unroll)
    env = Counter(3, ending)
    metadata = collect(tmp_path / "a.npz", env, steps=19)
    steps = everything(data.read([(tmp_path / "a.npz", None)], env))
    t = np.array([0, 1, 2] * 3 + [0] + [0, 1, 2] * 3, np.float32)
    ends, cut = t == 2, np.arange(19) == 9
    np.testing.assert_array_equal(steps.obs[:, 1], t)
    np.testing.assert_array_equal(steps.next_obs[:, 1], t + 1)  # never the next episode's 0
    np.testing.assert_array_equal(steps.next_obs[:, 0], steps.obs[:, 0])  # where the episode began
    np.testing.assert_array_equal(steps.reward, t + 1)
    np.testing.assert_array_equal(steps.action, np.full((19, 1), 0.5))
    np.testing.assert_array_equal(steps.terminated, ends & (ending == "terminated"))
    np.testing.assert_array_equal(steps.truncated, cut | (ends & (ending == "truncated")))
    assert len(np.unique(steps.obs[:, 0])) == 7  # every episode has a start of its own
    assert steps.extras == ()
    part = metadata["parts"][0]
    assert (part["steps"], part["episodes"], part["whole_episodes"], part["mean_return"]) == (19, 7, 6, 6.0)
    columns, _ = load(tmp_path / "a.npz")
    assert columns["observations"].shape == (26, 2)
    np.testing.assert_array_equal(columns["episode_ids"], np.repeat(np.arange(7), [3, 3, 3, 1, 3, 3, 3]))


def test_first_episodes_are_whole_and_each_environments_own():
    env = Counter(3, "terminated")
    algorithm = constant_algorithm(Plan(1, 1, 1), 0.5)
    paths, returns = rolling.first_episodes(env, algorithm, algorithm.init(None), "greedy", 5, jax.random.key(0))
    np.testing.assert_array_equal(returns, np.full(5, 6.0))
    for path in paths:
        np.testing.assert_array_equal(path[:, 1], [0, 1, 2, 3])
        np.testing.assert_array_equal(path[:, 0], np.full(4, path[0, 0]))
    assert len({float(path[0, 0]) for path in paths}) == 5


@pytest.mark.parametrize(
    "env", [Counter(3, asymmetric=True), Counter(3, action=Discrete(4)), Counter(3, action=Box((2,), -3.0, (1.0, 2.0)))]
)
def test_dict_observations_and_every_kind_of_action(tmp_path, env):
    collect(tmp_path / "a.npz", env, 12, algorithm=random_policy(env.spec))
    steps = everything(data.read([(tmp_path / "a.npz", None)], env))
    assert jax.tree.structure(steps.next_obs) == jax.tree.structure(env.spec.obs)
    for after, before in zip(jax.tree.leaves(steps.next_obs), jax.tree.leaves(steps.obs), strict=True):
        np.testing.assert_array_equal(after[:, 1] - before[:, 1], np.ones(12))
    dtype, shape = (np.int32, ()) if isinstance(env.spec.action, Discrete) else (np.float32, env.spec.action.shape)
    assert steps.action.dtype == dtype and steps.action.shape == (12, *shape)
    assert len(np.unique(steps.action)) > 2


@pytest.mark.parametrize("reset", ["always", "pool"])
def test_episodes_begin_with_true_resets_or_out_of_a_pool(tmp_path, reset):
    """Four environments, ten episodes each: begun in a state of its own, or in one of 128, some of them in the same."""
    collect(tmp_path / "a.npz", steps=4 * 30, num_envs=4, reset=reset)
    steps = everything(data.read([(tmp_path / "a.npz", None)], Counter(3)))
    np.testing.assert_array_equal(steps.obs[:, 1], np.tile([0, 1, 2], 40))
    found = len(np.unique(steps.obs[:, 0]))
    assert found == 40 if reset == "always" else 20 < found < 40


def test_the_modes_are_those_of_the_policy(tmp_path):
    for mode, spread in (("greedy", False), ("sample", True)):
        collect(tmp_path / f"{mode}.npz", mode=mode)
        assert (np.ptp(load(tmp_path / f"{mode}.npz")[0]["actions"]) > 0) == spread


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        collect(tmp_path / f"{name}.npz", mode="sample", seed=seed)
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b != c
    assert len({load(tmp_path / f"{name}.npz")[1]["sha256"] for name in "abc"}) == 2


def test_several_policies_give_their_share_of_the_steps(tmp_path):
    algorithm = constant_algorithm(Plan(1, 1, 1))
    policies = [algorithm.init(None)._replace(bias=jnp.asarray(bias, jnp.float32)) for bias in (0.25, -0.25)]
    parts = [
        Part(algorithm, p, steps, {"run": "r"}) for p, steps in zip(policies, split_steps(20, [3, 1]), strict=True)
    ]
    metadata = collection.collect(Counter(3), parts, tmp_path / "a.npz", mode="greedy", progress=quiet())
    actions = everything(data.read([(tmp_path / "a.npz", None)], Counter(3))).action
    np.testing.assert_array_equal(actions[:, 0], [0.25] * 15 + [-0.25] * 5)
    assert [part["steps"] for part in metadata["parts"]] == [15, 5] and metadata["parts"][0]["run"] == "r"


@pytest.mark.parametrize(("total", "shares"), [(10, [1, 1, 1]), (7, [0.5, 0.25, 0.25]), (1000, [1e-3, 1.0])])
def test_steps_are_split_whole_and_within_one_of_their_share(total, shares):
    steps = split_steps(total, shares)
    assert sum(steps) == total
    assert all(abs(n - share / sum(shares) * total) < 1 for n, share in zip(steps, shares, strict=True))


def test_unless_told_every_environment_can_finish_an_episode():
    assert collection.num_envs_of(Counter(50), 1000, 0) == 20
    assert collection.num_envs_of(Counter(50), 10, 0) == 1
    assert collection.num_envs_of(Counter(2), 10**6, 0) == collection.MAX_ENVS
    assert collection.num_envs_of(Counter(2), 100, 7) == 7


Usage = namedtuple("Usage", "free")


def test_what_cannot_be_written_is_refused_before_anything_compiles(tmp_path, monkeypatch):
    (tmp_path / "a.npz").write_text("mine")
    monkeypatch.setattr(collection, "roll_out", None)
    for path, message in (("a.npz", "exists already"), ("a.txt", "is an .npz file"), ("no/a.npz", "folder")):
        with pytest.raises(UserError, match=message):
            collect(tmp_path / path)
    assert (tmp_path / "a.npz").read_text() == "mine"
    with pytest.raises(UserError, match="num_envs = 21"):
        collect(tmp_path / "b.npz", num_envs=21)
    with pytest.raises(UserError, match="steps = 0"):
        collect(tmp_path / "b.npz", steps=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**20 + 100))
    with pytest.raises(UserError, match="disk full"):
        collect(tmp_path / "b.npz")
    monkeypatch.undo()
    monkeypatch.setattr(collection, "available_memory", lambda: 100)
    with pytest.raises(UserError, match="of memory"):
        collect(tmp_path / "b.npz")


def test_overwriting_is_asked_for_and_leaves_nothing_else(tmp_path):
    collect(tmp_path / "a.npz")
    collect(tmp_path / "a.npz", seed=1, overwrite=True)
    assert load(tmp_path / "a.npz")[1]["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_values_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(NonFiniteError, match="environment 1 gave a value that is not finite in obs"):
        collect(tmp_path / "a.npz", Counter(3, nan_at=-1.0))
    assert not list(tmp_path.iterdir())


def edited(path, out, change, **metadata):
    """A copy with columns changed by `change(columns)`, and a checksum to match."""
    columns, old = load(path)
    columns = {name: array.copy() for name, array in columns.items()}
    change(columns)
    write(out, {name: column(array) for name, array in columns.items()}, {**old, **metadata})
    return out


def put(name, index, value):
    def change(columns):
        columns[name][index] = value

    return change


def replace(name, function):
    def change(columns):
        columns[name] = function(columns[name])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda columns: columns.pop("actions"), "no column 'actions'; it has episode_ids"),
        (replace("episode_ids", lambda x: x.astype(np.int32)), r"episode_ids is int32\[20\]; it must be int64"),
        (replace("episode_ids", lambda x: x[:0]), r"at least one step"),
        (replace("episode_ids", lambda x: x + 1), r"episode_ids\[0\] is 1; they must go from 0 on"),
        (put("episode_ids", 4, 0), r"episode_ids\[4\] is 0"),
        (put("episode_ids", slice(3, None), 2), r"episode_ids\[3\] is 2"),
        (replace("observations", lambda x: x[1:]), r"observations is float32\[27, 2\]; it must be float32\[28, 2\]"),
        (replace("observations", lambda x: x.astype(np.float64)), "observations is float64"),
        (replace("actions", lambda x: x[:, 0]), r"actions is float32\[20\]; it must be float32\[20, 1\]"),
        (replace("rewards", lambda x: x.astype(np.int32)), r"rewards is int32\[20\]; it must be float32\[20\]"),
        (replace("terminations", lambda x: x.astype(np.int8)), "terminations is int8"),
        (put("terminations", 2, True), "step 2 is both a termination and a truncation"),
        (put("truncations", 4, True), "step 4 ends its episode, but episode_ids goes on with it"),
        (put("truncations", 5, False), "step 5 is the last of its episode, and neither terminated nor truncated"),
        (put("truncations", 19, False), "step 19 is the last of its episode"),
        (put("observations", (3, 1), np.nan), r"observations\[3\] is not finite"),
        (put("actions", 7, np.inf), r"actions\[7\] is not finite"),
        (put("rewards", 6, -np.inf), r"rewards\[6\] is not finite"),
        (put("actions", 7, 1.5), r"actions\[7\] is \[1.5\]; it must be from -1 to 1"),
    ],
)
def test_every_fault_of_the_columns_is_refused_by_its_first_place(tmp_path, change, message):
    collect(tmp_path / "a.npz")
    path = edited(tmp_path / "a.npz", tmp_path / "b.npz", change)
    with pytest.raises(UserError, match=f"data set .*b.npz.*{message}"):
        data.read([(path, None)], Counter(3))


def test_discrete_actions_must_exist(tmp_path):
    env = Counter(3, action=Discrete(3))
    collect(tmp_path / "a.npz", env, algorithm=random_policy(env.spec))
    path = edited(tmp_path / "a.npz", tmp_path / "b.npz", put("actions", 5, 3))
    with pytest.raises(UserError, match=r"actions\[5\] is 3; it must be from 0 to 2"):
        data.read([(path, None)], env)


def test_data_of_another_environment_or_of_other_actions_are_refused(tmp_path):
    collect(tmp_path / "a.npz")
    for env, message in (
        (type("Other", (Counter,), {})(3), "of environment 'Counter', not 'Other'"),
        (Counter(3, action=Box((1,), -2.0, 2.0)), r"its actions are {'low': \[-1.0\]"),
        (Counter(3, action=Discrete(2)), "those of Counter are {'num_values': 2"),
    ):
        with pytest.raises(UserError, match=message):
            data.read([(tmp_path / "a.npz", None)], env)


def test_an_environment_in_a_file_may_lie_elsewhere(tmp_path):
    env = Counter(3)
    env.spec = dataclasses.replace(env.spec, name="/here/my_env.py:make")
    collect(tmp_path / "a.npz", env)
    env.spec = dataclasses.replace(env.spec, name="/there/my_env.py:make")
    data.read([(tmp_path / "a.npz", None)], env)


def test_what_is_no_data_set_is_refused_and_nothing_is_ever_unpickled(tmp_path):
    collect(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    columns, metadata = load(tmp_path / "a.npz")

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("it was unpickled",))

    flipped = bytearray(whole)
    flipped[whole.index(columns["actions"].tobytes()) + 5] ^= 1
    text = np.array(json.dumps(metadata))
    files = {
        "half": (lambda p: p.write_bytes(whole[: len(whole) // 2]), "no npz archive, or not a whole one"),
        "flipped": (lambda p: p.write_bytes(flipped), "it cannot be read: Bad CRC-32"),
        "text": (lambda p: p.write_text("observations"), "no npz archive"),
        "pickled": (lambda p: np.savez(p, metadata=text, actions=np.array([Bomb()], object)), "allow_pickle"),
        "bare": (lambda p: np.savez(p, **columns), "its metadata cannot be read"),
        "changed": (lambda p: np.savez(p, metadata=text, **{**columns, "rewards": -columns["rewards"]}), "checksum"),
        "newer": (lambda p: np.savez(p, metadata=json.dumps({**metadata, "format": 2}), **columns), "has format 2"),
    }
    for name, (make, message) in files.items():
        path = tmp_path / f"{name}.npz"
        make(path)
        with pytest.raises(UserError, match=message):
            data.read([(path, None)], Counter(3))
    with pytest.raises(UserError, match="no such file"):
        data.read([(tmp_path / "none.npz", None)], Counter(3))
    np.savez(tmp_path / "same.npz", metadata=text, **columns)  # the checksum is of the content, not of the file
    data.read([(tmp_path / "same.npz", None)], Counter(3))


def draw(found, plan, key=0):
    source = found.source(found.arrays, plan, None)
    return jax.jit(lambda key: source.collect(None, None, (), key)[1])(jax.random.key(key))


def test_a_trajectory_is_consecutive_steps_as_of_an_environment_that_resets_itself(tmp_path):
    collect(tmp_path / "a.npz", steps=20)
    found = data.read([(tmp_path / "a.npz", None)], Counter(3))
    trajectory = jax.tree.map(np.asarray, draw(found, Plan(500, 7, 1)))
    done = trajectory.terminated | trajectory.truncated
    assert trajectory.obs.shape == (7, 500, 2) and trajectory.reward.shape == (7, 500)
    assert done[-1].all() and not (trajectory.terminated & trajectory.truncated).any()  # what follows begins elsewhere
    inside = ~done[:-1]
    np.testing.assert_array_equal(trajectory.obs[1:][inside], trajectory.next_obs[:-1][inside])
    assert (trajectory.obs[1:][~inside][:, 1] == 0).all()  # a new episode
    starts, counts = np.unique(trajectory.obs.reshape(-1, 2), axis=0, return_counts=True)
    assert len(starts) == 20
    np.testing.assert_allclose(counts / counts.sum(), np.full(20, 1 / 20), rtol=0.3)  # each step equally often


def test_files_give_their_shares_and_none_runs_over_into_another(tmp_path):
    collect(tmp_path / "a.npz", bias=0.5, steps=20)
    collect(tmp_path / "b.npz", bias=-0.5, steps=80, seed=1)
    share = {}
    for name, (one, two) in {"given": (3.0, 1.0), "by size": (None, None)}.items():
        found = data.read([(tmp_path / "a.npz", one), (tmp_path / "b.npz", two)], Counter(3))
        action = np.asarray(draw(found, Plan(4000, 5, 1)).action)[..., 0]
        assert (action == action[0]).all()
        share[name] = (action[0] == 0.5).mean()
    assert share["given"] == pytest.approx(0.75, abs=0.03)
    assert share["by size"] == pytest.approx(0.2, abs=0.03)
    both = everything(found)
    np.testing.assert_array_equal(both.next_obs[:, 1] - both.obs[:, 1], np.ones(100))
    for shares in ((1.0, None), (1.0, 0.0), (1.0, -2.0), (float("nan"), 1.0)):
        with pytest.raises(UserError, match="share = .* above 0"):
            data.read([(tmp_path / "a.npz", shares[0]), (tmp_path / "b.npz", shares[1])], Counter(3))


def test_windows_out_of_data_are_n_step_targets_within_one_episode(tmp_path):
    collect(tmp_path / "a.npz", steps=11)  # an episode of each environment is cut by the end
    found = data.read([(tmp_path / "a.npz", None)], Counter(3))
    steps = everything(found)
    batch = jax.jit(found.draw, static_argnums=(2, 3))(found.arrays, jax.random.key(0), 200, 3, 0.5)
    rows = [int(np.flatnonzero((steps.obs == obs).all(axis=1))[0]) for obs in np.asarray(batch.obs)]
    assert set(rows) == set(range(11))
    for i, row in enumerate(rows):
        last = next(t for t in range(row, row + 3) if steps.terminated[t] or steps.truncated[t] or t == row + 2)
        reward = sum(0.5 ** (t - row) * steps.reward[t] for t in range(row, last + 1))
        discount = 0.0 if steps.terminated[last] else 0.5 ** (last - row + 1)
        assert (float(batch.reward[i]), float(batch.discount[i])) == pytest.approx((reward, discount))
        np.testing.assert_array_equal(batch.next_obs[i], steps.next_obs[last])
        np.testing.assert_array_equal(batch.action[i], steps.action[row])


def named(env=None):
    """Without a name of its own an environment goes by its class, and in chunks by that of the wrapper."""
    env = env or Counter(5)
    env.spec = dataclasses.replace(env.spec, name="counter")
    return env


CHUNKS = [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 4], [4, 4, 4], [5, 6, 6], [6, 6, 6]]  # episodes of 5 and 2 steps
REWARDS = [1 + 2 + 4, 2 + 4 + 8, 4 + 8 + 16, 8 + 16, 16, 32 + 64, 64]
TERMINATED = [False, False, True, True, True, False, False]
TRUNCATED = [False, False, False, False, False, True, True]
OBS = [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [1, 0], [1, 1]]
NEXT_OBS = [[0, 3], [0, 4], [0, 5], [0, 5], [0, 5], [1, 2], [1, 2]]
NEXT = [3, 4, 5, 5, 5, 0, 0]  # where the next one begins


def one_at_a_time(path, env=None):
    """Step i of seven has the action i / 10 and the reward 2^i; obs = [episode, t]; one terminates, one is cut."""
    columns = {
        "observations": np.array([[0, t] for t in range(6)] + [[1, t] for t in range(3)], np.float32),
        "actions": np.arange(7, dtype=np.float32)[:, None] / 10,
        "rewards": 2 ** np.arange(7, dtype=np.float32),
        "terminations": np.arange(7) == 4,
        "truncations": np.arange(7) == 6,
        "episode_ids": np.array([0] * 5 + [1] * 2, np.int64),
    }
    write(path, {name: column(array) for name, array in columns.items()}, describe_env(env or named()))
    return path


def test_single_actions_are_read_as_chunks_up_to_the_end_of_an_episode(tmp_path):
    found = data.read([(one_at_a_time(tmp_path / "a.npz"), None)], ActionChunk(named(), 3))
    steps = everything(found)
    np.testing.assert_array_equal(steps.obs, OBS)
    np.testing.assert_array_equal(steps.action, np.array(CHUNKS, np.float32) / 10)
    np.testing.assert_array_equal(steps.reward, REWARDS)
    np.testing.assert_array_equal(steps.terminated, TERMINATED)
    np.testing.assert_array_equal(steps.truncated, TRUNCATED)
    np.testing.assert_array_equal(steps.next_obs, NEXT_OBS)
    assert (steps.action.dtype, steps.reward.dtype, found.arrays.spans.dtype) == (np.float32, np.float32, np.int32)


def test_rewards_of_several_agents_are_summed_apart():
    rewards = np.stack([np.arange(4), 10 * np.arange(4)], axis=1).astype(np.float32)
    last = np.arange(4) == 3
    arrays = data.Arrays(np.zeros((5, 1)), np.zeros((4, 1)), rewards, last, ~last & last, np.zeros(4, np.int32))
    np.testing.assert_array_equal(data.in_chunks(arrays, 2).rewards, [[1, 10], [3, 30], [5, 50], [3, 30]])


def test_a_run_of_chunks_goes_on_where_the_last_one_ended(tmp_path):
    found = data.read([(one_at_a_time(tmp_path / "a.npz"), None)], ActionChunk(named(), 3))
    trajectory = jax.tree.map(np.asarray, draw(found, Plan(300, 4, 1, action_repeat=3)))
    rows = np.array([[REWARDS.index(reward) for reward in rewards] for rewards in trajectory.reward])
    np.testing.assert_array_equal(rows[1:], np.array(NEXT)[rows[:-1]])
    assert (np.bincount(rows[0], minlength=7) > 20).all()
    np.testing.assert_array_equal(trajectory.obs, np.array(OBS)[rows])
    np.testing.assert_array_equal(trajectory.next_obs, np.array(NEXT_OBS)[rows])
    np.testing.assert_array_equal(trajectory.terminated, np.array(TERMINATED)[rows])
    np.testing.assert_array_equal(trajectory.truncated[:-1], np.array(TRUNCATED)[rows[:-1]])
    assert (trajectory.truncated | trajectory.terminated)[-1].all()  # what follows begins elsewhere


def test_n_step_targets_of_chunks_discount_once_a_decision(tmp_path):
    found = data.read([(one_at_a_time(tmp_path / "a.npz"), None)], ActionChunk(named(), 3))
    batch = jax.jit(found.draw, static_argnums=(2, 3))(found.arrays, jax.random.key(0), 100, 2, 0.5)
    for i, obs in enumerate(np.asarray(batch.obs).tolist()):
        row = OBS.index(obs)
        more = not (TERMINATED[row] or TRUNCATED[row])
        last = NEXT[row] if more else row
        assert batch.reward[i] == REWARDS[row] + more * 0.5 * REWARDS[last]
        assert batch.discount[i] == (0.0 if TERMINATED[last] else 0.5 ** (1 + more))
        np.testing.assert_array_equal(batch.next_obs[i], NEXT_OBS[last])
        np.testing.assert_array_equal(batch.action[i], np.array(CHUNKS[row], np.float32) / 10)


def test_what_is_collected_in_chunks_is_read_as_it_is_and_beside_single_actions(tmp_path):
    env = ActionChunk(named(), 3)
    metadata = collect(tmp_path / "a.npz", env, 8, algorithm=random_policy(env.spec))
    assert metadata["action"] == {"low": [-1.0] * 3, "high": [1.0] * 3, "repeat": 3, "chunk": 3}
    assert metadata["parts"][0]["mean_return"] == 15.0
    steps = everything(data.read([(tmp_path / "a.npz", None)], env))
    np.testing.assert_array_equal(steps.obs[:, 1], [0, 3] * 4)
    np.testing.assert_array_equal(steps.next_obs[:, 1], [3, 5] * 4)
    np.testing.assert_array_equal(steps.reward, [1 + 2 + 3, 4 + 5] * 4)
    np.testing.assert_array_equal(steps.truncated, [False, True] * 4)
    np.testing.assert_array_equal(steps.action, load(tmp_path / "a.npz")[0]["actions"])
    found = data.read([(tmp_path / "a.npz", None), (one_at_a_time(tmp_path / "b.npz"), None)], env)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:8], y), everything(found), steps)
    np.testing.assert_array_equal(everything(found).next_obs[8:], NEXT_OBS)
    trajectory = draw(found, Plan(100, 6, 1))
    of_file = np.asarray(trajectory.reward)[..., None] == np.array([6.0, 9.0])
    assert (of_file.any(axis=2) == of_file.any(axis=2)[0]).all()  # no run goes over into the other file


def test_actions_that_are_no_part_of_the_chunks_are_refused(tmp_path):
    three, path = ActionChunk(named(), 3), one_at_a_time(tmp_path / "a.npz")
    assert "chunk" not in load(path)[1]["action"]  # as in files from before there were any
    collect(tmp_path / "b.npz", three, 8, algorithm=random_policy(three.spec))
    for file, env in (
        ("b", named()),
        ("b", ActionChunk(named(), 2)),
        ("a", ActionChunk(ActionRepeat(named(), 2), 3)),
        ("a", ActionChunk(named(Counter(5, action=Box((1,), -2.0, 2.0))), 3)),
        ("a", ActionChunk(named(Counter(5, action=Box((2,)))), 3)),
        ("a", ActionRepeat(named(), 3)),
    ):
        with pytest.raises(UserError, match="its actions are {'low'"):
            data.read([(tmp_path / f"{file}.npz", None)], env)
    repeated = one_at_a_time(tmp_path / "c.npz", ActionRepeat(named(), 2))
    data.read([(repeated, None)], ActionChunk(ActionRepeat(named(), 2), 3))
    wide = edited(path, tmp_path / "d.npz", replace("actions", lambda x: np.repeat(x, 3, axis=1)))
    with pytest.raises(UserError, match=r"actions is float32\[7, 3\]; it must be float32\[7, 1\]"):
        data.read([(wide, None)], three)


def test_a_learner_clones_chunks_out_of_single_actions_and_counts_their_steps(tmp_path):
    env = ActionChunk(named(), 3)
    found = data.read([(one_at_a_time(tmp_path / "a.npz"), None)], env)
    result = train(env, bc, SMALL, CONFIG, data=found, progress=quiet())
    assert result.history[-1]["step"] == 192 and result.state.iteration == 2  # 4 environments, 8 decisions, 3 steps
    assert result.history[-1]["eval/return"] == 15.0 and result.history[-1]["eval/length"] == 5.0


MIXING = sac.Config(
    actor_hidden=(8,),
    critic_hidden=(8,),
    batch_size=16,
    data_batch=8,
    utd_ratio=(2, 32),
    replay_size=100,
    prefill_steps=0,
)


@pytest.mark.slow
def test_a_learner_mixes_data_with_what_it_sees_and_resumes_bit_for_bit(tmp_path, found):
    def mixed(name, config=MIXING, of=found, **keywords):
        place = tmp_path / name if name else None
        return train(Counter(3), sac, SMALL, config, data=of, run_dir=place, progress=quiet(), **keywords)

    whole = mixed("whole")
    assert mixed("part", on_epoch=lambda row: row["step"] >= 96).interrupted
    assert_same_state(whole.state, mixed("part", resume=True).state)
    assert "train/return" in whole.history[1]  # of environments
    plain = train(Counter(3), sac, SMALL, dataclasses.replace(MIXING, data_batch=0), progress=quiet())
    assert not np.array_equal(plain.state.learner.params["log_alpha"], whole.state.learner.params["log_alpha"])
    with pytest.raises(UserError, match="at these settings sac learns from a data set"):
        mixed("none", of=None)


@pytest.mark.slow
def test_many_runs_mix_the_same_data_each_with_what_it_sees(found):
    alone = train(Counter(3), sac, SMALL, MIXING, data=found, progress=quiet())
    many = train_many(
        Counter(3),
        sac,
        {"a": (SMALL, MIXING), "b": (dataclasses.replace(SMALL, seed=1), MIXING)},
        data=found,
        progress=quiet(),
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        many["a"].state.learner.params,
        alone.state.learner.params,
    )


def test_a_learner_that_replays_can_learn_from_data_alone(found):
    """Without environments: no episode of training is seen, and nothing is kept beside the data."""
    config = dataclasses.replace(MIXING, data_batch=16)
    result = train(Counter(3), sac, SMALL, config, data=found, progress=quiet())
    assert result.state.learner.experience.rows == () and result.state.source == ()
    assert "train/return" not in result.history[1] and result.history[1]["train/critic_loss"] > 0
    with pytest.raises(UserError, match="sac takes nothing out of it"):
        train(Counter(3), sac, SMALL, dataclasses.replace(MIXING, data_batch=0), data=found, progress=quiet())


def run(found, tmp=None, config=SMALL, **keywords):
    return train(Counter(3), bc, config, CONFIG, data=found, run_dir=tmp, progress=quiet(), **keywords)


@pytest.fixture
def found(tmp_path):
    collect(tmp_path / "a.npz", mode="sample")
    return data.read([(tmp_path / "a.npz", 1.0)], Counter(3))


def test_a_run_on_data_resumes_bit_for_bit_and_notes_what_it_read(tmp_path, found):
    whole = run(found, tmp_path / "whole")
    part = run(found, tmp_path / "part", on_epoch=lambda row: row["step"] >= 96)
    assert part.interrupted
    rest = run(found, tmp_path / "part", resume=True)
    assert_same_state(whole.state, rest.state)
    assert without_time(rest.history) == without_time(whole.history)
    assert rest.history[-1]["step"] == 192 and rest.history[-1]["train/loss"] < rest.history[1]["train/loss"]
    recorded = json.loads((tmp_path / "whole/config.json").read_text())["data"]
    assert [entry["sha256"] for entry in recorded] == [load(tmp_path / "a.npz")[1]["sha256"]]
    assert recorded[0]["path"] == str(tmp_path / "a.npz") and recorded[0]["metadata"]["env"] == "Counter"


def test_a_run_does_not_go_on_with_other_data(tmp_path, found):
    run(found, tmp_path / "run")
    collect(tmp_path / "b.npz", mode="sample", seed=1)
    other = data.read([(tmp_path / "b.npz", 1.0)], Counter(3))
    with pytest.raises(UserError, match="the run to resume learns from other data"):
        run(other, tmp_path / "run", resume=True)


def test_data_are_an_argument_of_the_program_and_no_part_of_the_state(found):
    schedule = make_schedule(Counter(3), SMALL)
    built = bc.make(CONFIG, Counter(3).spec, schedule.plan)
    key = jax.random.key(0)
    programs = compile_run(Counter(3), lambda varied, draw: built, schedule, SMALL, key, {}, None, quiet(), found)
    assert programs.abstract_state.source == ()
    shape = f"f32[{len(found.arrays.observations)},2]"
    lines = [line for line in programs.epoch.as_text().splitlines() if f"= {shape}" in line]
    assert any(" parameter(" in line for line in lines) and not any(" constant(" in line for line in lines)
    state = programs.init(key, {}, None, programs.arrays)
    programs.epoch(state, {}, programs.arrays)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(programs.arrays))


def test_many_runs_read_the_same_data(found):
    runs = {f"seed-{s}": (dataclasses.replace(SMALL, seed=s), CONFIG) for s in range(2)}
    many = train_many(Counter(3), bc, runs, data=found, progress=quiet())
    alone = run(found, config=dataclasses.replace(SMALL, seed=1))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        many["seed-1"].state.learner.params,
        alone.state.learner.params,
    )


def test_algorithms_that_data_cannot_serve_and_those_that_need_them_are_told(found):
    with pytest.raises(UserError, match="ppo cannot learn from data: its update needs Extras"):
        train(Counter(3), ppo, SMALL, data=found, progress=quiet())
    with pytest.raises(UserError, match="bc learns from a data set"):
        run(None)


@pytest.mark.slow
def test_behaviour_cloning_finds_the_regulator_in_its_actions(tmp_path):
    """The optimal feedback, which acts without noise; its clone has the same gain and the same return."""
    env = envs.make("probe/lqr")
    gains, best = lqr_optimum(env)
    gain = jnp.asarray(gains[0] / env.scale, jnp.float32)

    def act(policy, memory, obs, key, mode):
        return memory, jnp.clip(-obs @ gain.T, -1.0, 1.0), ()

    expert = Algorithm(lambda key, policy=None: (), lambda learner, mode: (), lambda key: (), act, lambda *_: None)
    collect(tmp_path / "a.npz", env, 10_000, 200, algorithm=expert)
    config = TrainConfig(total_steps=400_000, num_envs=512, unroll_length=1, num_evals=1, eval_episodes=1024)
    _, _, _, key = jax.random.split(jax.random.key(config.seed), 4)  # as in training: the same starts and pushes
    own = float(jax.jit(make_evaluate(env, expert, config.eval_episodes))((), key).returns.mean())
    assert own == pytest.approx(best, rel=0.2)
    for distribution, within in (("normal", 0.03), ("tanh_normal", 0.06)):  # where the expert saturates, tanh cannot
        settings = bc.Config(num_minibatches=1, distribution=distribution, learning_rate=3e-3)
        found = data.read([(tmp_path / "a.npz", None)], env)
        result = train(env, bc, config, settings, data=found, progress=quiet())
        assert result.history[0]["eval/return"] < 2 * own
        assert result.history[-1]["eval/return"] == pytest.approx(own, rel=within)
        assert result.history[-1]["train/loss"] < result.history[1]["train/loss"] - 1
