"""MADDPG: multi-agent deep deterministic policy gradients (Lowe et al. 2017, arXiv 1706.02275), and MATD3 as settings.

    a'       = (pi'_1(o'_1), ..., pi'_N(o'_N)), each with clip(noise, -noise_clip, noise_clip) added
    y_i      = r_i + gamma (1 - terminated) min_j Q'_ij(s', a')                                            (eq. 6)
    J_Q_i    = E[1/2 (Q_ij(s, a) - y_i)^2]: of each agent a critic of the state and all actions
    J_pi_i   = -E[Q_i1(s, a_1, ..., pi_i(o_i), ..., a_N)] + output_penalty * E[x^2], the other actions those replayed,
               x what the actor gives before tanh; on every `policy_delay`-th gradient step                (eq. 5)
    Q', pi'  = tau (Q, pi) + (1 - tau) (Q', pi'), on the same steps

r_i is the agent's own reward where the game pays agents apart, else the team's. The penalty, which keeps actions away
from the borders, stands in the authors' code. MATD3 (Ackermann et al. 2019, arXiv 1910.01465) is num_critics=2,
policy_delay=2, target_noise=0.2; of one agent it is TD3. Discrete actions are drawn, when acting and in all of the
above, by the straight-through Gumbel-softmax (arXiv 1611.01144), and have no other noise.

What differs from the papers: n-step targets; time limits bootstrap from the true successor; observations are normalised
with running statistics; one network may serve all agents (`share_params`).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlx import off_policy
from rlx.agents import made_of, make_networks, masked
from rlx.algorithm import Algorithm, Key, Mode, Plan
from rlx.distributions import OneHotCategorical, real
from rlx.errors import require_at_least
from rlx.networks import DTYPES, MLP, select
from rlx.off_policy import ActingPolicy, OffPolicyState, make_critics, make_off_policy, noisy
from rlx.optimization import adam, descend
from rlx.replay import Batch, Draw
from rlx.types import Metrics, PyTree, Spec, Transition


@dataclasses.dataclass(frozen=True)
class Config:
    actor_learning_rate: float = 5e-4  # Adam's step size
    critic_learning_rate: float = 1e-3  # Adam's step size
    gamma: float = 0.95  # discount per decision
    tau: float = 0.01  # share of the networks that their targets take over
    n_step: int = 1  # rewards in a target
    batch_size: int = 256  # transitions a gradient step
    utd_ratio: tuple[int, ...] = (1, 20)  # gradient steps, for so many decisions; rounded to whole steps an iteration
    replay_size: int = 1_000_000  # transitions kept, over all environments; rounded up to whole iterations
    replay_dtype: str = "float32"  # of stored observations: float32, bfloat16 or uint8 (whole numbers 0 to 255)
    prefill_steps: int = 10_000  # decisions, over all environments, before the first gradient step
    random_prefill: bool = True  # take them uniformly at random, not by the policy
    data_batch: int = 0  # transitions of a batch that come out of data sets (`--data`); all of them: no environment
    team_reward: bool = False  # all critics learn of the sum over agents
    share_params: bool = False  # one actor for all agents, which reads who it is
    num_critics: int = 1  # E of each agent; targets take the minimum over them
    policy_delay: int = 1  # gradient steps of the critics for each one of the actors and of the targets
    exploration_noise: float = 0.1  # standard deviation of what is added to actions; the box is [-1, 1]
    target_noise: float = 0.0  # standard deviation of what is added to the target actors' actions
    noise_clip: float = 0.5  # largest noise there
    output_penalty: float = 1e-3  # weight of the actors' squared outputs
    max_grad_norm: float = 0.5  # global norm, of each network
    reward_scale: float = 1.0  # applied inside update only
    normalize_obs: bool = True  # running mean and standard deviation of observations
    actor_hidden: tuple[int, ...] = (128, 128)  # hidden layers
    critic_hidden: tuple[int, ...] = (128, 128)  # hidden layers
    activation: str = "relu"  # of the hidden layers
    layer_norm: bool = False  # in the critics, after each hidden layer
    dtype: str = "float32"  # of the networks' arithmetic: float32 or bfloat16; parameters stay float32
    actor_obs_key: str = "agents"  # entry of a dict observation that the actors read
    critic_obs_key: str = "state"  # entry of a dict observation that the critics read


class Learned(NamedTuple):
    """What a gradient step changes."""

    params: dict[str, PyTree]  # {"actor" [N, ...], "critic" [N, E, ...]}
    targets: dict[str, PyTree]  # as params
    optimizers: dict[str, optax.OptState]  # as params


def check(config: Config, spec: Spec, plan: Plan) -> None:
    """Raises UserError for settings that cannot work, before anything compiles."""
    off_policy.check(config, spec, plan, "maddpg", several=True, apart=not config.team_reward)
    off_policy.check_noise(config)
    require_at_least(config, 0, "output_penalty")


uses_data = off_policy.uses_data


def make(config: Config, spec: Spec, plan: Plan, data: Draw | None = None) -> Algorithm:
    """MADDPG for `spec`; see `rlx.algorithm.Algorithm` for the functions it returns.

    `data`: what `data_batch` transitions of every batch come out of.
    """
    agents = made_of(spec, config.actor_obs_key)
    N, mask = agents.num_agents, jnp.asarray(agents.action_mask)
    network = MLP(config.actor_hidden, agents.action_size, config.activation, dtype=DTYPES[config.dtype])
    actors = make_networks(network.init, network.apply, agents, config.share_params)
    critics = make_critics(config, spec)
    experience = make_off_policy(config, spec, plan, data, apart=not config.team_reward)
    optimizer = adam(config.max_grad_norm)

    def outputs(params: PyTree, obs: PyTree) -> jax.Array:
        """Of all agents, before tanh or as logits: [..., N, a]."""
        return actors.apply(params, agents.rows(select(obs, config.actor_obs_key))).astype(jnp.float32)

    def chosen(out: jax.Array) -> jax.Array:
        """What the actors do, [..., N, a]."""
        return masked(OneHotCategorical(out), mask).mode() if agents.discrete else bounded(jnp.tanh(out))

    def drawn(out: jax.Array, key: Key, std: float | jax.Array, clip: float | jax.Array = jnp.inf) -> jax.Array:
        """With the noise of exploration, or of targets: [..., N, a]."""
        if agents.discrete:
            return masked(OneHotCategorical(out), mask).sample(key)
        return bounded(noisy(chosen(out), std, key, clip))

    def bounded(action: jax.Array) -> jax.Array:
        return real(action, jnp.broadcast_to(mask, action.shape))

    def init(key: Key, policy: ActingPolicy | None = None) -> OffPolicyState:
        actor_key, critic_key = jax.random.split(key)
        params = {
            "actor": actors.init(actor_key) if policy is None else policy.actor,
            "critic": jax.vmap(critics.init)(jax.random.split(critic_key, N)),
        }
        states = {"actor": actors.each(optimizer.init)(params["actor"])}
        states["critic"] = jax.vmap(optimizer.init)(params["critic"])
        learned = Learned(params, jax.tree.map(jnp.copy, params), states)
        return experience.init(learned, policy)

    def act(policy: ActingPolicy, memory: PyTree, obs: PyTree, key: Key, mode: Mode):
        out = outputs(policy.actor, experience.observe(policy.explorer.statistics, obs))
        if mode == "greedy":
            return memory, agents.decode(chosen(out)), ()
        noise_key, random_key = jax.random.split(key)
        action = agents.decode(drawn(out, noise_key, config.exploration_noise))
        return memory, experience.explore(policy, action, random_key, mode), ()

    def targets(learned: Learned, batch: Batch, key: Key) -> jax.Array:
        """y_i, [N, batch]."""
        out = outputs(learned.targets["actor"], batch.next_obs)
        action = drawn(out, key, config.target_noise, config.noise_clip).reshape(len(out), -1)
        values = jax.vmap(critics.apply, (0, None, None))(learned.targets["critic"], batch.next_obs, action).min(axis=1)
        reward = jnp.broadcast_to(batch.reward.reshape(len(out), -1), (len(out), N))
        return reward.T + batch.discount[None] * values

    def critic_loss(params: PyTree, batch: Batch, wanted: jax.Array) -> tuple[jax.Array, Metrics]:
        """Summed over agents, whose critics are apart; metrics are means."""
        losses, metrics = jax.vmap(critics.loss, (0, None, 0))(params, batch, wanted)
        return losses.sum(), jax.tree.map(jnp.mean, metrics)

    def actor_loss(params: PyTree, critic: PyTree, batch: Batch, key: Key) -> tuple[jax.Array, jax.Array]:
        """J_pi_i, summed over agents, whose parameters are apart; and its mean."""
        out = outputs(params, batch.obs)
        own = drawn(out, key, 0.0) if agents.discrete else chosen(out)
        replayed = batch.action.reshape(own.shape)
        first = jax.tree.map(lambda x: x[:, :1], critic)

        def of_agent(agent: jax.Array, critic: PyTree) -> jax.Array:
            joint = replayed.at[:, agent].set(own[:, agent]).reshape(len(out), -1)
            return -critics.apply(critic, batch.obs, joint).mean()

        losses = jax.vmap(of_agent)(jnp.arange(N), first)
        penalty = config.output_penalty * jnp.square(real(out, jnp.broadcast_to(mask, out.shape))).mean(axis=(0, 2))
        return (losses + penalty).sum(), losses.mean()

    def improve_actors(learned: Learned, batch: Batch, key: Key) -> tuple[Learned, Metrics]:
        """A gradient step of all actors, and the targets' part of what was learnt."""
        params, states = dict(learned.params), dict(learned.optimizers)
        grads, loss = jax.grad(actor_loss, has_aux=True)(params["actor"], params["critic"], batch, key)
        after = actors.each(lambda *of_one: descend(optimizer, config.actor_learning_rate, *of_one))
        params["actor"], states["actor"] = after(params["actor"], states["actor"], grads)
        following = optax.incremental_update(params, learned.targets, config.tau)
        return Learned(params, following, states), {"actor_loss": loss, "actor_grad_norm": optax.tree.norm(grads)}

    def step(learned: Learned, batch: Batch, turn: jax.Array, key: Key) -> tuple[Learned, Metrics]:
        """One gradient step; `turn` 0 is the actors' too."""
        target_key, actor_key = jax.random.split(key)
        batch = batch._replace(action=agents.encode(batch.action).reshape(len(batch.discount), -1))
        params, states = dict(learned.params), dict(learned.optimizers)
        wanted = jax.lax.stop_gradient(targets(learned, batch, target_key))
        grads, metrics = jax.grad(critic_loss, has_aux=True)(params["critic"], batch, wanted)
        after = jax.vmap(lambda *of_one: descend(optimizer, config.critic_learning_rate, *of_one))
        params["critic"], states["critic"] = after(params["critic"], states["critic"], grads)
        learned, of_actors = off_policy.delayed(
            config.policy_delay, turn, improve_actors, Learned(params, learned.targets, states), batch, actor_key
        )
        return learned, metrics | of_actors | {"critic_grad_norm": optax.tree.norm(grads)}

    def update(state: OffPolicyState, trajectory: Transition, iteration: jax.Array, key: Key):
        def one(learned: Learned, batch: Batch, count: jax.Array, key: Key) -> tuple[Learned, Metrics]:
            return step(learned, batch, off_policy.turn(config.policy_delay, experience, iteration, count), key)

        return experience.update(one, state, trajectory, iteration, key)

    return Algorithm(init, experience.policy, lambda key: (), act, update)
