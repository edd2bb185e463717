"""Returns against hand-computed numbers, loops that follow the definitions, and identities."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx import returns

GAMMA, LAMBDA = 0.9, 0.8


@pytest.fixture(params=["jit", "no_jit"])
def variant(request):
    """Wraps a function of arrays; what is passed by keyword stays static."""
    wrap = jax.jit if request.param == "jit" else lambda f: f
    return lambda f, **static: wrap(functools.partial(f, **static))


def floats(*values):
    return jnp.array(values, jnp.float32)


def bools(*values):
    return jnp.array(values, bool)


def random_stream(seed, length=12, endings=True):
    """rewards, values, next_values, terminated, truncated; some steps carry both flags."""
    rng = np.random.default_rng(seed)
    rewards, values, next_values = rng.normal(size=(3, length)).astype(np.float32)
    terminated, truncated = rng.random((2, length)) < (0.25 if endings else 0.0)
    return tuple(jnp.asarray(x) for x in (rewards, values, next_values, terminated, truncated))


def continuing_stream(seed, length=12):
    """A stream without endings, whose next_values are the values one step later."""
    rewards, values, next_values, terminated, truncated = random_stream(seed, length, endings=False)
    return rewards, values, jnp.concatenate([values[1:], next_values[-1:]]), terminated, truncated


# --- GAE ---


def test_gae_without_endings_by_hand(variant):
    # deltas: 1 + .5*3 - 2 = .5, 2 + .5*4 - 3 = 1; A_1 = 1, A_0 = .5 + .5*.5*1 = .75
    f = variant(returns.gae)
    advantages, targets = f(floats(1, 2), floats(2, 3), floats(3, 4), bools(0, 0), bools(0, 0), 0.5, 0.5)
    np.testing.assert_allclose(advantages, [0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(targets, [2.75, 4.0], rtol=1e-6)
    assert advantages.dtype == targets.dtype == jnp.float32


def test_gae_terminated_bootstraps_zero_and_cuts_by_hand(variant):
    # delta_0 = 1 - 2 = -1; delta_1 = 2 + .5*4 - 3 = 1
    f = variant(returns.gae)
    advantages, targets = f(floats(1, 2), floats(2, 3), floats(30, 4), bools(1, 0), bools(0, 0), 0.5, 0.5)
    np.testing.assert_allclose(advantages, [-1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(targets, [1.0, 4.0], rtol=1e-6)


def test_gae_truncated_bootstraps_the_successor_and_cuts_by_hand(variant):
    # delta_0 = 1 + .5*30 - 2 = 14; nothing of A_1 = 1 flows back
    f = variant(returns.gae)
    advantages, targets = f(floats(1, 2), floats(2, 3), floats(30, 4), bools(0, 0), bools(1, 0), 0.5, 0.5)
    np.testing.assert_allclose(advantages, [14.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(targets, [16.0, 4.0], rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_gae_is_the_discounted_sum_of_deltas_up_to_the_first_ending(variant, seed):
    rewards, values, next_values, terminated, truncated = (np.asarray(x) for x in random_stream(seed))
    expected = np.zeros(len(rewards))
    for t in range(len(rewards)):
        for k in range(t, len(rewards)):
            bootstrap = 0.0 if terminated[k] else GAMMA * next_values[k]
            expected[t] += (GAMMA * LAMBDA) ** (k - t) * (rewards[k] + bootstrap - values[k])
            if terminated[k] or truncated[k]:
                break
    advantages, targets = variant(returns.gae)(*random_stream(seed), GAMMA, LAMBDA)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(targets, expected + values, rtol=1e-5, atol=1e-5)


def test_gae_targets_are_lambda_returns_where_values_are_consistent(variant):
    rewards, values, next_values, terminated, truncated = continuing_stream(3)
    truncated = truncated.at[4].set(True)
    next_values = next_values.at[4].set(7.0)  # the final observation is not the one after the reset
    terminated = terminated.at[8].set(True)
    _, targets = variant(returns.gae)(rewards, values, next_values, terminated, truncated, GAMMA, LAMBDA)
    expected = variant(returns.lambda_returns)(rewards, next_values, terminated, truncated, GAMMA, LAMBDA)
    np.testing.assert_allclose(targets, expected, rtol=1e-5, atol=1e-5)


# --- lambda returns ---


def test_lambda_returns_by_hand(variant):
    # G_2 = 3 + .5*6 = 6; G_1 = 2 + .5*(.5*5 + .5*6) = 4.75; G_0 = 1 + .5*(.5*4 + .5*4.75) = 3.1875
    f = variant(returns.lambda_returns)
    targets = f(floats(1, 2, 3), floats(4, 5, 6), bools(0, 0, 0), bools(0, 0, 0), 0.5, 0.5)
    np.testing.assert_allclose(targets, [3.1875, 4.75, 6.0], rtol=1e-6)
    # cut at 1: terminated G_1 = 2, G_0 = 1 + .5*(2 + 1) = 2.5; truncated G_1 = 2 + .5*5 = 4.5, G_0 = 1 + .5*4.25
    targets = f(floats(1, 2, 3), floats(4, 5, 6), bools(0, 1, 0), bools(0, 0, 0), 0.5, 0.5)
    np.testing.assert_allclose(targets, [2.5, 2.0, 6.0], rtol=1e-6)
    targets = f(floats(1, 2, 3), floats(4, 5, 6), bools(0, 0, 0), bools(0, 1, 0), 0.5, 0.5)
    np.testing.assert_allclose(targets, [3.125, 4.5, 6.0], rtol=1e-6)


def test_lambda_1_is_monte_carlo_with_a_bootstrap_at_the_end_of_the_stream(variant):
    rewards, _, next_values, terminated, truncated = random_stream(0, endings=False)
    length = len(rewards)
    expected = [
        sum(GAMMA ** (k - t) * rewards[k] for k in range(t, length)) + GAMMA ** (length - t) * next_values[-1]
        for t in range(length)
    ]
    targets = variant(returns.lambda_returns)(rewards, next_values, terminated, truncated, GAMMA, 1.0)
    np.testing.assert_allclose(targets, expected, rtol=1e-5, atol=1e-5)


def test_lambda_0_is_one_step_td(variant):
    rewards, _, next_values, terminated, truncated = random_stream(1)
    expected = rewards + GAMMA * np.where(terminated, 0.0, next_values)
    targets = variant(returns.lambda_returns)(rewards, next_values, terminated, truncated, GAMMA, 0.0)
    np.testing.assert_allclose(targets, expected, rtol=1e-6)
    assert terminated.any() and (truncated & ~terminated).any()


def test_lambda_return_is_the_geometric_average_of_n_step_returns():
    rewards, _, next_values, terminated, truncated = random_stream(2, length=6, endings=False)
    n_step = [returns.n_step_returns(rewards, next_values, terminated, truncated, GAMMA, n) for n in range(1, 7)]
    weights = [(1 - LAMBDA) * LAMBDA ** (n - 1) for n in range(1, 6)] + [LAMBDA**5]
    expected = sum(w * g[0] for w, g in zip(weights, n_step, strict=True))
    targets = returns.lambda_returns(rewards, next_values, terminated, truncated, GAMMA, LAMBDA)
    np.testing.assert_allclose(targets[0], expected, rtol=1e-5)


# --- n-step returns ---


def test_n_step_returns_by_hand(variant):
    # n = 2: 1 + .5*2 + .25*5 = 3.25; 2 + .5*3 + .25*6 = 5; the last has one step left: 3 + .5*6 = 6
    f = variant(returns.n_step_returns, n=2)
    targets = f(floats(1, 2, 3), floats(4, 5, 6), bools(0, 0, 0), bools(0, 0, 0), 0.5)
    np.testing.assert_allclose(targets, [3.25, 5.0, 6.0], rtol=1e-6)
    # ends at 1: terminated 2, before it 1 + .5*2 = 2; truncated 2 + .5*5 = 4.5, before it 1 + 1 + .25*5 = 3.25
    targets = f(floats(1, 2, 3), floats(4, 5, 6), bools(0, 1, 0), bools(0, 0, 0), 0.5)
    np.testing.assert_allclose(targets, [2.0, 2.0, 6.0], rtol=1e-6)
    targets = f(floats(1, 2, 3), floats(4, 5, 6), bools(0, 0, 0), bools(0, 1, 0), 0.5)
    np.testing.assert_allclose(targets, [3.25, 4.5, 6.0], rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 12, 40])
def test_n_step_returns_follow_the_definition_with_the_exact_number_of_steps(variant, n):
    stream = random_stream(7)
    rewards, _, next_values, terminated, truncated = (np.asarray(x) for x in stream)
    expected = np.zeros(len(rewards))
    for t in range(len(rewards)):
        k = 0
        while True:
            expected[t] += GAMMA**k * rewards[t + k]
            k += 1
            last = t + k - 1
            if terminated[last] or truncated[last] or k == n or last == len(rewards) - 1:
                break
        expected[t] += 0.0 if terminated[last] else GAMMA**k * next_values[last]
    targets = variant(returns.n_step_returns, n=n)(stream[0], *stream[2:], GAMMA)
    np.testing.assert_allclose(targets, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [12, 13, 100])
def test_n_of_at_least_the_length_is_lambda_1(n):
    rewards, _, next_values, terminated, truncated = random_stream(5)
    targets = returns.n_step_returns(rewards, next_values, terminated, truncated, GAMMA, n)
    expected = returns.lambda_returns(rewards, next_values, terminated, truncated, GAMMA, 1.0)
    np.testing.assert_allclose(targets, expected, rtol=1e-5, atol=1e-5)


def test_n_of_1_is_lambda_0():
    rewards, _, next_values, terminated, truncated = random_stream(6)
    targets = returns.n_step_returns(rewards, next_values, terminated, truncated, GAMMA, 1)
    expected = returns.lambda_returns(rewards, next_values, terminated, truncated, GAMMA, 0.0)
    np.testing.assert_allclose(targets, expected, rtol=1e-6)


# --- what holds for all ---


def all_targets(rewards, values, next_values, terminated, truncated, gamma=GAMMA):
    stream = (rewards, next_values, terminated, truncated)
    return {
        "gae": returns.gae(rewards, values, *stream[1:], gamma, LAMBDA)[0],
        "lambda": returns.lambda_returns(*stream, gamma, LAMBDA),
        "n_step": returns.n_step_returns(*stream, gamma, 4),
    }


@pytest.mark.parametrize("ending", ["terminated", "truncated"])
@pytest.mark.parametrize("name", ["gae", "lambda", "n_step"])
def test_nothing_leaks_backwards_across_an_ending(name, ending):
    rewards, values, next_values, terminated, truncated = random_stream(8, endings=False)
    end = jnp.zeros(12, bool).at[5].set(True)
    terminated, truncated = (end, truncated) if ending == "terminated" else (terminated, end)

    def before_the_ending(rewards, values, next_values):
        return all_targets(rewards, values, next_values, terminated, truncated)[name][:6].sum()

    gradients = jax.grad(before_the_ending, argnums=(0, 1, 2))(rewards, values, next_values)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[6:], 0.0)
    assert gradients[0][5] != 0.0
    assert (gradients[2][5] == 0.0) == (ending == "terminated")


def test_terminated_wins_over_truncated():
    rewards, values, next_values, terminated, _ = random_stream(9)
    assert terminated.any()
    both = all_targets(rewards, values, next_values, terminated, terminated)
    alone = all_targets(rewards, values, next_values, terminated, jnp.zeros_like(terminated))
    for name in both:
        np.testing.assert_array_equal(both[name], alone[name], err_msg=name)


def test_traced_and_vmapped_discounts_equal_static_ones():
    stream = random_stream(10)
    gammas = floats(0.0, 0.5, 0.99)
    batched = jax.jit(jax.vmap(lambda gamma: all_targets(*stream, gamma)))(gammas)
    for i, gamma in enumerate([0.0, 0.5, 0.99]):
        for name, expected in all_targets(*stream, gamma).items():
            np.testing.assert_allclose(batched[name][i], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_stream_of_one_step_is_one_step_td():
    targets = all_targets(floats(1), floats(10), floats(5), bools(0), bools(0), 0.5)
    assert {name: float(x[0]) for name, x in targets.items()} == {"gae": 1 + 2.5 - 10, "lambda": 3.5, "n_step": 3.5}


def test_batched_mismatched_or_mistyped_streams_are_refused():
    rewards, values, next_values, terminated, truncated = random_stream(11)
    with pytest.raises(AssertionError, match="rank"):
        all_targets(*(x.reshape(6, 2) for x in random_stream(11)))
    with pytest.raises(AssertionError, match="shape"):
        all_targets(rewards, values, next_values[:-1], terminated, truncated)
    with pytest.raises(AssertionError, match="type"):
        all_targets(rewards, values, next_values, terminated.astype(jnp.float32), truncated)
    with pytest.raises(AssertionError, match="type"):
        all_targets(rewards.astype(jnp.bfloat16), values, next_values, terminated, truncated)
    with pytest.raises(AssertionError, match="rank"):
        all_targets(rewards, values, next_values, terminated, truncated, gamma=floats(0.9, 0.9))


@pytest.mark.parametrize("n", [0, -1, 1.5])
def test_n_must_be_a_positive_integer(n):
    rewards, _, next_values, terminated, truncated = random_stream(11)
    with pytest.raises(AssertionError):
        returns.n_step_returns(rewards, next_values, terminated, truncated, GAMMA, n)


# --- n-step windows ---


def test_n_step_window_by_hand(variant):
    f = variant(returns.n_step_window)
    reward, discount, last = f(floats(1, 2, 4), bools(0, 0, 0), bools(0, 0, 0), 0.5)
    assert (float(reward), float(discount), int(last)) == (1 + 0.5 * 2 + 0.25 * 4, 0.125, 2)
    assert (reward.dtype, discount.dtype, last.dtype) == (jnp.float32, jnp.float32, jnp.int32)
    reward, discount, last = f(floats(1, 2, 4), bools(0, 1, 0), bools(0, 0, 1), 0.5)
    assert (float(reward), float(discount), int(last)) == (2, 0, 1)
    reward, discount, last = f(floats(1, 2, 4), bools(0, 0, 1), bools(1, 0, 0), 0.5)
    assert (float(reward), float(discount), int(last)) == (1, 0.5, 0)


@pytest.mark.parametrize("n", [1, 2, 5, 12])
@pytest.mark.parametrize("seed", range(4))
def test_n_step_windows_give_n_step_returns(n, seed):
    rewards, _, next_values, terminated, truncated = random_stream(seed)
    expected = returns.n_step_returns(rewards, next_values, terminated, truncated, GAMMA, n)
    for t in range(rewards.size - n + 1):
        parts = rewards[t : t + n], terminated[t : t + n], truncated[t : t + n]
        reward, discount, last = returns.n_step_window(*parts, GAMMA)
        np.testing.assert_allclose(reward + discount * next_values[t + last], expected[t], rtol=1e-5)


def test_what_lies_behind_an_ending_does_not_enter_a_window_whatever_it_is():
    reward, discount, _ = returns.n_step_window(floats(1, jnp.nan), bools(1, 0), bools(0, 0), GAMMA)
    assert (float(reward), float(discount)) == (1, 0)


def test_n_step_windows_of_agents_that_are_paid_apart_are_those_of_each():
    rewards, terminated, truncated = floats(1, 2, 3), bools(0, 0, 0), bools(0, 1, 0)
    of_two = jnp.stack([rewards, -5 * rewards], axis=-1)
    reward, *rest = returns.n_step_window(of_two, terminated, truncated, GAMMA)
    for i in range(2):
        alone, *expected = returns.n_step_window(of_two[:, i], terminated, truncated, GAMMA)
        assert float(reward[i]) == pytest.approx(float(alone))
        assert rest == expected
