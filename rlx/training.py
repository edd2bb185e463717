"""TrainState, make_epoch and train: the only training loop. It names no algorithm and no environment."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rlx import settings
from rlx.algorithm import Algorithm, LearnerState, Mode, Plan, Policy, Source, SourceState
from rlx.compilation import Programs, check_environment, check_fixed_point, compile_programs
from rlx.environment import Environment
from rlx.errors import UserError, require
from rlx.evaluation import make_evaluate
from rlx.logging import Progress, RunDirectory, Writer
from rlx.recording import Recorder, StopSignal, check_same_settings, describe, draw_curve, open_checkpoints
from rlx.rollout import make_source
from rlx.types import EpisodeStats, Metrics

MAX_STEPS_PER_EPOCH = 2**19  # seconds on a CPU: a signal is answered at an epoch's end


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    total_steps: int = 1_000_000  # budget of inner environment steps; rounded down to whole iterations, at least one
    num_envs: int = 256  # parallel environments
    unroll_length: int = 32  # decisions an environment takes in one iteration
    seed: int = 0  # decides everything that is random
    iterations_per_epoch: int = 0  # iterations in one compiled block; 0: a fiftieth of the run, at most 2^19 steps
    num_evals: int = 10  # evaluations after the one at the start, evenly spaced, the last at the end; 0: none
    eval_episodes: int = 64  # episodes an evaluation
    eval_decisions: int = 0  # cut of an episode without an ending; 0: the environment's time limit
    reset: Literal["pool", "always"] = "pool"  # where new episodes start: a pool of drawn states, or anew
    reset_pool_size: int = 128  # states in that pool, a quarter of which is drawn anew once an epoch
    stagger: bool = True  # cut first episodes at random, so that environments do not start all later ones together
    num_checkpoints: int = 10  # saves, evenly spaced, the last at the end
    keep_checkpoints: int = 2  # whole ones kept beside the best policy


class TrainState(NamedTuple):
    """All that a run is: a pytree of arrays."""

    learner: LearnerState
    source: SourceState
    key: jax.Array  # the root key; never changes
    iteration: jax.Array  # () int32


class EpochMetrics(NamedTuple):
    """Sums over the iterations of an epoch, and for `nonfinite` the largest."""

    iterations: jax.Array
    train: Metrics
    stats: EpisodeStats


class Run(NamedTuple):
    """What `train` returns."""

    state: TrainState
    history: list[dict[str, float]]  # the rows of metrics.jsonl
    policy: Policy  # greedy
    interrupted: bool  # a signal ended it early; `resume` goes on


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
        state = TrainState(learner, source_state, state.key, state.iteration + 1)
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
        state = state._replace(source=source.refresh(state.source, jax.random.fold_in(pool_key, state.iteration)))
        count = jnp.minimum(iterations_per_epoch, plan.num_iterations - state.iteration)
        after, shapes = jax.eval_shape(iterate, state)
        check_fixed_point("the state of the run", state, after)
        zeros = jax.tree.map(lambda x: jnp.full(x.shape, -1 if x.dtype == jnp.int32 else 0, x.dtype), shapes)

        def body(_, carry):
            state, sums = carry
            state, new = iterate(state)
            nonfinite = jax.tree.map(jnp.maximum, sums.stats.nonfinite, new.stats.nonfinite)
            sums = jax.tree.map(jnp.add, sums, new)
            return state, sums._replace(stats=sums.stats._replace(nonfinite=nonfinite))

        return jax.lax.fori_loop(0, count, body, (state, zeros))

    return epoch


class Schedule(NamedTuple):
    """When the driver visits the host: a pure function of the iteration, so that a resumed run keeps it."""

    plan: Plan
    iterations_per_epoch: int

    @property
    def num_epochs(self) -> int:
        return -(-self.plan.num_iterations // self.iterations_per_epoch)

    def after(self, iteration: int) -> int:
        """The iteration at the next epoch's end."""
        return min(iteration + self.iterations_per_epoch, self.plan.num_iterations)

    def due(self, iteration: int, times: int) -> bool:
        """Whether one of `times` evenly spaced events falls on the epoch that ends at `iteration`."""
        epoch = -(-iteration // self.iterations_per_epoch)
        return epoch * times // self.num_epochs > (epoch - 1) * times // self.num_epochs


def make_schedule(env: Environment, config: TrainConfig) -> Schedule:
    """Sizes of the run from its settings. Raises UserError for a field that cannot be."""
    settings.check_types(config)
    at_least_1 = ("total_steps", "num_envs", "unroll_length", "eval_episodes", "reset_pool_size")
    for name in (*at_least_1, "num_checkpoints", "keep_checkpoints"):
        require(getattr(config, name) >= 1, name, getattr(config, name), "at least 1")
    for name in ("iterations_per_epoch", "num_evals", "eval_decisions"):
        require(getattr(config, name) >= 0, name, getattr(config, name), "at least 0")
    if config.num_evals and not env.spec.episode_length:
        allowed = "at least 1, for the environment has no time limit"
        require(config.eval_decisions > 0, "eval_decisions", config.eval_decisions, allowed)
    require(0 <= config.seed < 2**32, "seed", config.seed, "an integer from 0 to 2^32 - 1")
    require(config.reset in ("pool", "always"), "reset", config.reset, "pool or always")
    plan = Plan(config.num_envs, config.unroll_length, 0, env.spec.action_repeat)
    num_iterations = max(1, config.total_steps // plan.steps_per_iteration)
    largest = max(1, MAX_STEPS_PER_EPOCH // plan.steps_per_iteration)
    per_epoch = config.iterations_per_epoch or min(max(1, num_iterations // 50), largest)
    return Schedule(plan._replace(num_iterations=num_iterations), min(per_epoch, num_iterations))


def run_epochs(
    programs: Programs,
    schedule: Schedule,
    config: TrainConfig,
    algorithm: Algorithm,
    state: TrainState,
    recorder: Recorder,
    stop: StopSignal,
    on_epoch: Callable[[dict[str, float]], Any] | None,
) -> TrainState:
    """The loop. The host handles an epoch's metrics after it has dispatched the next one."""
    on_epoch = on_epoch or (lambda row: None)
    iteration = int(state.iteration)
    _, _, _, eval_key = jax.random.split(state.key, 4)

    def evaluate(state: TrainState, iteration: int) -> dict[str, float]:
        policy = algorithm.policy(state.learner, "greedy")
        return recorder.evaluation(iteration, programs.evaluate(policy, eval_key), policy)

    if iteration == 0 and config.num_evals:
        recorder.write(0, evaluate(state, 0))
    recorder.begin(iteration)
    pending: tuple[int, EpochMetrics, float | None] | None = None
    stopping = False
    while iteration < schedule.plan.num_iterations and not stopping:
        state, metrics = programs.epoch(state)
        if pending:
            stopping = bool(on_epoch(recorder.write(pending[0], recorder.epoch(*pending, state.learner))))
        iteration = schedule.after(iteration)
        pending = (iteration, metrics, recorder.time_if_ready(metrics))
        evaluates = schedule.due(iteration, config.num_evals)
        last = iteration == schedule.plan.num_iterations
        if evaluates or last or stop.requested or stopping or schedule.due(iteration, config.num_checkpoints):
            row = recorder.epoch(*pending, state.learner)
            pending = None
            row |= evaluate(state, iteration) if evaluates else {}
            stopping |= bool(on_epoch(recorder.write(iteration, row))) | stop.requested
            if stopping or schedule.due(iteration, config.num_checkpoints):
                recorder.save(iteration, state)
            recorder.resume_clock()
    return state


def train(
    env: Environment,
    algorithm: Any,
    train_config: TrainConfig = TrainConfig(),  # noqa: B008  (frozen)
    config: Any = None,
    *,
    run_dir: str | Path | None = None,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    init_policy: Policy | None = None,
    on_epoch: Callable[[dict[str, float]], Any] | None = None,
    progress: Progress | None = None,
    writers: Sequence[Writer] = (),
) -> Run:
    """Trains, and with `run_dir` records everything that is needed to go on.

    Args:
        env: see `rlx.environment.Environment`.
        algorithm: a module (or any object) with `Config`, `make` and, if it has any, `check`.
        train_config: sizes of the run.
        config: the algorithm's Config; its defaults if None.
        run_dir: where config.json, metrics.jsonl, tensorboard/, checkpoints/, eval.json, curve.png go. None: nowhere.
        record: more entries for config.json (what builds the environment again, say).
        overwrite: replaces a run that `run_dir` already holds.
        resume: goes on from the newest whole checkpoint in `run_dir`, bit for bit as if nothing had happened.
        init_policy: another run's policy to start from.
        on_epoch: called with each row of metrics; a true answer ends the run after a save.
        progress: where phases and progress are shown; None: a display of its own on stderr.
        writers: more places for the rows of metrics; the caller closes them.

    Raises:
        UserError: settings that cannot work, before anything compiles; a run directory in use; a disk that is full.
        NonFiniteError: a NaN or infinity in the losses or the environment.
    """
    config = algorithm.Config() if config is None else config
    schedule = make_schedule(env, train_config)
    plan = schedule.plan
    built = build_algorithm(algorithm, config, env, plan)
    check_policy(built, init_policy)
    require(run_dir is not None or not resume, "run_dir", run_dir, "resume needs the directory of the run")
    progress = progress or Progress()
    progress.total_steps = plan.num_iterations * plan.steps_per_iteration
    schedule_entry = {**plan._asdict(), "iterations_per_epoch": schedule.iterations_per_epoch}
    description = describe(algorithm, env, train_config, config, schedule_entry) | dict(record or {})
    directory = None
    if run_dir is not None and resume:
        directory = RunDirectory.open(run_dir)
        check_same_settings(directory.config, description)
    elif run_dir is not None:
        RunDirectory.check_free(run_dir, overwrite)
    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        programs = compile_run(env, built, schedule, train_config, init_policy, progress)
        if run_dir is not None and not resume:
            directory = RunDirectory.create(run_dir, description, overwrite)
        stop = stack.enter_context(StopSignal(progress.quiet))
        state, recorder = None, Recorder(plan.steps_per_iteration, progress)
        if directory:
            state = recorder.open(stack, directory, train_config.keep_checkpoints, resume, programs.abstract_state)
        recorder.writers += writers
        if state is None:
            state = programs.init(jax.random.key(train_config.seed), init_policy)
        with progress.phase("training"):
            state = run_epochs(programs, schedule, train_config, built, state, recorder, stop, on_epoch)
    interrupted = int(state.iteration) < plan.num_iterations
    if directory:
        draw_curve(directory, progress)
    return Run(state, recorder.history, built.policy(state.learner, "greedy"), interrupted)


def build_algorithm(module: Any, config: Any, env: Environment, plan: Plan) -> Algorithm:
    """Checks the settings of an algorithm and makes it. Raises UserError for those that cannot work."""
    settings.check_types(config, "algo.")
    check = getattr(module, "check", None)
    if check:
        check(config, env.spec, plan)
    return module.make(config, env.spec, plan)


def compile_run(
    env: Environment, algorithm: Algorithm, schedule: Schedule, config: TrainConfig, policy: Policy, progress: Progress
) -> Programs:
    """Everything a run needs, compiled ahead of the first step."""
    check_environment(env)
    source = make_source(env, schedule.plan, config.reset, config.reset_pool_size, config.stagger)
    evaluate = None
    if config.num_evals:
        evaluate = make_evaluate(env, algorithm, config.eval_episodes, "greedy", config.eval_decisions)
    return compile_programs(
        init=lambda key, policy: init_state(algorithm, source, key, policy),
        epoch=make_epoch(algorithm, source, schedule.plan, schedule.iterations_per_epoch),
        evaluate=evaluate,
        greedy=lambda state: algorithm.policy(state.learner, "greedy"),
        policy=policy,
        progress=progress,
    )


def check_policy(algorithm: Algorithm, policy: Policy | None) -> None:
    """Raises UserError, with the first leaf that differs, where a policy to start from is of another kind."""
    if policy is None:
        return
    wanted = jax.eval_shape(lambda key: algorithm.policy(algorithm.init(key), "greedy"), jax.random.key(0))
    has, takes = (
        {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (policy, wanted))
    )
    for name in takes | has:
        found, allowed = has.get(name, "nothing"), takes.get(name, "nothing")
        if found != allowed:
            raise UserError(f"the policy to start from has {found} at {name}; this run's learner takes {allowed}.")


def load_policy(
    run_dir: str | Path,
    env: Environment,
    algorithm: Any,
    train_config: TrainConfig,
    config: Any,
    best: bool = False,
    mode: Mode = "greedy",
) -> tuple[Algorithm, Policy, int]:
    """The algorithm of a run and the policy of its newest whole checkpoint, or of its best evaluation; the step.

    Raises UserError where there is none, or where it is of another algorithm or environment.
    """
    plan = make_schedule(env, train_config).plan
    built = build_algorithm(algorithm, config, env, plan)
    checkpointer = open_checkpoints(RunDirectory.open(run_dir), train_config.keep_checkpoints)
    learner = jax.eval_shape(built.init, jax.random.key(0))
    if best:
        greedy = jax.eval_shape(lambda learner: built.policy(learner, "greedy"), learner)
        return built, *checkpointer.restore_best(greedy)
    # The learner alone: the environments' part depends on the physics engine, which may be another one here.
    state, step = checkpointer.restore(TrainState(learner, (), (), ()), partial=True)  # type: ignore[arg-type]
    return built, built.policy(state.learner, mode), step
