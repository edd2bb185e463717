"""DPPO: diffusion policy policy optimisation (Ren et al. 2024, arXiv 2409.00588).

    Each of the K denoising steps of an action is a Gaussian action of its own, whose state is (s, x_k): an inner MDP
    inside the environment's, paid at its last step alone (section 4.1). The last K' of them are learnt by PPO:

    rho_i    = p(x_{i+1} | x_i, s) / p_old(x_{i+1} | x_i, s),  i = 0..K'-1, i = 0 the noisiest     (`rlx.diffusion`)
    A_i      = gamma_den^(K' - 1 - i) A                          A: GAE over environment steps, V(s) alone     (eq. 4.3)
    eps_i    = base + (clip_eps - base) (e^(3 i / (K' - 1)) - 1) / (e^3 - 1)
    L        = -E[min(rho_i A_i, clip(rho_i, 1 - eps_i, 1 + eps_i) A_i)] + value_coef * 1/2 E[(V - target)^2]

The first K - K' steps stay with the policy that the run began with. As in the authors' code: log-probabilities are
means over the action, of normals whose deviation has a floor; minibatches draw pairs of an environment's and a
denoising step; the noisiest step is clipped tightest (the paper's text has it the other way round).

What differs: an action is clipped to the box where the environment receives it, not inside the last step's density;
greedy actions are the means from x_K = 0, those of mode "sample" are what the paper evaluates, but for a clip of the
noise: drawn, with a small floor and without noise in the last step. Chunks of actions are the environment's
(`--env.action-chunk`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlx import diffusion, normalize, on_policy
from rlx.algorithm import Algorithm, Key, Mode, Plan
from rlx.diffusion import draw, make_diffusion, steps_of
from rlx.distributions import Normal
from rlx.errors import require, require_above, require_at_least
from rlx.networks import select
from rlx.on_policy import Batch, OnPolicyState, clipped_surrogate, make_critic, make_update, ratio_metrics
from rlx.optimization import adam
from rlx.types import Box, Metrics, PyTree, Spec, Transition


@dataclasses.dataclass(frozen=True)
class Config:
    learning_rate: float = 3e-4  # Adam's step size
    critic_lr_scale: float = 1.0  # the critic's step size over the actor's
    anneal_lr: bool = False  # linearly to 0 over the run
    adaptive_lr: bool = False  # raise or lower the rate by a factor 1.5 to hold the estimated KL near target_kl
    target_kl: float = 0.01  # nats, for adaptive_lr
    stop_kl: float = 1.0  # nats, estimated, after which nothing more is learnt from a trajectory
    gamma: float = 0.99  # discount per decision
    gamma_denoising: float = 0.99  # discount of an advantage per denoising step
    gae_lambda: float = 0.95  # trace decay of GAE
    clip_eps: float = 0.1  # ratio clipping at the last denoising step
    clip_base: float = 0.1  # ratio clipping at the noisiest
    value_coef: float = 0.5  # weight of half the squared value error
    max_grad_norm: float = 1.0  # global norm; inf for none
    num_epochs: int = 4  # passes over a trajectory
    num_minibatches: int = 8  # gradient steps a pass
    num_denoising_steps: int = 10  # K
    ddim_steps: int = 0  # take so many steps of DDIM over them instead; 0: all, of DDPM
    finetuned_steps: int = 0  # K', the last ones, that are learnt; 0: all
    min_std: float = 0.1  # floor of a step's deviation while exploring
    min_log_prob_std: float = 0.1  # floor of it in log-probabilities
    eval_min_std: float = 1e-3  # floor of it in mode "sample"
    noise_clip: float = 3.0  # largest noise of a step while exploring, in deviations
    clean_clip: float = 1.0  # largest predicted action
    sum_log_prob: bool = False  # log-probabilities summed over the action, not averaged
    log_prob_min: float = -5.0  # of one entry of the action; -inf for none
    log_prob_max: float = 2.0  # of one entry of the action; inf for none
    reward_scale: float = 1.0  # applied inside update only
    normalize_reward: bool = False  # by the running standard deviation of their discounted sums
    normalize_obs: bool = True  # running mean and standard deviation of observations
    freeze_statistics: bool = False  # keep those of observations that the policy to start from has
    normalize_advantage: bool = True  # to mean 0 and std 1 in each minibatch, before gamma_denoising
    actor_hidden: tuple[int, ...] = (64, 64)  # hidden layers
    critic_hidden: tuple[int, ...] = (64, 64)  # hidden layers
    activation: str = "mish"  # of the hidden layers
    residual: bool = False  # pairs of the actor's hidden layers add to their input
    actor_obs_key: str = "state"  # entry of a dict observation that the actor reads
    critic_obs_key: str = "state"  # entry of a dict observation that the critic reads


class Extras(NamedTuple):
    chain: jax.Array  # [..., K' + 1, d]: x before the first learnt step and after each
    log_prob: jax.Array  # [..., K'] of these steps


class Step(NamedTuple):
    """In the place of `Extras` while a trajectory is learnt from: one denoising step."""

    before: jax.Array  # [..., d]
    after: jax.Array  # [..., d]
    number: jax.Array  # [...] int32, 0 .. K' - 1
    log_prob: jax.Array  # [...], of the policy before the update


class DPPOState(NamedTuple):
    learned: OnPolicyState
    base: PyTree  # the weights of the steps that are not learnt; () if all are

    @property
    def params(self) -> dict[str, PyTree]:
        return self.learned.params


class DPPOPolicy(NamedTuple):
    params: dict[str, PyTree]  # {"actor"}, and "base" where not all steps are learnt
    statistics: PyTree


def num_steps(config: Config) -> tuple[int, int]:
    """How many steps make an action, and how many of them are learnt."""
    steps = config.ddim_steps or config.num_denoising_steps
    return steps, config.finetuned_steps or steps


def check(config: Config, spec: Spec, plan: Plan) -> None:
    """Raises UserError for settings that cannot work, before anything compiles."""
    diffusion.check(config, spec, "dppo")
    steps, learnt = num_steps(config)
    require(1 <= learnt <= steps, "algo.finetuned_steps", config.finetuned_steps, f"0 to {steps}, the steps there are")
    pairs = plan._replace(num_envs=plan.num_envs * learnt)  # of an environment's and a denoising step
    on_policy.check(config, spec, pairs, "dppo", of=f"{learnt} denoising steps * num_envs")
    denoising = config.gamma_denoising
    require(0 <= denoising <= 1, "algo.gamma_denoising", denoising, "between 0 and 1")
    require_above(config, 0, "stop_kl", "clip_base", "min_log_prob_std", "noise_clip")
    require_at_least(config, 0, "min_std", "eval_min_std")
    lowest, highest = config.log_prob_min, config.log_prob_max
    require(lowest < highest, "algo.log_prob_min", lowest, f"below algo.log_prob_max = {highest}")


def clip_schedule(base: Any, last: Any, steps: int) -> jax.Array:
    """eps_i, [K'], from `base` at the noisiest step to `last`; of one step alone it is `last`."""
    progress = jnp.arange(steps, dtype=jnp.float32) / (steps - 1) if steps > 1 else jnp.ones(1, jnp.float32)
    return base + (last - base) * jnp.expm1(3.0 * progress) / math.expm1(3.0)


def make(config: Config, spec: Spec, plan: Plan) -> Algorithm:
    """DPPO for `spec`; see `rlx.algorithm.Algorithm` for the functions it returns."""
    assert isinstance(spec.action, Box)
    action_shape = spec.action.shape
    steps, learnt = num_steps(config)
    frozen = steps - learnt
    actor = make_diffusion(config, spec)
    critic = make_critic(config, spec)
    optimizer = adam(config.max_grad_norm)
    rows = jax.tree.map(jnp.asarray, steps_of(actor.explore, frozen))

    def init(key: Key, policy: DPPOPolicy | None = None) -> DPPOState:
        actor_key, critic_key = jax.random.split(key)
        params = {"actor": actor.init(actor_key), "critic": critic.init(critic_key)}
        base = params["actor"] if policy is None else policy.params.get("base", policy.params["actor"])
        if policy is not None:
            policy = policy._replace(params={"actor": policy.params["actor"]})
        learned = on_policy.init(config, spec, plan, params, optimizer.init, policy)
        return DPPOState(learned, jax.tree.map(jnp.copy, base) if frozen else ())

    def policy(state: DPPOState, mode: Mode) -> DPPOPolicy:
        params = {"actor": state.params["actor"]} | ({"base": state.base} if frozen else {})
        return DPPOPolicy(params, state.learned.statistics)

    def act(policy: DPPOPolicy, memory: PyTree, obs: PyTree, key: Key, mode: Mode):
        obs = select(normalize.observe(config, policy.statistics, obs), config.actor_obs_key)
        x, noise = diffusion.noises(config, key, (*obs.shape[:-1], *action_shape), mode)
        table, floor = actor.evaluate, config.eval_min_std
        if mode == "explore":
            table, floor = actor.explore, config.min_std
            noise = jnp.clip(noise, -config.noise_clip, config.noise_clip)
        if frozen:
            earlier, _ = draw(actor, steps_of(table, 0, frozen), policy.params["base"], obs, x, noise[:frozen], floor)
            x = earlier[-1]
        chain, means = draw(actor, steps_of(table, frozen), policy.params["actor"], obs, x, noise[frozen:], floor)
        action = jnp.clip(chain[-1], -1.0, 1.0)
        if mode != "explore":
            return memory, action, ()
        chain, means = jnp.moveaxis(chain, 0, -2), jnp.moveaxis(means, 0, -2)
        return memory, action, Extras(chain, log_prob(means, chain[..., 1:, :], rows.std))

    def log_prob(mean: jax.Array, after: jax.Array, std: jax.Array) -> jax.Array:
        """Of steps to `after` [..., d], `std` [...]: over the entries of the action the mean, each clamped."""
        std = jnp.broadcast_to(jnp.maximum(std, config.min_log_prob_std), mean.shape[:-1])[..., None, None]
        each = Normal(mean[..., None], jnp.broadcast_to(std, (*mean.shape, 1))).log_prob(after[..., None])
        each = jnp.clip(each, config.log_prob_min, config.log_prob_max)
        return each.sum(axis=-1) if config.sum_log_prob else each.mean(axis=-1)

    def prepare(params: PyTree, batch: Batch, key: Key) -> Batch:
        """Pairs of an environment's and a denoising step, [T, B * K', ...]."""
        transition = batch.transition
        chain, old = transition.extras

        def flat(x: jax.Array) -> jax.Array:
            """[T, B, K', ...] to [T, B * K', ...]."""
            return x.reshape(x.shape[0], -1, *x.shape[3:])

        number = jnp.broadcast_to(jnp.arange(learnt, dtype=jnp.int32), old.shape)
        step = Step(flat(chain[..., :-1, :]), flat(chain[..., 1:, :]), flat(number), flat(old))
        obs, *rest = jax.tree.map(
            lambda x: jnp.repeat(x, learnt, axis=1), (transition.obs, batch.values, batch.advantages, batch.targets)
        )
        return Batch(Transition(obs, (), (), (), (), (), step), *rest)  # type: ignore[arg-type]

    def objective(params: PyTree, batch: Batch, key: Key) -> tuple[jax.Array, jax.Array, Metrics]:
        step, obs = batch.transition.extras, batch.transition.obs
        row = jax.tree.map(lambda column: column[step.number], rows)
        mean = actor.mean(params["actor"], select(obs, config.actor_obs_key), step.before, row)
        new = log_prob(mean, step.after, row.std)
        ratio = jnp.exp(new - step.log_prob)
        advantages = config.gamma_denoising ** (learnt - 1 - step.number).astype(jnp.float32) * batch.advantages
        clip_eps = clip_schedule(config.clip_base, config.clip_eps, learnt)[step.number]
        policy_loss = -clipped_surrogate(ratio, advantages, clip_eps).mean()
        metrics = {
            "policy_loss": policy_loss,
            "kl": (ratio - 1 - (new - step.log_prob)).mean(),
            **ratio_metrics(ratio, clip_eps),
        }
        return policy_loss, critic.value(params, obs), metrics

    learn = make_update(config, plan, optimizer, critic.values, objective, prepare=prepare, stop_kl=config.stop_kl)

    def update(state: DPPOState, trajectory: Transition, iteration: jax.Array, key: Key):
        learned, metrics = learn(state.learned, trajectory, iteration, key)
        return DPPOState(learned, state.base), metrics

    return Algorithm(init, policy, lambda key: (), act, update)
