"""SAC: soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905).

    y        = r + gamma (1 - terminated) [min_i Q'_i(s', a') - alpha log pi(a' | s')],  a' ~ pi(. | s')   (eq. 3)
    J_Q      = E[1/2 (Q_i(s, a) - y)^2]                                                                    (eq. 5)
    J_pi     = E[alpha log pi(a | s) - min_i Q_i(s, a)],  a = tanh(mean(s) + std(s) noise)                 (eq. 9)
    J_alpha  = E[-alpha (log pi(a | s) + target_entropy)]                                                  (eq. 18)
    Q'       = tau Q + (1 - tau) Q'

What differs from the paper: any number of critics, of whose targets a random subset may serve (REDQ, Chen et al. 2021,
arXiv 2101.05982); n-step targets, whose inner rewards have no entropy bonus; time limits bootstrap from the true
successor; observations are normalised with running statistics when they are drawn, replay holds them raw; the standard
deviation is softplus(x) + min_std. The settings of massively parallel recipes (large batches, many environments, few
updates for each step, bfloat16) are settings here too.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlx import off_policy
from rlx.actors import squashed_normal
from rlx.algorithm import Algorithm, Key, Mode, Plan
from rlx.distributions import TanhNormal
from rlx.errors import require, require_above, require_at_least
from rlx.networks import DTYPES, MLP, select
from rlx.off_policy import ActingPolicy, OffPolicyState, make_critics, make_off_policy
from rlx.optimization import adam, descend
from rlx.replay import Batch, Draw
from rlx.types import Box, Metrics, PyTree, Spec, Transition


@dataclasses.dataclass(frozen=True)
class Config:
    actor_learning_rate: float = 3e-4  # Adam's step size
    critic_learning_rate: float = 3e-4  # Adam's step size
    alpha_learning_rate: float = 3e-4  # Adam's step size of log alpha
    gamma: float = 0.99  # discount per decision
    tau: float = 0.005  # share of the critic that its target takes over at each gradient step
    n_step: int = 1  # rewards in a target
    batch_size: int = 256  # transitions a gradient step
    utd_ratio: tuple[int, ...] = (1, 1)  # gradient steps, for so many decisions; rounded to whole steps an iteration
    replay_size: int = 1_000_000  # transitions kept, over all environments; rounded up to whole iterations
    replay_dtype: str = "float32"  # of stored observations: float32, bfloat16 or uint8 (whole numbers 0 to 255)
    prefill_steps: int = 5_000  # decisions, over all environments, before the first gradient step
    random_prefill: bool = True  # take them uniformly at random, not by the policy
    data_batch: int = 0  # transitions of a batch that come out of data sets (`--data`); all of them: no environment
    num_critics: int = 2  # E; targets and actor take the minimum over them
    target_subset: int = 0  # critics, drawn anew at each gradient step, that a target is the minimum of; 0: all
    mean_critic: bool = False  # the actor climbs the critics' mean instead, as in REDQ
    init_alpha: float = 1.0  # temperature at the start
    tune_alpha: bool = True  # towards the target entropy
    target_entropy_scale: float = 1.0  # target entropy: minus so many nats for each dimension of the action
    max_grad_norm: float = 1e9  # global norm, of each network; so large a one clips nothing
    reward_scale: float = 1.0  # applied inside update only
    normalize_obs: bool = True  # running mean and standard deviation of observations
    actor_hidden: tuple[int, ...] = (256, 256)  # hidden layers
    critic_hidden: tuple[int, ...] = (256, 256)  # hidden layers
    activation: str = "relu"  # of the hidden layers
    layer_norm: bool = False  # in the critics, after each hidden layer
    min_std: float = 1e-3  # floor of the standard deviation, before tanh
    dtype: str = "float32"  # of the networks' arithmetic: float32 or bfloat16; parameters stay float32
    actor_obs_key: str = "state"  # entry of a dict observation that the actor reads
    critic_obs_key: str = "state"  # entry of a dict observation that the critics read


class Learned(NamedTuple):
    """What a gradient step changes."""

    params: dict[str, PyTree]  # {"actor", "critic", "log_alpha"}
    target_critic: PyTree
    optimizers: dict[str, optax.OptState]  # as params


def check(config: Config, spec: Spec, plan: Plan) -> None:
    """Raises UserError for settings that cannot work, before anything compiles."""
    off_policy.check(config, spec, plan, "sac")
    require_above(config, 0, "alpha_learning_rate", "init_alpha")
    require_at_least(config, 0, "min_std")
    subset, allowed = config.target_subset, f"from 0 to num_critics = {config.num_critics}"
    require(0 <= subset <= config.num_critics, "algo.target_subset", subset, allowed)


uses_data = off_policy.uses_data


def make(config: Config, spec: Spec, plan: Plan, data: Draw | None = None) -> Algorithm:
    """SAC for `spec`; see `rlx.algorithm.Algorithm` for the functions it returns.

    `data`: what `data_batch` transitions of every batch come out of.
    """
    assert isinstance(spec.action, Box)
    action_size = spec.action.shape[0]
    target_entropy = -config.target_entropy_scale * action_size
    actor = MLP(config.actor_hidden, 2 * action_size, config.activation, dtype=DTYPES[config.dtype])
    critics = make_critics(config, spec)
    experience = make_off_policy(config, spec, plan, data)
    optimizers = {name: adam(config.max_grad_norm) for name in ("actor", "critic")}
    optimizers["log_alpha"] = optax.scale_by_adam()
    rates = {"actor": config.actor_learning_rate, "critic": config.critic_learning_rate}
    rates["log_alpha"] = config.alpha_learning_rate

    def distribution(params: PyTree, obs: PyTree) -> TanhNormal:
        return squashed_normal(actor.apply(params, select(obs, config.actor_obs_key)), config.min_std)

    def init(key: Key, policy: ActingPolicy | None = None) -> OffPolicyState:
        actor_key, critic_key = jax.random.split(key)
        obs = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), spec.obs)
        critic = critics.init(critic_key)
        params = {
            "actor": actor.init(actor_key, select(obs, config.actor_obs_key)) if policy is None else policy.actor,
            "critic": critic,
            "log_alpha": jnp.log(jnp.asarray(config.init_alpha, jnp.float32)),
        }
        states = {name: optimizer.init(params[name]) for name, optimizer in optimizers.items()}
        learned = Learned(params, jax.tree.map(jnp.copy, critic), states)
        return experience.init(learned, policy)

    def act(policy: ActingPolicy, memory: PyTree, obs: PyTree, key: Key, mode: Mode):
        pi = distribution(policy.actor, experience.observe(policy.explorer.statistics, obs))
        if mode == "greedy":
            return memory, pi.to_action(pi.mode()), ()
        sample_key, random_key = jax.random.split(key)
        action = pi.to_action(pi.sample(sample_key))
        return memory, experience.explore(policy, action, random_key, mode), ()

    def targets(learned: Learned, batch: Batch, action_key: Key, subset_key: Key) -> jax.Array:
        """y of eq. 3 and 5, [batch]."""
        pi = distribution(learned.params["actor"], batch.next_obs)
        raw_action = pi.sample(action_key)
        next_values = critics.apply(learned.target_critic, batch.next_obs, pi.to_action(raw_action))
        if config.target_subset:
            next_values = jax.random.permutation(subset_key, next_values)[: config.target_subset]
        alpha = jnp.exp(learned.params["log_alpha"])
        return batch.reward + batch.discount * (next_values.min(axis=0) - alpha * pi.log_prob(raw_action))

    def actor_loss(params: PyTree, critic: PyTree, log_alpha: jax.Array, batch: Batch, key: Key):
        """J_pi, eq. 9; and E[-log pi], an estimate of the entropy."""
        pi = distribution(params, batch.obs)
        raw_action = pi.sample(key)
        log_prob = pi.log_prob(raw_action)
        values = critics.apply(critic, batch.obs, pi.to_action(raw_action))
        value = values.mean(axis=0) if config.mean_critic else values.min(axis=0)
        loss = (jnp.exp(log_alpha) * log_prob - value).mean()
        return loss, {"actor_loss": loss, "entropy": -log_prob.mean(), "std": pi.std.mean()}

    def alpha_loss(log_alpha: jax.Array, entropy: jax.Array) -> jax.Array:
        """J_alpha, eq. 18."""
        return jnp.exp(log_alpha) * (entropy - target_entropy)

    def step(learned: Learned, batch: Batch, count: jax.Array, key: Key) -> tuple[Learned, Metrics]:
        """One gradient step on everything, in the order of the paper's algorithm 1."""
        params, states, metrics = dict(learned.params), dict(learned.optimizers), {}

        def improve(name: str, grads: PyTree) -> None:
            params[name], states[name] = descend(optimizers[name], rates[name], params[name], states[name], grads)
            metrics[f"{name}_grad_norm"] = optax.tree.norm(grads)

        target_key, subset_key, actor_key = jax.random.split(key, 3)
        wanted = jax.lax.stop_gradient(targets(learned, batch, target_key, subset_key))
        grads, of_critic = jax.grad(critics.loss, has_aux=True)(params["critic"], batch, wanted)
        improve("critic", grads)
        grads, of_actor = jax.grad(actor_loss, has_aux=True)(
            params["actor"], params["critic"], params["log_alpha"], batch, actor_key
        )
        improve("actor", grads)
        if config.tune_alpha:
            improve("log_alpha", jax.grad(alpha_loss)(params["log_alpha"], of_actor["entropy"]))
        target_critic = optax.incremental_update(params["critic"], learned.target_critic, config.tau)
        metrics |= of_critic | of_actor | {"alpha": jnp.exp(params["log_alpha"])}
        return Learned(params, target_critic, states), metrics

    def update(state: OffPolicyState, trajectory: Transition, iteration: jax.Array, key: Key):
        return experience.update(step, state, trajectory, iteration, key)

    return Algorithm(init, experience.policy, lambda key: (), act, update)
