"""Algorithm, Source and Plan: what the training loop knows of learners and of where experience comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from rlx.types import EpisodeStats, Metrics, PyTree, Transition

LearnerState = Any
Policy = Any
Memory = Any
SourceState = Any
Mode = Literal["explore", "sample", "greedy"]
Key = jax.Array


class Plan(NamedTuple):
    """The sizes of a run. Static, known before anything compiles."""

    num_envs: int  # per seed, over all devices and processes
    unroll_length: int  # decisions an environment takes in one iteration: T
    num_iterations: int  # collect-and-update rounds in the whole run
    action_repeat: int = 1  # inner steps per decision
    num_groups: int = 1  # groups of neighbouring environments; experience is shuffled and sampled within each
    num_devices: int = 1  # over which environments are split, in whole groups; it decides nothing but rounding

    @property
    def steps_per_iteration(self) -> int:
        """Inner environment steps in one iteration, a host integer."""
        return self.num_envs * self.unroll_length * self.action_repeat


class Algorithm(NamedTuple):
    """Pure functions over explicit state, made by `make(config, spec, plan)` of a module in `rlx/algorithms/`.

    `act` takes a batch: observations [B, ...], memories [B, ...], one key; it returns actions [B, ...] and extras
    [B, ...]. `memory` makes one unbatched memory. `mode` is static: "explore" gathers training data, "sample" draws
    from the policy that is judged, "greedy" is deterministic. `iteration` is never vmapped, so gates may use it.
    """

    init: Callable[..., LearnerState]  # (key, policy=None): from scratch, or from another run's policy
    policy: Callable[[LearnerState, Mode], Policy]  # what acting needs; no optimiser, no replay
    memory: Callable[[Key], Memory]  # what the policy carries inside one episode; () for most
    act: Callable[[Policy, Memory, PyTree, Key, Mode], tuple[Memory, jax.Array, PyTree]]
    update: Callable[[LearnerState, Transition, jax.Array, Key], tuple[LearnerState, Metrics]]


class Source(NamedTuple):
    """Where experience comes from: environments (`rlx.rollout`) or a data set (`rlx.data`)."""

    init: Callable[[Algorithm, Key], SourceState]
    refresh: Callable[[SourceState, Key], SourceState]  # once an epoch: new reset states
    collect: Callable[[Algorithm, Policy, SourceState, Key], tuple[SourceState, Transition, EpisodeStats]]


class Data(NamedTuple):
    """Where experience comes from that was gathered before: arrays that a Source reads and never changes.

    They are an argument of the compiled program: as part of the state they would be donated and saved with every
    checkpoint, as constants they would be compiled.
    """

    arrays: PyTree  # of numpy arrays
    source: Callable[[PyTree, Plan, Mesh | None], Source] | None  # of those arrays, traced; None beside environments
    draw: Callable[..., Any]  # (arrays, key, size, n_step, gamma) -> rlx.replay.Batch
    record: Sequence[Mapping[str, Any]]  # for config.json: a file each, with its path, sha256 and share
