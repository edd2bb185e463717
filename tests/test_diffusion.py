"""Diffusion policies: the schedule, the steps and their coefficients against closed forms."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx import diffusion
from rlx.algorithms import dppo
from rlx.types import Box, Discrete, Spec, UserError

SPEC = Spec(obs=jax.ShapeDtypeStruct((3,), jnp.float32), action=Box((2,)))
CONFIG = dppo.Config(actor_hidden=(8,), num_denoising_steps=5)


def test_the_cosine_schedule_by_its_formula():
    abar = diffusion.cosine_schedule(4)
    curve = [math.cos((k / 4 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(5)]
    np.testing.assert_allclose(abar[:4], np.asarray(curve[:4]) / curve[0], rtol=1e-12)
    assert abar[0] == 1.0 and (np.diff(abar) < 0).all()
    assert abar[4] == pytest.approx(abar[3] * (1 - 0.999))  # the last step would leave no signal at all


def test_a_step_has_the_mean_and_the_variance_of_the_posterior():
    """DDPM, eq. 7."""
    table = diffusion.make_table(6, 0, 1.0)
    abar = diffusion.cosine_schedule(6)
    for row, k in enumerate(range(6, 0, -1)):
        alpha = abar[k] / abar[k - 1]
        assert table.step[row] == k - 1
        assert table.signal[row] == pytest.approx(math.sqrt(abar[k]))
        assert table.of_clean[row] == pytest.approx(math.sqrt(abar[k - 1]) * (1 - alpha) / (1 - abar[k]))
        assert table.of_noisy[row] == pytest.approx(math.sqrt(alpha) * (1 - abar[k - 1]) / (1 - abar[k]))
        assert table.std[row] ** 2 == pytest.approx((1 - alpha) * (1 - abar[k - 1]) / (1 - abar[k]), rel=1e-5)


def test_ddim_with_all_steps_and_all_noise_is_ddpm():
    ddpm, ddim = diffusion.make_table(8, 0, 1.0), diffusion.make_table(8, 8, 1.0)
    for one, other in zip(ddpm, ddim, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("ddim", "eta"), [(0, 1.0), (3, 0.0), (3, 1.0), (1, 0.0)])
def test_the_last_step_leaves_the_predicted_action(ddim, eta):
    table = diffusion.make_table(9, ddim, eta)
    assert len(table.step) == (ddim or 9) and table.step[0] == 8
    assert (np.diff(table.step) < 0).all()
    np.testing.assert_allclose([table.of_clean[-1], table.of_noisy[-1], table.std[-1]], [1, 0, 0], atol=1e-6)


def test_each_step_keeps_the_distribution_that_noise_gives_an_action():
    """With a_hat = a, x_k ~ N(sqrt(abar_k) a, 1 - abar_k) becomes x of the next abar, in mean and variance."""
    for ddim, eta in ((0, 1.0), (4, 1.0), (4, 0.5), (4, 0.0)):
        table = diffusion.make_table(8, ddim, eta)
        after = np.append(table.signal[1:], 1.0)
        np.testing.assert_allclose(table.of_clean + table.of_noisy * table.signal, after, rtol=1e-5)
        variance = (table.of_noisy * table.noise) ** 2 + table.std**2
        np.testing.assert_allclose(variance, 1 - after**2, rtol=1e-4, atol=1e-6)


def zero_network(made):
    return jax.tree.map(jnp.zeros_like, made.init(jax.random.key(0)))


def test_a_network_that_sees_no_noise_predicts_the_scaled_input_within_the_box():
    made = diffusion.make_diffusion(CONFIG, SPEC)
    params, x = zero_network(made), jnp.asarray([[0.1, -5.0]])
    row = diffusion.Table(*(column[-2] for column in made.explore))
    clean = np.clip(np.asarray(x) / row.signal, -1, 1)
    np.testing.assert_allclose(made.mean(params, jnp.ones((1, 3)), x, row), row.of_clean * clean + row.of_noisy * x)
    free = diffusion.make_diffusion(dataclasses.replace(CONFIG, clean_clip=float("inf")), SPEC)
    expected = (row.of_clean / row.signal + row.of_noisy) * x
    np.testing.assert_allclose(free.mean(params, jnp.ones((1, 3)), x, row), expected, rtol=1e-6)


def test_the_loss_is_the_squared_error_of_the_noise():
    made = diffusion.make_diffusion(CONFIG, SPEC)
    noise = jnp.asarray([[1.0, 2.0], [0.0, -1.0]])
    loss = made.loss(zero_network(made), jnp.ones((2, 3)), jnp.ones((2, 2)), noise, jnp.asarray([0, 4]))
    np.testing.assert_allclose(loss, [2.5, 0.5])


def test_a_draw_is_a_chain_of_means_and_noise():
    made = diffusion.make_diffusion(CONFIG, SPEC)
    params, obs = made.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (7, 3))
    noise = jax.random.normal(jax.random.key(2), (5, 7, 2))
    chain, means = diffusion.draw(made, made.explore, params, obs, jnp.ones((7, 2)), noise, 0.1)
    assert chain.shape == (6, 7, 2) and means.shape == (5, 7, 2)
    np.testing.assert_array_equal(chain[0], 1.0)
    for i in range(5):
        row = diffusion.Table(*(column[i] for column in made.explore))
        np.testing.assert_allclose(means[i], made.mean(params, obs, chain[i], row), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(chain[i + 1], means[i] + max(row.std, 0.1) * noise[i], rtol=1e-5, atol=1e-6)


def test_noise_of_each_mode():
    draw = lambda config, mode: diffusion.noises(config, jax.random.key(0), (4, 2), mode)  # noqa: E731
    start, noise = draw(CONFIG, "greedy")
    assert not start.any() and not noise.any()
    start, noise = draw(CONFIG, "sample")
    assert start.all() and noise[:-1].all() and not noise[-1].any()
    start, noise = draw(CONFIG, "explore")
    assert start.all() and noise.all() and noise.shape == (5, 4, 2)
    start, noise = draw(dataclasses.replace(CONFIG, ddim_steps=3), "sample")
    assert start.all() and not noise.any() and noise.shape == (3, 4, 2)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_denoising_steps": 0}, "num_denoising_steps"),
        ({"ddim_steps": 6}, "ddim_steps"),
        ({"clean_clip": 0.0}, "clean_clip"),
        ({"residual": True, "actor_hidden": (8, 8)}, "odd number"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, field):
    with pytest.raises(UserError, match=field):
        diffusion.check(dataclasses.replace(CONFIG, **change), SPEC, "dppo")


def test_discrete_actions_are_refused():
    with pytest.raises(UserError, match="continuous"):
        diffusion.check(CONFIG, dataclasses.replace(SPEC, action=Discrete(3)), "dppo")
