"""Matrix games: every agent chooses once, and one table says what the team is paid. Nothing is seen: obs is zeros.

`penalty` and `climbing` are those of Claus and Boutilier 1998 ("The dynamics of reinforcement learning in cooperative
multiagent systems"), on which learners of one agent at a time end at the safe payoff instead of the best one. Best
payoffs: penalty 10, climbing 11, diagonal the last of its `values`. `MatrixGame` plays any table, of any number of
agents.

obs = {"agents": [N, 1] zeros, "state": [1] zeros}, actions [N] int32, reward () what all of them together are paid;
each episode is terminated after its only step. With one agent alone obs is [1], and the action ().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from envs.adapter import check_physics, defaults_of, limit_and_repeat, read_options
from rlx.environment import Environment
from rlx.errors import require, unknown
from rlx.types import Discrete, PyTree, Spec, TimeStep


def penalty(k: float = -100.0) -> np.ndarray:
    """Two optima of 10, a safe 2; `k`, 0 or less, where the agents aim at different optima. Raises UserError else."""
    require(-np.inf < k <= 0, "k", k, "a penalty, a finite number of 0 or less")
    return np.array([[10.0, 0.0, k], [0.0, 2.0, 0.0], [k, 0.0, 10.0]])


def climbing() -> np.ndarray:
    """The best joint action pays 11, and everything next to it -30 or 0; the equilibrium beside it pays 7."""
    return np.array([[11.0, -30.0, 0.0], [-30.0, 7.0, 6.0], [0.0, 0.0, 5.0]])


def diagonal(N: int = 2, values: tuple[float, ...] = (5.0, 10.0, 20.0)) -> np.ndarray:
    """N agents are paid values[i] where all of them choose i, else 0.

    Raises UserError for no agents or values, values that are no numbers, and a table of over a million entries.
    """
    require(N >= 1, "N", N, "a whole number of at least 1")
    numbers = [isinstance(value, int | float) and np.isfinite(value) for value in values]
    require(len(values) > 0 and all(numbers), "values", values, "at least one payoff, finite numbers")
    require(len(values) ** N <= 10**6, "N", N, f"so few agents that {len(values)}^N is at most a million")
    table = np.zeros((len(values),) * N)
    np.einsum("i" * N + "->i", table)[:] = values  # a view of the diagonal
    return table


GAMES: dict[str, Callable[..., np.ndarray]] = {"climbing": climbing, "diagonal": diagonal, "penalty": penalty}
NAMES: tuple[str, ...] = tuple(GAMES)


class MatrixGame:
    """One step under `payoff` [A_1, ..., A_N]: the team's reward for the actions of agents 1 to N.

    Where agents have fewer actions than others, `spec.action_mask` says which they have; one that they do not have
    counts as their last. The state is (). Raises UserError for a table without actions, or not finite.
    """

    def __init__(self, payoff: ArrayLike):
        try:
            table = np.asarray(payoff, np.float32)
        except (TypeError, ValueError):
            require(False, "payoff", payoff, "a table of numbers, its rows of one length")
        require(table.ndim >= 1 and table.size > 0, "payoff", table.shape, "a table with an axis an agent")
        require(bool(np.isfinite(table).all()), "payoff", table.tolist(), "finite numbers")
        self.payoff, self.num_agents = table, table.ndim
        N, counts = table.ndim, np.array(table.shape)
        if N == 1:
            self.spec = Spec(jax.ShapeDtypeStruct((1,), jnp.float32), Discrete(table.size), episode_length=1)
            return
        obs = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in (("agents", (N, 1)), ("state", (1,)))}
        obs_mask, action_mask = np.ones((N, 1), bool), np.arange(counts.max())[None] < counts[:, None]
        self.spec = Spec(obs, Discrete(int(counts.max()), (N,)), N, obs_mask, action_mask, episode_length=1)

    def obs(self) -> PyTree:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.spec.obs)

    def reset(self, key: jax.Array, params: PyTree) -> tuple[tuple[()], PyTree]:
        return (), self.obs()

    def step(self, state: tuple[()], action: jax.Array, key: jax.Array) -> tuple[tuple[()], TimeStep]:
        choices = action[None] if self.num_agents == 1 else action
        reward = jnp.asarray(self.payoff).at[tuple(choices)].get(mode="clip")
        obs, over = self.obs(), jnp.ones((), bool)
        return state, TimeStep(obs, reward, over, ~over, obs, {})


def make(name: str, physics: str = "auto", **overrides: Any) -> Environment:
    """Builds `matrix/<name>`; `overrides` are the arguments of its function.

    Raises UserError for a name, an engine or an override that does not exist.
    """
    if name not in GAMES:
        raise unknown("Matrix game", name, NAMES)
    full_name = f"matrix/{name}"
    check_physics(full_name, physics, ())
    options = read_options(full_name, overrides, defaults_of(GAMES[name]))
    return limit_and_repeat(MatrixGame(GAMES[name](**options.rest)), options)
