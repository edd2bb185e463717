"""Gymnasium, both ways: environments of rlx as its environments, and policies of rlx on its tasks."""

from __future__ import annotations

import json
import math
import sys
import warnings

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs
import rlx
from rlx import cli
from rlx.algorithm import Algorithm
from rlx.gymnasium import native_actions
from rlx.types import Box, Discrete, Spec, UserError
from tests.worlds import Counter

FOUR = Spec(obs=jax.ShapeDtypeStruct((4,), jnp.float32), action=Box((1,)), name="my/env")
THREE = Spec(obs=jax.ShapeDtypeStruct((3,), jnp.float32), action=Box((1,)))


def acting(act, memory=lambda key: ()):
    """An algorithm that does what `act(memory, obs, key)` says, and learns nothing."""
    return Algorithm(
        lambda key, policy=None: (),
        lambda learner, mode: learner,
        memory,
        lambda policy, memory, obs, key, mode: (*act(memory, obs, key), ()),
        lambda learner, *_: (learner, {}),
    )


def balancing(gains):
    """Continuous actions that are linear in the observation."""
    return acting(lambda memory, obs, key: (memory, jnp.clip(obs @ jnp.array(gains), -1, 1)[:, None]))


CENTRE = balancing([0.3, 3.0, 0.5, 0.7])


# Environments of rlx as Gymnasium's


class Drawn(Counter):
    """A picture as dark as the step."""

    def render(self, states):
        return np.stack([np.full((4, 6, 3), state.t, np.uint8) for state in states])


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: envs.make("gymnax/CartPole-v1"), id="discrete"),
        pytest.param(lambda: Drawn(5, action=Box((2,))), id="drawn"),
        pytest.param(lambda: Drawn(5, "terminated", asymmetric=True), id="observations in a mapping"),
    ],
)
def test_gymnasium_finds_nothing_wrong(make):
    env, name = make(), "rlx/Checked-v0"
    drawn = isinstance(env, Drawn)
    gymnasium.register(name, entry_point=lambda render_mode=None: envs.to_gymnasium(env, render_mode=render_mode))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_env(gymnasium.make(name).unwrapped, skip_render_check=not drawn)
    finally:
        del gymnasium.registry[name]
    # A Spec has no bounds of observations.
    assert not [str(w.message) for w in caught if "observation space m" not in str(w.message)]


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_the_twins_of_gymnasiums_own_tasks_agree_in_a_step_from_the_same_state(name):
    twin = gymnasium.make(name).unwrapped
    env = envs.to_gymnasium(envs.make(f"gymnax/{name}"))
    twin.reset(seed=0)
    obs, _ = env.reset(seed=0)
    env.action_space.seed(0)
    ends = 0
    for _ in range(300):
        action = env.action_space.sample()
        pendulum = np.ndim(action) > 0
        twin.state = np.array([math.atan2(obs[1], obs[0]), obs[2]]) if pendulum else obs.astype(np.float64)
        twin.steps_beyond_terminated = None
        expected, paid, over, _, _ = twin.step(2 * action if pendulum else int(action))
        obs, reward, terminated, truncated, info = env.step(action)
        np.testing.assert_allclose(obs, expected, rtol=1e-5, atol=1e-5)
        assert reward == pytest.approx(paid, rel=1e-5, abs=1e-5)
        assert terminated == over and info == {}
        if terminated or truncated:
            ends += 1
            obs, _ = env.reset()
    assert ends > 0


def test_an_episode_ends_in_the_way_that_the_environment_says_and_must_be_begun_anew():
    for ending in ("terminated", "truncated"):
        env = envs.to_gymnasium(Counter(3, ending))
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(np.zeros(1))
        first, info = env.reset(seed=3)
        assert first.flags.writeable and info == {}
        steps = [env.step(np.full(1, 7.0)) for _ in range(3)]  # beyond the box: clipped
        assert [step[1] for step in steps] == [1.0, 2.0, 3.0]
        assert [step[2:4] for step in steps][:2] == [(False, False)] * 2
        assert steps[2][2:4] == (ending == "terminated", ending == "truncated")
        assert steps[2][4] == {"t": 3.0}
        np.testing.assert_array_equal(steps[2][0], [first[0], 3.0])
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(np.zeros(1))
        np.testing.assert_array_equal(env.reset(seed=3)[0], first)
        assert env.reset()[0][0] != first[0]


def test_params_reach_every_episode():
    env = envs.make("gymnax/Pendulum-v1")
    short = envs.to_gymnasium(env, env.spec.params.replace(max_steps_in_episode=jnp.array(2, jnp.int32)))
    short.reset(seed=0)
    assert [short.step(np.zeros(1))[3] for _ in range(2)] == [False, True]


def test_frames_are_drawn_on_request():
    env = envs.to_gymnasium(Drawn(3), render_mode="rgb_array")
    env.reset(seed=0)
    env.step(np.zeros(1))
    frame = env.render()
    assert frame.shape == (4, 6, 3) and frame.dtype == np.uint8 and (frame == 1).all()
    assert envs.to_gymnasium(Drawn(3)).render() is None
    many = envs.to_gymnasium_vector(Drawn(3), 2, render_mode="rgb_array")
    slow = envs.to_gymnasium(envs.make("particle/simple", action_repeat=2), render_mode="rgb_array")
    assert many.metadata["render_fps"] == 20.0 and slow.metadata["render_fps"] == 5.0  # decisions a second
    for fresh in (many, envs.to_gymnasium(Drawn(3), render_mode="rgb_array")):
        with pytest.raises(gymnasium.error.ResetNeeded):
            fresh.render()
    many.reset(seed=0)
    assert [frame.max() for frame in many.render()] == [0, 0]


def test_whole_numbers_of_any_width_are_actions():
    world = Counter(50, action=Discrete(3))
    one = begun(world)
    for action in (1, np.int64(1), np.uint8(1), np.array(1), jnp.int32(1)):
        assert not one.step(action)[2]
    many = envs.to_gymnasium_vector(world, 2)
    many.reset(seed=0)
    for actions in ([0, 2], np.array([0, 2]), np.array([0, 2], np.uint8), many.action_space.sample()):
        assert many.step(actions)[1].shape == (2,)


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda: envs.to_gymnasium(envs.make("matrix/penalty")), "num_agents = 2 is not possible: 1"),
        (lambda: envs.to_gymnasium(Counter(), render_mode="human"), "render_mode = 'human'"),
        (lambda: envs.to_gymnasium_vector(Counter(), 0), "num_envs = 0"),
        (lambda: envs.to_gymnasium_vector(Counter(), 2).reset(options={"reset_mask": [True, False]}), "options"),
        (lambda: begun(Counter()).step(np.zeros(2)), r"action = array.* in Box\(-1.0, 1.0, \(1,\)"),
        (lambda: begun(Counter()).step(np.full(1, np.nan)), "action"),
        (lambda: begun(Counter(action=Discrete(3))).step(3), r"action = 3 .* in Discrete\(3"),
        (lambda: begun(Counter(action=Discrete(3))).step(-1), r"action = -1 .* in Discrete\(3"),
        (lambda: begun(Counter(action=Discrete(3))).step(1.5), r"action = 1.5 .* in Discrete\(3"),
        (lambda: begun(Counter(), render_mode="rgb_array").render(), "Counter cannot be rendered"),
    ],
)
def test_what_gymnasium_cannot_have_is_said_plainly(do, message):
    with pytest.raises(UserError, match=message):
        do()


def begun(env, **options):
    made = envs.to_gymnasium(env, **options)
    made.reset(seed=0)
    return made


def test_many_instances_begin_anew_in_the_step_behind_their_endings():
    env = envs.to_gymnasium_vector(Counter(2), 3)
    assert env.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.NEXT_STEP
    first, _ = env.reset(seed=1)
    assert env.observation_space.contains(first) and len(set(first[:, 0])) == 3
    rows = [env.step(env.action_space.sample()) for _ in range(4)]
    assert [row[0][0, 1] for row in rows] == [1, 2, 0, 1]  # the final observation, then the new episode's first
    assert [row[1][0] for row in rows] == [1.0, 2.0, 0.0, 1.0]
    assert [bool(row[3].all()) for row in rows] == [False, True, False, False]
    assert not any(row[2].any() for row in rows)
    assert [bool(row[4]["_t"].all()) for row in rows] == [True, True, False, True]
    np.testing.assert_array_equal(rows[1][0][:, 0], first[:, 0])
    assert (rows[2][0][:, 0] != first[:, 0]).all()
    np.testing.assert_array_equal(rows[3][0][:, 0], rows[2][0][:, 0])
    np.testing.assert_array_equal(env.reset(seed=1)[0], first)


def test_many_instances_end_apart_and_gymnasiums_wrappers_count_them():
    env = gymnasium.wrappers.vector.RecordEpisodeStatistics(
        envs.to_gymnasium_vector(envs.make("gymnax/CartPole-v1"), 8)
    )
    env.reset(seed=0)
    env.action_space.seed(0)
    running, found = np.zeros(8), []
    for _ in range(100):
        obs, reward, terminated, _, info = env.step(env.action_space.sample())
        running += reward
        assert (np.abs(obs[terminated]) > [2.4, 99, 0.2, 99]).any(axis=1).all()
        found += [*zip(running[terminated], info["episode"]["r"][terminated], strict=True)] if terminated.any() else []
        running[terminated] = 0
    assert len(found) > 10
    for ours, theirs in found:
        assert ours == theirs


# Policies of rlx on Gymnasium's tasks


def test_a_policy_drives_a_mujoco_task_within_its_own_bounds():
    result = rlx.evaluate_gymnasium("InvertedPendulum-v5", FOUR, CENTRE, (), 3, max_decisions=300)
    np.testing.assert_array_equal(result.lengths, [300.0] * 3)
    np.testing.assert_array_equal(result.returns, [300.0] * 3)


def test_each_episode_counts_once_and_the_seed_decides_all():
    spec = Spec(obs=FOUR.obs, action=Discrete(2))
    coin = acting(lambda memory, obs, key: (memory, jax.random.bernoulli(key, 0.5, obs.shape[:1]).astype(jnp.int32)))
    first, again, other = (rlx.evaluate_gymnasium("CartPole-v1", spec, coin, (), 8, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.returns, first.lengths)  # a reward of 1 a step
    np.testing.assert_array_equal(first.returns, again.returns)
    assert len(set(first.returns.tolist())) > 1 and (first.returns != other.returns).any()
    assert 8 <= first.lengths.min() and first.lengths.max() < 150


def test_an_episode_is_the_one_that_a_loop_by_hand_gives():
    env = gymnasium.make("InvertedPendulum-v5")
    obs, _ = env.reset(seed=int(np.random.SeedSequence(5).generate_state(2)[1]))
    total, ended = 0.0, False
    while not ended:
        action = np.clip(np.float32(obs) @ np.float32([0, 5, 0, 1]), -1, 1)
        obs, reward, terminated, truncated, _ = env.step(np.array([3 * action]))
        total, ended = total + reward, terminated or truncated
    result = rlx.evaluate_gymnasium("InvertedPendulum-v5", FOUR, balancing([0.0, 5.0, 0.0, 1.0]), (), 2, seed=5)
    assert result.returns[1] == pytest.approx(total, abs=2) and total > 20


def test_memory_lives_in_an_episode_and_a_cut_ends_it():
    seen = []

    class Told(gymnasium.ActionWrapper):
        def action(self, action):
            seen.append(float(action[0]))
            return action

    counting = acting(lambda memory, obs, key: (memory + 1, memory[:, None] / 10), lambda key: jnp.zeros(()))
    spec = Counter(5).spec
    evaluate = lambda **options: rlx.evaluate_gymnasium(  # noqa: E731
        lambda: Told(envs.to_gymnasium(Counter(5))), spec, counting, (), 1, **options
    )
    assert evaluate(max_decisions=9).returns.tolist() == [15.0]
    np.testing.assert_allclose(seen, [0.0, 0.1, 0.2, 0.3, 0.4])
    cut = evaluate(max_decisions=2)
    assert cut.returns.tolist() == [3.0] and cut.lengths.tolist() == [2.0]
    with pytest.raises(UserError, match="max_decisions = 0 is not possible.*no time limit"):
        evaluate()


def test_observations_in_a_mapping_reach_the_policy():
    env = Counter(3, asymmetric=True)
    echo = acting(lambda memory, obs, key: (memory, obs["privileged_state"][:, 2:] * obs["state"][:, 1:] / 2))
    task = lambda: envs.to_gymnasium(env)  # noqa: E731
    assert rlx.evaluate_gymnasium(task, env.spec, echo, (), 2, max_decisions=5).returns.tolist() == [6.0, 6.0]


def test_actions_are_mapped_to_the_bounds_in_chunks_and_repeats():
    space = gymnasium.spaces.Box(np.float32([-2, 0]), np.float32([2, 1]))
    spec = Spec(obs=FOUR.obs, action=Box((4,)), action_repeat=4, action_chunk=2)
    found = native_actions(np.float32([[1.0, 0.0, -0.5, -1.0]]), spec, space)
    np.testing.assert_array_equal(found, [[[2.0, 0.5], [2.0, 0.5], [-1.0, 0.0], [-1.0, 0.0]]])
    assert found.dtype == np.float32
    later = gymnasium.spaces.Discrete(3, start=5)
    np.testing.assert_array_equal(native_actions(np.int32([0, 2]), Spec(FOUR.obs, Discrete(3)), later), [[5], [7]])


@pytest.mark.parametrize(
    ("task", "spec", "message"),
    [
        ("HalfCheeta-v5", FOUR, "Gymnasium's task 'HalfCheeta-v5' does not exist. Did you mean HalfCheetah-v5"),
        ("no_such_module:Task-v0", FOUR, "cannot be made: No module named 'no_such_module'"),
        ("Swimmer-v5", FOUR, r"policy of my/env reads observations \[4\]; those of Swimmer-v5 are \[8\]"),
        ("Blackjack-v1", Counter(asymmetric=True).spec, r"state \[2\].*are None"),
        ("CartPole-v1", FOUR, r"my/env gives actions of \[1\] between bounds; CartPole-v1 takes Discrete\(2\)"),
        ("Pendulum-v1", Spec(THREE.obs, Discrete(2)), r"one of 2 values; Pendulum-v1 takes Box\(-2.0, 2.0"),
        ("CartPole-v1", Spec(FOUR.obs, Discrete(2, (3,)), num_agents=3), "num_agents = 3"),
        ("CliffWalking-v1", Spec(jax.ShapeDtypeStruct((), jnp.float32), Discrete(4)), "has no time limit"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_with_what_both_have(task, spec, message):
    with pytest.raises(UserError, match=message):
        rlx.evaluate_gymnasium(task, spec, CENTRE, (), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_episodes": 0}, "num_episodes = 0"),
        ({"mode": "gredy"}, "mode = 'gredy'"),
        ({"seed": -1}, "seed = -1"),
        ({"max_decisions": -1}, "at least 0"),
    ],
)
def test_numbers_that_make_no_evaluation_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        rlx.evaluate_gymnasium("CartPole-v1", FOUR, CENTRE, (), **options)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "gymnasium.envs.mujoco.mujoco_rendering", raising=False)
    monkeypatch.setitem(sys.modules, "imageio", None)
    with pytest.raises(UserError, match=r"imageio.*pip install 'gymnasium\[mujoco\]' has it"):
        rlx.evaluate_gymnasium("InvertedPendulum-v5", FOUR, CENTRE, (), 1)


def test_the_command_line_plays_a_runs_policy_and_leaves_its_own_evaluation_alone(tmp_path, capsys):
    sizes = ["--total-steps", "64", "--num-envs", "4", "--unroll-length", "4", "--eval-episodes", "2"]
    run_dir = tmp_path / "run"
    small = ["--algo.actor-hidden", "8", "--algo.critic-hidden", "8", "--algo.num-minibatches", "2"]
    assert cli.main(["train", "ppo", "gymnax/CartPole-v1", *sizes, *small, "--run-dir", str(run_dir), "--quiet"]) == 0
    before = (run_dir / "eval.json").read_bytes()
    evaluate = ["evaluate", str(run_dir), "--gymnasium", "CartPole-v1", "--episodes", "3"]
    assert cli.main([*evaluate, "--seed", "7"]) == 0
    assert "on CartPole-v1: mean return" in capsys.readouterr().out
    found = json.loads((run_dir / "eval_gymnasium.json").read_text())
    assert (found["task"], found["seed"], found["step"], found["mode"]) == ("CartPole-v1", 7, 64, "greedy")
    assert found["returns"] == found["lengths"] and len(found["returns"]) == 3
    assert (run_dir / "eval.json").read_bytes() == before
    assert cli.main([*evaluate, "--decisions", "2"]) == 0
    assert json.loads((run_dir / "eval_gymnasium.json").read_text()) == found  # holds whole episodes only
    assert cli.main([*evaluate, "--video", "a.gif"]) == 2
    assert cli.main(["evaluate", str(run_dir), "--gymnasium", "Pendulum-v1"]) == 2
    error = capsys.readouterr().err
    assert "--video = 'a.gif'" in error
    assert "policy of gymnax/CartPole-v1 reads observations [4]; those of Pendulum-v1 are [3]" in error


@pytest.mark.slow
def test_ppo_learns_on_braxs_pendulum_and_drives_gymnasiums(tmp_path, capsys):
    run_dir = tmp_path / "run"
    train = ["train", "ppo", "brax/inverted_pendulum", "--total-steps", "500000", "--run-dir", str(run_dir), "--quiet"]
    assert cli.main(train) == 0
    assert cli.main(["evaluate", str(run_dir), "--gymnasium", "InvertedPendulum-v5", "--episodes", "16"]) == 0
    assert np.mean(json.loads((run_dir / "eval_gymnasium.json").read_text())["returns"]) > 900
