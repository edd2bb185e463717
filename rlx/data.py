"""The data-set source: files of `rlx.data_file`, checked, and read on the device in the place of environments.

A trajectory [T, B] is B runs of T consecutive steps, each begun at a step drawn uniformly, so that every step comes
equally often: with `unroll_length` 1 these are independent transitions. It reads as that of an environment that resets
itself (an episode's end is followed by the next one's start, the last by the first of its file) and whose time limit
falls on the end of every trajectory: what follows begins elsewhere. So n-step returns, segments and recurrent memory
mean what they mean there. Of several files each run is in one, drawn by their shares.

An environment of action chunks reads data of the same chunks as they are, and data of single actions as chunks of them
(`in_chunks`): a decision can begin at every step, and the next one of its run where it ends, as if played.

All draws come from the iteration's key: the reader has no state, and a resumed run goes on bit for bit. `step` counts
the transitions consumed (times the inner steps a decision takes, as everywhere).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlx.algorithm import Algorithm, Data, Key, Plan, Policy, Source
from rlx.data_checks import check_columns, check_env
from rlx.data_file import describe_env, load, obs_columns
from rlx.environment import Environment
from rlx.errors import UserError, require
from rlx.replay import Batch
from rlx.returns import n_step_window
from rlx.sharding import on_parts
from rlx.types import EpisodeStats, PyTree, Spec, Transition


class Arrays(NamedTuple):
    """N steps of E episodes, over all files; a decision begins at each."""

    observations: PyTree  # [N + E, ...]
    actions: Any  # [N, ...]
    rewards: Any  # [N]
    terminations: Any  # [N] bool
    truncations: Any  # [N] bool
    episode_ids: Any  # [N] int32, 0 .. E - 1
    spans: Any = None  # [N] int32: how many steps the decision takes; None: 1 each


def transitions(arrays: Arrays, rows: jax.Array) -> Transition:
    """Decisions `rows` [...] of the data, with their true successors and without extras; leaves [..., ...]."""
    arrays = jax.tree.map(jnp.asarray, arrays)  # traced rows cannot index numpy's
    before = rows + arrays.episode_ids[rows]  # every episode before it has one observation more than steps
    after = before + (1 if arrays.spans is None else arrays.spans[rows])
    obs = jax.tree.map(lambda x: x[before], arrays.observations)
    next_obs = jax.tree.map(lambda x: x[after], arrays.observations)
    columns = (arrays.actions, arrays.rewards, arrays.terminations, arrays.truncations)
    action, reward, terminated, truncated = (x[rows] for x in columns)
    return Transition(obs, action, reward, terminated, truncated, next_obs, ())


def read(files: Sequence[tuple[str | Path, float | None]], env: Environment) -> Data:
    """Data sets as an argument of `rlx.train`: pairs of a file and its share of the experience.

    Without shares every step of all files comes equally often. Raises UserError that names the file and its first
    fault.
    """
    require(bool(files), "data", files, "at least one file")
    parts, records = [], []
    for path, share in files:
        try:
            columns, metadata = load(Path(path))
            chunk = check_env(metadata, describe_env(env))
            check_columns(columns, env.spec, chunk)
        except UserError as error:
            raise UserError(f"data set {str(path)!r}: {error}") from error
        part = as_arrays(columns, env.spec)
        parts.append(in_chunks(part, chunk) if env.spec.action_chunk > 1 else part)
        record = {"path": str(Path(path).absolute()), "share": share, "sha256": metadata["sha256"]}
        records.append({**record, "metadata": metadata})
    sizes = [len(part.rewards) for part in parts]
    shares = normalized_shares([share for _, share in files], sizes)
    episodes = np.cumsum([0, *(int(part.episode_ids[-1]) + 1 for part in parts)])
    require(sum(sizes) + episodes[-1] < 2**31, "data", sum(sizes), "fewer than 2^31 observations")
    parts = [part._replace(episode_ids=part.episode_ids + n) for part, n in zip(parts, episodes.tolist(), strict=False)]
    whole = parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: np.concatenate(x), *parts)
    source, drawn = partial(make_source, sizes=sizes, shares=shares), partial(draw, sizes=sizes, shares=shares)
    return Data(whole, source, drawn, records)


def as_arrays(columns: Mapping[str, np.ndarray], spec: Spec) -> Arrays:
    observations = jax.tree.unflatten(jax.tree.structure(spec.obs), [columns[name] for name in obs_columns(spec.obs)])
    rest = {name: columns[name] for name in ("actions", "rewards", "terminations", "truncations")}
    return Arrays(observations, **rest, episode_ids=columns["episode_ids"].astype(np.int32))


def in_chunks(arrays: Arrays, size: int) -> Arrays:
    """Steps of single actions as decisions of `size` of them, one at every step, so that they overlap.

    The decision at step t has the actions of steps t .. t + size - 1, one behind the other, the sum of their rewards
    and the ending of the last. An episode's end cuts it: fewer steps are taken, and copies of the last action fill it,
    as in Diffusion Policy (arXiv 2303.04137). DPPO's own loader leaves such decisions out, and with them all that is
    done last in an episode.
    """
    rows = np.arange(len(arrays.rewards))
    last = np.searchsorted(arrays.episode_ids, arrays.episode_ids, side="right") - 1  # [N]: step of its episode
    ends = np.minimum(rows + size - 1, last)
    window = np.minimum(rows[:, None] + np.arange(size), last[:, None])  # [N, size]
    spans = (ends - rows + 1).astype(np.int32)
    counts = (np.arange(size) < spans[:, None]).astype(np.float32)
    return arrays._replace(
        actions=arrays.actions[window].reshape(len(rows), -1),
        rewards=np.einsum("nk,nk...->n...", counts, arrays.rewards[window]),
        terminations=arrays.terminations[ends],
        truncations=arrays.truncations[ends],
        spans=spans,
    )


def normalized_shares(shares: Sequence[float | None], otherwise: Sequence[float]) -> list[float]:
    """`shares` with sum 1; `otherwise` where none is given. Raises UserError for one that is none."""
    if all(share is None for share in shares):
        shares = otherwise
    for share in shares:
        ok = share is not None and math.isfinite(share) and share > 0
        require(ok, "share", share, "a number above 0, for all or for none")
    total = sum(share for share in shares if share)
    return [share / total for share in shares if share]


def runs_of_steps(
    key: Key, count: int, length: int, sizes: Sequence[int], shares: Sequence[float], spans: Any = None
) -> jax.Array:
    """Rows [count, length] int32 of runs of decisions, each in one file and begun anywhere in it; its end is followed
    by its start. `spans`: as in Arrays."""
    file_key, start_key = jax.random.split(key)
    file = jax.random.choice(file_key, len(sizes), (count,), p=jnp.asarray(shares, jnp.float32))
    offsets = np.cumsum([0, *sizes[:-1]]).astype(np.int32)
    offset, size = jnp.asarray(offsets)[file], jnp.asarray(sizes, jnp.int32)[file]
    start = jax.random.randint(start_key, (count,), 0, size)
    if spans is not None:
        spans = jnp.asarray(spans)

        def follow(step, _):
            row = offset + step
            return (step + spans[row]) % size, row

        return jax.lax.scan(follow, start, length=length)[1].T
    steps = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    return offset[:, None] + steps % size[:, None]


def draw(
    arrays: Arrays,
    key: Key,
    size: int,
    n_step: int,
    gamma: float | jax.Array,
    sizes: Sequence[int],
    shares: Sequence[float],
) -> Batch:
    """`size` n-step targets in parts, as a replay gives them, for a learner that mixes data with what it sees."""
    rows = runs_of_steps(key, size, n_step, sizes, shares, arrays.spans)
    arrays = jax.tree.map(jnp.asarray, arrays)
    columns = (arrays.rewards[rows], arrays.terminations[rows], arrays.truncations[rows])
    reward, discount, last = jax.vmap(n_step_window, (0, 0, 0, None))(*columns, gamma)
    first = transitions(arrays, rows[:, 0])
    ends = transitions(arrays, jnp.take_along_axis(rows, last[:, None], axis=1)[:, 0])
    obs, next_obs = (jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in (first.obs, ends.next_obs))
    return Batch(obs, first.action, reward, discount, next_obs)


def make_source(arrays: Arrays, plan: Plan, mesh: Mesh | None, sizes: Sequence[int], shares: Sequence[float]) -> Source:
    """A Source over files of `sizes` steps that lie one after another in `arrays`, which may be traced."""
    take = on_parts(lambda rows, arrays: transitions(arrays, rows), mesh, num_shared=1)

    def collect(algorithm: Algorithm, policy: Policy, state: tuple[()], key: Key):
        rows = runs_of_steps(key, plan.num_envs, plan.unroll_length, sizes, shares, arrays.spans)
        batch = take(rows, arrays)  # [B, T, ...]
        trajectory = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batch)
        cut = trajectory.truncated.at[-1].set(~trajectory.terminated[-1])  # the next trajectory begins elsewhere
        trajectory = trajectory._replace(truncated=cut)
        zero = jnp.zeros((), jnp.float32)
        return state, trajectory, EpisodeStats(zero, zero, zero, {}, {})

    return Source(lambda algorithm, key: (), lambda state, key: state, collect)
