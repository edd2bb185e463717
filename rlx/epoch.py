"""TrainState, and the compiled block between two visits to the host. Names no algorithm and no environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlx.algorithm import Algorithm, LearnerState, Plan, Policy, Source, SourceState
from rlx.errors import UserError
from rlx.sharding import is_per_env
from rlx.types import EpisodeStats, Metrics, PyTree


class TrainState(NamedTuple):
    """All that a run is: a pytree of arrays."""

    learner: LearnerState
    source: SourceState
    key: jax.Array  # the root key; never changes
    iteration: jax.Array  # () int32
    stopped: jax.Array | None = None  # () int32, of a run among many: the iteration that was not finite, -1 before one


class EpochMetrics(NamedTuple):
    """Sums over the iterations of an epoch, and for `nonfinite` the largest."""

    iterations: jax.Array
    train: Metrics
    stats: EpisodeStats


def init_state(algorithm: Algorithm, source: Source, key: jax.Array, policy: Policy | None = None) -> TrainState:
    """The state at iteration 0. `policy` starts the learner from another run's."""
    init_key, _, _, _ = jax.random.split(key, 4)
    learner_key, source_key = jax.random.split(init_key)
    learner = algorithm.init(learner_key, policy)
    return TrainState(learner, source.init(algorithm, source_key), key, jnp.zeros((), jnp.int32))


def make_iteration(algorithm: Algorithm, source: Source) -> Callable[[TrainState], tuple[TrainState, EpochMetrics]]:
    """A pure function: one round of collect and update. Its keys are folded from the root key by iteration."""

    def iterate(state: TrainState) -> tuple[TrainState, EpochMetrics]:
        _, train_key, _, _ = jax.random.split(state.key, 4)
        collect_key, update_key = jax.random.split(jax.random.fold_in(train_key, state.iteration))
        policy = algorithm.policy(state.learner, "explore")
        source_state, trajectory, stats = source.collect(algorithm, policy, state.source, collect_key)
        learner, metrics = algorithm.update(state.learner, trajectory, state.iteration, update_key)
        state = state._replace(learner=learner, source=source_state, iteration=state.iteration + 1)
        metrics = {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}
        return state, EpochMetrics(jnp.ones((), jnp.float32), metrics, stats)

    return iterate


def make_epoch(
    algorithm: Algorithm, source: Source, plan: Plan, iterations_per_epoch: int
) -> Callable[[TrainState], tuple[TrainState, EpochMetrics]]:
    """A pure function: new reset states, then up to `iterations_per_epoch` iterations, never past the plan's last.

    Raises UserError, while tracing, where an iteration changes a leaf's shape, dtype or weak type.
    """
    iterate = jax.jit(make_iteration(algorithm, source))  # jitted: traced once, though it is called twice below

    def epoch(state: TrainState) -> tuple[TrainState, EpochMetrics]:
        _, _, pool_key, _ = jax.random.split(state.key, 4)
        refreshed = source.refresh(state.source, jax.random.fold_in(pool_key, state.iteration))
        if state.stopped is not None:
            running = state.stopped < 0
            refreshed = jax.tree.map(lambda new, old: jnp.where(running, new, old), refreshed, state.source)
        state = state._replace(source=refreshed)
        count = jnp.minimum(iterations_per_epoch, plan.num_iterations - state.iteration)
        after, shapes = jax.eval_shape(iterate, state)
        check_fixed_point("the state of the run", state, after)
        zeros = jax.tree.map(lambda x: jnp.full(x.shape, -1 if x.dtype == jnp.int32 else 0, x.dtype), shapes)

        def body(_, carry):
            before, sums = carry
            state, new = iterate(before)
            if before.stopped is not None:
                state, new = stop_nonfinite(before, state, new)
            nonfinite = jax.tree.map(jnp.maximum, sums.stats.nonfinite, new.stats.nonfinite)
            sums = jax.tree.map(jnp.add, sums, new)
            return state, sums._replace(stats=sums.stats._replace(nonfinite=nonfinite))

        return jax.lax.fori_loop(0, count, body, (state, zeros))

    return epoch


def stop_nonfinite(before: TrainState, after: TrainState, metrics: EpochMetrics) -> tuple[TrainState, EpochMetrics]:
    """One iteration of a run among many: one that is not finite is taken back, and from then on nothing is learnt.

    Its metrics stand, so that the host sees it (all NaN where the learner alone is not finite); those of later
    iterations are zero. What the learner keeps of the past (`per_env` classes) is neither looked through nor taken
    back, either of which would read all of it in every iteration: it came in through trajectories that were checked,
    and nothing is learnt from it any more.
    """
    assert before.stopped is not None
    running = before.stopped < 0
    finite = [jnp.isfinite(value).all() for value in metrics.train.values()]
    finite += [index < 0 for index in metrics.stats.nonfinite.values()]
    seen = jnp.stack([jnp.ones((), bool), *finite]).all()
    nodes = [node for node in jax.tree.leaves(after.learner, is_leaf=is_per_env) if not is_per_env(node)]
    leaves = [leaf for leaf in nodes if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    goes_on = running & seen & jnp.stack([jnp.ones((), bool), *(jnp.isfinite(leaf).all() for leaf in leaves)]).all()
    unseen = running & seen & ~goes_on
    metrics = metrics._replace(train={k: jnp.where(unseen, jnp.nan, v) for k, v in metrics.train.items()})

    def choose(new: Any, old: Any) -> Any:
        return new if is_per_env(new) else jnp.where(goes_on, new, old)

    learner = jax.tree.map(choose, after.learner, before.learner, is_leaf=is_per_env)
    source = jax.tree.map(lambda new, old: jnp.where(goes_on, new, old), after.source, before.source)
    stopped = jnp.where(running & ~goes_on, before.iteration, before.stopped)
    still = metrics._replace(stats=metrics.stats._replace(nonfinite={}))
    still = jax.tree.map(lambda x: jnp.where(running, x, jnp.zeros_like(x)), still)
    nonfinite = {k: jnp.where(running, index, -1) for k, index in metrics.stats.nonfinite.items()}
    metrics = still._replace(stats=still.stats._replace(nonfinite=nonfinite))
    return after._replace(learner=learner, source=source, stopped=stopped), metrics


def check_fixed_point(what: str, before: PyTree, after: PyTree) -> None:
    """Raises UserError, naming leaves, where `after` differs from `before` in structure, shape, dtype or weak type."""

    def kind(leaf: Any) -> str:
        aval = jax.typeof(leaf)  # as it prints itself, less where it is
        return f"{aval.dtype}[{','.join(map(str, aval.shape))}]{' (weakly typed)' if aval.weak_type else ''}"

    leaves = [
        {jax.tree_util.keystr(path): kind(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (before, after)
    ]
    names = [name for name in leaves[0] | leaves[1] if leaves[0].get(name) != leaves[1].get(name)]
    changes = [f"{name}: {leaves[0].get(name, 'nothing')} became {leaves[1].get(name, 'nothing')}" for name in names]
    if changes:
        raise UserError(f"{what} must keep its structure, shapes, dtypes and weak types; {'; '.join(changes[:5])}.")
