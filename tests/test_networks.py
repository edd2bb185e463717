"""Networks: shapes, initial distributions, memory, and the messages for wrong names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx.networks import (
    ACTIVATIONS,
    GRU,
    MLP,
    ResidualMLP,
    TimeMLP,
    activation,
    check_residual,
    embed_time,
    select,
)
from rlx.types import UserError

KEY = jax.random.key(0)


def kernels(network, inputs=64):
    params = network.init(KEY, jnp.zeros(inputs))["params"]
    return {name: layer["kernel"] for name, layer in params.items() if "kernel" in layer}


def test_mlp_equals_its_layers_written_out():
    x = jax.random.normal(KEY, (5, 3))
    network = MLP((8, 6), out=2, activation="tanh")
    params = network.init(KEY, x)
    p = params["params"]
    hidden = jnp.tanh(jnp.tanh(x @ p["Dense_0"]["kernel"]) @ p["Dense_1"]["kernel"])  # biases start at zero
    np.testing.assert_allclose(network.apply(params, x), hidden @ p["output"]["kernel"], atol=1e-5)
    for layer in p.values():
        np.testing.assert_array_equal(layer["bias"], 0.0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_mlp_without_hidden_layers_is_linear_and_without_output_ends_activated():
    x = jax.random.normal(KEY, (5, 3))
    linear, params = MLP((), out=2).init_with_output(KEY, x)
    assert linear.shape == (5, 2) and set(params["params"]) == {"output"}
    hidden, params = MLP((4,), activation="relu").init_with_output(KEY, x)
    assert hidden.shape == (5, 4) and set(params["params"]) == {"Dense_0"}
    assert (hidden >= 0).all() and (hidden == 0).any() and (hidden > 0).any()


def test_hidden_kernels_are_uniform_with_variance_one_over_the_inputs():
    kernel = kernels(MLP((256, 256), out=256))["Dense_1"]
    assert float(jnp.var(kernel)) == pytest.approx(1 / 256, rel=0.03)
    assert float(jnp.abs(kernel).max()) <= np.sqrt(3 / 256)


def test_output_scale_scales_the_variance_of_the_output_kernel_alone():
    one, hundredth = (kernels(MLP((256,), out=256, output_scale=scale)) for scale in (1.0, 0.01))
    assert float(jnp.var(one["output"])) == pytest.approx(1 / 256, rel=0.03)
    np.testing.assert_allclose(hundredth["output"], 0.1 * one["output"], rtol=1e-5)
    np.testing.assert_array_equal(hundredth["Dense_0"], one["Dense_0"])


def test_layer_norm_follows_each_hidden_activation_and_not_the_output():
    x = 10 * jax.random.normal(KEY, (5, 3))
    hidden = MLP((32, 32), layer_norm=True).init_with_output(KEY, x)[0]
    np.testing.assert_allclose(hidden.mean(axis=-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(hidden.std(axis=-1), 1.0, rtol=1e-2)
    params = MLP((32, 32), out=2, layer_norm=True).init(KEY, x)["params"]
    assert set(params) == {"Dense_0", "LayerNorm_0", "Dense_1", "LayerNorm_1", "output"}


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_is_elementwise_and_not_linear(name):
    x = jnp.linspace(-2, 2, 9)
    y = activation(name)(x)
    assert y.shape == x.shape
    np.testing.assert_allclose(jax.vmap(activation(name))(x), y, rtol=1e-6)
    assert float(jnp.abs(jnp.diff(y, 2)).max()) > 1e-2


def test_an_unknown_activation_is_refused_with_close_matches():
    with pytest.raises(UserError, match="'swich' does not exist.*swish"):
        activation("swich")
    with pytest.raises(UserError, match="(?s)'zzz'.*elu.*tanh"):
        MLP((4,), activation="zzz").init(KEY, jnp.zeros(3))


def test_gru_equals_its_equations_and_outputs_its_memory():
    network = GRU(4)
    memory, x = jax.random.normal(KEY, (2, 4)), jax.random.normal(jax.random.key(1), (2, 3))
    params = network.init(KEY, memory, x)
    p = params["params"]["GRUCell_0"]
    dense = {name: layer["kernel"] for name, layer in p.items()}  # biases start at zero
    reset = jax.nn.sigmoid(x @ dense["ir"] + memory @ dense["hr"])
    update = jax.nn.sigmoid(x @ dense["iz"] + memory @ dense["hz"])
    candidate = jnp.tanh(x @ dense["in"] + reset * (memory @ dense["hn"]))
    new_memory, y = network.apply(params, memory, x)
    np.testing.assert_allclose(new_memory, (1 - update) * candidate + update * memory, atol=1e-5)
    np.testing.assert_array_equal(new_memory, y)


def test_gru_memory_starts_at_zero_unbatched_and_is_a_fixed_point_in_shape_and_dtype():
    memory = GRU(4).initial_memory()
    np.testing.assert_array_equal(memory, np.zeros(4, np.float32))
    (new_memory, _), _ = GRU(4).init_with_output(KEY, memory, jnp.ones(3))
    assert (new_memory.shape, new_memory.dtype, new_memory.weak_type) == (memory.shape, memory.dtype, memory.weak_type)


def test_gru_carries_what_it_saw_first():
    network = GRU(8)
    params = network.init(KEY, network.initial_memory(), jnp.ones(1))

    def last(first):
        xs = jnp.zeros((5, 1)).at[0].set(first)
        return jax.lax.scan(lambda m, x: network.apply(params, m, x), network.initial_memory(), xs)[1][-1]

    assert float(jnp.abs(last(1.0) - last(-1.0)).max()) > 1e-3


def test_select_picks_the_key_of_a_dict_and_passes_arrays_through():
    obs = {"state": jnp.ones(2), "privileged_state": jnp.zeros(3)}
    assert select(obs, "privileged_state") is obs["privileged_state"]
    assert select(obs["state"], "state") is obs["state"]
    spec = jax.ShapeDtypeStruct((3,), jnp.float32)
    assert select({"state": spec}, "state") is spec


def test_select_names_the_keys_there_are_while_tracing():
    obs = {"state": jnp.ones(2), "privileged_state": jnp.zeros(3)}
    with pytest.raises(UserError, match="'privileged'.*Did you mean privileged_state.*privileged_state, state"):
        jax.jit(lambda o: select(o, "privileged"))(obs)


def test_residual_blocks_add_to_their_input():
    """Blocks of zero weights change nothing: what is left is the first layer and the output."""
    network = ResidualMLP((8, 8, 8, 8, 8), 2)
    x = jax.random.normal(KEY, (4, 3))
    params = network.init(KEY, x)
    assert len(params["params"]) == 6  # first, two blocks of two, output
    for i in range(1, 5):
        params["params"][f"Dense_{i}"] = jax.tree.map(jnp.zeros_like, params["params"][f"Dense_{i}"])
    first, out = params["params"]["Dense_0"], params["params"]["output"]
    hidden = jax.nn.mish(x @ first["kernel"] + first["bias"][None])
    expected = hidden @ out["kernel"] + out["bias"][None]
    np.testing.assert_allclose(network.apply(params, x), expected, rtol=1e-4, atol=1e-6)


def test_times_are_embedded_by_cosines_and_sines():
    found = embed_time(jnp.asarray([[0.0, 0.5]]), (1.0, 4.0))
    expected = [[[1, 1, 0, 0], [np.cos(0.5), np.cos(2), np.sin(0.5), np.sin(2)]]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"residual": True}, {"embed_hidden": 4}])
def test_a_network_of_time_has_the_shape_of_the_action(settings):
    network = TimeMLP((8, 8, 8), 2, (1.0, 2.0), **settings)
    inputs = (jnp.ones((5, 4, 3)), jnp.ones((5, 4, 2)), jnp.ones((5, 4)))
    out = network.apply(network.init(KEY, *(x[0, 0] for x in inputs)), *inputs)
    assert out.shape == (5, 4, 2) and out.dtype == jnp.float32


@pytest.mark.parametrize("widths", [(), (8, 8), (8, 8, 4)])
def test_residual_widths_are_equal_and_odd_in_number(widths):
    with pytest.raises(UserError, match="algo.actor_hidden.*odd number"):
        check_residual(widths, "algo.actor_hidden")
