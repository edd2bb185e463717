"""TrainState, make_epoch and train: the only training loop. It names no algorithm and no environment."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rlx import group, settings
from rlx.algorithm import Algorithm, Key, LearnerState, Mode, Plan, Policy, Source, SourceState
from rlx.compilation import Programs, check_environment, check_fixed_point, compile_programs
from rlx.environment import Environment
from rlx.errors import UserError, require
from rlx.evaluation import EvalResult, make_evaluate
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
    stopped: jax.Array | None = None  # () int32, of a run among many: the iteration that was not finite, -1 before one


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
    error: str = ""  # of a run among many that met a NaN or an infinity; its state is of no use


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
        state = state._replace(source=source.refresh(state.source, jax.random.fold_in(pool_key, state.iteration)))
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
    iterations are zero.
    """
    assert before.stopped is not None
    running = before.stopped < 0
    finite = [jnp.isfinite(value).all() for value in metrics.train.values()]
    finite += [index < 0 for index in metrics.stats.nonfinite.values()]
    seen = jnp.stack([jnp.ones((), bool), *finite]).all()
    leaves = [leaf for leaf in jax.tree.leaves(after.learner) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    goes_on = running & seen & jnp.stack([jnp.ones((), bool), *(jnp.isfinite(leaf).all() for leaf in leaves)]).all()
    unseen = running & seen & ~goes_on
    metrics = metrics._replace(train={k: jnp.where(unseen, jnp.nan, v) for k, v in metrics.train.items()})
    kept = jax.tree.map(
        lambda new, old: jnp.where(goes_on, new, old), (after.learner, after.source), (before.learner, before.source)
    )
    stopped = jnp.where(running & ~goes_on, before.iteration, before.stopped)
    still = metrics._replace(stats=metrics.stats._replace(nonfinite={}))
    still = jax.tree.map(lambda x: jnp.where(running, x, jnp.zeros_like(x)), still)
    nonfinite = {k: jnp.where(running, index, -1) for k, index in metrics.stats.nonfinite.items()}
    metrics = still._replace(stats=still.stats._replace(nonfinite=nonfinite))
    return after._replace(learner=kept[0], source=kept[1], stopped=stopped), metrics


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
    varied: Mapping[str, jax.Array],
    schedule: Schedule,
    config: TrainConfig,
    state: TrainState,
    recorder: Recorder | group.GroupRecorder,
    stop: StopSignal,
    on_epoch: Callable[[Any], Any] | None,
) -> TrainState:
    """The loop. The host handles an epoch's metrics after it has dispatched the next one."""
    on_epoch = on_epoch or (lambda row: None)
    iteration = int(state.iteration)
    if iteration == 0 and config.num_evals:
        recorder.evaluation(0, *programs.evaluate(state, varied))
        recorder.write(0)
    recorder.begin(iteration)
    pending: tuple[int, EpochMetrics, float | None] | None = None
    stopping = False
    while iteration < schedule.plan.num_iterations and not stopping:
        state, metrics = programs.epoch(state, varied)
        if pending:
            recorder.epoch(*pending, state.learner)
            stopping = bool(on_epoch(recorder.write(pending[0])))
        iteration = schedule.after(iteration)
        pending = (iteration, metrics, recorder.time_if_ready(metrics))
        evaluates = schedule.due(iteration, config.num_evals)
        last = iteration == schedule.plan.num_iterations
        if evaluates or last or stop.requested or stopping or schedule.due(iteration, config.num_checkpoints):
            recorder.epoch(*pending, state.learner)
            pending = None
            if evaluates:
                recorder.evaluation(iteration, *programs.evaluate(state, varied))
            stopping |= bool(on_epoch(recorder.write(iteration))) | stop.requested
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
    key = jax.random.key(train_config.seed)
    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        programs = compile_run(env, lambda varied: built, schedule, train_config, key, {}, init_policy, progress)
        if run_dir is not None and not resume:
            directory = RunDirectory.create(run_dir, description, overwrite)
        stop = stack.enter_context(StopSignal(progress.quiet))
        state, recorder = None, Recorder(plan.steps_per_iteration, progress)
        if directory:
            state = recorder.open(stack, directory, train_config.keep_checkpoints, resume, programs.abstract_state)
        recorder.writers += writers
        if state is None:
            state = programs.init(key, {}, init_policy)
        with progress.phase("training"):
            state = run_epochs(programs, {}, schedule, train_config, state, recorder, stop, on_epoch)
    interrupted = int(state.iteration) < plan.num_iterations
    if directory:
        draw_curve(directory, progress)
    return Run(state, recorder.history, built.policy(state.learner, "greedy"), interrupted)


def train_many(
    env: Environment,
    algorithm: Any,
    runs: Mapping[str, tuple[TrainConfig, Any]],
    *,
    run_dir: str | Path | None = None,
    records: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    overwrite: bool = False,
    resume: bool = False,
    init_policy: Policy | None = None,
    on_epoch: Callable[[dict[str, dict[str, float]]], Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Run]:
    """Trains many runs as one compiled program, each recorded as if it had run alone.

    A run differs from itself alone by the rounding of batched arithmetic, which learning amplifies: 1e-5 after a few
    iterations, another draw of the same distribution in the end. One that meets a NaN or an infinity is recorded no
    further (`failed.json`, `Run.error`); the others go on.

    Args:
        env, algorithm, overwrite, resume, init_policy, progress: as for `train`.
        runs: name -> its settings. They may differ in `seed` and in fields of the algorithm's Config that are floats.
        run_dir: holds a run directory for each name.
        records: name -> more entries for its config.json.
        on_epoch: called with {name: row of metrics} of the runs that go on; a true answer ends all after a save.

    Raises:
        UserError: as `train`; runs that differ in another setting.
        NonFiniteError: every run has met one.
    """
    names = list(runs)
    train_config, config, varied = group.varied_settings(runs)
    schedule = make_schedule(env, train_config)
    plan = schedule.plan
    built = [build_algorithm(algorithm, of_run, env, plan) for _, of_run in runs.values()]
    check_policy(built[0], init_policy)
    require(run_dir is not None or not resume, "run_dir", run_dir, "resume needs the directory of the runs")
    progress = progress or Progress()
    progress.total_steps = plan.num_iterations * plan.steps_per_iteration
    schedule_entry = {**plan._asdict(), "iterations_per_epoch": schedule.iterations_per_epoch}
    descriptions = {
        name: describe(algorithm, env, *runs[name], schedule_entry) | dict(records.get(name, {})) for name in names
    }
    directories = []
    if run_dir is not None and resume:
        for name in names:  # a kill may have come before all were made
            if not (Path(run_dir) / name / "config.json").exists():
                RunDirectory.create(Path(run_dir) / name, descriptions[name])
        directories = [RunDirectory.open(Path(run_dir) / name) for name in names]
        for directory in directories:
            check_same_settings(directory.config, descriptions[directory.path.name])
    elif run_dir is not None:
        group.check_free(run_dir, names, overwrite)
    key = jnp.stack([jax.random.key(of_run.seed) for of_run, _ in runs.values()])

    def make(varied: Mapping[str, jax.Array]) -> Algorithm:
        return algorithm.make(dataclasses.replace(config, **varied), env.spec, plan)

    def after_epoch(rows: dict[str, dict[str, float]]) -> bool:
        return not rows or bool(on_epoch and on_epoch(rows))  # no rows: every run has failed

    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        programs = compile_run(env, make, schedule, train_config, key, varied, init_policy, progress)
        if run_dir is not None and not resume:
            directories = group.create(run_dir, descriptions, overwrite)
        stop = stack.enter_context(StopSignal(progress.quiet))
        state, recorder = None, group.GroupRecorder(names, plan.steps_per_iteration, progress)
        if directories:
            keep, abstract = train_config.keep_checkpoints, programs.abstract_state
            greedy = jax.eval_shape(jax.vmap(lambda learner: built[0].policy(learner, "greedy")), abstract.learner)
            state = recorder.open(stack, directories, keep, resume, abstract, greedy)
        if state is None:
            state = programs.init(key, varied, init_policy)
        with progress.phase("training"):
            state = run_epochs(programs, varied, schedule, train_config, state, recorder, stop, after_epoch)
        with progress.phase("writing the runs' own checkpoints"):
            recorder.save_each(state)
        recorder.check_any()
    interrupted = int(state.iteration) < plan.num_iterations
    for directory in directories:
        draw_curve(directory, progress)
    found = {}
    for index, (name, member) in enumerate(recorder.members.items()):
        own = group.one_run(state, index)
        policy = built[index].policy(own.learner, "greedy")
        found[name] = Run(own, member.history, policy, interrupted, recorder.failed.get(name, ""))
    return found


def build_algorithm(module: Any, config: Any, env: Environment, plan: Plan) -> Algorithm:
    """Checks the settings of an algorithm and makes it. Raises UserError for those that cannot work."""
    settings.check_types(config, "algo.")
    check = getattr(module, "check", None)
    if check:
        check(config, env.spec, plan)
    return module.make(config, env.spec, plan)


def compile_run(
    env: Environment,
    make: Callable[[Mapping[str, jax.Array]], Algorithm],
    schedule: Schedule,
    config: TrainConfig,
    key: Key,
    varied: Mapping[str, jax.Array],
    policy: Policy | None,
    progress: Progress,
) -> Programs:
    """Everything a run needs, compiled ahead of the first step; many runs, if there are many keys.

    `make` gives the algorithm for its `varied` settings, () each. With `key` [K] those are [K], and all leaves of the
    state and of what it gives are [K, ...], but for the iteration.
    """
    check_environment(env)
    source = make_source(env, schedule.plan, config.reset, config.reset_pool_size, config.stagger)
    many = key.ndim > 0

    def init(key: Key, varied: Any, policy: Policy | None) -> TrainState:
        state = init_state(make(varied), source, key, policy)
        return state._replace(stopped=jnp.full((), -1, jnp.int32)) if many else state

    def epoch(state: TrainState, varied: Any) -> tuple[TrainState, EpochMetrics]:
        return make_epoch(make(varied), source, schedule.plan, schedule.iterations_per_epoch)(state)

    def evaluate(state: TrainState, varied: Any) -> tuple[EvalResult, Policy]:
        algorithm = make(varied)
        policy = algorithm.policy(state.learner, "greedy")
        play = make_evaluate(env, algorithm, config.eval_episodes, "greedy", config.eval_decisions)
        _, _, _, eval_key = jax.random.split(state.key, 4)
        return play(policy, eval_key), policy

    functions: tuple[Any, Any, Any] = (init, epoch, evaluate)
    if many:
        of_state = TrainState(0, 0, 0, None, 0)  # type: ignore[arg-type]
        functions = (
            jax.vmap(init, (0, 0, None), of_state),
            jax.vmap(epoch, (of_state, 0), (of_state, 0)),
            jax.vmap(evaluate, (of_state, 0)),
        )
    init_all, epoch_all, evaluate_all = functions
    return compile_programs(
        init_all, epoch_all, evaluate_all if config.num_evals else None, key, varied, policy, progress
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
