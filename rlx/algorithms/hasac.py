"""HASAC: heterogeneous-agent soft actor-critic (Liu et al. 2024, arXiv 2306.10715), and MASAC as a setting.

    y        = r^(n) + gamma^k (1 - terminated) [min_j Q'_j(s', a') - alpha_c sum_i log pi_i(a'_i | s'_i)],  a' ~ pi
    J_Q      = E[1/2 (Q_j(s, a) - y)^2],  a = (a_1, ..., a_N): a critic of the state and all actions
    J_pi^m   = E[alpha_m log pi_m(a_m | s_m) - min_j Q_j(s, a)],  agent after agent in an order drawn anew:
               a_m ~ pi_m by reparameterisation, the agents before m by their policies as just improved, those after
               it by the old ones
    J_alpha  = E[-alpha_m (log pi_m(a_m | s_m) + target_entropy_m)];  of alpha_c with the sums over agents
    Q'       = tau Q + (1 - tau) Q'

`sequential=False` is MASAC: all agents answer to the old policies of the others (with `share_params` the one network
moves between their steps all the same). One agent, with n = 1, is SAC.
Discrete actions are one-hot in the critic, differentiable by the straight-through Gumbel-softmax (arXiv 1611.01144).

What differs from the paper's code: time limits bootstrap from the true successor, with the exact k where a window ends
early; the joint entropy stands in the target; the target entropy of discrete actions is a share of log n; observations
are normalised with running statistics. `share_params` trains one network by each agent in turn. `anneal_alpha` lowers
the temperatures over the run: from soft responses that are nearly uniform, agents end at better equilibria of games.
A network's slope at a one-hot action says little about the other actions; `value_each` asks for their values instead.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlx import off_policy
from rlx.actors import squashed_normal
from rlx.agents import made_of, make_networks, masked, put, take
from rlx.algorithm import Algorithm, Key, Mode, Plan
from rlx.distributions import OneHotCategorical, TanhNormal
from rlx.errors import require, require_above, require_at_least
from rlx.networks import DTYPES, MLP, select
from rlx.off_policy import ActingPolicy, OffPolicyState, make_critics, make_off_policy
from rlx.optimization import adam, descend
from rlx.replay import Batch, Draw
from rlx.types import Discrete, Metrics, PyTree, Spec, Transition


@dataclasses.dataclass(frozen=True)
class Config:
    actor_learning_rate: float = 5e-4  # Adam's step size
    critic_learning_rate: float = 5e-4  # Adam's step size
    alpha_learning_rate: float = 5e-4  # Adam's step size of log alphas
    gamma: float = 0.99  # discount per decision
    tau: float = 0.005  # share of the critic that its target takes over at each gradient step
    n_step: int = 1  # rewards in a target
    batch_size: int = 256  # transitions a gradient step
    utd_ratio: tuple[int, ...] = (1, 20)  # gradient steps, for so many decisions; rounded to whole steps an iteration
    replay_size: int = 1_000_000  # transitions kept, over all environments; rounded up to whole iterations
    replay_dtype: str = "float32"  # of stored observations: float32, bfloat16 or uint8 (whole numbers 0 to 255)
    prefill_steps: int = 10_000  # decisions, over all environments, before the first gradient step
    random_prefill: bool = True  # take them uniformly at random, not by the policy
    data_batch: int = 0  # transitions of a batch that come out of data sets (`--data`); all of them: no environment
    sequential: bool = True  # agents answer to those improved before them; False: MASAC
    fixed_order: bool = False  # agent 0 improves first, always; not a random order
    share_params: bool = False  # one actor for all agents, which reads who it is
    num_critics: int = 2  # E; targets and actors take the minimum over them
    init_alpha: float = 1.0  # temperature at the start, of each agent and of the critic
    tune_alpha: bool = True  # towards the target entropies
    anneal_alpha: bool = False  # geometrically over the run, prefill included, to final_alpha
    final_alpha: float = 0.01  # temperature at the end, for anneal_alpha
    target_entropy_scale: float = 1.0  # target entropy: minus so many nats for each dimension of an agent's action
    discrete_entropy_scale: float = 0.3  # and of n discrete actions: this share of log n
    value_each: bool = False  # discrete actors learn of the values of all actions, not of the critic's slope at one
    max_grad_norm: float = 1e9  # global norm, of each network; so large a one clips nothing
    reward_scale: float = 1.0  # applied inside update only
    normalize_obs: bool = True  # running mean and standard deviation of observations
    actor_hidden: tuple[int, ...] = (256, 256)  # hidden layers
    critic_hidden: tuple[int, ...] = (256, 256)  # hidden layers
    activation: str = "relu"  # of the hidden layers
    layer_norm: bool = False  # in the critics, after each hidden layer
    min_std: float = 1e-3  # floor of the standard deviation, before tanh
    dtype: str = "float32"  # of the networks' arithmetic: float32 or bfloat16; parameters stay float32
    actor_obs_key: str = "agents"  # entry of a dict observation that the actors read
    critic_obs_key: str = "state"  # entry of a dict observation that the critics read


class Learned(NamedTuple):
    """What a gradient step changes."""

    params: dict[str, PyTree]  # {"actor" [N, ...], "critic", "log_alpha" [N], "log_critic_alpha" ()}
    target_critic: PyTree
    optimizers: dict[str, optax.OptState]  # as params


def check(config: Config, spec: Spec, plan: Plan) -> None:
    """Raises UserError for settings that cannot work, before anything compiles."""
    off_policy.check(config, spec, plan, "hasac", several=True)
    require_above(config, 0, "alpha_learning_rate", "init_alpha", "final_alpha")
    require_at_least(config, 0, "min_std")
    one = not (config.anneal_alpha and config.tune_alpha)
    require(one, "algo.anneal_alpha", True, "only without tune_alpha, which moves the temperatures too")
    share = config.discrete_entropy_scale
    require(0 <= share <= 1, "algo.discrete_entropy_scale", share, "from 0 to 1: log n is the largest entropy there is")
    fits = isinstance(spec.action, Discrete) or not config.value_each
    require(fits, "algo.value_each", config.value_each, "with discrete actions")


uses_data = off_policy.uses_data


def make(config: Config, spec: Spec, plan: Plan, data: Draw | None = None) -> Algorithm:
    """HASAC for `spec`; see `rlx.algorithm.Algorithm` for the functions it returns.

    `data`: what `data_batch` transitions of every batch come out of.
    """
    agents = made_of(spec, config.actor_obs_key)
    N, mask = agents.num_agents, jnp.asarray(agents.action_mask)
    sizes = agents.action_mask.sum(axis=1)
    discrete, continuous = config.discrete_entropy_scale * np.log(sizes), -config.target_entropy_scale * sizes
    target_entropy = jnp.asarray(discrete if agents.discrete else continuous, jnp.float32)
    outputs = agents.action_size if agents.discrete else 2 * agents.action_size
    network = MLP(config.actor_hidden, outputs, config.activation, dtype=DTYPES[config.dtype])
    actors = make_networks(network.init, network.apply, agents, config.share_params)
    critics = make_critics(config, spec)
    experience = make_off_policy(config, spec, plan, data)
    optimizers = {"actor": adam(config.max_grad_norm), "critic": adam(config.max_grad_norm)}
    optimizers |= {"log_alpha": optax.scale_by_adam(), "log_critic_alpha": optax.scale_by_adam()}
    rates = {"actor": config.actor_learning_rate, "critic": config.critic_learning_rate}
    rates |= {"log_alpha": config.alpha_learning_rate, "log_critic_alpha": config.alpha_learning_rate}

    def distribution(out: jax.Array, mask: jax.Array) -> OneHotCategorical | TanhNormal:
        """Of the networks' output: [..., N, a] with `mask` [N, a], or [..., a] with [a] of one agent."""
        pi = OneHotCategorical(out.astype(jnp.float32)) if agents.discrete else squashed_normal(out, config.min_std)
        return masked(pi, mask)

    def policies(params: PyTree, obs: PyTree) -> OneHotCategorical | TanhNormal:
        """Of all agents, [..., N, a]."""
        return distribution(actors.apply(params, agents.rows(select(obs, config.actor_obs_key))), mask)

    def init(key: Key, policy: ActingPolicy | None = None) -> OffPolicyState:
        actor_key, critic_key = jax.random.split(key)
        critic = critics.init(critic_key)
        params = {
            "actor": actors.init(actor_key) if policy is None else policy.actor,
            "critic": critic,
            **log_alphas(jnp.log(jnp.asarray(config.init_alpha, jnp.float32))),
        }
        states = {name: optimizers[name].init(params[name]) for name in ("critic", "log_critic_alpha")}
        states["actor"] = actors.each(optimizers["actor"].init)(params["actor"])
        states["log_alpha"] = jax.vmap(optimizers["log_alpha"].init)(params["log_alpha"])
        learned = Learned(params, jax.tree.map(jnp.copy, critic), states)
        return experience.init(learned, policy)

    def log_alphas(value: jax.Array) -> dict[str, jax.Array]:
        return {"log_alpha": jnp.broadcast_to(value, N), "log_critic_alpha": value}

    def act(policy: ActingPolicy, memory: PyTree, obs: PyTree, key: Key, mode: Mode):
        pi = policies(policy.actor, experience.observe(policy.explorer.statistics, obs))
        if mode == "greedy":
            return memory, agents.decode(pi.to_action(pi.mode())), ()
        sample_key, random_key = jax.random.split(key)
        action = agents.decode(pi.to_action(pi.sample(sample_key)))
        return memory, experience.explore(policy, action, random_key, mode), ()

    def targets(learned: Learned, batch: Batch, key: Key) -> jax.Array:
        """y, [batch]."""
        pi = policies(learned.params["actor"], batch.next_obs)
        raw_action = pi.sample(key)
        next_action = pi.to_action(raw_action).reshape(len(batch.reward), -1)
        next_value = critics.apply(learned.target_critic, batch.next_obs, next_action).min(axis=0)
        alpha = jnp.exp(learned.params["log_critic_alpha"])
        return batch.reward + batch.discount * (next_value - alpha * pi.log_prob(raw_action).sum(axis=-1))

    def actor_loss(params: PyTree, agent: jax.Array, actions: jax.Array, learned: Learned, batch: Batch, key: Key):
        """J_pi of one agent, whose action takes its place among the others' `actions` [batch, N, a]."""
        row = agents.rows(select(batch.obs, config.actor_obs_key))[:, agent]
        pi = distribution(actors.apply_one(params, agent, row), mask[agent])
        raw_action = pi.sample(key)
        log_prob = pi.log_prob(raw_action)
        action = pi.to_action(raw_action)

        def value_of(action: jax.Array) -> jax.Array:
            joint = actions.at[:, agent].set(action).reshape(len(batch.reward), -1)
            return critics.apply(learned.params["critic"], batch.obs, joint).min(axis=0)

        if agents.discrete and config.value_each:
            value = (jax.vmap(value_of, out_axes=1)(jnp.eye(agents.action_size)) * action).sum(axis=-1)
        else:
            value = value_of(action)
        loss = (jnp.exp(learned.params["log_alpha"][agent]) * log_prob - value).mean()
        metrics = {"actor_loss": loss, "entropy": -log_prob.mean()}
        return loss, metrics | ({"std": pi.std.mean(where=pi.mask)} if isinstance(pi, TanhNormal) else {})

    def alpha_loss(log_alpha: jax.Array, entropy: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.exp(log_alpha) * (entropy - target)

    def improve_agents(learned: Learned, batch: Batch, key: Key) -> tuple[Learned, Metrics]:
        """A gradient step of each agent and of its temperature; metrics [N] in the order of the steps."""
        order_key, old_key, steps_key = jax.random.split(key, 3)
        pi = policies(learned.params["actor"], batch.obs)
        old = jax.lax.stop_gradient(pi.to_action(pi.sample(old_key)))
        order = jnp.arange(N) if config.fixed_order else jax.random.permutation(order_key, N)

        def one(carry: tuple[Learned, jax.Array], inputs: tuple[jax.Array, Key]):
            (learned, actions), (agent, key) = carry, inputs
            params, states = dict(learned.params), dict(learned.optimizers)
            sample_key, again_key = jax.random.split(key)
            actor, state = actors.take(params["actor"], agent), actors.take(states["actor"], agent)
            grads, metrics = jax.grad(actor_loss, has_aux=True)(actor, agent, actions, learned, batch, sample_key)
            actor, state = descend(optimizers["actor"], rates["actor"], actor, state, grads)
            params["actor"] = actors.put(params["actor"], agent, actor)
            states["actor"] = actors.put(states["actor"], agent, state)
            metrics["actor_grad_norm"] = optax.tree.norm(grads)
            if config.tune_alpha:
                log_alpha, state = take((params["log_alpha"], states["log_alpha"]), agent)
                grad = jax.grad(alpha_loss)(log_alpha, metrics["entropy"], target_entropy[agent])
                after = descend(optimizers["log_alpha"], rates["log_alpha"], log_alpha, state, grad)
                kept = put((params["log_alpha"], states["log_alpha"]), agent, after)
                params["log_alpha"], states["log_alpha"] = kept
                metrics["log_alpha_grad_norm"] = optax.tree.norm(grad)
            if config.sequential and N > 1:
                row = agents.rows(select(batch.obs, config.actor_obs_key))[:, agent]
                pi = distribution(actors.apply_one(actor, agent, row), mask[agent])
                actions = actions.at[:, agent].set(pi.to_action(pi.sample(again_key)))
            return (Learned(params, learned.target_critic, states), actions), metrics

        (learned, _), metrics = jax.lax.scan(one, (learned, old), (order, jax.random.split(steps_key, N)))
        return learned, metrics

    def step(learned: Learned, batch: Batch, count: jax.Array, key: Key) -> tuple[Learned, Metrics]:
        """One gradient step on everything: the critic, the agents one after the other, the critic's temperature."""
        target_key, actor_key = jax.random.split(key)
        batch = batch._replace(action=agents.encode(batch.action).reshape(len(batch.reward), -1))
        wanted = jax.lax.stop_gradient(targets(learned, batch, target_key))
        params, states = dict(learned.params), dict(learned.optimizers)

        def improve(name: str, grads: PyTree) -> None:
            params[name], states[name] = descend(optimizers[name], rates[name], params[name], states[name], grads)

        grads, of_critic = jax.grad(critics.loss, has_aux=True)(params["critic"], batch, wanted)
        improve("critic", grads)
        learned, of_agents = improve_agents(Learned(params, learned.target_critic, states), batch, actor_key)
        params, states = dict(learned.params), dict(learned.optimizers)
        if config.tune_alpha:
            entropy = of_agents["entropy"].sum()
            improve("log_critic_alpha", jax.grad(alpha_loss)(params["log_critic_alpha"], entropy, target_entropy.sum()))
        target_critic = optax.incremental_update(params["critic"], learned.target_critic, config.tau)
        metrics = of_critic | {name: value.mean() for name, value in of_agents.items()}
        metrics |= {"alpha": jnp.exp(params["log_alpha"]).mean(), "critic_alpha": jnp.exp(params["log_critic_alpha"])}
        metrics["critic_grad_norm"] = optax.tree.norm(grads)
        return Learned(params, target_critic, states), metrics

    def update(state: OffPolicyState, trajectory: Transition, iteration: jax.Array, key: Key):
        if config.anneal_alpha:
            share = iteration.astype(jnp.float32) / max(1, plan.num_iterations - 1)
            ends = jnp.log(jnp.asarray([config.init_alpha, config.final_alpha], jnp.float32))
            params = state.params | log_alphas(ends[0] + share * (ends[1] - ends[0]))
            state = state._replace(learned=state.learned._replace(params=params))
        return experience.update(step, state, trajectory, iteration, key)

    return Algorithm(init, experience.policy, lambda key: (), act, update)
