"""MAPPO's update against PPO's and against numbers worked out by hand; HAPPO and IPPO as its settings."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import envs
from rlx.algorithms import mappo, ppo
from rlx.logging import Progress
from rlx.schedule import TrainConfig
from rlx.training import train
from rlx.types import Box, Discrete, Spec, TimeStep, UserError
from tests.on_policy import CONTINUOUS, DISCRETE, PLAN, one_update, trajectory_of

N = 3
TEAM = Spec(
    obs={"agents": jax.ShapeDtypeStruct((N, 4), jnp.float32), "state": jax.ShapeDtypeStruct((5,), jnp.float32)},
    action=Box((N, 2)),
    num_agents=N,
    obs_mask=np.ones((N, 4), bool),
    action_mask=np.array([[True, True], [True, False], [True, True]]),
    episode_length=10,
)
WORDS = dataclasses.replace(
    TEAM, action=Discrete(3, (N,)), action_mask=np.array([[True, True, True], [True, True, False], [True] * 3])
)
SMALL = mappo.Config(actor_hidden=(8,), critic_hidden=(8,), num_epochs=2, max_grad_norm=float("inf"))
INDEPENDENT = dataclasses.replace(SMALL, central_critic=False)
IN_TURN = dataclasses.replace(SMALL, sequential=True)
SHARED = dataclasses.replace(SMALL, share_params=True)


def first(tree):
    """The part of agent 0 in leaves [1, ...]."""
    return jax.tree.map(lambda x: x[0], tree)


def close(a, b, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), a, b)


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (CONTINUOUS, SMALL),
        (CONTINUOUS, dataclasses.replace(SMALL, num_minibatches=3, adaptive_lr=True, clip_value=True)),
        (DISCRETE, SMALL),
        (CONTINUOUS, INDEPENDENT),
        (CONTINUOUS, IN_TURN),
        (CONTINUOUS, SHARED),
    ],
    ids=["together", "minibatches", "discrete", "independent", "in turn", "shared"],
)
def test_of_one_agent_it_is_ppo(spec, config):
    shared = {f.name for f in dataclasses.fields(ppo.Config)} & {f.name for f in dataclasses.fields(config)}
    alone = ppo.Config(**{name: getattr(config, name) for name in shared if not name.endswith("obs_key")})
    team, single = mappo.make(config, spec, PLAN), ppo.make(alone, spec, PLAN)
    learner, other = team.init(jax.random.key(0)), single.init(jax.random.key(0))
    of = (lambda tree: tree) if config.share_params else first
    of_critic = of if not config.central_critic else lambda tree: tree
    params = {"encoder": (), "actor": of(learner.params["actor"]), "critic": of_critic(learner.params["critic"])}
    other = other._replace(params=params)
    updates = jax.jit(team.update), jax.jit(single.update)
    for iteration in range(2):
        seen, expected = (trajectory_of(a, x, spec, iteration) for a, x in ((team, learner), (single, other)))
        np.testing.assert_allclose(seen.action, expected.action, atol=1e-6)
        key = jax.random.key(iteration)
        learner, metrics = updates[0](learner, seen, jnp.asarray(iteration), key)
        other, of_ppo = updates[1](other, expected, jnp.asarray(iteration), key)
        close(of(learner.params["actor"]), other.params["actor"], atol=1e-6)
        close(of_critic(learner.params["critic"]), other.params["critic"], atol=1e-6)
        close(learner.statistics, other.statistics, rtol=1e-6)
        for name in ("policy_loss", "value_loss", "entropy", "kl", "learning_rate", "explained_variance"):
            assert float(metrics[name]) == pytest.approx(float(of_ppo[name]), rel=1e-4, abs=1e-6), name


@functools.cache
def built(config, discrete=False):
    """The algorithm, its learner, a trajectory of its policy, its update and how it acts, jitted."""
    spec = WORDS if discrete else TEAM
    algorithm = mappo.make(config, spec, PLAN)
    learner = algorithm.init(jax.random.key(0))
    return algorithm, learner, trajectory_of(algorithm, learner, spec), jax.jit(algorithm.update)


def updated(config, trajectory=None, discrete=False):
    _, learner, own, update = built(config, discrete)
    return update(learner, own if trajectory is None else trajectory, jnp.asarray(0), jax.random.key(3))


BY_HAND = {"gamma": 0.0, "normalize_obs": False, "entropy_coef": 0.0, "learning_rate": 1e-2, "num_epochs": 3}


def by_hand(config, order, weighted=True):
    """The actors after all have been updated in this order; a critic of 0 and gamma = 0: A is the reward."""
    _, learner, trajectory, _ = built(config)
    advantages = np.asarray(trajectory.reward)
    advantages = jnp.asarray((advantages - advantages.mean()) / advantages.std())
    optimizer = optax.adam(config.learning_rate, eps=1e-5)
    actor, factor, found = learner.params["actor"], jnp.ones_like(advantages), {}
    raw, rows = trajectory.extras.raw_action, trajectory.obs["agents"]

    def log_prob(params, agent):
        hidden, output = (params["network"]["params"][name] for name in ("Dense_0", "output"))
        mean = jnp.tanh(rows[:, :, agent] @ hidden["kernel"] + hidden["bias"].reshape(1, 1, -1)) @ output["kernel"]
        mean = mean + output["bias"].reshape(1, 1, -1)
        std = jax.nn.softplus(params["raw_std"]).reshape(1, 1, -1) + config.min_std
        density = jax.scipy.stats.norm.logpdf(raw[:, :, agent], mean, jnp.broadcast_to(std, mean.shape))
        return density[..., np.asarray(TEAM.action_mask[agent])].sum(axis=-1)  # what is padding has no part

    for agent in order:
        params = jax.tree.map(lambda x, agent=agent: x[agent], actor)
        before, state = log_prob(params, agent), optimizer.init(params)

        def loss(params, agent=agent, before=before, factor=factor):
            ratio = jnp.exp(log_prob(params, agent) - before)
            clipped = jnp.clip(ratio, 1 - config.clip_eps, 1 + config.clip_eps)
            return -(factor * jnp.minimum(ratio * advantages, clipped * advantages)).mean()

        for _ in range(config.num_epochs):
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            params = optax.apply_updates(params, updates)
        if weighted:
            factor = factor * jnp.exp(log_prob(params, agent) - before)
        found[agent] = params
    return jax.tree.map(lambda *x: jnp.stack(x), *(found[agent] for agent in range(N)))


def with_no_values(config):
    """As `built`, with a critic of 0 that stays there for the advantages of one update."""
    algorithm, learner, _, update = built(config)
    learner = learner._replace(
        params=learner.params | {"critic": jax.tree.map(jnp.zeros_like, learner.params["critic"])}
    )
    return learner, update


def test_happo_weighs_advantages_by_the_ratios_of_those_before_and_draws_every_order():
    config = dataclasses.replace(IN_TURN, **BY_HAND)
    learner, update = with_no_values(config)
    _, _, trajectory, _ = built(config)
    keys = jax.random.split(jax.random.key(0), 40)
    many, _ = jax.jit(jax.vmap(update, (None, None, None, 0)))(learner, trajectory, jnp.asarray(0), keys)
    orders = list(itertools.permutations(range(N)))
    flat = lambda tree: np.concatenate([np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(tree)], 1)  # noqa: E731
    expected = np.stack([flat(by_hand(config, order)).ravel() for order in orders])
    drawn = np.concatenate([np.asarray(x).reshape(len(keys), N, -1) for x in jax.tree.leaves(many.params["actor"])], 2)
    apart = np.abs(drawn.reshape(len(keys), 1, -1) - expected[None]).max(axis=2)  # [keys, orders]
    assert (apart.min(axis=1) < 1e-5).all()
    assert np.abs(expected[:, None] - expected[None]).max(axis=2)[~np.eye(6, dtype=bool)].min() > 1e-4
    assert set(apart.argmin(axis=1)) == set(range(len(orders)))


def test_a_fixed_order_begins_with_agent_0():
    config = dataclasses.replace(IN_TURN, fixed_order=True, **BY_HAND)
    learner, update = with_no_values(config)
    state, metrics = update(learner, built(config)[2], jnp.asarray(0), jax.random.key(7))
    close(state.params["actor"], by_hand(config, range(N)), atol=1e-5)
    assert float(metrics["first_ratio_deviation"]) < 2e-6


def test_together_nobody_is_weighed():
    config = dataclasses.replace(SMALL, **BY_HAND)
    learner, update = with_no_values(config)
    state, _ = update(learner, built(config)[2], jnp.asarray(0), jax.random.key(7))
    close(state.params["actor"], by_hand(config, range(N), weighted=False), atol=1e-5)


def test_the_team_learns_from_the_sum_of_its_rewards():
    _, _, trajectory, _ = built(SMALL)
    shares = jnp.array([0.5, -0.7, 1.2]).reshape(1, 1, N)
    apart = trajectory._replace(reward=trajectory.reward[..., None] * shares)
    close(updated(SMALL)[0].params, updated(SMALL, trajectory=apart)[0].params, atol=1e-6)


def seen_otherwise(trajectory, agent):
    """Another state, and another observation of one agent, throughout."""

    def change(obs):
        return {"agents": obs["agents"].at[:, :, agent].add(1.0), "state": obs["state"] + 1.0}

    return trajectory._replace(obs=change(trajectory.obs), next_obs=change(trajectory.next_obs))


def test_critics_of_ippo_see_nothing_but_what_their_agent_sees():
    config = dataclasses.replace(INDEPENDENT, normalize_obs=False)
    other = seen_otherwise(built(config)[2], 2)
    before, after = updated(config)[0].params, updated(config, trajectory=other)[0].params
    for part in ("actor", "critic"):
        for agent, same in ((0, True), (1, True), (2, False)):
            own, others = (jax.tree.leaves(jax.tree.map(lambda x, i=agent: x[i], p[part])) for p in (before, after))
            equal = all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(own, others, strict=True))
            assert equal == same, (part, agent)
    central = dataclasses.replace(SMALL, normalize_obs=False)
    errors = [float(updated(central, trajectory=x)[1]["value_loss"]) for x in (None, other)]
    assert abs(errors[0] - errors[1]) > 1e-3


def test_the_central_critic_reads_the_state_alone():
    config = dataclasses.replace(SMALL, normalize_obs=False)
    trajectory = built(config)[2]
    rows = trajectory._replace(
        obs={**trajectory.obs, "agents": trajectory.obs["agents"] + 1.0},
        next_obs={**trajectory.next_obs, "agents": trajectory.next_obs["agents"] + 1.0},
    )
    close(updated(config)[0].params["critic"], updated(config, trajectory=rows)[0].params["critic"], atol=0)


@pytest.mark.parametrize("config", [SMALL, IN_TURN, SHARED], ids=["together", "in turn", "shared"])
def test_padding_is_0_in_actions_and_nothing_in_what_is_learnt(config):
    _, _, trajectory, _ = built(config)
    assert not trajectory.action[:, :, 1, 1].any() and trajectory.action[:, :, 1, 0].any()
    extras = trajectory.extras
    moved = trajectory._replace(extras=extras._replace(raw_action=extras.raw_action.at[:, :, 1, 1].add(5.0)))
    close(updated(config)[0].params, updated(config, trajectory=moved)[0].params, atol=0)
    if not config.share_params:
        start, end = (x.params["actor"]["network"]["params"]["output"] for x in (built(config)[1], updated(config)[0]))
        np.testing.assert_array_equal(start["kernel"][1, :, 1], end["kernel"][1, :, 1])
        assert (start["kernel"][1, :, 0] != end["kernel"][1, :, 0]).all()


@pytest.mark.parametrize("config", [SMALL, IN_TURN, SHARED], ids=["together", "in turn", "shared"])
def test_discrete_agents_choose_among_their_own_values_and_start_at_a_ratio_of_one(config):
    config = dataclasses.replace(config, entropy_coef=0.1)
    algorithm, learner, trajectory, _ = built(config, discrete=True)
    obs = jax.tree.map(lambda x: jnp.zeros((2000, *x.shape)), WORDS.obs)
    _, action, _ = algorithm.act(algorithm.policy(learner, "explore"), (), obs, jax.random.key(0), "explore")
    assert action.dtype == jnp.int32 and action.shape == (2000, N)
    assert [set(column) for column in np.asarray(action).T.tolist()] == [{0, 1, 2}, {0, 1}, {0, 1, 2}]
    state, metrics = updated(config, discrete=True)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state, metrics)))
    assert float(metrics["first_ratio_deviation"]) < 2e-6


def test_shared_parameters_tell_agents_apart_by_who_they_are():
    algorithm, learner, _, _ = built(SHARED)
    obs = {"agents": jnp.ones((1, N, 4)), "state": jnp.ones((1, 5))}
    _, action, _ = algorithm.act(algorithm.policy(learner, "greedy"), (), obs, jax.random.key(0), "greedy")
    assert len(np.unique(np.asarray(action[0, :, 0]))) == N
    sizes = [sum(x.size for x in jax.tree.leaves(built(c)[1].params["actor"])) for c in (SHARED, SMALL)]
    assert sizes[1] == N * (sizes[0] - N * SHARED.actor_hidden[0])  # and who it is comes in


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SMALL, marks=pytest.mark.slow, id="together"),
        pytest.param(IN_TURN, id="in turn"),
        pytest.param(INDEPENDENT, marks=pytest.mark.slow, id="independent"),
    ],
)
def test_a_program_does_not_grow_with_the_team(config):
    def length(num_agents):
        shapes = {"agents": (num_agents, 4), "state": (5,)}
        spec = dataclasses.replace(
            TEAM,
            obs={key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in shapes.items()},
            action=Box((num_agents, 2)),
            num_agents=num_agents,
            obs_mask=np.ones((num_agents, 4), bool),
            action_mask=np.ones((num_agents, 2), bool),
        )
        algorithm = mappo.make(config, spec, PLAN)
        learner = algorithm.init(jax.random.key(0))
        trajectory = trajectory_of(algorithm, learner, spec)
        jaxpr = jax.make_jaxpr(algorithm.update)(learner, trajectory, jnp.asarray(0), jax.random.key(0))
        return str(jaxpr).count("\n")

    assert length(2) == length(9)


class Answers:
    """Each agent is to answer with what it sees; the second has one entry, the first two. One step."""

    spec = dataclasses.replace(
        TEAM,
        obs={"agents": jax.ShapeDtypeStruct((2, 2), jnp.float32), "state": jax.ShapeDtypeStruct((3,), jnp.float32)},
        action=Box((2, 2)),
        num_agents=2,
        obs_mask=np.array([[True, True], [True, False]]),
        action_mask=np.array([[True, True], [True, False]]),
        episode_length=1,
    )

    def reset(self, key, params):
        state = jax.random.uniform(key, (3,), minval=-0.8, maxval=0.8)
        return state, {"agents": jnp.append(state, 0.0).reshape(2, 2), "state": state}

    def step(self, state, action, key):
        errors = (action - jnp.append(state, 0.0).reshape(2, 2)) ** 2
        obs, over = {"agents": jnp.append(state, 0.0).reshape(2, 2), "state": state}, jnp.ones((), bool)
        return state, TimeStep(obs, -errors.sum(axis=1), over, ~over, obs, {})


SETTINGS = {
    "mappo": {},
    "ippo": {"central_critic": False},
    "happo": {"sequential": True},
    "shared": {"share_params": True},
}


SOON = {("mappo", "continuous"), ("happo", "continuous"), ("ippo", "discrete"), ("shared", "discrete")}


@pytest.mark.parametrize(
    ("name", "world"),
    [
        pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in SOON))
        for pair in itertools.product(SETTINGS, ("continuous", "discrete"))
    ],
)
def test_a_team_learns_in_seconds(name, world):
    """Answers: 0 is best, and about -1 by chance. Of the diagonal game's 5, 10 and 20 it finds the 20."""
    env = Answers() if world == "continuous" else envs.make("matrix/diagonal")
    plan = TrainConfig(total_steps=64 * 8 * 60, num_envs=64, unroll_length=8, num_evals=1, eval_episodes=128)
    config = mappo.Config(learning_rate=5e-3, entropy_coef=1e-3, num_epochs=4, num_minibatches=2, **SETTINGS[name])
    run = train(env, mappo, plan, config, progress=Progress(quiet=True))
    assert run.history[-1]["eval/return"] > (-0.05 if world == "continuous" else 19.9)


@pytest.mark.parametrize(
    ("change", "spec", "message"),
    [
        ({"sequential": True, "share_params": True}, TEAM, "algo.share_params = True .* parameters of their own"),
        ({"entropy_coef": -1.0}, TEAM, "algo.entropy_coef"),
        ({"num_minibatches": 7}, TEAM, "algo.num_minibatches"),
        ({"gamma": 1.5}, TEAM, "algo.gamma"),
        ({"distribution": "nromal"}, TEAM, "algo.distribution"),
        ({"actor_obs_key": "agnets"}, TEAM, "agents"),
        ({"critic_obs_key": "agents"}, TEAM, "env = .*critic reads vectors"),
        ({}, dataclasses.replace(TEAM, num_agents=2), "env = .*of each of 2 agents"),
        ({}, dataclasses.replace(TEAM, action=Box((2, 2))), "env = .*actions of shape"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, spec, message):
    with pytest.raises(UserError, match=message):
        mappo.check(dataclasses.replace(SMALL, **change), spec, PLAN)


def test_ppo_sends_teams_elsewhere():
    with pytest.raises(UserError, match="ppo trains a single agent"):
        ppo.check(ppo.Config(), TEAM, PLAN)


def test_golden_numbers_of_one_update():
    config = dataclasses.replace(IN_TURN, num_minibatches=3)
    *_, (state, metrics) = one_update(mappo, config, TEAM)
    measured = {k: float(metrics[k]) for k in ("policy_loss", "value_loss", "entropy", "actor_grad_norm")}
    measured["params"] = float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(state.params)))
    message = (
        "One MAPPO update gives other numbers than it did: its mathematics, its initialisation or its use of keys has "
        "changed. If that was meant, write the new numbers here and say in CHANGELOG.md that curves are not comparable."
    )
    assert measured == pytest.approx(GOLDEN, rel=1e-4), message


GOLDEN = {
    "policy_loss": -0.004867401,
    "value_loss": 16.58059,
    "entropy": 2.366732,
    "actor_grad_norm": 1.353601,
    "params": 70.09152,
}
