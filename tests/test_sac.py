"""SAC's update against closed forms, its gates and its switches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx.algorithms import sac
from rlx.replay import Batch
from rlx.types import Discrete, UserError
from tests.off_policy import (
    ASYMMETRIC,
    CONTINUOUS,
    PLAN,
    SMALL,
    built,
    constant_critic,
    entropy_of_squashed_normal,
    one_update,
    trajectory_of,
)

CONFIG = sac.Config(**SMALL)
ONE = dataclasses.replace(CONFIG, utd_ratio=(1, 24))
COLD = dataclasses.replace(ONE, init_alpha=1e-20, tune_alpha=False, critic_learning_rate=1e-20)  # no entropy, no step
PLAIN = trajectory_of(CONTINUOUS)
NEVER = jnp.zeros_like(PLAIN.terminated)


def update_with(config, trajectory, critic=(0.0, 0.0), target_critic=(0.0, 0.0), seed=3):
    """Metrics of one update of a learner whose critics are constants."""
    _, update, state = built(sac, config)
    learned = state.learned
    params = learned.params | {"critic": constant_critic(learned.params["critic"], critic)}
    learned = learned._replace(params=params, target_critic=constant_critic(learned.target_critic, target_critic))
    _, metrics = update(state._replace(learned=learned), trajectory, jnp.int32(0), jax.random.key(seed))
    return {name: float(value) for name, value in metrics.items()}


def endings(terminated, truncated, reward=1.0):
    return PLAIN._replace(
        reward=jnp.full_like(PLAIN.reward, reward), terminated=NEVER | terminated, truncated=NEVER | truncated
    )


@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [(False, False, 2 + 0.9 * 3), (True, False, 2), (False, True, 2 + 0.9 * 3), (True, True, 2)],
)
def test_targets_take_the_smaller_value_and_bootstrap_at_time_limits_alone(terminated, truncated, expected):
    config = dataclasses.replace(COLD, gamma=0.9, reward_scale=2.0)
    metrics = update_with(config, endings(terminated, truncated), (1.0, 2.0), (5.0, 3.0))
    assert metrics["target"] == pytest.approx(expected, rel=1e-6)
    assert metrics["critic_loss"] == pytest.approx(0.5 * ((1 - expected) ** 2 + (2 - expected) ** 2), rel=1e-5)
    assert metrics["q"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("num_critics", "subset"),
    [(1, 0), (5, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(2, 0), (5, 0), (5, 1)])],
)
def test_ensembles_of_any_size_give_the_minimum_of_all_or_of_a_random_subset(num_critics, subset):
    config = dataclasses.replace(COLD, num_critics=num_critics, target_subset=subset, gamma=1.0, mean_critic=subset > 0)
    values = np.arange(num_critics) + 1.0
    found = {
        round(update_with(config, endings(False, True, 0.0), values, values, seed)["target"], 4) for seed in range(8)
    }
    allowed = {1.0} if not subset else set(values[: num_critics - subset + 1])
    assert found <= allowed and (len(found) > 1) == (subset > 0)
    loss = update_with(config, endings(False, True), values, values)["actor_loss"]
    assert loss == pytest.approx(-values.mean() if subset else -1.0, rel=1e-5)


def test_targets_and_both_other_losses_carry_the_entropy_of_the_policy():
    """An actor of zeros is a squashed normal of a known entropy, log-determinant included."""
    config = dataclasses.replace(
        ONE, init_alpha=0.5, batch_size=20_000, gamma=0.9, critic_learning_rate=1e-20, target_entropy_scale=0.7
    )
    _, update, state = built(sac, config)
    params = state.params | {
        "actor": jax.tree.map(jnp.zeros_like, state.params["actor"]),
        "critic": constant_critic(state.params["critic"], (4.0, 3.0)),
    }
    learned = state.learned._replace(params=params, target_critic=constant_critic(params["critic"], (4.0, 3.0)))
    after, metrics = update(state._replace(learned=learned), endings(False, False), jnp.int32(0), jax.random.key(0))
    entropy = entropy_of_squashed_normal(np.log(2) + config.min_std, 2)
    assert float(metrics["entropy"]) == pytest.approx(entropy, abs=0.02)
    assert float(metrics["target"]) == pytest.approx(1 + 0.9 * (3 + 0.5 * entropy), abs=0.02)
    assert float(metrics["actor_loss"]) == pytest.approx(-0.5 * entropy - 3, abs=0.02)
    # d/d log_alpha of alpha (entropy - target): its size, and the first step of Adam against its sign
    gradient = 0.5 * (float(metrics["entropy"]) + 0.7 * 2)
    assert float(metrics["log_alpha_grad_norm"]) == pytest.approx(abs(gradient), rel=1e-4)
    step = float(after.params["log_alpha"]) - np.log(0.5)
    assert step == pytest.approx(-np.sign(gradient) * config.alpha_learning_rate, rel=1e-3)


def test_targets_follow_by_tau():
    config = dataclasses.replace(ONE, tau=0.25, critic_learning_rate=1e-2)
    _, before, (after, _) = one_update(sac, config)
    expected = jax.tree.map(lambda new, old: 0.25 * new + 0.75 * old, after.params["critic"], before.params["critic"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.learned.target_critic, expected
    )


def test_the_first_target_is_a_copy_of_the_critic_in_memory_of_its_own():
    state = sac.make(CONFIG, CONTINUOUS, PLAN).init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state.learned.target_critic, state.params["critic"])
    jax.jit(lambda x: x, donate_argnums=0)(state)  # aliased leaves could not be donated


def test_entropy_converges_to_its_target():
    """Where actions cost their square, so that the temperature decides how far they spread."""
    trajectory = endings(True, False)._replace(reward=-4 * jnp.square(PLAIN.action).sum(axis=-1))
    config = dataclasses.replace(
        CONFIG,
        utd_ratio=(400, 24),
        batch_size=64,
        critic_hidden=(32,),
        replay_size=24,
        target_entropy_scale=0.75,
        actor_learning_rate=3e-3,
        critic_learning_rate=1e-2,
        alpha_learning_rate=3e-2,
    )
    _, update, state = built(sac, config)
    for iteration in range(6):
        state, metrics = update(state, trajectory, jnp.int32(iteration), jax.random.key(iteration))
    assert float(metrics["entropy"]) == pytest.approx(-0.75 * 2, abs=0.05)


def test_networks_read_observations_by_the_statistics_of_all_that_was_seen_the_newest_included():
    """The first update equals one without normalisation on observations that are normalised already."""
    raw = dataclasses.replace(CONFIG, normalize_obs=False)
    mean, std = (np.asarray(f(PLAIN.obs, (0, 1)))[None, None] for f in (jnp.mean, jnp.std))
    seen = PLAIN._replace(obs=(PLAIN.obs - mean) / std, next_obs=(PLAIN.next_obs - mean) / std)
    results = []
    for config, trajectory in ((CONFIG, PLAIN), (raw, seen)):
        _, update, state = built(sac, config)
        results.append(update(state, trajectory, jnp.int32(0), jax.random.key(3))[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), results[0].learned, results[1].learned
    )
    np.testing.assert_allclose(results[0].experience.statistics.mean, mean[0, 0], rtol=1e-5)
    np.testing.assert_array_equal(results[0].experience.rows.obs[0, :6], PLAIN.obs)  # raw


def test_prefill_only_gathers_by_random_actions_and_then_the_policy_acts():
    config = dataclasses.replace(CONFIG, prefill_steps=2 * 24 + 5)
    algorithm, update, state = built(sac, config)
    act = jax.jit(algorithm.act, static_argnums=4)

    def spread(mode, state):
        """How far the actions of a policy reach that is sure to act at a border."""
        actor = jax.tree.map(lambda x: 0.0 * x - 9.0, state.params["actor"])
        policy = algorithm.policy(state, mode)._replace(actor=actor)
        return float(act(policy, (), jnp.full((200, 3), 2.0), jax.random.key(0), mode)[1].std())

    for iteration in range(3):
        assert spread("explore", state) > 0.5
        assert spread("sample", state) < 0.5
        after, metrics = update(
            state, trajectory_of(CONTINUOUS, iteration), jnp.int32(iteration), jax.random.key(iteration)
        )
        changed = (
            after.params["critic"]["params"]["output"]["kernel"] != state.params["critic"]["params"]["output"]["kernel"]
        )
        assert bool(changed.any()) == (iteration == 2) == (float(metrics["critic_loss"]) > 0)
        assert float(jnp.abs(after.experience.rows.reward).sum()) > float(jnp.abs(state.experience.rows.reward).sum())
        state = after
    assert not state.experience.random and spread("explore", state) < 0.5
    np.testing.assert_allclose(state.experience.statistics.count[0], 3 * 24)


@pytest.mark.parametrize("change", [{"random_prefill": False}, {"prefill_steps": 0}])
def test_policy_prefill_and_runs_from_another_policy_act_by_the_policy(change):
    config = dataclasses.replace(CONFIG, prefill_steps=100)
    state = sac.make(dataclasses.replace(config, **change), CONTINUOUS, PLAN).init(jax.random.key(0))
    assert not state.experience.random
    less_than_an_iteration = dataclasses.replace(config, prefill_steps=23)
    assert sac.make(less_than_an_iteration, CONTINUOUS, PLAN).init(jax.random.key(0)).experience.random
    algorithm = sac.make(config, CONTINUOUS, PLAN)
    assert algorithm.init(jax.random.key(0)).experience.random
    assert not algorithm.init(jax.random.key(0), algorithm.policy(state, "greedy")).experience.random


def test_actor_and_critic_read_their_own_entries_and_nothing_else_is_kept():
    config = dataclasses.replace(CONFIG, critic_obs_key="privileged_state")
    _, _, (state, _) = one_update(sac, config, asymmetric=True)
    assert set(state.experience.rows.obs) == set(state.experience.statistics.mean) == {"state", "privileged_state"}
    assert state.params["actor"]["params"]["Dense_0"]["kernel"].shape == (3, 8)
    assert state.params["critic"]["params"]["Dense_0"]["kernel"].shape == (2, 5 + 2, 8)
    _, _, (state, _) = one_update(sac, CONFIG, asymmetric=True)
    assert set(state.experience.rows.obs) == {"state"}


@pytest.mark.parametrize(
    "change",
    [
        {"n_step": 3},
        {"dtype": "bfloat16"},
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in ({"layer_norm": True}, {"replay_dtype": "bfloat16"}, {"max_grad_norm": 0.1})
        ),
    ],
    ids=str,
)
def test_every_switch_changes_the_update_and_keeps_float32_parameters(change):
    _, _, (plain, metrics) = one_update(sac, CONFIG)
    _, _, (state, other) = one_update(sac, dataclasses.replace(CONFIG, **change))
    learnt = [np.concatenate([x.ravel() for x in jax.tree.leaves(s.params)]) for s in (plain, state)]
    assert not np.array_equal(*learnt)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert all(np.isfinite(value) for value in other.values())
    if "dtype" in change or "replay_dtype" in change:
        assert float(other["critic_loss"]) == pytest.approx(float(metrics["critic_loss"]), rel=0.1)


def test_a_data_set_gives_its_part_of_every_batch():
    """Rewards are 0 in replay and 1 in the data set, values are 0: the mean target is the data set's part."""
    zeros = jnp.zeros((4, *CONTINUOUS.obs.shape), jnp.float32)
    drawn = Batch(zeros, jnp.zeros((4, *CONTINUOUS.action.shape), jnp.float32), jnp.ones(4), jnp.zeros(4), zeros)

    def draw(key, size, n_step, gamma):
        assert (size, n_step, gamma) == (4, COLD.n_step, COLD.gamma)
        return drawn

    config = dataclasses.replace(COLD, data_batch=4)
    whole = dataclasses.replace(COLD, data_batch=COLD.batch_size)
    assert [sac.uses_data(c) for c in (COLD, config, whole)] == ["", "beside", "alone"]
    algorithm = sac.make(config, CONTINUOUS, PLAN, draw)
    state = algorithm.init(jax.random.key(0))
    _, metrics = algorithm.update(state, endings(True, False, 0.0), 0, jax.random.key(0))
    assert float(metrics["target"]) == pytest.approx(4 / 16, abs=1e-6)


def test_data_keep_the_entries_of_observations_that_networks_read():
    obs = jax.tree.map(lambda x: jnp.zeros((4, *x.shape), jnp.float32), ASYMMETRIC.obs)
    drawn = Batch(obs, jnp.zeros((4, *ASYMMETRIC.action.shape), jnp.float32), jnp.ones(4), jnp.zeros(4), obs)
    config = dataclasses.replace(COLD, data_batch=4, critic_obs_key="privileged_state")
    algorithm = sac.make(config, ASYMMETRIC, PLAN, lambda key, size, n_step, gamma: drawn)
    trajectory = trajectory_of(ASYMMETRIC)
    _, metrics = algorithm.update(algorithm.init(jax.random.key(0)), trajectory, 0, jax.random.key(0))
    assert np.isfinite(float(metrics["critic_loss"]))


def test_golden_numbers_of_one_update():
    _, _, (state, metrics) = one_update(sac, CONFIG)
    measured = {k: float(metrics[k]) for k in ("critic_loss", "actor_loss", "entropy", "alpha")}
    measured["params"] = float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(state.params)))
    message = (
        "One SAC update gives other numbers than it did: its mathematics, its initialisation or its use of keys has "
        "changed. If that was meant, write the new numbers here and say in CHANGELOG.md that curves are not comparable."
    )
    assert measured == pytest.approx(GOLDEN, rel=1e-4), message


GOLDEN = {
    "critic_loss": 3.821942,
    "actor_loss": -0.6867774,
    "entropy": 0.585727,
    "alpha": 0.9995514,
    "params": 60.19092,
}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"gamma": 1.5}, "gamma"),
        ({"tau": -0.1}, "tau"),
        ({"init_alpha": 0.0}, "init_alpha"),
        ({"num_critics": 0}, "num_critics"),
        ({"target_subset": 3}, "target_subset = 3 .* num_critics = 2"),
        ({"batch_size": 0}, "batch_size"),
        ({"data_batch": 17}, "data_batch = 17 .* batch_size = 16"),
        ({"n_step": 0}, "n_step"),
        ({"utd_ratio": (1, 100)}, "utd_ratio = .1, 100. .* a gradient step"),
        ({"utd_ratio": (1,)}, "utd_ratio = .1,. .* two whole numbers"),
        ({"utd_ratio": (1, 0)}, "utd_ratio = .1, 0. .* above 0"),
        ({"prefill_steps": 241}, "prefill_steps = 241 .* total_steps"),
        ({"replay_size": 0}, "replay_size"),
        ({"replay_size": 10**12}, "replay_size = 10+ .* of a single run about"),
        ({"replay_dtype": "int8"}, "replay_dtype"),
        ({"dtype": "float16"}, "dtype"),
        ({"activation": "rleu"}, "relu"),
        ({"critic_hidden": (0,)}, "critic_hidden"),
        ({"actor_learning_rate": 0.0}, "actor_learning_rate"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, field):
    with pytest.raises(UserError, match=field):
        sac.check(dataclasses.replace(CONFIG, **change), CONTINUOUS, PLAN)


def test_discrete_actions_and_missing_observation_keys_are_refused():
    with pytest.raises(UserError, match="sac needs continuous actions"):
        sac.check(CONFIG, dataclasses.replace(CONTINUOUS, action=Discrete(3)), PLAN)
    with pytest.raises(UserError, match="privileged_state"):
        sac.check(dataclasses.replace(CONFIG, critic_obs_key="privileged"), ASYMMETRIC, PLAN)
