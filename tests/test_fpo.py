"""FPO's update against identities and numbers worked out by hand, and its settings."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx import flow
from rlx.algorithms import fpo
from rlx.types import UserError
from tests.on_policy import CONTINUOUS, DISCRETE, PLAN, one_update, trajectory_of

SMALL = fpo.Config(
    actor_hidden=(8,), critic_hidden=(8,), num_epochs=1, num_minibatches=1, num_samples=3, num_flow_steps=4
)
PLUS = {"ratio": "per_sample", "flow_loss": "velocity", "sum_loss": True, "asymmetric": True, "ema_decay": 0.95}
PLUS |= {"loss_clamp": 20.0, "difference_clamp": 10.0, "straight_through": True, "advantage_clamp": 100.0}
PLUS |= {"max_grad_norm": 1.0, "weight_decay": 1e-4, "flow_times": "uniform"}


def updated(**changes):
    return one_update(fpo, dataclasses.replace(SMALL, **changes), CONTINUOUS)


def distance(one, other):
    return max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


@pytest.mark.parametrize("change", [{}, {"ratio": "per_sample"}, PLUS], ids=["mean", "per_sample", "plus"])
def test_the_first_minibatch_has_a_ratio_of_one(change):
    *_, (_, metrics) = updated(num_minibatches=2, **change)
    assert float(metrics["first_ratio_deviation"]) < 2e-6


def test_ratios_of_means_and_of_samples_have_the_same_gradient_on_policy():
    *_, (mean, of_mean) = updated(ratio="mean")
    *_, (each, of_each) = updated(ratio="per_sample")
    assert float(of_mean["grad_norm"]) == pytest.approx(float(of_each["grad_norm"]), rel=1e-5)
    assert distance(mean.params, each.params) < 1e-5
    *_, (mean, _) = updated(ratio="mean", num_epochs=5, learning_rate=1e-2)
    *_, (each, _) = updated(ratio="per_sample", num_epochs=5, learning_rate=1e-2)
    assert distance(mean.params, each.params) > 1e-4


def test_ratios_of_samples_are_on_average_at_least_those_of_means():
    """Jensen (FPO, section 3.3): after the same first step rho - 1 - log rho is larger for each pair by itself."""
    *_, (_, of_mean) = updated(ratio="mean", num_epochs=2, learning_rate=1e-2)
    *_, (_, of_each) = updated(ratio="per_sample", num_epochs=2, learning_rate=1e-2)
    assert float(of_each["kl"]) > float(of_mean["kl"]) > 0


def test_the_square_pulls_the_ratio_of_a_bad_action_back():
    """rho A - |A| / (2 eps) (rho - 1)^2 for A = -2, eps = .1: the best ratio is .9, and falls off on both sides."""
    found = fpo.pulled_surrogate(jnp.asarray([0.8, 0.9, 1.0, 1.2]), jnp.asarray(-2.0).reshape(1), 0.1)
    np.testing.assert_allclose(found, [-2.0, -1.9, -2.0, -2.8], rtol=1e-6)
    slope = jax.grad(lambda rho: fpo.pulled_surrogate(rho, jnp.asarray(-2.0), 0.1))
    np.testing.assert_allclose([slope(0.5), slope(0.9), slope(1.3)], [8.0, 0.0, -8.0], atol=1e-5)


def test_bad_actions_go_less_far_with_the_square_than_with_the_clip():
    """All advantages below 0, many steps: clipping lets ratios run away, the square holds them."""
    ratios = {}
    for asymmetric in (False, True):
        config = dataclasses.replace(
            SMALL, asymmetric=asymmetric, num_epochs=60, learning_rate=3e-3, normalize_advantage=False, clip_eps=0.2
        )
        algorithm = fpo.make(config, CONTINUOUS, PLAN)
        learner = algorithm.init(jax.random.key(0))
        trajectory = trajectory_of(algorithm, learner, CONTINUOUS)._replace(reward=jnp.full((6, 4), -50.0))
        _, metrics = jax.jit(algorithm.update)(learner, trajectory, jnp.asarray(0), jax.random.key(3))
        ratios[asymmetric] = float(metrics["kl"])
    assert ratios[True] < ratios[False]


@pytest.mark.slow
def test_clamps_bind_where_they_should():
    *_, (free, metrics) = updated(num_epochs=3)
    assert float(metrics["flow_loss"]) > 0.1
    *_, (clamped, metrics) = updated(num_epochs=3, loss_clamp=0.1)
    assert float(metrics["flow_loss"]) <= 0.1 and distance(free.params, clamped.params) > 1e-4
    *_, (tight, _) = updated(num_epochs=3, advantage_clamp=1e-3)
    assert distance(free.params["actor"], tight.params["actor"]) > 1e-4
    # Past the first step each ratio's logarithm is beyond a tiny clamp: only a straight-through one still learns.
    stuck, through = (
        updated(num_epochs=20, ratio="per_sample", difference_clamp=1e-9, straight_through=passes)[-1][0]
        for passes in (False, True)
    )
    once = updated(num_epochs=1, ratio="per_sample", difference_clamp=1e-9)[-1][0]
    assert distance(once.params["actor"], through.params["actor"]) > distance(
        once.params["actor"], stuck.params["actor"]
    )


def test_evaluation_plays_averaged_weights_and_exploration_the_learnt_ones():
    learner, _, (state, _) = updated(ema_decay=0.75, learning_rate=1e-2)
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, learner.average, state.params["actor"])
    assert distance(state.average, expected) < 1e-6
    algorithm = fpo.make(dataclasses.replace(SMALL, ema_decay=0.75), CONTINUOUS, PLAN)
    assert distance(algorithm.policy(state, "explore").params["actor"], state.params["actor"]) == 0
    assert distance(algorithm.policy(state, "greedy").params["actor"], state.average) == 0
    *_, (state, _) = updated()
    assert distance(state.average, state.params["actor"]) == 0


def test_weights_decay():
    """With no advantages and no value loss nothing is left but the decay: w - rate * decay * w."""
    learner, _, (state, _) = updated(weight_decay=0.5, learning_rate=1e-2, advantage_clamp=1e-30, value_coef=0.0)
    expected = jax.tree.map(lambda w: w * (1 - 1e-2 * 0.5), learner.params)
    assert distance(state.params, expected) < 1e-6


def test_the_entropy_bonus_spreads_actions():
    def spread(coef):
        config = dataclasses.replace(
            SMALL, entropy_samples=8, entropy_coef=coef, num_epochs=100, learning_rate=3e-3, advantage_clamp=1e-30
        )
        *_, (state, _) = one_update(fpo, config, CONTINUOUS)
        algorithm = fpo.make(config, CONTINUOUS, PLAN)
        obs = jnp.ones((500, 3))
        _, _, extras = algorithm.act(algorithm.policy(state, "explore"), (), obs, jax.random.key(1), "explore")
        return float(extras.raw_action.std())

    assert spread(1.0) > 1.05 * spread(0.0)


def test_greedy_actions_start_from_zero_noise():
    algorithm = fpo.make(SMALL, CONTINUOUS, PLAN)
    policy = algorithm.policy(algorithm.init(jax.random.key(0)), "greedy")
    made = flow.make_flow(SMALL, CONTINUOUS)
    obs = jnp.ones((5, 3))
    _, action, _ = algorithm.act(policy, (), obs, jax.random.key(0), "greedy")
    np.testing.assert_allclose(action, jnp.tanh(made.sample(policy.params["actor"], obs, jnp.zeros((5, 2)))), rtol=1e-6)


def test_golden_numbers_of_one_update():
    *_, (state, metrics) = updated(num_epochs=2, num_minibatches=3, **PLUS)
    measured = {k: float(metrics[k]) for k in ("policy_loss", "value_loss", "flow_loss", "grad_norm")}
    measured["params"] = float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(state.params)))
    message = (
        "One FPO update gives other numbers than it did: its mathematics, its initialisation or its use of keys has "
        "changed. If that was meant, write the new numbers here and say in CHANGELOG.md that curves are not comparable."
    )
    assert measured == pytest.approx(GOLDEN, rel=1e-4), message


GOLDEN = {
    "policy_loss": -0.001412038,
    "value_loss": 11.12657,
    "flow_loss": 3.452061,
    "grad_norm": 10.15689,
    "params": 46.68445,
}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"ratio": "sample"}, "ratio"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"difference_clamp": 0.0}, "difference_clamp"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"entropy_samples": 1}, "entropy_samples"),
        ({"entropy_coef": 0.1}, "entropy_samples"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, field):
    with pytest.raises(UserError, match=field):
        fpo.check(dataclasses.replace(SMALL, **change), CONTINUOUS, PLAN)


def test_discrete_actions_are_refused():
    with pytest.raises(UserError, match="continuous"):
        fpo.check(SMALL, DISCRETE, PLAN)
