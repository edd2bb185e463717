"""MAPPO: PPO for a team, with one critic of its state (Yu et al. 2022, arXiv 2103.01955).

As settings of it IPPO, where each agent has a critic of what it sees (de Witt et al. 2020, arXiv 2011.09533), and
HAPPO, whose agents are updated one after another (Kuba et al. 2022, arXiv 2109.11251).

    A        = GAE of the team's reward, the sum over agents: one for all, by V(s); IPPO: one for each, by V_i(o_i)
    rho_i    = pi_i(a_i | o_i) / pi_i,old(a_i | o_i)
    L_i      = -E[M_i min(rho_i A, clip(rho_i, 1 - eps, 1 + eps) A)] - entropy_coef * H[pi_i]
    M_i      = 1; HAPPO: the product of rho_j, by their new parameters, of the agents j updated before i
    L_V      = value_coef * 1/2 E[(V - target)^2]

HAPPO draws the order of the agents anew in each iteration, takes all gradient steps of one agent before the next one's,
and those of the critic last.

What differs from the papers: what differs in PPO (`rlx.algorithms.ppo`); no recurrence; rewards may be scaled
(`normalize_reward`) where MAPPO scales value targets. Gradients are clipped network by network, not actor and critic
together: with `max_grad_norm` = inf MAPPO of one agent is PPO. Where a game pays its agents apart they learn from the
sum all the same, IPPO's too: they are a team.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlx import actors, agents, normalize, on_policy
from rlx.actors import make_actor
from rlx.agents import make_networks, masked
from rlx.algorithm import Algorithm, Key, Mode, Plan
from rlx.errors import require, require_at_least
from rlx.minibatches import scan_minibatches
from rlx.networks import MLP, select
from rlx.on_policy import (
    Batch,
    Learnt,
    OnPolicyState,
    adapted,
    clipped_surrogate,
    normalized,
    ratio_metrics,
    squared_error,
)
from rlx.optimization import adam, descend
from rlx.types import Box, Discrete, Metrics, PyTree, Spec, Transition


@dataclasses.dataclass(frozen=True)
class Config:
    central_critic: bool = True  # one critic of the state; off: one an agent, of what it sees itself (IPPO)
    sequential: bool = False  # agents one after another, weighted by what those before changed (HAPPO)
    fixed_order: bool = False  # of sequential updates: agent 0 first, instead of an order drawn each iteration
    share_params: bool = False  # one actor for all agents, which reads who it is, and so of IPPO's critics
    learning_rate: float = 5e-4  # Adam's step size
    critic_lr_scale: float = 1.0  # the critic's step size over the actors'
    anneal_lr: bool = False  # linearly to 0 over the run
    adaptive_lr: bool = False  # raise or lower the rate by a factor 1.5 to hold the KL near target_kl
    target_kl: float = 0.01  # nats, for adaptive_lr
    gamma: float = 0.99  # discount per decision
    gae_lambda: float = 0.95  # trace decay of GAE
    clip_eps: float = 0.2  # ratio clipping
    clip_value: bool = False  # clip the critic's change to clip_eps too
    value_coef: float = 1.0  # weight of half the squared value error
    entropy_coef: float = 0.0  # weight of the entropy bonus
    max_grad_norm: float = 10.0  # norm of each network's gradient; inf for none
    num_epochs: int = 10  # passes over a trajectory
    num_minibatches: int = 1  # gradient steps a pass
    reward_scale: float = 1.0  # applied inside update only
    normalize_reward: bool = False  # by the running standard deviation of their discounted sums
    normalize_obs: bool = True  # running mean and standard deviation of observations
    freeze_statistics: bool = False  # keep those of observations that the policy to start from has
    normalize_advantage: bool = True  # to mean 0 and std 1 in each minibatch
    actor_hidden: tuple[int, ...] = (64, 64)  # hidden layers
    critic_hidden: tuple[int, ...] = (64, 64)  # hidden layers
    activation: str = "tanh"  # of the hidden layers
    distribution: str = "normal"  # of continuous actions: normal (clipped to the box) or tanh_normal
    state_dependent_std: bool = False  # the actor's output instead of one parameter an action
    init_std: float = 1.0  # standard deviation at the start, before tanh
    min_std: float = 1e-3  # floor of the standard deviation
    actor_obs_key: str = "agents"  # entry of a dict observation with a row for each agent
    critic_obs_key: str = "state"  # entry of a dict observation that the central critic reads


class Extras(NamedTuple):
    """What the losses need from acting time; leaves [T, B, N, ...]."""

    raw_action: jax.Array  # before tanh or clipping
    log_prob: jax.Array
    distribution: PyTree  # of the behaviour policy, for the KL


class Own(NamedTuple):
    """What actors learn from: leaves [T, B, N, ...], or of one agent [T, B, ...]."""

    rows: jax.Array
    extras: Extras
    advantages: jax.Array
    factor: jax.Array  # M


class Valued(NamedTuple):
    """What critics learn from: leaves [T, B, ...], of IPPO's [T, B, N, ...]."""

    inputs: jax.Array
    values: jax.Array
    targets: jax.Array


Judge = tuple[PyTree, optax.OptState]  # parameters and optimizer of the critic


class MAPPOPolicy(NamedTuple):
    params: PyTree  # {"actor"}
    statistics: PyTree


def check(config: Config, spec: Spec, plan: Plan) -> None:
    """Raises UserError for settings that cannot work, before anything compiles."""
    agents.check(spec, config.actor_obs_key, "mappo")
    if config.central_critic:
        shape = select(spec.obs, config.critic_obs_key).shape
        require(len(shape) == 1, "env", f"a state of shape {shape}", "mappo's critic reads vectors")
    on_policy.check_settings(config, plan)
    actors.check(config)
    require_at_least(config, 0, "entropy_coef")
    allowed = "agents that are updated one after another have parameters of their own"
    require(not (config.sequential and config.share_params), "algo.share_params", config.share_params, allowed)


def make(config: Config, spec: Spec, plan: Plan) -> Algorithm:
    """MAPPO for `spec`; see `rlx.algorithm.Algorithm` for the functions it returns."""
    team = agents.made_of(spec, config.actor_obs_key)
    N, mask = team.num_agents, jnp.asarray(team.action_mask)
    one_action = Discrete(team.action_size) if team.discrete else Box((team.action_size,))
    one_actor = make_actor(config, dataclasses.replace(spec, action=one_action))
    actor = make_networks(one_actor.init, one_actor.distribution, team, config.share_params)
    critic = MLP(config.critic_hidden, 1, config.activation)
    own_critics = make_networks(critic.init, critic.apply, team, config.share_params)
    optimizer = adam(config.max_grad_norm, eps=1e-5)  # of one network
    actor_optimizer = of_each(optimizer, actor.each)
    critic_optimizer = optimizer if config.central_critic else of_each(optimizer, own_critics.each)
    over_agents = jnp.mean if config.share_params else jnp.sum  # separate networks hear of their own loss alone
    value_clip = config.clip_eps if config.clip_value else None

    def rows(obs: PyTree) -> jax.Array:
        return team.rows(select(obs, config.actor_obs_key))

    def distribution(params: PyTree, rows: jax.Array) -> Any:
        return masked(actor.apply(params, rows), mask)

    def read(obs: PyTree) -> jax.Array:
        """What the critic reads: [..., D], of IPPO's critics [..., N, d]."""
        return select(obs, config.critic_obs_key) if config.central_critic else rows(obs)

    def value(params: PyTree, inputs: jax.Array) -> jax.Array:
        """[...] of the team, or [..., N]."""
        return (critic.apply if config.central_critic else own_critics.apply)(params, inputs).squeeze(-1)

    def init_optimizers(params: dict[str, PyTree]) -> dict[str, optax.OptState]:
        return {"actor": actor_optimizer.init(params["actor"]), "critic": critic_optimizer.init(params["critic"])}

    def init(key: Key, policy: MAPPOPolicy | None = None) -> OnPolicyState:
        actor_key, critic_key = jax.random.split(key)
        if config.central_critic:
            of_critic = critic.init(critic_key, jnp.zeros(select(spec.obs, config.critic_obs_key).shape, jnp.float32))
        else:
            of_critic = own_critics.init(critic_key)
        params = {"actor": actor.init(actor_key), "critic": of_critic}
        return on_policy.init(config, spec, plan, params, init_optimizers, policy)

    def policy(state: OnPolicyState, mode: Mode) -> MAPPOPolicy:
        return MAPPOPolicy({"actor": state.params["actor"]}, state.statistics)

    def act(policy: MAPPOPolicy, memory: PyTree, obs: PyTree, key: Key, mode: Mode):
        pi = distribution(policy.params["actor"], rows(normalize.observe(config, policy.statistics, obs)))
        raw_action = pi.mode() if mode == "greedy" else pi.sample(key)
        extras = Extras(raw_action, pi.log_prob(raw_action), pi)
        return memory, team.merge(pi.to_action(raw_action)), extras

    def values(params: PyTree, trajectory: Transition) -> tuple[jax.Array, jax.Array]:
        return value(params["critic"], read(trajectory.obs)), value(params["critic"], read(trajectory.next_obs))

    def actor_loss(params: PyTree, apply: Callable[..., Any], own: Own, key: Key) -> tuple[jax.Array, Metrics]:
        """The sum of L_i over the agents that `own` is of."""
        pi = apply(params, own.rows)
        ratio = jnp.exp(pi.log_prob(own.extras.raw_action) - own.extras.log_prob)
        surrogate = own.factor * clipped_surrogate(ratio, normalized(config, own.advantages), config.clip_eps)
        entropy = pi.entropy(key)
        metrics = {
            "policy_loss": -surrogate.mean(),
            "entropy": entropy.mean(),
            "kl": own.extras.distribution.kl(pi).mean(),
            **ratio_metrics(ratio, config.clip_eps),
        }
        return -over_agents((surrogate + config.entropy_coef * entropy).mean(axis=(0, 1))), metrics

    def critic_loss(params: PyTree, valued: Valued) -> tuple[jax.Array, Metrics]:
        """L_V; of IPPO's critics the sum."""
        error = squared_error(value(params, valued.inputs), valued, value_clip)
        return config.value_coef * 0.5 * over_agents(error.mean(axis=(0, 1))), {"value_loss": 0.5 * error.mean()}

    def improve_actor(optimizer: optax.GradientTransformation, apply: Callable[..., Any], anneal: jax.Array):
        """A gradient step (carry, Own, key) -> (carry, metrics) on parameters, optimizer and learning rate."""

        def step(carry: Learnt, own: Own, key: Key) -> tuple[Learnt, Metrics]:
            grads, metrics = jax.grad(actor_loss, has_aux=True)(carry.params, apply, own, key)
            learning_rate = adapted(config, carry.learning_rate, metrics["kl"])
            params, state = descend(optimizer, anneal * learning_rate, carry.params, carry.optimizer, grads)
            return Learnt(params, state, learning_rate), {**metrics, "actor_grad_norm": optax.tree.norm(grads)}

        return step

    def improve_critic(carry: Judge, valued: Valued, rate: jax.Array) -> tuple[Judge, Metrics]:
        grads, metrics = jax.grad(critic_loss, has_aux=True)(carry[0], valued)
        after = descend(critic_optimizer, config.critic_lr_scale * rate, *carry, grads)
        return after, {**metrics, "critic_grad_norm": optax.tree.norm(grads)}

    sizes = (config.num_epochs, config.num_minibatches, False, plan.num_groups)

    def learn_together(players: Learnt, critic: Judge, own: Own, valued: Valued, anneal: jax.Array, key: Key):
        """A step of all actors and one of the critic in turn."""
        improve_all = improve_actor(actor_optimizer, distribution, anneal)

        def step(carry: tuple[Learnt, Judge], minibatch: tuple[Own, Valued], key: Key):
            players, of_actors = improve_all(carry[0], minibatch[0], key)
            critic, of_critic = improve_critic(carry[1], minibatch[1], anneal * players.learning_rate)
            return (players, critic), {**of_actors, **of_critic}

        (players, critic), metrics = scan_minibatches(step, (players, critic), (own, valued), key, *sizes)
        return players, critic, metrics

    def learn_in_turn(players: Learnt, critic: Judge, own: Own, valued: Valued, anneal: jax.Array, key: Key):
        """All steps of one actor, then of the next; those of the critic last."""
        order_key, actor_key, critic_key = jax.random.split(key, 3)
        order = jnp.arange(N) if config.fixed_order else jax.random.permutation(order_key, N)

        def turn(carry: tuple[Learnt, jax.Array], inputs: tuple[jax.Array, Key]):
            players, factor = carry
            agent, key = inputs
            mine = jax.tree.map(lambda x: x[:, :, agent], own)._replace(factor=factor)

            def apply(params: PyTree, row: jax.Array) -> Any:
                return masked(actor.apply_one(params, agent, row), mask[agent])

            params, state = actor.take(players[:2], agent)
            one = Learnt(params, state, players.learning_rate)
            one, metrics = scan_minibatches(improve_actor(optimizer, apply, anneal), one, mine, key, *sizes)
            log_ratio = apply(one.params, mine.rows).log_prob(mine.extras.raw_action) - mine.extras.log_prob
            params, state = actor.put(players[:2], agent, one[:2])
            players = Learnt(params, state, one.learning_rate)
            return (players, factor * jnp.exp(log_ratio)), metrics

        start = (players, jnp.ones((plan.unroll_length, plan.num_envs), jnp.float32))
        (players, _), of_actors = jax.lax.scan(turn, start, (order, jax.random.split(actor_key, N)))

        def step(carry: Judge, valued: Valued, key: Key):
            return improve_critic(carry, valued, anneal * players.learning_rate)

        critic, of_critic = scan_minibatches(step, critic, valued, critic_key, *sizes)
        return players, critic, {**of_actors, **of_critic}

    def learn(learnt: Learnt, batch: Batch, anneal: jax.Array, key: Key) -> tuple[Learnt, Metrics]:
        obs, extras, advantages = batch.transition.obs, batch.transition.extras, batch.advantages
        if config.central_critic:
            advantages = jnp.broadcast_to(advantages[..., None], extras.log_prob.shape)
        own = Own(rows(obs), extras, advantages, jnp.ones_like(advantages))
        valued = Valued(read(obs), batch.values, batch.targets)
        params, states = learnt.params, learnt.optimizer
        players, critic = (
            Learnt(params["actor"], states["actor"], learnt.learning_rate),
            (params["critic"], states["critic"]),
        )
        learn_all = learn_in_turn if config.sequential else learn_together
        players, critic, metrics = learn_all(players, critic, own, valued, anneal, key)
        first = metrics.pop("ratio_deviation")[..., 0, 0].max()
        params, states = ({"actor": x, "critic": y} for x, y in zip(players[:2], critic, strict=True))
        metrics = {**jax.tree.map(jnp.mean, metrics), "first_ratio_deviation": first}
        return Learnt(params, states, players.learning_rate), metrics

    of_team = on_policy.around(config, plan, on_policy.make_estimate(config, values), learn)

    def update(state: OnPolicyState, trajectory: Transition, iteration: jax.Array, key: Key):
        reward = agents.team(trajectory.reward, trajectory.terminated.shape)
        return of_team(state, trajectory._replace(reward=reward), iteration, key)

    return Algorithm(init, policy, lambda key: (), act, update)


def of_each(optimizer: optax.GradientTransformation, each: Callable[..., Any]) -> optax.GradientTransformation:
    """`optimizer` for every network by itself; `each` as in `rlx.agents.Networks`."""
    return optax.GradientTransformation(each(optimizer.init), each(optimizer.update))
