"""DPPO's update against identities and numbers worked out by hand, and its settings."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import norm

from rlx import diffusion
from rlx.actors import Actor
from rlx.algorithms import bc, dppo, ppo
from rlx.distributions import Normal
from rlx.learners import check_policy
from rlx.types import Transition, UserError
from tests.on_policy import CONTINUOUS, DISCRETE, PLAN, one_update, trajectory_of

SMALL = dppo.Config(
    actor_hidden=(8,), critic_hidden=(8,), num_epochs=1, num_minibatches=1, num_denoising_steps=4, activation="tanh"
)
EXACT = {"sum_log_prob": True, "log_prob_min": -jnp.inf, "log_prob_max": jnp.inf, "clean_clip": jnp.inf}
EXACT |= {"noise_clip": jnp.inf, "gamma_denoising": 1.0, "stop_kl": jnp.inf}


def changed(**changes):
    return dataclasses.replace(SMALL, **changes)


def distance(one, other):
    return max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


@pytest.mark.parametrize(
    "change", [{}, {"finetuned_steps": 2}, {"ddim_steps": 2}, {"residual": True, "actor_hidden": (8, 8, 8)}]
)
def test_the_first_minibatch_has_a_ratio_of_one(change):
    *_, (_, metrics) = one_update(dppo, changed(num_minibatches=2, **change), CONTINUOUS)
    assert float(metrics["first_ratio_deviation"]) < 2e-6


def test_the_clip_schedule_runs_from_base_to_last_and_one_step_has_the_last():
    found = dppo.clip_schedule(0.01, 0.2, 5)
    assert found.shape == (5,) and (jnp.diff(found) > 0).all()
    np.testing.assert_allclose([found[0], found[-1]], [0.01, 0.2], rtol=1e-5)
    assert float(found[2]) == pytest.approx(0.01 + 0.19 * np.expm1(1.5) / np.expm1(3.0), rel=1e-5)
    np.testing.assert_allclose(dppo.clip_schedule(0.01, 0.2, 1), [0.2], rtol=1e-5)


def test_the_chains_log_probability_is_the_product_of_its_gaussians():
    config = changed(**EXACT, min_std=0.3, min_log_prob_std=0.05)
    algorithm, made = dppo.make(config, CONTINUOUS, PLAN), diffusion.make_diffusion(config, CONTINUOUS)
    policy = algorithm.policy(algorithm.init(jax.random.key(0)), "explore")
    obs = jnp.ones((5, 3))
    _, action, extras = algorithm.act(policy, (), obs, jax.random.key(1), "explore")
    np.testing.assert_array_equal(action, jnp.clip(extras.chain[:, -1], -1, 1))
    total = np.zeros(5)
    for i in range(4):
        row = diffusion.Table(*(column[i] for column in made.explore))
        mean = made.mean(policy.params["actor"], obs, extras.chain[:, i], row)
        std = max(float(row.std), 0.05)  # the floor of log-probabilities, not the one of noise
        total += norm.logpdf(extras.chain[:, i + 1], mean, std).sum(axis=-1)
    np.testing.assert_allclose(extras.log_prob.sum(axis=-1), total, rtol=1e-3)


def test_log_probabilities_are_means_of_clamped_entries():
    config = changed(log_prob_max=0.5, log_prob_min=-1.0, min_std=0.3, min_log_prob_std=0.3)
    algorithm, made = dppo.make(config, CONTINUOUS, PLAN), diffusion.make_diffusion(config, CONTINUOUS)
    policy, obs = algorithm.policy(algorithm.init(jax.random.key(0)), "explore"), jnp.ones((200, 3))
    extras = algorithm.act(policy, (), obs, jax.random.key(1), "explore")[2]
    row = diffusion.Table(*(column[-1] for column in made.explore))
    mean = made.mean(policy.params["actor"], obs, extras.chain[:, -2], row)
    each = np.clip(norm.logpdf(extras.chain[:, -1], mean, 0.3), -1.0, 0.5)
    np.testing.assert_allclose(extras.log_prob[:, -1], each.mean(axis=-1), rtol=1e-3, atol=1e-4)


def test_one_step_equals_gaussian_ppo_whose_observation_holds_the_initial_noise(monkeypatch):
    """K = 1: the policy is N(a_hat(s, x_1), 1); PPO with that distribution has the same losses and gradients."""
    config = changed(num_denoising_steps=1, min_std=1.0, min_log_prob_std=1.0, clip_eps=0.02, max_grad_norm=jnp.inf)
    config = dataclasses.replace(config, normalize_obs=False, **EXACT)
    made = diffusion.make_diffusion(config, CONTINUOUS)
    algorithm = dppo.make(config, CONTINUOUS, PLAN)
    learner = algorithm.init(jax.random.key(0))
    trajectory = trajectory_of(algorithm, learner, CONTINUOUS)
    moved = jax.tree.map(lambda x: x + 1e-4, learner.params)  # so that ratios are not 1
    state = learner._replace(learned=learner.learned._replace(params=moved))
    after, ours = jax.jit(algorithm.update)(state, trajectory, jnp.asarray(0), jax.random.key(3))

    def distribution(params, inputs):
        row = diffusion.Table(*(column[0] for column in made.explore))
        mean = made.mean(params, inputs[..., :3], inputs[..., 3:], row)
        return Normal(mean, jnp.ones_like(mean))

    gaussian = Actor(lambda key, inputs: made.init(key), distribution)
    monkeypatch.setattr(ppo, "make_actor", lambda config, spec: gaussian)
    with_noise = jax.ShapeDtypeStruct((5,), jnp.float32)
    spec = dataclasses.replace(CONTINUOUS, obs={"state": with_noise, "privileged_state": CONTINUOUS.obs})
    settings = {"clip_eps": 0.02, "critic_obs_key": "privileged_state", "max_grad_norm": jnp.inf, "activation": "tanh"}
    settings |= {"critic_hidden": (8,), "num_epochs": 1, "num_minibatches": 1, "normalize_obs": False}
    reference = ppo.make(ppo.Config(**settings), spec, PLAN)
    start = reference.init(jax.random.key(0))
    start = start._replace(params=start.params | moved)
    chain = trajectory.extras.chain

    def observed(obs):
        return {"state": jnp.concatenate([obs, chain[..., 0, :]], axis=-1), "privileged_state": obs}

    old = distribution(learner.params["actor"], observed(trajectory.obs)["state"])
    extras = ppo.Extras(chain[..., 1, :], old.log_prob(chain[..., 1, :]), old, ())
    seen = trajectory._replace(obs=observed(trajectory.obs), next_obs=observed(trajectory.next_obs), extras=extras)
    reached, theirs = jax.jit(reference.update)(start, seen, jnp.asarray(0), jax.random.key(3))
    for part in ("actor", "critic"):  # after one step Adam's mean is a tenth of the gradient
        grads = [optax.tree.get(x.optimizer, "mu")[part] for x in (after.learned, reached)]
        assert distance(*grads) < 1e-5 * max(1.0, *(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads)))
    assert 0.1 < float(ours["clip_fraction"]) < 0.9 and float(ours["grad_norm"]) > 0.1
    for name in ("policy_loss", "value_loss", "clip_fraction", "grad_norm"):
        assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-5, abs=1e-6), name


def test_one_finetuned_step_is_finite_and_leaves_the_others_frozen():
    learner, _, (state, metrics) = one_update(dppo, changed(finetuned_steps=1, num_epochs=3), CONTINUOUS)
    assert all(np.isfinite(value) for value in metrics.values())
    assert distance(learner.base, state.base) == 0 and distance(state.params["actor"], state.base) > 1e-5


def test_frozen_steps_are_those_of_the_policy_that_a_run_began_with():
    """`base` makes x of the first K - K' steps, `actor` the others, which have the ratios; K' = K has no base."""
    algorithm = dppo.make(changed(finetuned_steps=2), CONTINUOUS, PLAN)
    learner = algorithm.init(jax.random.key(0))
    policy, obs = algorithm.policy(learner, "explore"), jnp.ones((5, 3))

    def chain(part):
        moved = {part: jax.tree.map(lambda x: x + 1.0, policy.params[part])} if part else {}
        other = policy._replace(params=policy.params | moved)
        return algorithm.act(other, (), obs, jax.random.key(1), "explore")[2].chain

    assert chain("").shape == (5, 3, 2)
    assert distance(chain("")[:, 0], chain("base")[:, 0]) > 1e-3
    assert distance(chain("")[:, 0], chain("actor")[:, 0]) == 0
    assert distance(chain("")[:, 1], chain("actor")[:, 1]) > 1e-3
    moved = learner._replace(base=jax.tree.map(lambda x: x + 1.0, learner.base))
    trajectory = trajectory_of(algorithm, moved, CONTINUOUS)
    _, metrics = jax.jit(algorithm.update)(moved, trajectory, jnp.asarray(0), jax.random.key(3))
    assert float(metrics["first_ratio_deviation"]) < 2e-6
    whole = dppo.make(SMALL, CONTINUOUS, PLAN)
    assert set(whole.policy(whole.init(jax.random.key(0)), "greedy").params) == {"actor"}


def test_earlier_denoising_steps_have_smaller_advantages():
    """On policy the loss is minus the mean of gamma_denoising^(K' - 1 - i) A over the steps i of every action."""
    *_, (_, all_paid) = one_update(dppo, changed(gamma_denoising=1.0, normalize_advantage=False), CONTINUOUS)
    *_, (_, half) = one_update(dppo, changed(gamma_denoising=0.5, normalize_advantage=False), CONTINUOUS)
    share = float(half["policy_loss"]) / float(all_paid["policy_loss"])
    assert share == pytest.approx((1 + 0.5 + 0.25 + 0.125) / 4, rel=1e-4)


def one_ratio_moved(config, number, factor=1.05):
    """Metrics of the first update where the ratios of denoising step `number` are `factor`, those of the others 1."""
    algorithm = dppo.make(config, CONTINUOUS, PLAN)
    learner = algorithm.init(jax.random.key(0))
    trajectory = trajectory_of(algorithm, learner, CONTINUOUS)
    extras = trajectory.extras
    old = extras.log_prob if number is None else extras.log_prob.at[..., number].add(-np.log(factor))
    trajectory = trajectory._replace(extras=extras._replace(log_prob=old))
    return jax.jit(algorithm.update)(learner, trajectory, jnp.asarray(0), jax.random.key(3))[1]


def test_without_a_future_the_last_denoising_step_alone_is_paid():
    """gamma_denoising = 0: A_i = 0 for all steps but i = K' - 1."""
    config = changed(gamma_denoising=0.0, normalize_advantage=False)
    losses = [float(one_ratio_moved(config, number)["policy_loss"]) for number in (None, 0, 3)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and abs(losses[2] - losses[0]) > 1e-3 * abs(losses[0])


@pytest.mark.parametrize(("number", "share"), [(0, 0.25), (2, 0.25), (3, 0.0)])
def test_each_denoising_step_has_the_clipping_of_its_own(number, share):
    """eps_i from 0.01 to 0.1 at i = 0, 1, 2, 3: 0.010, 0.018, 0.040, 0.100."""
    metrics = one_ratio_moved(changed(clip_base=0.01, clip_eps=0.1), number)
    assert float(metrics["clip_fraction"]) == pytest.approx(share)


def test_exploration_noise_is_clipped_in_deviations():
    """The log-density of a step is -z^2 / 2 and a constant, averaged over the action: z = 0.1 everywhere at most."""
    spread = {}
    for clip in (0.1, 3.0):
        algorithm = dppo.make(changed(noise_clip=clip, min_std=0.2, log_prob_min=-jnp.inf), CONTINUOUS, PLAN)
        policy = algorithm.policy(algorithm.init(jax.random.key(0)), "explore")
        found = algorithm.act(policy, (), jnp.ones((100, 3)), jax.random.key(1), "explore")[2].log_prob
        spread[clip] = float((found.max(axis=0) - found.min(axis=0)).max())
    assert spread[0.1] <= 0.1**2 and spread[3.0] > 0.5


def test_learning_stops_for_a_trajectory_once_the_policy_has_moved_far():
    *_, (free, metrics) = one_update(dppo, changed(num_epochs=20, learning_rate=1e-2, stop_kl=jnp.inf), CONTINUOUS)
    assert float(metrics["stopped"]) == 0.0
    *_, (held, metrics) = one_update(dppo, changed(num_epochs=20, learning_rate=1e-2, stop_kl=1e-4), CONTINUOUS)
    assert 0.5 < float(metrics["stopped"]) < 1.0
    *_, (two, _) = one_update(dppo, changed(num_epochs=2, learning_rate=1e-2, stop_kl=jnp.inf), CONTINUOUS)
    assert distance(held.params, two.params) < distance(free.params, two.params)


def test_actor_and_critic_have_step_sizes_of_their_own():
    for scale in (1e-6, 10.0):
        learner, _, (state, _) = one_update(dppo, changed(critic_lr_scale=scale), CONTINUOUS)
        moved = [distance(learner.params[part], state.params[part]) for part in ("critic", "actor")]
        assert moved == pytest.approx([scale * 3e-4, 3e-4], rel=0.1)  # the length of Adam's first step


@pytest.mark.parametrize("finetuned", [0, 2])
def test_finetuning_begins_at_a_cloned_policy(finetuned):
    cloned = bc.Config(distribution="diffusion", actor_hidden=(8,), num_denoising_steps=4, activation="tanh")
    teacher = bc.make(cloned, CONTINUOUS, PLAN)
    policy = teacher.policy(teacher.init(jax.random.key(7)), "greedy")
    student = dppo.make(changed(finetuned_steps=finetuned), CONTINUOUS, PLAN)
    check_policy(student, policy)
    learner = student.init(jax.random.key(0), policy)
    obs = jnp.ones((5, 3))
    for mode in ("greedy", "sample"):
        actions = [
            algorithm.act(p, (), obs, jax.random.key(1), mode)[1]
            for algorithm, p in ((teacher, policy), (student, student.policy(learner, mode)))
        ]
        np.testing.assert_allclose(*actions, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="policy to start from"):
        gaussian = ppo.make(ppo.Config(), CONTINUOUS, PLAN)
        check_policy(student, gaussian.policy(gaussian.init(jax.random.key(0)), "greedy"))


def test_a_time_limit_bootstraps_from_the_final_observation():
    """The critic knows obs from final_obs: V = the first entry; the target at the limit is r + gamma V(final_obs)."""
    plan = PLAN._replace(num_envs=1, unroll_length=1)
    config = changed(gamma=0.5, normalize_obs=False, critic_hidden=())
    algorithm = dppo.make(config, CONTINUOUS, plan)
    learner = algorithm.init(jax.random.key(0))
    critic = {"params": {"output": {"kernel": jnp.asarray([[1.0], [0.0], [0.0]]), "bias": jnp.zeros(1)}}}
    learner = learner._replace(learned=learner.learned._replace(params=learner.params | {"critic": critic}))
    obs, final = jnp.asarray([[2.0, 0.0, 0.0]]), jnp.asarray([[8.0, 0.0, 0.0]])
    _, action, extras = algorithm.act(algorithm.policy(learner, "explore"), (), obs, jax.random.key(0), "explore")
    no, yes = jnp.zeros(1, bool), jnp.ones(1, bool)
    one = jax.tree.map(lambda x: x[None], Transition(obs, action, jnp.ones(1), no, yes, final, extras))
    _, metrics = algorithm.update(learner, one, jnp.asarray(0), jax.random.key(0))
    assert float(metrics["value_loss"]) == pytest.approx(0.5 * (2 - (1 + 0.5 * 8)) ** 2)


def test_golden_numbers_of_one_update():
    config = changed(num_epochs=2, num_minibatches=3, finetuned_steps=3, clip_base=0.05)
    *_, (state, metrics) = one_update(dppo, config, CONTINUOUS)
    measured = {k: float(metrics[k]) for k in ("policy_loss", "value_loss", "kl", "grad_norm")}
    measured["params"] = float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(state.params)))
    message = (
        "One DPPO update gives other numbers than it did: its mathematics, its initialisation or its use of keys has "
        "changed. If that was meant, write the new numbers here and say in CHANGELOG.md that curves are not comparable."
    )
    assert measured == pytest.approx(GOLDEN, rel=1e-4), message


GOLDEN = {
    "policy_loss": -0.004846231,
    "value_loss": 13.93953,
    "kl": 0.0004459901,
    "grad_norm": 5.900212,
    "params": 240.9691,
}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"finetuned_steps": 5}, "finetuned_steps"),
        ({"ddim_steps": 2, "finetuned_steps": 3}, "finetuned_steps"),
        ({"gamma_denoising": 1.5}, "gamma_denoising"),
        ({"critic_lr_scale": 0.0}, "critic_lr_scale"),
        ({"stop_kl": 0.0}, "stop_kl"),
        ({"log_prob_min": 3.0}, "log_prob_min"),
        ({"min_std": -0.1}, "min_std"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, field):
    with pytest.raises(UserError, match=field):
        dppo.check(dataclasses.replace(SMALL, **change), CONTINUOUS, PLAN)


def test_discrete_actions_are_refused():
    with pytest.raises(UserError, match="continuous"):
        dppo.check(SMALL, DISCRETE, PLAN)
