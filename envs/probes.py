"""Debugging worlds whose values and optima are known in closed form: each isolates one thing a learner can get wrong.

Start with `constant_reward` and go down the list: the first world that is not learned names the broken part.
`V` is the value of every policy, or of the best one where actions matter; `gamma` is the discount of the learner.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.adapter import check_physics, defaults_of, limit_and_repeat, read_options
from rlx.environment import Environment
from rlx.errors import require, unknown
from rlx.types import Box, Discrete, PyTree, Spec, TimeStep


class ProbeState(NamedTuple):
    t: jax.Array  # () int32: steps taken in this episode
    draw: jax.Array  # () float32: what chance decided at reset


class Probe:
    """`length` steps, then an ending. A probe says what chance draws, what is seen and what is paid.

    Observations are [obs_size] float32. `terminates`: whether the last step ends the MDP or is a time limit.
    """

    def __init__(self, length: int, obs_size: int = 1, action: Box | Discrete | None = None, terminates: bool = True):
        require(length >= 1, "episode_length", length, "an episode has at least 1 step")
        self.length, self.terminates = length, terminates
        obs = jax.ShapeDtypeStruct((obs_size,), jnp.float32)
        self.spec = Spec(obs=obs, action=action or Box((1,)), episode_length=length)

    def draw(self, key: jax.Array) -> jax.Array:
        return jnp.zeros((), jnp.float32)

    def obs(self, state: ProbeState) -> jax.Array:
        raise NotImplementedError

    def reward(self, state: ProbeState, action: jax.Array) -> jax.Array:
        """Of `action` in `state`, the state before the step."""
        raise NotImplementedError

    def reset(self, key: jax.Array, params: PyTree) -> tuple[ProbeState, jax.Array]:
        state = ProbeState(jnp.zeros((), jnp.int32), self.draw(key))
        return state, self.obs(state)

    def step(self, state: ProbeState, action: jax.Array, key: jax.Array) -> tuple[ProbeState, TimeStep]:
        reward = self.reward(state, action)
        state = state._replace(t=state.t + 1)
        ended, never = state.t >= self.length, jnp.zeros((), bool)
        terminated, truncated = (ended, never) if self.terminates else (never, ended)
        obs = self.obs(state)
        return state, TimeStep(obs, reward, terminated, truncated, obs, {})


def _any_action(discrete: bool) -> Box | Discrete:
    return Discrete(2) if discrete else Box((1,))


def _sign(key: jax.Array) -> jax.Array:
    return jax.random.rademacher(key, (), jnp.float32)


class ConstantReward(Probe):
    """One step, obs 0, reward 1: V = 1. Fails if the value loss or its optimiser is broken."""

    def __init__(self, discrete: bool = False):
        super().__init__(1, action=_any_action(discrete))

    def obs(self, state):
        return jnp.zeros(1, jnp.float32)

    def reward(self, state, action):
        return jnp.ones((), jnp.float32)


class ObsReward(Probe):
    """One step, obs -1 or 1 at random, reward = obs: V(obs) = obs. Fails if values do not depend on observations."""

    def __init__(self, discrete: bool = False):
        super().__init__(1, action=_any_action(discrete))

    def draw(self, key):
        return _sign(key)

    def obs(self, state):
        return state.draw[None]

    def reward(self, state, action):
        return state.draw


class DelayedReward(Probe):
    """Two steps, obs 0 then 1, reward 0 then 1: V(0) = gamma, V(1) = 1. Fails if discounting is wrong."""

    def __init__(self, discrete: bool = False):
        super().__init__(2, action=_any_action(discrete))

    def obs(self, state):
        return (state.t >= 1).astype(jnp.float32)[None]

    def reward(self, state, action):
        return (state.t == 1).astype(jnp.float32)


class ActionReward(Probe):
    """One step, reward 1 for action 1 and -1 for action 0: best V = 1. Fails if the policy's gradient is wrong."""

    def __init__(self):
        super().__init__(1, action=Discrete(2))

    def obs(self, state):
        return jnp.zeros(1, jnp.float32)

    def reward(self, state, action):
        return jnp.where(action == 1, 1.0, -1.0).astype(jnp.float32)


class ObsActionReward(ActionReward):
    """One step, obs -1 or 1; reward 1 if the action is 1 at obs 1 or 0 at obs -1, else -1: best V = 1, blind V = 0."""

    def draw(self, key):
        return _sign(key)

    def obs(self, state):
        return state.draw[None]

    def reward(self, state, action):
        return jnp.where((action == 1) == (state.draw > 0), 1.0, -1.0).astype(jnp.float32)


class ActionRewardContinuous(Probe):
    """One step, reward -(a - 0.5)^2: the best action is 0.5, best V = 0."""

    def __init__(self):
        super().__init__(1)

    def obs(self, state):
        return jnp.zeros(1, jnp.float32)

    def reward(self, state, action):
        return -jnp.square(action[0] - 0.5)


class ObsActionRewardContinuous(ActionRewardContinuous):
    """One step, obs -1 or 1, reward -(a - 0.5 obs)^2: the best action is 0.5 obs, best V = 0, blind V = -0.25."""

    def draw(self, key):
        return _sign(key)

    def obs(self, state):
        return state.draw[None]

    def reward(self, state, action):
        return -jnp.square(action[0] - 0.5 * state.draw)


class TwoModes(ActionRewardContinuous):
    """One step, reward exp(-((|a| - mode) / width)^2): two best actions, -mode and mode, best V = 1.

    As it is, 0 pays 0.0000001, the border 0.37, uniform actions 0.327. A Gaussian must choose one of the two, a policy
    that can hold both may keep both: no reward tells it to. Modes nearer to 0 are harder to keep apart.
    """

    def __init__(self, mode: float = 0.8, width: float = 0.2):
        require(0 < mode <= 1, "mode", mode, "above 0 and at most 1")
        require(width > 0, "width", width, "above 0")
        super().__init__()
        self.mode, self.width = mode, width

    def reward(self, state, action):
        return jnp.exp(-jnp.square((jnp.abs(action[0]) - self.mode) / self.width))


class TruncateOnly(Probe):
    """Reward 1 a step, only ever truncated: V = 1 / (1 - gamma) everywhere. Fails if truncation is taken for an end.

    obs = [sin, cos] of a phase that starts anywhere and turns by a tenth of a circle a step: it does not tell the time.
    """

    def __init__(self, episode_length: int = 10, discrete: bool = False):
        super().__init__(episode_length, 2, _any_action(discrete), terminates=False)

    def draw(self, key):
        return jax.random.uniform(key, maxval=2 * jnp.pi)

    def obs(self, state):
        phase = state.draw + 2 * jnp.pi / 10 * state.t.astype(jnp.float32)
        return jnp.stack([jnp.sin(phase), jnp.cos(phase)])

    def reward(self, state, action):
        return jnp.ones((), jnp.float32)


class TerminateOnly(Probe):
    """Reward 1 a step, always terminated after T steps: V(t) = (1 - gamma^(T - t)) / (1 - gamma).

    obs = one-hot of t [T], all zero once the episode has ended. Fails if a value is bootstrapped past the end.
    """

    def __init__(self, episode_length: int = 10, discrete: bool = False):
        super().__init__(episode_length, episode_length, _any_action(discrete))

    def obs(self, state):
        return jax.nn.one_hot(state.t, self.length, dtype=jnp.float32)

    def reward(self, state, action):
        return jnp.ones((), jnp.float32)


class Fork(Probe):
    """Two steps that pay 0, then 1: the first action chooses between two ways that differ in their ending alone.

    obs 0, then 1 after an action of 0 or more (action 1), or -1 (action 0). At 1 the episode is terminated: V(1) = 1.
    At -1 it is truncated and stays there: V(-1) = 1 / (1 - gamma), and the best V(0) = gamma / (1 - gamma). A learner
    that takes both endings for the same one values both ways alike.
    """

    def __init__(self, discrete: bool = False):
        super().__init__(2, action=_any_action(discrete))

    def obs(self, state):
        return state.draw[None]

    def reward(self, state, action):
        return (state.t == 1).astype(jnp.float32)

    def step(self, state, action, key):
        high = action == 1 if isinstance(self.spec.action, Discrete) else action[0] >= 0
        chosen = jnp.where(high, 1.0, -1.0).astype(jnp.float32)
        state = state._replace(draw=jnp.where(state.t == 0, chosen, state.draw))
        state, timestep = super().step(state, action, key)
        ended = timestep.terminated
        return state, timestep._replace(terminated=ended & (state.draw > 0), truncated=ended & (state.draw < 0))


class FinalCode(Probe):
    """obs = [t, code]: code 7 in the final observation, 0 before and after a reset. Reward 0, truncated: V = 0.

    A successor observation taken after the auto reset shows code 0 where it must show 7.
    """

    def __init__(self, episode_length: int = 5, discrete: bool = False):
        super().__init__(episode_length, 2, _any_action(discrete), terminates=False)

    def obs(self, state):
        code = jnp.where(state.t >= self.length, 7.0, 0.0).astype(jnp.float32)
        return jnp.stack([state.t.astype(jnp.float32), code])

    def reward(self, state, action):
        return jnp.zeros((), jnp.float32)


class Memory(Probe):
    """A cue -1 or 1 in the first observation, `delay` blank ones, then a question: 1 if action 1 answers cue 1 or
    action 0 cue -1, else -1; other steps pay 0. obs = [cue at t = 0 else 0, 1 at the question else 0].

    `delay` + 2 steps, terminated. Best expected return: 1 with memory, 0 without. V(t) = gamma^(delay + 1 - t).
    """

    def __init__(self, delay: int = 5):
        require(delay >= 0, "delay", delay, "blank observations, 0 or more")
        super().__init__(delay + 2, 2, Discrete(2))

    def draw(self, key):
        return _sign(key)

    def obs(self, state):
        question = (state.t == self.length - 1).astype(jnp.float32)
        return jnp.stack([jnp.where(state.t == 0, state.draw, 0.0), question])

    def reward(self, state, action):
        answer = jnp.where((action == 1) == (state.draw > 0), 1.0, -1.0)
        return jnp.where(state.t == self.length - 1, answer, 0.0).astype(jnp.float32)


class Nan(Probe):
    """obs = [t / T], but NaN from step `nan_step` on in a share `probability` of the episodes. Reward 1, truncated.

    Training must stop and name the observation.
    """

    def __init__(self, nan_step: int = 5, probability: float = 0.1, episode_length: int = 10, discrete: bool = False):
        require(0 <= probability <= 1, "probability", probability, "a share of the episodes, 0 to 1")
        require(nan_step >= 1, "nan_step", nan_step, "1 or more: the first observation is always finite")
        self.nan_step, self.probability = nan_step, probability
        super().__init__(episode_length, 1, _any_action(discrete), terminates=False)

    def draw(self, key):
        return jax.random.uniform(key)

    def obs(self, state):
        bad = (state.draw < self.probability) & (state.t >= self.nan_step)
        return jnp.where(bad, jnp.nan, state.t.astype(jnp.float32) / self.length)[None]

    def reward(self, state, action):
        return jnp.ones((), jnp.float32)


class LqrState(NamedTuple):
    t: jax.Array  # () int32
    x: jax.Array  # [2] float32: position in m, velocity in m/s


class Lqr:
    """Linear-quadratic regulator: bring a cart with a little friction to rest at 0, against random pushes.

    x' = A x + B u + w, u = scale * a (m/s^2), dt = 0.1 s; `drag` is the share of the velocity lost a step (0: the pure
    double integrator), w a push on the velocity with standard deviation `noise`. x_0 is normal with standard
    deviations INITIAL_STD. Reward = -(x^T Q x + u^T R u), Q = diag(1, 0.1), R = 0.1. obs = x. Truncated at the end.

    The optimum is `lqr_optimum`: -9.438 with the defaults. The best gain blind to the time loses 0.16 %; doing
    nothing costs 5.5 times as much, uniformly random actions 34 times.
    """

    DT, Q, R = 0.1, (1.0, 0.1), 0.1
    INITIAL_STD = (1.0, 0.1)

    def __init__(self, episode_length: int = 50, drag: float = 0.1, noise: float = 0.05, scale: float = 8.0):
        require(episode_length >= 1, "episode_length", episode_length, "an episode has at least 1 step")
        require(0 <= drag <= 1, "drag", drag, "a share of the velocity, 0 to 1")
        require(noise >= 0, "noise", noise, "a standard deviation, 0 or more")
        require(scale > 0, "scale", scale, "an acceleration in m/s^2 above 0")
        self.length, self.drag, self.noise, self.scale = episode_length, drag, noise, scale
        obs = jax.ShapeDtypeStruct((2,), jnp.float32)
        self.spec = Spec(obs=obs, action=Box((1,), -scale, scale), episode_length=episode_length)

    def reset(self, key: jax.Array, params: PyTree) -> tuple[LqrState, jax.Array]:
        x = jax.random.normal(key, (2,)) * jnp.array(self.INITIAL_STD, jnp.float32)
        return LqrState(jnp.zeros((), jnp.int32), x), x

    def step(self, state: LqrState, action: jax.Array, key: jax.Array) -> tuple[LqrState, TimeStep]:
        # Written out: a matrix product would round to fewer bits on some accelerators.
        (position, velocity), u = state.x, self.scale * jnp.clip(action[0], -1.0, 1.0)
        reward = -(self.Q[0] * position**2 + self.Q[1] * velocity**2 + self.R * u**2)
        push = self.noise * jax.random.normal(key)
        moved = position + self.DT * velocity + self.DT**2 / 2 * u
        x = jnp.stack([moved, (1 - self.drag) * velocity + self.DT * u + push])
        t = state.t + 1
        return LqrState(t, x), TimeStep(x, reward, jnp.zeros((), bool), t >= self.length, x, {})

    def matrices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """A [2, 2], B [2, 1], Q [2, 2], R [1, 1], float64."""
        a = np.array([[1.0, self.DT], [0.0, 1.0 - self.drag]])
        b = np.array([[self.DT**2 / 2], [self.DT]])
        return a, b, np.diag(self.Q), np.array([[self.R]])


def lqr_optimum(env: Lqr) -> tuple[np.ndarray, float]:
    """The best control u_t = -K_t x_t, and its expected return, saturation aside.

    Riccati recursion (Bertsekas, Dynamic Programming and Optimal Control, vol. 1, section 3.1): P_T = 0,
    K_t = (R + B^T P B)^-1 B^T P A, P_t = Q + A^T P (A - B K_t) with P = P_{t+1}; the expected cost is
    tr(P_0 cov x_0) + sum_t tr(P_{t+1} cov w).

    Returns:
        gains: [T, 1, 2] float64; the action is -K_t x / scale.
        expected_return: of an episode, undiscounted.
    """
    a, b, q, r = env.matrices()
    push, start = np.diag([0.0, env.noise**2]), np.diag(np.square(env.INITIAL_STD))
    p, gains, cost = np.zeros((2, 2)), [], 0.0
    for _ in range(env.length):
        gain = np.linalg.solve(r + b.T @ p @ b, b.T @ p @ a)
        cost += np.trace(p @ push)
        gains.append(gain)
        p = q + a.T @ p @ (a - b @ gain)
    return np.stack(gains[::-1]), -float(cost + np.trace(p @ start))


_PROBES: dict[str, Any] = {
    "constant_reward": ConstantReward,
    "obs_reward": ObsReward,
    "delayed_reward": DelayedReward,
    "action_reward": ActionReward,
    "obs_action_reward": ObsActionReward,
    "action_reward_continuous": ActionRewardContinuous,
    "obs_action_reward_continuous": ObsActionRewardContinuous,
    "two_modes": TwoModes,
    "truncate_only": TruncateOnly,
    "terminate_only": TerminateOnly,
    "fork": Fork,
    "final_code": FinalCode,
    "lqr": Lqr,
    "memory": Memory,
    "nan": Nan,
}

NAMES: tuple[str, ...] = tuple(_PROBES)


def make(name: str, physics: str = "auto", **overrides: Any) -> Environment:
    """A probe by name. It has no physics engine; `overrides` are the arguments of the probe's constructor.

    Raises:
        UserError: a name or override that does not exist, a value that is not possible.
    """
    if name not in _PROBES:
        raise unknown("Probe", name, NAMES)
    full_name = f"probe/{name}"
    check_physics(full_name, physics, ())
    defaults = defaults_of(_PROBES[name])
    length = defaults.pop("episode_length", None)
    options = read_options(full_name, overrides, defaults, length)
    if length is None:
        return limit_and_repeat(_PROBES[name](**options.rest), options)
    env = _PROBES[name](episode_length=options.episode_length or 0, **options.rest)
    return limit_and_repeat(env, options._replace(episode_length=None))
