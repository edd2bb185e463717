"""TD3: twin delayed deep deterministic policy gradients (Fujimoto et al. 2018, arXiv 1802.09477).

    a'       = clip(pi'(s') + clip(noise, -noise_clip, noise_clip), -1, 1),  noise ~ N(0, target_noise^2)   (eq. 14)
    y        = r + gamma (1 - terminated) min_i Q'_i(s', a')                                                (eq. 10)
    J_Q      = E[1/2 (Q_i(s, a) - y)^2]
    J_pi     = -E[Q_1(s, pi(s))], on every `policy_delay`-th gradient step                                 (section 5.2)
    Q', pi'  = tau (Q, pi) + (1 - tau) (Q', pi'), on the same steps                                        (algorithm 1)

What differs from the paper: any number of critics; n-step targets; time limits bootstrap from the true successor;
observations are normalised with running statistics when they are drawn, replay holds them raw.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlx import off_policy
from rlx.algorithm import Algorithm, Key, Mode, Plan
from rlx.networks import DTYPES, MLP, select
from rlx.off_policy import ActingPolicy, OffPolicyState, make_critics, make_off_policy, noisy
from rlx.optimization import adam, descend
from rlx.replay import Batch, Draw
from rlx.types import Box, Metrics, PyTree, Spec, Transition


@dataclasses.dataclass(frozen=True)
class Config:
    actor_learning_rate: float = 3e-4  # Adam's step size
    critic_learning_rate: float = 3e-4  # Adam's step size
    gamma: float = 0.99  # discount per decision
    tau: float = 0.005  # share of the networks that their targets take over
    n_step: int = 1  # rewards in a target
    batch_size: int = 256  # transitions a gradient step
    utd_ratio: tuple[int, ...] = (1, 1)  # gradient steps, for so many decisions; rounded to whole steps an iteration
    replay_size: int = 1_000_000  # transitions kept, over all environments; rounded up to whole iterations
    replay_dtype: str = "float32"  # of stored observations: float32, bfloat16 or uint8 (whole numbers 0 to 255)
    prefill_steps: int = 5_000  # decisions, over all environments, before the first gradient step
    random_prefill: bool = True  # take them uniformly at random, not by the policy
    data_batch: int = 0  # transitions of a batch that come out of data sets (`--data`); all of them: no environment
    num_critics: int = 2  # E; targets take the minimum over them
    policy_delay: int = 2  # gradient steps of the critics for each one of the actor and of the targets
    exploration_noise: float = 0.1  # standard deviation of what is added to actions; the box is [-1, 1]
    target_noise: float = 0.2  # standard deviation of what is added to the target actor's actions
    noise_clip: float = 0.5  # largest noise there
    max_grad_norm: float = 1e9  # global norm, of each network; so large a one clips nothing
    reward_scale: float = 1.0  # applied inside update only
    normalize_obs: bool = True  # running mean and standard deviation of observations
    actor_hidden: tuple[int, ...] = (256, 256)  # hidden layers
    critic_hidden: tuple[int, ...] = (256, 256)  # hidden layers
    activation: str = "relu"  # of the hidden layers
    layer_norm: bool = False  # in the critics, after each hidden layer
    dtype: str = "float32"  # of the networks' arithmetic: float32 or bfloat16; parameters stay float32
    actor_obs_key: str = "state"  # entry of a dict observation that the actor reads
    critic_obs_key: str = "state"  # entry of a dict observation that the critics read


class Learned(NamedTuple):
    """What a gradient step changes."""

    params: dict[str, PyTree]  # {"actor", "critic"}
    targets: dict[str, PyTree]  # as params
    optimizers: dict[str, optax.OptState]  # as params


def check(config: Config, spec: Spec, plan: Plan) -> None:
    """Raises UserError for settings that cannot work, before anything compiles."""
    off_policy.check(config, spec, plan, "td3")
    off_policy.check_noise(config)


uses_data = off_policy.uses_data


def make(config: Config, spec: Spec, plan: Plan, data: Draw | None = None) -> Algorithm:
    """TD3 for `spec`; see `rlx.algorithm.Algorithm` for the functions it returns.

    `data`: what `data_batch` transitions of every batch come out of.
    """
    assert isinstance(spec.action, Box)
    action_size = spec.action.shape[0]
    actor = MLP(config.actor_hidden, action_size, config.activation, dtype=DTYPES[config.dtype])
    critics = make_critics(config, spec)
    experience = make_off_policy(config, spec, plan, data)
    optimizer = adam(config.max_grad_norm)

    def actions(params: PyTree, obs: PyTree) -> jax.Array:
        return jnp.tanh(actor.apply(params, select(obs, config.actor_obs_key)).astype(jnp.float32))

    def init(key: Key, policy: ActingPolicy | None = None) -> OffPolicyState:
        actor_key, critic_key = jax.random.split(key)
        obs = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), spec.obs)
        critic = critics.init(critic_key)
        params = {
            "actor": actor.init(actor_key, select(obs, config.actor_obs_key)) if policy is None else policy.actor,
            "critic": critic,
        }
        states = {name: optimizer.init(of_network) for name, of_network in params.items()}
        learned = Learned(params, jax.tree.map(jnp.copy, params), states)
        return experience.init(learned, policy)

    def act(policy: ActingPolicy, memory: PyTree, obs: PyTree, key: Key, mode: Mode):
        action = actions(policy.actor, experience.observe(policy.explorer.statistics, obs))
        if mode == "greedy":
            return memory, action, ()
        noise_key, random_key = jax.random.split(key)
        action = noisy(action, config.exploration_noise, noise_key)
        return memory, experience.explore(policy, action, random_key, mode), ()

    def targets(learned: Learned, batch: Batch, key: Key) -> jax.Array:
        """y of eq. 10 with a' of eq. 14, [batch]."""
        action = actions(learned.targets["actor"], batch.next_obs)
        action = noisy(action, config.target_noise, key, config.noise_clip)
        next_values = critics.apply(learned.targets["critic"], batch.next_obs, action)
        return batch.reward + batch.discount * next_values.min(axis=0)

    def actor_loss(params: PyTree, critic: PyTree, batch: Batch) -> jax.Array:
        """J_pi: minus the first critic's value."""
        first = jax.tree.map(lambda x: x[:1], critic)
        return -critics.apply(first, batch.obs, actions(params, batch.obs)).mean()

    def improve_actor(learned: Learned, batch: Batch) -> tuple[Learned, Metrics]:
        """A gradient step of the actor, and the targets' part of what was learnt."""
        params, states = dict(learned.params), dict(learned.optimizers)
        loss, grads = jax.value_and_grad(actor_loss)(params["actor"], params["critic"], batch)
        rate = config.actor_learning_rate
        params["actor"], states["actor"] = descend(optimizer, rate, params["actor"], states["actor"], grads)
        following = optax.incremental_update(params, learned.targets, config.tau)
        return Learned(params, following, states), {"actor_loss": loss, "actor_grad_norm": optax.tree.norm(grads)}

    def step(learned: Learned, batch: Batch, turn: jax.Array, key: Key) -> tuple[Learned, Metrics]:
        """One gradient step; `turn` 0 is the actor's too."""
        params, states = dict(learned.params), dict(learned.optimizers)
        wanted = jax.lax.stop_gradient(targets(learned, batch, key))
        grads, metrics = jax.grad(critics.loss, has_aux=True)(params["critic"], batch, wanted)
        rate = config.critic_learning_rate
        params["critic"], states["critic"] = descend(optimizer, rate, params["critic"], states["critic"], grads)
        learned = Learned(params, learned.targets, states)
        learned, of_actor = off_policy.delayed(config.policy_delay, turn, improve_actor, learned, batch)
        return learned, metrics | of_actor | {"critic_grad_norm": optax.tree.norm(grads)}

    def update(state: OffPolicyState, trajectory: Transition, iteration: jax.Array, key: Key):
        def one(learned: Learned, batch: Batch, count: jax.Array, key: Key) -> tuple[Learned, Metrics]:
            return step(learned, batch, off_policy.turn(config.policy_delay, experience, iteration, count), key)

        return experience.update(one, state, trajectory, iteration, key)

    return Algorithm(init, experience.policy, lambda key: (), act, update)
