"""TD3's update against closed forms, and the turn of its delayed actor."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx.algorithms import td3
from rlx.types import UserError
from tests.off_policy import CONTINUOUS, PLAN, SMALL, built, constant_critic, one_update, trajectory_of

CONFIG = td3.Config(**SMALL)
ONE = dataclasses.replace(CONFIG, utd_ratio=(1, 24), policy_delay=1)
LINEAR = dataclasses.replace(ONE, critic_hidden=(), normalize_obs=False, critic_learning_rate=1e-20)
PLAIN = trajectory_of(CONTINUOUS)
NEVER = jnp.zeros_like(PLAIN.terminated)


def endings(terminated, truncated):
    return PLAIN._replace(
        reward=jnp.ones_like(PLAIN.reward), terminated=NEVER | terminated, truncated=NEVER | truncated
    )


def update_with(config, trajectory, critic, actor=None):
    """State and metrics of one update from given parameters, which are those of the targets too."""
    _, update, state = built(td3, config)
    params = {"actor": state.params["actor"] if actor is None else actor(state.params["actor"])}
    params["critic"] = critic(state.params["critic"])
    learned = state.learned._replace(params=params, targets=params)
    return update(state._replace(learned=learned), trajectory, jnp.int32(0), jax.random.key(3))


def of_first_action(*weights):
    """Linear critics: critic i is `weights[i]` times the first entry of the action."""

    def change(critic):
        critic = jax.tree.map(jnp.zeros_like, critic)
        kernel = critic["params"]["output"]["kernel"]
        critic["params"]["output"]["kernel"] = kernel.at[:, 3, 0].set(jnp.asarray(weights, jnp.float32))
        return critic

    return change


@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [(False, False, 2 + 0.9 * 3), (True, False, 2), (False, True, 2 + 0.9 * 3), (True, True, 2)],
)
def test_targets_take_the_smallest_value_and_bootstrap_at_time_limits_alone(terminated, truncated, expected):
    config = dataclasses.replace(ONE, gamma=0.9, reward_scale=2.0, num_critics=3, critic_learning_rate=1e-20)
    _, metrics = update_with(config, endings(terminated, truncated), lambda c: constant_critic(c, (5.0, 3.0, 4.0)))
    assert float(metrics["target"]) == pytest.approx(expected, rel=1e-6)
    error = sum((value - expected) ** 2 for value in (5, 3, 4))
    assert float(metrics["critic_loss"]) == pytest.approx(0.5 * error, rel=1e-5)
    assert float(metrics["actor_loss"]) == pytest.approx(-5.0)  # the first critic's, not the smallest


def test_targets_are_those_of_windows_of_n_steps():
    config = dataclasses.replace(ONE, gamma=0.9, n_step=3, critic_learning_rate=1e-20)
    _, metrics = update_with(config, endings(False, False), lambda c: constant_critic(c, (0.0, 0.0)))
    assert 1.5 < float(metrics["target"]) < 1 + 0.9 + 0.81  # those that begin with the newest two steps are shorter
    _, metrics = update_with(config, endings(False, True), lambda c: constant_critic(c, (0.0, 0.0)))
    assert float(metrics["target"]) == pytest.approx(1.0)
    _, metrics = update_with(config, endings(False, False), lambda c: constant_critic(c, (10.0, 10.0)))
    assert float(metrics["target"]) == pytest.approx(10.0)  # the value of 1 for ever, whatever the window


def test_the_noise_of_target_actions_is_clipped_and_so_are_they():
    """With Q = +-a and noise far beyond its clip, a' = +-clip about the target action, within the box."""

    def constant(value):
        def change(actor):
            actor = jax.tree.map(jnp.zeros_like, actor)
            actor["params"]["output"]["bias"] = jnp.full(2, value)
            return actor

        return change

    config = dataclasses.replace(LINEAR, gamma=0.9, target_noise=1e6, noise_clip=0.3)
    for pre_tanh, smallest in ((0.0, -0.3), (20.0, -1.0)):  # at the border: min(-1, -0.7) by the sign of noise
        _, metrics = update_with(config, endings(False, False), of_first_action(1.0, -1.0), constant(pre_tanh))
        if pre_tanh == 0.0:
            assert float(metrics["target"]) == pytest.approx(1 + 0.9 * smallest, rel=1e-5)
        else:
            assert 1 - 0.9 <= float(metrics["target"]) <= 1 - 0.9 * 0.7
    quiet = dataclasses.replace(config, target_noise=0.0)
    _, metrics = update_with(quiet, endings(False, False), of_first_action(1.0, -1.0), constant(0.5))
    assert float(metrics["target"]) == pytest.approx(1 - 0.9 * np.tanh(0.5), rel=1e-5)


def test_the_actor_climbs_the_first_critic():
    config = dataclasses.replace(LINEAR, actor_learning_rate=1e-2)
    before, _, start = built(td3, config)
    for weights, sign in (((1.0, -5.0), 1), ((-1.0, 5.0), -1)):
        state, _ = update_with(config, PLAIN, of_first_action(*weights))
        old, new = (
            before.act(before.policy(s, "greedy"), (), PLAIN.obs[0], jax.random.key(0), "greedy")[1]
            for s in (start, start._replace(learned=state.learned))
        )
        assert (sign * (new - old)[:, 0] > 0).all()


def test_the_actor_and_the_targets_wait_for_their_turn_over_iterations():
    config = dataclasses.replace(CONFIG, utd_ratio=(3, 24), policy_delay=2, tau=0.5)
    _, update, state = built(td3, config)
    counts = []
    for iteration in range(4):
        state, metrics = update(
            state, trajectory_of(CONTINUOUS, iteration), jnp.int32(iteration), jax.random.key(iteration)
        )
        counts.append(tuple(int(state.learned.optimizers[name][1].count) for name in ("critic", "actor")))
    assert counts == [(3, 1), (6, 3), (9, 4), (12, 6)]
    once = dataclasses.replace(config, utd_ratio=(1, 24))
    _, before, (after, metrics) = one_update(td3, once)  # the actor's turn comes with the second
    jax.tree.map(np.testing.assert_array_equal, before.learned.targets, after.learned.targets)
    jax.tree.map(np.testing.assert_array_equal, before.params["actor"], after.params["actor"])
    assert float(metrics["actor_loss"]) == 0 != float(metrics["critic_loss"])
    _, _, (after, metrics) = one_update(td3, once, iteration=1)
    expected = jax.tree.map(lambda new, old: 0.5 * (new + old), after.params, before.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.learned.targets, expected)


def test_exploration_adds_noise_within_the_box():
    config = dataclasses.replace(CONFIG, exploration_noise=0.2)
    algorithm = td3.make(config, CONTINUOUS, PLAN)
    policy = algorithm.policy(algorithm.init(jax.random.key(0)), "explore")
    obs = jnp.zeros((4000, 3))
    _, noisy, _ = algorithm.act(policy, (), obs, jax.random.key(1), "explore")
    _, plain, _ = algorithm.act(policy._replace(), (), obs, jax.random.key(1), "greedy")
    assert float((noisy - plain).std()) == pytest.approx(0.2, rel=0.05)
    loud = td3.make(dataclasses.replace(config, exploration_noise=9.0), CONTINUOUS, PLAN)
    assert float(jnp.abs(loud.act(policy, (), obs, jax.random.key(1), "sample")[1]).max()) == 1.0


@pytest.mark.parametrize(
    ("change", "field"),
    [({"policy_delay": 0}, "policy_delay"), ({"target_noise": -1.0}, "target_noise"), ({"gamma": 2.0}, "gamma")],
)
def test_impossible_settings_are_refused_by_name(change, field):
    with pytest.raises(UserError, match=field):
        td3.check(dataclasses.replace(CONFIG, **change), CONTINUOUS, PLAN)


def test_golden_numbers_of_one_update():
    _, _, (state, metrics) = one_update(td3, dataclasses.replace(CONFIG, policy_delay=1))
    measured = {k: float(metrics[k]) for k in ("critic_loss", "actor_loss", "target")}
    measured["params"] = float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(state.params)))
    message = (
        "One TD3 update gives other numbers than it did: its mathematics, its initialisation or its use of keys has "
        "changed. If that was meant, write the new numbers here and say in CHANGELOG.md that curves are not comparable."
    )
    assert measured == pytest.approx(GOLDEN, rel=1e-4), message


GOLDEN = {"critic_loss": 1.441308, "actor_loss": -0.2813156, "target": 0.2432593, "params": 54.96601}
