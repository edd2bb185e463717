"""Distributions against scipy, numerical integration, automatic differentiation and Monte Carlo."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from rlx.distributions import Categorical, Normal, OneHotCategorical, TanhNormal, log_det_tanh, straight_through

MEAN = jnp.array([[0.3, -1.2, 2.0], [0.0, 0.5, -0.7]], jnp.float32)
STD = jnp.array([[0.5, 1.5, 0.1], [1.0, 0.3, 2.0]], jnp.float32)
LOGITS = jnp.array([[0.0, 1.0, -2.0, 0.5], [3.0, 3.0, 0.0, -1.0]], jnp.float32)
KEY = jax.random.key(0)
CONTINUOUS = [Normal, TanhNormal]


def examples():
    """Two distributions of each class, and a value of the first."""
    return {
        "Normal": (Normal(MEAN, STD), Normal(MEAN + 0.3, 1.7 * STD), MEAN - 0.5),
        "TanhNormal": (TanhNormal(MEAN, STD), TanhNormal(MEAN + 0.3, 1.7 * STD), MEAN - 0.5),
        "Categorical": (Categorical(LOGITS), Categorical(LOGITS[:, ::-1]), jnp.array([2, 0], jnp.int32)),
        "OneHotCategorical": (
            OneHotCategorical(LOGITS),
            OneHotCategorical(LOGITS[:, ::-1]),
            jnp.eye(4)[jnp.array([2, 0])],
        ),
    }


@pytest.fixture(params=["Normal", "TanhNormal", "Categorical", "OneHotCategorical"])
def example(request):
    return examples()[request.param]


# --- all classes ---


def test_results_are_batched_over_the_leading_axes_and_summed_over_the_last(example):
    p, q, value = example
    for result in (p.log_prob(value), p.entropy(KEY), p.kl(q)):
        assert result.shape == (2,) and result.dtype == jnp.float32
    assert p.sample(KEY).shape == p.mode().shape == p.to_action(value).shape == value.shape
    assert p.sample(KEY).dtype == p.mode().dtype == p.to_action(value).dtype == value.dtype


def test_a_distribution_is_a_pytree_and_vmap_equals_the_batch(example):
    p, q, value = example
    calls = [lambda p, q, x: p.log_prob(x), lambda p, q, x: p.kl(q)]
    for call in calls:
        np.testing.assert_allclose(jax.jit(jax.vmap(call))(p, q, value), call(p, q, value), rtol=1e-5, atol=1e-6)


def test_the_key_decides_the_sample(example):
    p, _, _ = example
    p = jax.tree.map(lambda x: jnp.broadcast_to(x, (50, *x.shape)), p)
    np.testing.assert_array_equal(p.sample(KEY), p.sample(KEY))
    assert not np.array_equal(p.sample(KEY), p.sample(jax.random.key(1)))
    assert not np.array_equal(p.sample(KEY)[0], p.sample(KEY)[1])


def test_kl_to_itself_is_zero_and_to_others_positive(example):
    p, q, _ = example
    np.testing.assert_allclose(p.kl(p), 0.0, atol=1e-6)
    assert (p.kl(q) > 0.01).all()


def test_kl_equals_the_mean_log_ratio_of_samples(example):
    p, q, _ = example
    samples = jax.vmap(p.sample)(jax.random.split(KEY, 50_000))
    ratios = np.asarray(jax.vmap(p.log_prob)(samples) - jax.vmap(q.log_prob)(samples), np.float64)
    error = ratios.std(axis=0) / np.sqrt(len(ratios))
    assert (np.abs(ratios.mean(axis=0) - p.kl(q)) < 4 * error).all()
    assert (error < 0.03).all()


def test_entropy_equals_the_mean_negative_log_probability_of_samples(example):
    p, _, _ = example
    keys = jax.random.split(KEY, 50_000)
    surprise = -np.asarray(jax.vmap(lambda key: p.log_prob(p.sample(key)))(keys), np.float64)
    entropy = np.asarray(jax.vmap(p.entropy)(jax.random.split(jax.random.key(1), 50_000)), np.float64)
    error = np.sqrt((surprise.var(axis=0) + entropy.var(axis=0)) / len(keys))
    assert (np.abs(surprise.mean(axis=0) - entropy.mean(axis=0)) < 4 * error).all()
    assert (error < 0.05).all()


# --- Normal ---


def test_normal_log_prob_and_entropy_equal_scipy():
    reference = scipy.stats.norm(np.asarray(MEAN, np.float64), np.asarray(STD, np.float64))
    value = MEAN + jnp.array([0.1, -2.0, 0.3])[None]
    np.testing.assert_allclose(Normal(MEAN, STD).log_prob(value), reference.logpdf(value).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(Normal(MEAN, STD).entropy(KEY), reference.entropy().sum(-1), rtol=1e-5)


def test_normal_kl_by_hand():
    # log(2/1) + (1 + (1 - 3)^2) / (2 * 4) - 1/2, twice
    p = Normal(jnp.ones(2), jnp.ones(2))
    q = Normal(jnp.full(2, 3.0), jnp.full(2, 2.0))
    assert float(p.kl(q)) == pytest.approx(2 * (np.log(2) + 5 / 8 - 0.5), rel=1e-6)


@pytest.mark.parametrize("make", CONTINUOUS)
def test_samples_of_u_have_the_mean_and_deviation_asked_for(make):
    samples = np.asarray(jax.vmap(make(MEAN, STD).sample)(jax.random.split(KEY, 20_000)))
    np.testing.assert_allclose(samples.mean(axis=0), MEAN, atol=0.06)
    np.testing.assert_allclose(samples.std(axis=0), STD, rtol=0.03)


@pytest.mark.parametrize("make", CONTINUOUS)
def test_samples_are_reparameterised(make):
    noise = make(jnp.zeros(3), jnp.ones(3)).sample(KEY)
    mean_gradient, std_gradient = jax.grad(lambda m, s: make(m, s).sample(KEY).sum(), argnums=(0, 1))(MEAN[0], STD[0])
    np.testing.assert_allclose(mean_gradient, 1.0)
    np.testing.assert_allclose(std_gradient, noise, rtol=1e-6)


def test_actions_of_a_normal_are_clipped_to_the_box():
    np.testing.assert_array_equal(Normal(MEAN, STD).to_action(jnp.array([-7.0, 0.25, 1.5])), [-1.0, 0.25, 1.0])


@pytest.mark.parametrize("make", CONTINUOUS)
@pytest.mark.parametrize("std", [1e-8, 1e-4, 1e4])
def test_extreme_deviations_stay_finite_with_their_gradients(make, std):
    def total(mean, log_std):
        p = make(mean, jnp.exp(log_std))
        q = make(mean + 0.1 * jnp.exp(log_std), 2 * jnp.exp(log_std))
        return (p.log_prob(p.sample(KEY)) + p.entropy(KEY) + p.kl(q)).sum()

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(MEAN, jnp.full(MEAN.shape, np.log(std), jnp.float32))
    assert jnp.isfinite(value) and all(jnp.isfinite(g).all() for g in gradients)


def test_kl_of_tiny_deviations_is_exact():
    """The square of 1e-25 is 0 in float32."""
    p, q = Normal(jnp.zeros(1), jnp.full(1, 1e-25)), Normal(jnp.zeros(1), jnp.full(1, 2e-25))
    assert float(p.kl(q)) == pytest.approx(np.log(2) + 1 / 8 - 0.5, rel=1e-5)


# --- TanhNormal ---


@pytest.mark.parametrize("u", [-5.0, -1.0, -1e-3, 0.0, 0.4, 2.0, 5.0])
def test_log_det_is_the_log_derivative_of_tanh(u):
    assert float(log_det_tanh(jnp.float32(u))) == pytest.approx(float(jnp.log(jax.grad(jnp.tanh)(u))), abs=1e-3)
    exact = -2 * np.log(np.cosh(np.float64(u)))
    assert float(log_det_tanh(jnp.float32(u))) == pytest.approx(exact, abs=2e-6)


@pytest.mark.parametrize("u", [30.0, 1e3, 1e6, 1e30])
def test_log_det_of_large_values_is_finite_symmetric_and_linear(u):
    for value in (u, -u):
        assert float(log_det_tanh(jnp.float32(value))) == pytest.approx(2 * np.log(2) - 2 * u, rel=1e-6)
        assert float(jax.grad(log_det_tanh)(jnp.float32(value))) == -2.0 * np.sign(value)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.3), (-1.0, 1.5)])
def test_the_density_of_tanh_normal_actions_integrates_to_1(mean, std):
    p = TanhNormal(jnp.array([mean], jnp.float32), jnp.array([std], jnp.float32))
    actions = np.linspace(-1, 1, 200_001)[1:-1]
    density = jnp.exp(jax.vmap(p.log_prob)(jnp.asarray(np.arctanh(actions)[:, None], jnp.float32)))
    assert scipy.integrate.trapezoid(density, actions) == pytest.approx(1.0, abs=2e-3)


def test_the_density_of_tanh_normal_actions_matches_their_histogram():
    p = TanhNormal(jnp.array([0.4], jnp.float32), jnp.array([0.8], jnp.float32))
    actions = np.asarray(p.to_action(jax.vmap(p.sample)(jax.random.split(KEY, 100_000))))[:, 0]
    edges = np.linspace(-0.9, 0.9, 19)
    histogram = np.histogram(actions, edges)[0] / len(actions) / np.diff(edges)
    centres = jnp.asarray(np.arctanh((edges[1:] + edges[:-1]) / 2)[:, None], jnp.float32)
    np.testing.assert_allclose(jnp.exp(jax.vmap(p.log_prob)(centres)), histogram, atol=0.03)


def test_tanh_normal_log_prob_by_hand():
    # At u = 0 the Jacobian is 1; at u = 1 it is 1 - tanh(1)^2 = 0.4199743
    p = TanhNormal(jnp.zeros(1), jnp.ones(1))
    assert float(p.log_prob(jnp.zeros(1))) == pytest.approx(-0.9189385, rel=1e-6)
    assert float(p.log_prob(jnp.ones(1))) == pytest.approx(-0.9189385 - 0.5 - np.log(0.4199743), rel=1e-6)


def test_tanh_normal_log_prob_of_saturated_actions_is_finite():
    p = TanhNormal(jnp.zeros(2), jnp.ones(2))
    value, gradient = jax.value_and_grad(lambda u: p.log_prob(u))(jnp.array([50.0, -50.0]))
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(p.to_action(jnp.array([50.0, -50.0])), [1.0, -1.0])


def test_tanh_normal_entropy_is_an_unbiased_estimate_with_the_right_gradient():
    mean, std = 0.6, 0.9
    grid = np.linspace(mean - 9 * std, mean + 9 * std, 20_001)

    def exact(mean, std):
        log_det = -2 * np.log(np.cosh(grid))
        weights = scipy.stats.norm(mean, std).pdf(grid)
        return 0.5 * np.log(2 * np.pi * np.e * std**2) + scipy.integrate.trapezoid(weights * log_det, grid)

    def estimate(parameters):
        p = TanhNormal(parameters[:1], parameters[1:])
        return jax.vmap(p.entropy)(jax.random.split(KEY, 40_000)).mean()

    value, gradient = jax.value_and_grad(estimate)(jnp.array([mean, std], jnp.float32))
    assert float(value) == pytest.approx(exact(mean, std), abs=0.02)
    expected = [(exact(mean + 1e-4, std) - exact(mean - 1e-4, std)) / 2e-4]
    expected += [(exact(mean, std + 1e-4) - exact(mean, std - 1e-4)) / 2e-4]
    np.testing.assert_allclose(gradient, expected, atol=0.03)


def test_tanh_normal_kl_is_that_of_the_actions():
    p = TanhNormal(jnp.array([0.2], jnp.float32), jnp.array([0.5], jnp.float32))
    q = TanhNormal(jnp.array([-0.3], jnp.float32), jnp.array([0.8], jnp.float32))
    actions = np.linspace(-1, 1, 100_001)[1:-1]
    u = jnp.asarray(np.arctanh(actions)[:, None], jnp.float32)
    log_p, log_q = (np.asarray(jax.vmap(d.log_prob)(u)) for d in (p, q))
    expected = scipy.integrate.trapezoid(np.exp(log_p) * (log_p - log_q), actions)
    assert float(p.kl(q)) == pytest.approx(expected, abs=1e-3)


# --- Categorical ---


def test_categorical_equals_scipy():
    probs = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    p = Categorical(LOGITS)
    for value in range(4):
        log_prob = p.log_prob(jnp.full(2, value, jnp.int32))
        np.testing.assert_allclose(log_prob, np.log(probs[:, value]), rtol=1e-5)
    np.testing.assert_allclose(p.entropy(KEY), scipy.stats.entropy(probs, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(
        p.kl(Categorical(LOGITS[:, ::-1])), scipy.stats.entropy(probs, probs[:, ::-1], axis=-1), rtol=1e-5
    )


def test_categorical_samples_have_the_frequencies_asked_for_and_are_int32():
    samples = np.asarray(jax.vmap(Categorical(LOGITS).sample)(jax.random.split(KEY, 40_000)))
    frequencies = (samples[..., None] == np.arange(4)).mean(axis=0)
    np.testing.assert_allclose(frequencies, jax.nn.softmax(LOGITS), atol=0.012)
    assert samples.dtype == np.int32


def test_categorical_mode_is_the_first_most_probable_value():
    np.testing.assert_array_equal(Categorical(LOGITS).mode(), [1, 0])


def test_categorical_does_not_depend_on_a_constant_added_to_the_logits():
    p, shifted = Categorical(LOGITS), Categorical(LOGITS + 100.0)
    np.testing.assert_allclose(p.log_prob(jnp.array([1, 2])), shifted.log_prob(jnp.array([1, 2])), rtol=1e-4)
    np.testing.assert_allclose(p.kl(shifted), 0.0, atol=1e-5)


def test_forbidden_values_are_never_drawn_and_leave_everything_finite():
    mask = jnp.array([0.0, -jnp.inf, 0.0, -jnp.inf])
    allowed = LOGITS[0, jnp.array([0, 2])]
    p, q = Categorical(LOGITS[0] + mask), Categorical(LOGITS[1] + mask)
    samples = jax.vmap(p.sample)(jax.random.split(KEY, 1000))
    assert set(np.asarray(samples).tolist()) == {0, 2}
    np.testing.assert_allclose(p.entropy(), Categorical(allowed).entropy(), rtol=1e-6)
    np.testing.assert_allclose(p.kl(q), Categorical(allowed).kl(Categorical(LOGITS[1, jnp.array([0, 2])])), rtol=1e-5)
    assert p.log_prob(jnp.int32(1)) == -jnp.inf
    assert Categorical(LOGITS[0]).kl(p) == jnp.inf

    def total(x, y):
        p, q = Categorical(x + mask), Categorical(y + mask)
        return p.entropy() + p.kl(q) + p.log_prob(jnp.int32(2))

    for gradient in jax.grad(total, argnums=(0, 1))(LOGITS[0], LOGITS[1]):
        assert jnp.isfinite(gradient).all() and (gradient[jnp.array([1, 3])] == 0).all()


def test_actions_of_a_categorical_are_its_values():
    np.testing.assert_array_equal(Categorical(LOGITS).to_action(jnp.array([3, 1])), [3, 1])


# --- padding ---


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_padded_entries_are_in_no_density_and_no_gradient_and_0_in_actions(kind):
    mask = jnp.array([[True, False, True], [True, True, False]])
    padded, other = kind(MEAN, STD, mask), kind(MEAN + 0.3, 1.7 * STD, mask)
    value = padded.sample(KEY)
    for row, real in enumerate(([0, 2], [0, 1])):
        real = jnp.array(real)
        plain, plain_other = kind(MEAN[row, real], STD[row, real]), kind(MEAN[row, real] + 0.3, 1.7 * STD[row, real])
        assert float(padded.log_prob(value)[row]) == pytest.approx(float(plain.log_prob(value[row, real])), rel=1e-6)
        assert float(padded.kl(other)[row]) == pytest.approx(float(plain.kl(plain_other)), rel=1e-6)
    if kind is Normal:
        assert float(padded.entropy()[1]) == pytest.approx(float(Normal(MEAN[1, :2], STD[1, :2]).entropy()), rel=1e-6)
    assert (np.asarray(padded.to_action(value))[~np.asarray(mask)] == 0).all()
    for f in (lambda p: p.log_prob(p.sample(KEY)).sum(), lambda p: p.entropy(KEY).sum(), lambda p: p.kl(other).sum()):
        grads = jax.grad(lambda mean, std: f(kind(mean, std, mask)), (0, 1))(MEAN, STD)  # noqa: B023
        for grad in grads:
            assert (np.asarray(grad)[~np.asarray(mask)] == 0).all()


# --- OneHotCategorical ---


def test_one_hot_values_are_those_of_the_categorical():
    p, plain = OneHotCategorical(LOGITS[0]), Categorical(LOGITS[0])
    draws = jax.vmap(p.sample)(jax.random.split(KEY, 20_000))
    np.testing.assert_array_equal(jnp.sort(draws, axis=-1), jnp.broadcast_to(jnp.eye(4)[3], draws.shape))
    np.testing.assert_allclose(draws.mean(axis=0), jax.nn.softmax(LOGITS[0]), atol=0.02)
    for i in range(4):
        assert float(p.log_prob(jnp.eye(4)[i])) == pytest.approx(float(plain.log_prob(jnp.int32(i))), rel=1e-6)
    np.testing.assert_array_equal(p.mode(), jnp.eye(4)[1])
    assert float(p.entropy()) == float(plain.entropy())


def test_gradients_pass_through_one_hot_values_as_through_the_softmax():
    weights = jnp.array([1.0, -2.0, 0.5, 3.0])
    hard = jax.grad(lambda logits: jnp.vdot(straight_through(logits), weights))(LOGITS[0])
    soft = jax.grad(lambda logits: jnp.vdot(jax.nn.softmax(logits), weights))(LOGITS[0])
    np.testing.assert_allclose(hard, soft, rtol=1e-6)
    assert (soft != 0).all()
    drawn = jax.grad(lambda logits: jnp.vdot(OneHotCategorical(logits).sample(KEY), weights))(LOGITS[0])
    noise = jax.random.gumbel(KEY, (4,))
    expected = jax.grad(lambda logits: jnp.vdot(jax.nn.softmax(logits + noise), weights))(LOGITS[0])
    np.testing.assert_allclose(drawn, expected, rtol=1e-5)


def test_forbidden_values_of_one_hot_vectors_are_never_drawn_and_finite_in_every_gradient():
    p = OneHotCategorical(jnp.array([0.3, -jnp.inf, 0.1]))
    assert float(jax.vmap(p.sample)(jax.random.split(KEY, 500))[:, 1].max()) == 0
    plain = Categorical(jnp.array([0.3, 0.1]))
    assert float(p.log_prob(jnp.eye(3)[2])) == pytest.approx(float(plain.log_prob(jnp.int32(1))), rel=1e-6)

    def log_prob(logits):
        pi = OneHotCategorical(jnp.where(jnp.array([True, False, True]), logits, -jnp.inf))
        return pi.log_prob(pi.sample(KEY)) + pi.entropy()

    grad = jax.grad(log_prob)(jnp.array([0.3, 0.2, 0.1]))
    assert np.isfinite(grad).all() and grad[1] == 0 and grad[0] != 0
