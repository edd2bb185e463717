"""The agents of a Spec: shapes, padding, their networks one by one, and what they are paid together."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx import agents
from rlx.distributions import Categorical, OneHotCategorical, TanhNormal
from rlx.environment import random_action
from rlx.networks import MLP
from rlx.types import Box, Discrete, Spec, UserError
from tests.off_policy import CONTINUOUS, DISCRETE_TEAM, TEAM

KEY = jax.random.key(0)
ONE_DISCRETE = dataclasses.replace(CONTINUOUS, action=Discrete(3))
SPECS = {"team": TEAM, "discrete team": DISCRETE_TEAM, "one": CONTINUOUS, "one, discrete": ONE_DISCRETE}
every = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@every
def test_actions_of_environments_and_of_learners_are_each_others_inverse(spec):
    of = agents.made_of(spec)
    action = jnp.stack([random_action(spec, key) for key in jax.random.split(KEY, 5)])
    encoded = of.encode(action)
    assert encoded.shape == (5, spec.num_agents, of.action_size) and encoded.dtype == jnp.float32
    np.testing.assert_array_equal(of.decode(encoded), action)
    np.testing.assert_array_equal(of.merge(of.split(action)), action)
    assert of.decode(encoded).dtype == action.dtype
    if of.discrete:
        np.testing.assert_array_equal(encoded.sum(axis=-1), 1.0)


def test_an_observation_of_one_agent_is_the_row_of_one_agent():
    assert agents.made_of(CONTINUOUS).rows(jnp.ones((7, 3))).shape == (7, 1, 3)
    rows = jnp.ones((7, 2, 4))
    assert agents.made_of(TEAM).rows(rows) is rows


def test_random_actions_have_nothing_in_their_padding():
    draws = jax.vmap(lambda key: random_action(TEAM, key))(jax.random.split(KEY, 50))
    assert (draws[:, ~TEAM.action_mask] == 0).all() and (draws[:, TEAM.action_mask] != 0).all()
    draws = jax.vmap(lambda key: random_action(DISCRETE_TEAM, key))(jax.random.split(KEY, 50))
    assert int(draws[:, 0].max()) == 2 and int(draws[:, 1].max()) == 1


def test_masked_distributions_of_all_agents_are_those_of_each():
    mean = jax.random.normal(KEY, (6, 2, 3))
    pi = agents.masked(TanhNormal(mean, jnp.ones_like(mean)), TEAM.action_mask)
    value = pi.sample(KEY)
    for i, size in enumerate((3, 1)):
        alone = TanhNormal(mean[:, i, :size], jnp.ones((6, size)))
        np.testing.assert_allclose(pi.log_prob(value)[:, i], alone.log_prob(value[:, i, :size]), rtol=1e-6)
        of_one = agents.masked(TanhNormal(mean[:, i], jnp.ones((6, 3))), jnp.asarray(TEAM.action_mask)[i])
        np.testing.assert_array_equal(of_one.log_prob(value[:, i]), pi.log_prob(value)[:, i])
    for kind in (Categorical, OneHotCategorical):
        pi = agents.masked(kind(mean), DISCRETE_TEAM.action_mask)
        np.testing.assert_allclose(pi.entropy()[:, 1], Categorical(mean[:, 1, :2]).entropy(), rtol=1e-5)


@pytest.mark.parametrize("share", [False, True])
@every
def test_networks_of_all_agents_give_each_what_its_own_gives_and_train_one_by_one(spec, share):
    of = agents.made_of(spec)
    network = MLP((4,), 2)
    networks = agents.make_networks(network.init, network.apply, of, share)
    params = networks.init(KEY)
    rows = jax.random.normal(KEY, (5, 6, of.num_agents, of.obs_size))
    out = networks.apply(params, rows)
    assert out.shape == (5, 6, of.num_agents, 2)
    for i in range(of.num_agents):
        one = networks.apply_one(networks.take(params, jnp.int32(i)), jnp.int32(i), rows[:, :, i])
        np.testing.assert_allclose(one, out[:, :, i], rtol=1e-5, atol=1e-6)
    last = jnp.int32(of.num_agents - 1)
    changed = networks.put(params, last, jax.tree.map(lambda x: x + 1.0, networks.take(params, last)))
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, params)
    moved = np.asarray((networks.apply(changed, rows) != out).any(axis=(0, 1, 3)))
    np.testing.assert_array_equal(moved, [share] * (of.num_agents - 1) + [True])


def test_networks_start_apart_and_one_that_is_shared_knows_whom_it_serves():
    of, network = agents.made_of(TEAM), MLP((4,), 2)
    alike = jnp.broadcast_to(jnp.arange(4.0), (2, 4))
    for share in (False, True):
        networks = agents.make_networks(network.init, network.apply, of, share)
        params = networks.init(KEY)
        out = networks.apply(params, alike)
        assert not np.allclose(out[0], out[1])
        kernel = params["params"]["Dense_0"]["kernel"]
        assert kernel.shape == ((4 + 2, 4) if share else (2, 4, 4))
        doubled = networks.each(lambda p: jax.tree.map(lambda x: 2 * x, p))(params)
        np.testing.assert_array_equal(doubled["params"]["Dense_0"]["kernel"], 2 * kernel)


def test_a_team_is_paid_the_sum():
    apart = jnp.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_array_equal(agents.team(apart, (2, 3)), apart[..., 0] + apart[..., 1])
    np.testing.assert_array_equal(agents.team(apart[..., 0], (2, 3)), apart[..., 0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dataclasses.replace(TEAM, action=Box((3, 3))), "actions of shape"),
        (dataclasses.replace(TEAM, action=Discrete(3)), "actions of shape"),
        (dataclasses.replace(TEAM, num_agents=3), "observations of shape"),
        (dataclasses.replace(TEAM, obs={"state": TEAM.obs["state"]}), "agents"),
        (Spec(jax.ShapeDtypeStruct((2, 2), jnp.float32), Box((1,))), "observations of shape"),
    ],
    ids=["action", "discrete", "obs", "key", "image"],
)
def test_environments_that_agents_cannot_be_trained_in_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        agents.check(spec, "agents", "hasac")
