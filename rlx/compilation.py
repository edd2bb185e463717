"""Compiling a run ahead of its first step, and what must hold before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from rlx.algorithm import Key, Policy
from rlx.environment import Environment, random_action
from rlx.errors import UserError
from rlx.evaluation import EvalResult
from rlx.logging import Progress
from rlx.types import PyTree


class Programs(NamedTuple):
    """Compiled; `state` is a `rlx.training.TrainState`."""

    init: Callable[..., Any]  # (key, varied, policy) -> state
    epoch: Callable[..., tuple[Any, Any]]  # (state, varied) -> (state, EpochMetrics); donates the state
    evaluate: Callable[..., tuple[EvalResult, Policy]]  # (state, varied); without evaluations, never called
    abstract_state: Any  # shapes and dtypes of the state


def compile_programs(
    init: Callable[..., Any],
    epoch: Callable[..., Any],
    evaluate: Callable[..., Any] | None,
    key: Key,
    varied: Mapping[str, jax.Array],
    policy: Policy | None,
    progress: Progress,
) -> Programs:
    """Traces and compiles, telling `progress` which of the two goes on. `policy` is what `init` may start from."""
    with progress.phase("tracing"):
        traced = [jax.jit(init).trace(key, varied, policy)]
        state = traced[0].out_info
        traced.append(jax.jit(epoch, donate_argnums=0).trace(state, varied))
        if evaluate:
            traced.append(jax.jit(evaluate).trace(state, varied))
    with progress.phase("compiling"):
        compiled = [program.lower().compile() for program in traced]
    return Programs(compiled[0], compiled[1], compiled[-1], state)


def check_fixed_point(what: str, before: PyTree, after: PyTree) -> None:
    """Raises UserError, naming leaves, where `after` differs from `before` in structure, shape, dtype or weak type."""
    leaves = [
        {jax.tree_util.keystr(path): jax.typeof(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (before, after)
    ]
    names = [name for name in leaves[0] | leaves[1] if leaves[0].get(name) != leaves[1].get(name)]
    changes = [f"{name}: {leaves[0].get(name, 'nothing')} became {leaves[1].get(name, 'nothing')}" for name in names]
    if changes:
        raise UserError(f"{what} must keep its structure, shapes, dtypes and weak types; {'; '.join(changes[:5])}.")


def check_environment(env: Environment) -> None:
    """Raises UserError where `step` returns another kind of state, observation or ending than it should."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state, obs = jax.eval_shape(env.reset, key, env.spec.params)
    action = jax.eval_shape(lambda key: random_action(env.spec, key), key)
    after, timestep = jax.eval_shape(env.step, state, action, key)
    name = env.spec.name or type(env).__name__
    check_fixed_point(f"the state of environment {name}", state, after)
    check_fixed_point(f"the observation of environment {name}", obs, timestep.obs)
    check_fixed_point(f"final_obs of environment {name}", obs, timestep.final_obs)
    for field in ("terminated", "truncated"):
        found = getattr(timestep, field)
        if (found.shape, found.dtype) != ((), bool):
            raise UserError(f"{field} of environment {name} is {found.dtype}{list(found.shape)}; it must be bool[].")
