"""The records that everything else passes around. This module imports nothing of rlx but its errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from rlx.errors import UserError as UserError

PyTree = Any
Metrics = Mapping[str, jax.Array]


class TimeStep(NamedTuple):
    """What one environment step returns; unbatched, `vmap` adds leading axes.

    No environment resets itself: the source (`rlx.rollout`) does, and it alone makes `obs` differ from `final_obs`.
    """

    obs: PyTree  # what to act on next; after a reset by the source the new episode's first observation
    reward: jax.Array  # () float32; [N] in games that pay their agents apart
    terminated: jax.Array  # () bool: the MDP ended, bootstrap 0
    truncated: jax.Array  # () bool: a time limit, bootstrap V(final_obs) and cut the trace
    final_obs: PyTree  # what this step led to; equals obs inside an episode
    info: Mapping[str, jax.Array]  # for logging alone; no algorithm reads it


class Transition(NamedTuple):
    """One step of experience. Leaves `[T, B, ...]` make a trajectory."""

    obs: PyTree
    action: jax.Array  # what the environment received: [-1, 1]^d float32, or int32
    reward: jax.Array  # raw, never scaled
    terminated: jax.Array
    truncated: jax.Array
    next_obs: PyTree  # the true successor (`final_obs`), never a reset observation
    extras: PyTree  # a NamedTuple that the algorithm defines


class EpisodeStats(NamedTuple):
    """What one `collect` saw, for logging and for the guard against values that are not finite."""

    episodes: jax.Array  # () float32: how many episodes ended
    returns: jax.Array  # () float32: sum of their undiscounted returns
    lengths: jax.Array  # () float32: sum of their lengths in inner steps
    info: Mapping[str, jax.Array]  # mean over all transitions, a scalar a key
    nonfinite: Mapping[str, jax.Array]  # per leaf of obs and reward: an environment with a value not finite, else -1


@dataclasses.dataclass(frozen=True)
class Box:
    """Continuous actions: algorithms and environments exchange [-1, 1]^shape. `low`, `high` record native bounds."""

    shape: tuple[int, ...]
    low: tuple[float, ...] | float = -1.0
    high: tuple[float, ...] | float = 1.0


@dataclasses.dataclass(frozen=True)
class Discrete:
    """Integer actions 0 .. num_values - 1, int32, of shape (), or (N,) of several agents (`Spec.action_mask`)."""

    num_values: int
    shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Spec:
    """What an algorithm may know of an environment before it starts."""

    obs: PyTree  # of jax.ShapeDtypeStruct, unbatched; of several agents {"agents": [N, d], "state": [D]}
    action: Box | Discrete  # of several agents [N, a], or [N] int32
    num_agents: int = 1
    obs_mask: Any = None  # [N, d] bool: which entries of a padded observation are real; None of one agent
    action_mask: Any = None  # [N, a] bool of an action's entries, [N, num_values] of discrete ones; None of one agent
    episode_length: int | None = None  # time limit in inner steps; None: none
    dt: float = 0.0  # seconds that an inner step simulates; 0: not known
    action_repeat: int = 1  # inner steps per decision
    action_chunk: int = 1  # inner actions in one decision, one behind the other in its action
    params: PyTree = ()  # the default of what may differ between episodes
    physics: str = ""  # the engine that simulates it, where there is a choice
    name: str = ""  # `suite/name` where `envs.make` made it, for records and titles

    @property
    def decisions(self) -> int:
        """How many an episode has up to its time limit; up to 1000 steps where there is none."""
        return -(-(self.episode_length or 1000) // self.action_repeat)
