"""Flow policies against numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx import flow
from rlx.algorithms import fpo
from rlx.types import Box, Discrete, Spec, UserError

SPEC = Spec(obs=jax.ShapeDtypeStruct((3,), jnp.float32), action=Box((2,)))
CONFIG = fpo.Config(actor_hidden=(8,), num_flow_steps=4, output_scale=0.5)


def with_constant_velocity(made, velocity):
    """Parameters whose network answers `velocity` whatever it is asked."""
    params = jax.tree.map(jnp.zeros_like, made.init(jax.random.key(0)))
    params["params"]["network"]["output"]["bias"] = jnp.asarray(velocity, jnp.float32)
    return params


def test_a_constant_velocity_carries_noise_by_itself():
    made = flow.make_flow(CONFIG, SPEC)
    params = with_constant_velocity(made, [2.0, -4.0])
    noise = jnp.asarray([[0.5, 0.25], [-1.0, 3.0]])
    np.testing.assert_allclose(made.sample(params, jnp.ones((2, 3)), noise), noise - jnp.asarray([[1.0, -2.0]]))


def test_losses_by_hand():
    """x = .25 (1, 0) + .75 (-1, 2), u = (2, -2), and the network answers (1, 2) times .5: the error is (1.5, -3)."""
    noise, raw_action, time = jnp.asarray([1.0, 0.0]), jnp.asarray([-1.0, 2.0]), jnp.asarray(0.25)
    found = {}
    for kind in ("velocity", "epsilon"):
        for summed in (False, True):
            made = flow.make_flow(dataclasses.replace(CONFIG, flow_loss=kind, sum_loss=summed), SPEC)
            params = with_constant_velocity(made, [1.0, 2.0])
            found[kind, summed] = float(made.loss(params, jnp.ones(3), raw_action, noise, time))
    assert found["velocity", False] == pytest.approx((1.5**2 + 3**2) / 2)
    assert found["velocity", True] == pytest.approx((1.5**2 + 3**2) / 2**0.5)
    assert found["epsilon", False] == pytest.approx(0.75**2 * (1.5**2 + 3**2) / 2)
    assert found["epsilon", True] == pytest.approx(0.75**2 * (1.5**2 + 3**2) / 2**0.5)


def test_the_epsilon_loss_is_the_error_of_the_noise_that_the_velocity_implies():
    """eps_hat = x_t + (1 - t) u_hat, for any network."""
    made = flow.make_flow(CONFIG, SPEC)
    params = made.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 4)
    obs, raw_action, noise = (jax.random.normal(k, (50, d)) for k, d in zip(keys, (3, 2, 2), strict=False))
    time = jax.random.uniform(keys[3], (50,))
    x = time[:, None] * noise + (1 - time)[:, None] * raw_action
    implied = x + (1 - time)[:, None] * made.velocity(params, obs, x, time)
    expected = np.square(noise - implied).mean(axis=-1)
    np.testing.assert_allclose(made.loss(params, obs, raw_action, noise, time), expected, rtol=1e-4, atol=1e-6)
    of_velocity = flow.make_flow(dataclasses.replace(CONFIG, flow_loss="velocity"), SPEC)
    ratio = made.loss(params, obs, raw_action, noise, time) / of_velocity.loss(params, obs, raw_action, noise, time)
    np.testing.assert_allclose(ratio, np.square(1 - np.asarray(time)), rtol=1e-4)


def test_times_are_those_of_the_steps_or_anywhere():
    made = flow.make_flow(CONFIG, SPEC)
    drawn = np.asarray(made.times(jax.random.key(0), (2000,)))
    np.testing.assert_array_equal(np.unique(drawn), [0.25, 0.5, 0.75, 1.0])
    uniform = flow.make_flow(dataclasses.replace(CONFIG, flow_times="uniform"), SPEC)
    drawn = np.asarray(uniform.times(jax.random.key(0), (2000,)))
    assert drawn.min() >= 0 and drawn.max() < 1 and abs(drawn.mean() - 0.5) < 0.03


def test_the_velocity_depends_on_all_that_it_is_asked():
    made = flow.make_flow(CONFIG, SPEC)
    params = made.init(jax.random.key(0))
    base = (jnp.zeros((1, 3)), jnp.zeros((1, 2)), jnp.zeros(1))
    first = made.velocity(params, *base)
    for i, x in enumerate(base):
        other = [*base]
        other[i] = x + 0.3
        assert (jnp.abs(made.velocity(params, *other) - first) > 1e-5).any()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_flow_steps": 0}, "num_flow_steps"),
        ({"flow_loss": "epsylon"}, "flow_loss"),
        ({"flow_times": "all"}, "flow_times"),
        ({"output_scale": 0.0}, "output_scale"),
        ({"residual": True, "actor_hidden": (8, 16, 8)}, "actor_hidden"),
        ({"residual": True, "actor_hidden": (8, 8)}, "odd number"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, field):
    with pytest.raises(UserError, match=field):
        flow.check(dataclasses.replace(CONFIG, **change), SPEC, "fpo")


def test_discrete_actions_are_refused():
    with pytest.raises(UserError, match="continuous"):
        flow.check(CONFIG, dataclasses.replace(SPEC, action=Discrete(3)), "fpo")
