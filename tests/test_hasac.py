"""HASAC's update against closed forms and against SAC, its order of agents, its padding and its switches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
import rlx
from rlx.algorithms import hasac, sac
from rlx.logging import Progress
from rlx.schedule import TrainConfig
from rlx.types import Box, Spec, UserError
from tests.off_policy import (  # noqa: F401  (same_noise is a fixture)
    CONTINUOUS,
    DISCRETE_TEAM,
    PLAN,
    SMALL,
    TEAM,
    alike,
    constant_critic,
    entropy_of_squashed_normal,
    same_noise,
    trajectory_of,
)

CONFIG = hasac.Config(**SMALL)
ONE = dataclasses.replace(CONFIG, utd_ratio=(1, 24))
STILL = dataclasses.replace(ONE, critic_learning_rate=1e-20, tune_alpha=False)  # what is not about actors stays
MANY = dataclasses.replace(STILL, batch_size=20_000, gamma=0.9, init_alpha=0.5)
STD = np.log(2) + CONFIG.min_std  # of an actor of zeros
THREE = Spec(
    obs={"agents": jax.ShapeDtypeStruct((3, 2), jnp.float32), "state": jax.ShapeDtypeStruct((4,), jnp.float32)},
    action=Box((3, 1)),
    num_agents=3,
)


def start(config, spec=TEAM, seed=0):
    algorithm = hasac.make(config, spec, PLAN)
    return algorithm, jax.jit(algorithm.update), algorithm.init(jax.random.key(seed))


def with_params(state, **params):
    return state._replace(learned=state.learned._replace(params=state.params | params))


def plain(state, critic=(0.0, 0.0), target_critic=(4.0, 3.0)):
    """A learner of actors of zeros and of constant critics."""
    actor = jax.tree.map(jnp.zeros_like, state.params["actor"])
    state = with_params(state, actor=actor, critic=constant_critic(state.params["critic"], critic))
    target = constant_critic(state.learned.target_critic, target_critic)
    return state._replace(learned=state.learned._replace(target_critic=target))


def endings(spec, terminated=False, truncated=False, reward=1.0):
    trajectory = trajectory_of(spec)
    never = jnp.zeros_like(trajectory.terminated)
    return trajectory._replace(
        reward=jnp.full_like(trajectory.reward, reward), terminated=never | terminated, truncated=never | truncated
    )


def same(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def of_agent(params, i):
    return jax.tree.map(lambda x: x[i], params["actor"])


@pytest.mark.parametrize("tune_alpha", [True, False])
def test_one_agent_is_sac(same_noise, tune_alpha):  # noqa: F811
    settings = SMALL | {"utd_ratio": (5, 24), "tune_alpha": tune_alpha, "init_alpha": 0.3}
    settings |= {f"{name}_learning_rate": 1e-3 for name in ("actor", "critic", "alpha")}
    one = sac.make(sac.Config(**settings), CONTINUOUS, PLAN)
    _, several, state = start(hasac.Config(**settings), CONTINUOUS)
    other = one.init(jax.random.key(0))
    params = {"actor": jax.tree.map(lambda x: x[None], other.params["actor"]), "critic": other.params["critic"]}
    state = with_params(state, **params)
    state = state._replace(learned=state.learned._replace(target_critic=other.learned.target_critic))
    for iteration in range(2):  # of five gradient steps each
        step = (trajectory_of(CONTINUOUS, iteration), jnp.int32(iteration), jax.random.key(iteration))
        state, metrics = several(state, *step)
        other, expected = jax.jit(one.update)(other, *step)
    close = {"rtol": 0, "atol": 1e-6}
    same(of_agent(state.params, 0), other.params["actor"], **close)
    same(state.params["critic"], other.params["critic"], **close)
    same(state.learned.target_critic, other.learned.target_critic, **close)
    assert float(other.params["log_alpha"] - np.log(0.3) != 0) == tune_alpha
    for name in ("log_alpha", "log_critic_alpha"):
        same(state.params[name].reshape(()), other.params["log_alpha"], **close)
    for name in ("critic_loss", "actor_loss", "entropy", "std", "target", "q", "alpha"):
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-5), name


@pytest.mark.parametrize(
    ("terminated", "truncated", "bootstraps"), [(False, False, 1), (True, False, 0), (False, True, 1), (True, True, 0)]
)
def test_targets_carry_the_entropy_of_all_agents_and_bootstrap_at_time_limits_alone(terminated, truncated, bootstraps):
    """Of four real entries, two of the six are padding."""
    _, update, state = start(dataclasses.replace(MANY, reward_scale=2.0))
    state = plain(with_params(state, log_alpha=jnp.full(2, 3.0)))  # the agents' own temperatures are no part of it
    trajectory = endings(TEAM, terminated, truncated)
    _, metrics = update(state, trajectory, jnp.int32(0), jax.random.key(0))
    value = 3 + 0.5 * entropy_of_squashed_normal(STD, 4)
    assert float(metrics["target"]) == pytest.approx(2 + 0.9 * bootstraps * value, abs=0.03)
    assert float(metrics["entropy"]) == pytest.approx(entropy_of_squashed_normal(STD, 4) / 2, abs=0.02)


def test_n_step_targets_count_their_steps_and_give_no_bonus_inside():
    _, update, state = start(dataclasses.replace(MANY, n_step=3, gamma=0.5))
    _, metrics = update(plain(state), endings(TEAM), jnp.int32(0), jax.random.key(0))
    value = 3 + 0.5 * entropy_of_squashed_normal(STD, 4)
    of_rows = [sum(0.5**i for i in range(k)) + 0.5**k * value for k in (3, 3, 3, 3, 2, 1)]  # the newest rows are last
    assert float(metrics["target"]) == pytest.approx(np.mean(of_rows), abs=0.03)


def test_rewards_paid_apart_are_added_up():
    _, update, state = start(dataclasses.replace(MANY, gamma=0.0))
    trajectory = endings(TEAM)
    apart = jnp.stack([trajectory.reward, 2 * trajectory.reward], axis=-1)
    for reward in (apart, apart.sum(axis=-1)):
        _, metrics = update(plain(state), trajectory._replace(reward=reward), jnp.int32(0), jax.random.key(0))
        assert float(metrics["target"]) == pytest.approx(3.0)


def three_agents(**changes):
    """Smooth and quick, with the first step of Adam, which tells signs alone, behind them."""
    config = dataclasses.replace(STILL, activation="tanh", actor_learning_rate=0.1, init_alpha=0.1, **changes)
    _, update, state = start(config, THREE)
    trajectory = alike(trajectory_of(THREE))
    return update, update(state, trajectory, jnp.int32(0), jax.random.key(0))[0], trajectory


@pytest.mark.parametrize(
    ("changes", "outcomes"), [({}, 6), ({"fixed_order": True}, 1), ({"sequential": False}, 1)], ids=str
)
def test_the_order_of_agents_is_any_at_all_and_matters_only_in_sequence(same_noise, changes, outcomes):  # noqa: F811
    """Batches and noise are the same in every update, so that nothing else depends on the key."""
    update, state, trajectory = three_agents(**changes)
    keys = jax.random.split(jax.random.key(1), 60)
    after = jax.vmap(update, (None, None, None, 0))(state, trajectory, jnp.int32(1), keys)[0]
    learnt = np.concatenate([np.asarray(x).reshape(60, -1) for x in jax.tree.leaves(after.params["actor"])], axis=1)
    assert len(np.unique(np.round(learnt, 5), axis=0)) == outcomes


def test_agents_answer_to_what_those_before_them_have_just_become(same_noise):  # noqa: F811
    """The second agent learns what it learns, all at once, where the first has become what it becomes."""
    update, state, trajectory = three_agents(fixed_order=True)
    at_once, _, _ = three_agents(sequential=False)
    inputs = (trajectory, jnp.int32(1), jax.random.key(1))
    after, together = update(state, *inputs)[0].params, at_once(state, *inputs)[0].params
    same(of_agent(after, 0), of_agent(together, 0), rtol=1e-6, atol=1e-7)
    actor = jax.tree.map(lambda x, new: x.at[0].set(new[0]), state.params["actor"], after["actor"])
    answering = at_once(with_params(state, actor=actor), *inputs)[0].params
    same(of_agent(after, 1), of_agent(answering, 1), rtol=1e-4, atol=1e-5)
    actor = jax.tree.map(lambda x, new: x.at[:2].set(new[:2]), state.params["actor"], after["actor"])
    answering = at_once(with_params(state, actor=actor), *inputs)[0].params
    same(of_agent(after, 2), of_agent(answering, 2), rtol=1e-4, atol=1e-5)
    for i in (1, 2):
        ways = [jax.tree.leaves(of_agent(params, i)) for params in (after, together)]
        assert max(float(jnp.abs(x - y).max()) for x, y in zip(*ways, strict=True)) > 1e-3


def test_padding_is_never_acted_learnt_or_valued():
    algorithm, update, state = start(CONFIG)
    obs = jax.tree.map(lambda x: x[0], trajectory_of(TEAM).obs)
    for mode in ("explore", "sample", "greedy"):
        action = algorithm.act(algorithm.policy(state, mode), (), obs, jax.random.key(0), mode)[1]
        assert action.shape == (4, 2, 3)
        assert (action[:, ~TEAM.action_mask] == 0).all() and (action[:, TEAM.action_mask] != 0).all()
    trajectory = trajectory_of(TEAM)
    action = jnp.where(TEAM.action_mask, trajectory.action, 0.0)
    after, _ = update(state, trajectory._replace(action=action), jnp.int32(0), jax.random.key(0))
    changed = after.params["actor"]["params"]["output"]["kernel"] != state.params["actor"]["params"]["output"]["kernel"]
    np.testing.assert_array_equal(changed.any(axis=1), np.tile(TEAM.action_mask, 2))  # means, then deviations
    kernels = [s.params["critic"]["params"]["Dense_0"]["kernel"] for s in (state, after)]
    changed = (kernels[0] != kernels[1]).any(axis=(0, 2))
    np.testing.assert_array_equal(changed, [True] * 5 + list(TEAM.action_mask.ravel()))


def test_discrete_actions_are_allowed_ones_and_their_actors_learn():
    config = dataclasses.replace(CONFIG, prefill_steps=24)
    algorithm, update, state = start(config, DISCRETE_TEAM)
    obs = jax.tree.map(lambda x: jnp.tile(x[0], (50, *[1] * (x.ndim - 2))), trajectory_of(TEAM).obs)
    for learner in (state, with_params(state, actor=jax.tree.map(lambda x: 5 * x, state.params["actor"]))):
        for mode in ("explore", "sample", "greedy"):
            action = algorithm.act(algorithm.policy(learner, mode), (), obs, jax.random.key(0), mode)[1]
            assert action.shape == (200, 2) and action.dtype == jnp.int32
            assert int(action[:, 1].max()) <= 1 and int(action.min()) >= 0
    trajectory = trajectory_of(DISCRETE_TEAM)._replace(obs=trajectory_of(TEAM).obs)
    trajectory = trajectory._replace(action=trajectory.action % jnp.array([3, 2])[None, None])
    after, metrics = update(state, trajectory, jnp.int32(1), jax.random.key(0))
    kernels = [s.params["actor"]["params"]["output"]["kernel"] for s in (state, after)]
    np.testing.assert_array_equal((kernels[0] != kernels[1]).any(axis=1), DISCRETE_TEAM.action_mask)
    assert 0 < float(metrics["entropy"]) <= (np.log(3) + np.log(2)) / 2 + 1e-6


def test_the_values_of_all_actions_decide_where_slopes_mislead():
    """A critic |x - 1/4| of x, which is 1 where agent 0 takes action 1: worth 3/4, anything else 1/4. But where it is
    not taken, which is nearly always, the slope in x is -1."""
    for each, sign in ((False, -1), (True, 1)):
        config = dataclasses.replace(
            STILL, value_each=each, init_alpha=1e-9, actor_learning_rate=1e-2, batch_size=512, num_critics=1
        )
        _, update, state = start(config, DISCRETE_TEAM)
        actor = jax.tree.map(jnp.zeros_like, state.params["actor"])
        actor["params"]["output"]["bias"] = actor["params"]["output"]["bias"].at[0, 1].set(-2.0)  # seldom drawn
        critic = jax.tree.map(jnp.zeros_like, state.params["critic"])
        for column, way in ((0, 1.0), (1, -1.0)):
            layer = critic["params"]["Dense_0"]
            layer["kernel"] = layer["kernel"].at[0, 5 + 1, column].set(way)
            layer["bias"] = layer["bias"].at[0, column].set(-way / 4)
            critic["params"]["output"]["kernel"] = critic["params"]["output"]["kernel"].at[0, column].set(1.0)
        trajectory = trajectory_of(DISCRETE_TEAM)._replace(obs=trajectory_of(TEAM).obs)
        trajectory = trajectory._replace(action=jnp.zeros_like(trajectory.action))
        learner = with_params(state, actor=actor, critic=critic)
        after, _ = update(learner, trajectory, jnp.int32(0), jax.random.key(0))
        moved = after.params["actor"]["params"]["output"]["bias"] - actor["params"]["output"]["bias"]
        assert float(jnp.sign(moved[0, 1])) == sign


@pytest.mark.parametrize("scale", [3.0, -3.0])
def test_temperatures_rise_where_entropy_lacks_and_each_has_its_own_target(scale):
    """Of zeros, an actor has an entropy of about 0.5 nats an entry: above -3, below 3."""
    config = dataclasses.replace(ONE, target_entropy_scale=-scale, alpha_learning_rate=1e-2)
    _, update, state = start(config)
    after, metrics = update(plain(state), endings(TEAM), jnp.int32(0), jax.random.key(0))
    for name in ("log_alpha", "log_critic_alpha"):
        np.testing.assert_allclose(after.params[name] - state.params[name], np.sign(scale) * 1e-2, rtol=1e-3)
    gradients = np.abs(np.array([3, 1]) * (entropy_of_squashed_normal(STD, 1) - scale))
    assert float(metrics["log_alpha_grad_norm"]) == pytest.approx(gradients.mean(), rel=0.3)


def test_discrete_targets_are_a_share_of_the_largest_entropy():
    """Uniform over what each may do: above 0.9 log n, below 1.1 log n, of three values and of two."""
    for share, sign in ((0.9, -1), (1.1, 1)):
        config = dataclasses.replace(ONE, discrete_entropy_scale=share, alpha_learning_rate=1e-2)
        _, update, state = start(config, DISCRETE_TEAM)
        trajectory = trajectory_of(DISCRETE_TEAM)._replace(obs=trajectory_of(TEAM).obs)
        trajectory = trajectory._replace(action=jnp.zeros_like(trajectory.action))
        after, _ = update(plain(state), trajectory, jnp.int32(0), jax.random.key(0))
        np.testing.assert_allclose(after.params["log_alpha"], sign * 1e-2, rtol=1e-3)


def test_an_annealed_temperature_falls_geometrically_over_the_run():
    config = dataclasses.replace(STILL, anneal_alpha=True, init_alpha=50.0, final_alpha=0.5)
    _, update, state = start(config)
    for iteration, expected in ((0, 50.0), (PLAN.num_iterations - 1, 0.5), (3, 50.0 * 0.01 ** (3 / 9))):
        after, metrics = update(state, trajectory_of(TEAM), jnp.int32(iteration), jax.random.key(0))
        assert float(metrics["alpha"]) == pytest.approx(expected, rel=1e-4)
        assert float(metrics["critic_alpha"]) == pytest.approx(expected, rel=1e-4)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


def test_shared_parameters_are_those_of_one_network_that_every_agent_trains():
    _, update, state = start(dataclasses.replace(ONE, share_params=True))
    assert state.params["actor"]["params"]["Dense_0"]["kernel"].shape == (4 + 2, 8)
    after, _ = update(state, trajectory_of(TEAM), jnp.int32(0), jax.random.key(0))
    assert int(after.learned.optimizers["actor"][1].count) == 2
    ids = (
        after.params["actor"]["params"]["Dense_0"]["kernel"][4:]
        != state.params["actor"]["params"]["Dense_0"]["kernel"][4:]
    )
    assert ids.any(axis=1).all()
    assert after.params["log_alpha"].shape == (2,)


def test_the_first_target_is_a_copy_of_the_critic_in_memory_of_its_own():
    _, _, state = start(CONFIG)
    same(state.learned.target_critic, state.params["critic"])
    jax.jit(lambda x: x, donate_argnums=0)(state)  # aliased leaves could not be donated


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"init_alpha": 0.0}, "init_alpha"),
        ({"final_alpha": 0.0}, "final_alpha"),
        ({"anneal_alpha": True}, "anneal_alpha"),
        ({"min_std": -1.0}, "min_std"),
        ({"n_step": 0}, "n_step"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(change, field):
    with pytest.raises(UserError, match=field):
        hasac.check(dataclasses.replace(CONFIG, **change), TEAM, PLAN)
    hasac.check(CONFIG, TEAM, PLAN)


def test_a_team_finds_the_best_of_three_agreements():
    """Paid 5, 10 or 20 where both choose the same, else nothing."""
    env = envs.make("matrix/diagonal")
    sizes = TrainConfig(total_steps=6_400, num_envs=16, unroll_length=4, num_evals=1, eval_episodes=8)
    config = dataclasses.replace(
        CONFIG,
        batch_size=64,
        utd_ratio=(4, 64),
        replay_size=6_400,
        prefill_steps=640,
        actor_learning_rate=3e-3,
        critic_learning_rate=3e-3,
        critic_hidden=(32,),
        tune_alpha=False,
        anneal_alpha=True,
        init_alpha=10.0,
        final_alpha=0.1,
    )
    run = rlx.train(env, hasac, sizes, config, progress=Progress(quiet=True))
    assert run.history[-1]["eval/return"] == 20.0


def test_golden_numbers_of_one_update():
    _, update, state = start(CONFIG)
    state, metrics = update(state, trajectory_of(TEAM), jnp.int32(0), jax.random.key(3))
    measured = {k: float(metrics[k]) for k in ("critic_loss", "actor_loss", "target")}
    measured["params"] = float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(state.params)))
    message = (
        "One HASAC update gives other numbers than it did: its mathematics, its initialisation or its use of keys has "
        "changed. If that was meant, write the new numbers here and say in CHANGELOG.md that curves are not comparable."
    )
    assert measured == pytest.approx(GOLDEN, rel=1e-4), message


GOLDEN = {"critic_loss": 4.710881, "actor_loss": -0.1609542, "target": 0.5455176, "params": 112.26}
