"""Compiling a run ahead of its first step, for the devices it is to use; what it takes there, and what must hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlx import footprint
from rlx.algorithm import Algorithm, Data, Key, Policy, Source
from rlx.environment import Environment, random_action
from rlx.epoch import EpochMetrics, TrainState, check_fixed_point, init_state, make_epoch
from rlx.errors import UserError
from rlx.evaluation import EvalResult, make_evaluate
from rlx.logging import Progress
from rlx.rollout import make_source
from rlx.schedule import Schedule, TrainConfig
from rlx.sharding import AXIS, make_mesh, place, placement
from rlx.types import PyTree

# XLA hands matrix products to YNNPACK, which packs both sides of each anew. Without it, on two cores, epochs of SAC are
# 1.36 times as fast at batch 256 and networks of 128 x 128 and 1.07 times at 512 and 256 x 256, of TD3 1.33 times, of
# PPO 0.9 to 1.1 times (jax 0.10.2; medians of 12 epochs, one with and one without in turn).
CPU_OPTIONS: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}


class Programs(NamedTuple):
    """Compiled; `state` is a `rlx.epoch.TrainState`."""

    init: Callable[..., TrainState]  # (key, varied, policy, arrays) -> state
    epoch: Callable[..., tuple[TrainState, EpochMetrics]]  # (state, varied, arrays); donates the state
    evaluate: Callable[..., tuple[EvalResult, Policy]]  # (state, varied); without evaluations, never called
    abstract_state: TrainState  # shapes, dtypes and, on several devices, shardings of the state
    arrays: PyTree = ()  # what the source reads and never changes, on every device


def compile_run(
    env: Environment,
    make: Callable[..., Algorithm],
    schedule: Schedule,
    config: TrainConfig,
    key: Key,
    varied: Mapping[str, jax.Array],
    policy: Policy | None,
    progress: Progress,
    data: Data | None = None,
) -> Programs:
    """Everything a run needs, compiled ahead of the first step; many runs, if there are many keys.

    `make` gives the algorithm for its `varied` settings, () each. With `key` [K] those are [K], and all leaves of the
    state and of what it gives are [K, ...], but for the iteration. `policy` is what `init` may start from. With `data`
    the environment is there for evaluations alone, unless they have no source; `make` gets the draws.
    """
    check_environment(env)
    many = key.ndim > 0
    mesh, runs_mesh = make_mesh(schedule.plan.num_devices), make_mesh(schedule.num_run_devices)
    arrays = data.arrays if data else ()

    def source(arrays: PyTree) -> Source:
        if data and data.source:
            return data.source(arrays, schedule.plan, mesh)
        return make_source(env, schedule.plan, config.reset, config.reset_pool_size, config.stagger, mesh)

    def learner(varied: Any, arrays: PyTree) -> Algorithm:
        return make(varied, partial(data.draw, arrays) if data else None)

    def init(key: Key, varied: Any, policy: Policy | None, arrays: PyTree) -> TrainState:
        state = init_state(learner(varied, arrays), source(arrays), key, policy)
        return state._replace(stopped=jnp.full((), -1, jnp.int32)) if many else state

    def epoch(state: TrainState, varied: Any, arrays: PyTree) -> tuple[TrainState, EpochMetrics]:
        return make_epoch(learner(varied, arrays), source(arrays), schedule.plan, schedule.iterations_per_epoch)(state)

    def evaluate(state: TrainState, varied: Any) -> tuple[EvalResult, Policy]:
        algorithm = make(varied, None)
        policy = algorithm.policy(state.learner, config.eval_mode)
        play = make_evaluate(env, algorithm, config.eval_episodes, config.eval_mode, config.eval_decisions, mesh)
        _, _, _, eval_key = jax.random.split(state.key, 4)
        return play(policy, eval_key), policy

    functions: tuple[Any, Any, Any] = (init, epoch, evaluate)
    if many:
        of_state = of_runs(0, None)
        functions = (
            jax.vmap(init, (0, 0, None, None), of_state),
            jax.vmap(epoch, (of_state, 0, None), (of_state, 0)),
            jax.vmap(evaluate, (of_state, 0)),
        )
    if runs_mesh:
        functions = over_devices(functions, runs_mesh)
    with progress.phase("tracing"):
        in_state = rest = whole = None  # where the state is, everything else that the programs give, and the arrays
        if runs_mesh:
            whole = NamedSharding(runs_mesh, P())
            rest = NamedSharding(runs_mesh, P(AXIS))
            in_state = of_runs(rest, NamedSharding(runs_mesh, P()))
        elif mesh:
            rest = whole = NamedSharding(mesh, P())
            in_state = placement(jax.eval_shape(functions[0], key, varied, policy, arrays), mesh, (None,) * key.ndim)
        given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arrays)
        traced = [jax.jit(functions[0], out_shardings=in_state).trace(key, varied, policy, given)]
        state = traced[0].out_info
        both = (in_state, rest)
        traced.append(jax.jit(functions[1], out_shardings=both, donate_argnums=0).trace(state, varied, given))
        if config.num_evals:
            traced.append(jax.jit(functions[2], out_shardings=rest).trace(state, varied))
    with progress.phase("compiling"):
        compiled = [compile_program(program.lower()) for program in traced]
    programs = (compiled[0], compiled[1], compiled[-1])
    footprint.report(programs, state, arrays, schedule, key.size, progress)
    return Programs(*programs, state, place(arrays, whole))


def compile_program(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """For a CPU, with `CPU_OPTIONS`, unless this XLA does not know them or XLA_FLAGS names them."""
    named = any(name in os.environ.get("XLA_FLAGS", "") for name in CPU_OPTIONS)
    if named or jax.default_backend() != "cpu":
        return lowered.compile()
    try:
        return lowered.compile(CPU_OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return lowered.compile()


def over_devices(functions: tuple[Any, Any, Any], mesh: Mesh) -> tuple[Any, ...]:
    """Those of many runs, so that every device trains some of the runs and none hears of the others."""
    one, of_state = P(AXIS), of_runs(P(AXIS), P())
    specs = [((one, one, P(), P()), of_state), ((of_state, one, P()), (of_state, one)), ((of_state, one), one)]
    return tuple(
        jax.shard_map(function, mesh=mesh, in_specs=given, out_specs=gives, check_vma=False)
        for function, (given, gives) in zip(functions, specs, strict=True)
    )


def of_runs(each: Any, shared: Any) -> Any:
    """A prefix of a TrainState of many runs: `shared` for the iteration, `each` for what every run has."""
    return TrainState(each, each, each, shared, each)


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
