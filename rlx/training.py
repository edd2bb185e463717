"""train and train_many: the only training loop. It names no algorithm and no environment."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlx import group, settings, storage
from rlx.algorithm import Algorithm, Data, Key, Mode, Plan, Policy
from rlx.compilation import Programs, compile_run
from rlx.distributed import check_shared, is_first, on_first, several
from rlx.environment import Environment
from rlx.epoch import EpochMetrics, TrainState
from rlx.errors import UserError, require
from rlx.logging import Progress, RunDirectory, Writer, locked
from rlx.recording import (
    Recorder,
    StopSignal,
    check_alone,
    check_same_settings,
    describe,
    draw_curve,
    note_resume,
    open_checkpoints,
    say_other_devices,
)
from rlx.schedule import Schedule, TrainConfig, make_schedule, one_device
from rlx.sharding import without_past
from rlx.types import Discrete, PyTree, Spec

LOST = 60.0  # seconds in which processes of a run that lost one of them end, and leave its directory


class Run(NamedTuple):
    """What `train` returns."""

    state: TrainState
    history: list[dict[str, float]]  # the rows of metrics.jsonl
    policy: Policy  # greedy
    interrupted: bool  # a signal ended it early; `resume` goes on
    error: str = ""  # of a run among many that met a NaN or an infinity; its state is of no use


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
        state, metrics = programs.epoch(state, varied, programs.arrays)
        if pending:
            recorder.epoch(*pending, state.learner)
            stopping = bool(on_epoch(recorder.write(pending[0])))
        iteration = schedule.after(iteration)
        stop.look()
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
    data: Data | None = None,
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
            `gs://bucket/path`: object storage (`rlx.storage`).
        record: more entries for config.json (what builds the environment again, say).
        overwrite: replaces a run that `run_dir` already holds.
        resume: goes on from the newest whole checkpoint in `run_dir`, bit for bit as if nothing had happened.
        init_policy: another run's policy to start from.
        data: data sets to learn from (`rlx.data.read`); `env` then serves evaluations alone, but for learners whose
            settings mix data with what they see (`uses_data(config)` of the module).
        on_epoch: called with each row of metrics; a true answer ends the run after a save.
        progress: where phases and progress are shown; None: a display of its own on stderr.
        writers: more places for the rows of metrics; the caller closes them.

    Several processes (`rlx.distributed.start`) call this alike. `on_epoch` and `writers` are the first one's alone.

    Raises:
        UserError: settings that cannot work, before anything compiles; a run directory that holds another run, or into
                which another process trains; a disk that is full.
        NonFiniteError: a NaN or infinity in the losses or the environment.
    """
    config = algorithm.Config() if config is None else config
    schedule = make_schedule(env, train_config)
    allowed = "0: several processes train on all their devices"
    require(not several() or schedule.num_devices > 1, "num_devices", train_config.num_devices, allowed)
    plan = schedule.plan
    built = build_algorithm(algorithm, config, env, plan)
    check_policy(built, init_policy)
    data = check_data(algorithm, config, built, env, data)
    init_policy = jax.device_get(init_policy)  # it may lie on other devices than this run will
    require(run_dir is not None or not resume, "run_dir", run_dir, "resume needs the directory of the run")
    progress = progress or Progress(quiet=not is_first())
    progress.total_steps = plan.num_iterations * plan.steps_per_iteration
    description = describe(algorithm, env, train_config, config, schedule, data) | dict(record or {})
    directory = None
    run_dir = None if run_dir is None else storage.fetch(run_dir)
    if run_dir is not None and resume:
        directory = RunDirectory(Path(run_dir).absolute(), on_first(lambda: RunDirectory.open(run_dir).config))
        check_same_settings(directory.config, description)
        check_alone(directory)
        say_other_devices(directory.config, description, progress)
    elif run_dir is not None:
        on_first(lambda: RunDirectory.check_free(run_dir, overwrite))
    if run_dir is not None:
        check_shared(Path(run_dir))
    key = jax.random.key(train_config.seed)
    make = maker(algorithm, config, env, plan)
    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        patience = LOST if several() else 0.0
        held = on_first(lambda: run_dir is not None and Path(run_dir).is_dir())  # a run to resume, or to overwrite
        if held:
            on_first(lambda: stack.enter_context(locked(str(run_dir), patience)))
        if run_dir is not None:
            on_first(partial(storage.claim, run_dir))
        programs = compile_run(env, make, schedule, train_config, key, {}, init_policy, progress, data)
        if directory:
            on_first(partial(note_resume, directory, progress))
        elif run_dir is not None:
            full = on_first(lambda: RunDirectory.create(run_dir, description, overwrite).config)
            directory = RunDirectory(Path(run_dir).absolute(), full)
            if not held:
                on_first(lambda: stack.enter_context(locked(directory.path, patience)))
        stop = stack.enter_context(StopSignal(progress.quiet))
        state, recorder = None, Recorder(plan.steps_per_iteration, progress)
        if directory:
            state = recorder.open(stack, directory, train_config.keep_checkpoints, resume, programs.abstract_state)
        recorder.writers += writers if is_first() else ()
        if state is None:
            state = programs.init(key, {}, init_policy, programs.arrays)
        asked = on_epoch and (lambda row: on_first(lambda: bool(on_epoch(row))))
        with progress.phase("training"):
            state = run_epochs(programs, {}, schedule, train_config, state, recorder, stop, asked)
    interrupted = int(state.iteration) < plan.num_iterations
    if directory:
        on_first(partial(draw_curve, directory, progress))
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
    data: Data | None = None,
    on_epoch: Callable[[dict[str, dict[str, float]]], Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Run]:
    """Trains many runs as one compiled program, each recorded as if it had run alone.

    A run differs from itself alone by the rounding of batched arithmetic, which learning amplifies: 1e-5 after a few
    iterations, another draw of the same distribution in the end. One that meets a NaN or an infinity is recorded no
    further (`failed.json`, `Run.error`); the others go on.

    Args:
        env, algorithm, overwrite, resume, init_policy, data, progress: as for `train`.
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
    schedule = make_schedule(env, train_config, len(runs))
    plan = schedule.plan
    built = [build_algorithm(algorithm, of_run, env, plan) for _, of_run in runs.values()]
    check_policy(built[0], init_policy)
    data = check_data(algorithm, config, built[0], env, data)
    init_policy = jax.device_get(init_policy)
    require(run_dir is not None or not resume, "run_dir", run_dir, "resume needs the directory of the runs")
    progress = progress or Progress()
    progress.total_steps = plan.num_iterations * plan.steps_per_iteration
    descriptions = {
        name: describe(algorithm, env, *runs[name], schedule, data) | dict(records.get(name, {})) for name in names
    }
    directories = []
    run_dir = None if run_dir is None else storage.fetch(run_dir)
    if run_dir is not None and resume:
        group.check_names(run_dir, names)
        for name in names:  # a kill may have come before all were made
            if not (Path(run_dir) / name / "config.json").exists():
                RunDirectory.create(Path(run_dir) / name, descriptions[name])
        directories = [RunDirectory.open(Path(run_dir) / name) for name in names]
        for directory in directories:
            check_same_settings(directory.config, descriptions[directory.path.name])
        say_other_devices(directories[0].config, descriptions[names[0]], progress)
    elif run_dir is not None:
        group.check_free(run_dir, names, overwrite)
    key = jnp.stack([jax.random.key(of_run.seed) for of_run, _ in runs.values()])
    make = maker(algorithm, config, env, plan)

    def after_epoch(rows: dict[str, dict[str, float]]) -> bool:
        return not rows or bool(on_epoch and on_epoch(rows))  # no rows: every run has failed

    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        held = run_dir is not None and Path(run_dir).is_dir()
        if held:
            stack.enter_context(locked(str(run_dir)))
        if run_dir is not None:
            storage.claim(run_dir)
        try:
            programs = compile_run(env, make, schedule, train_config, key, varied, init_policy, progress, data)
        except jax.errors.JAXTypeError as error:
            if not varied:
                raise
            raise UserError(
                f"runs that differ in {', '.join(f'algo.{name}' for name in varied)} could not be traced as one "
                "program. Does the algorithm decide on it in Python (`if`, `float()`, a shape)? Floats of a Config may "
                f"only enter jax's functions. {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
        for directory in directories:
            note_resume(directory, progress if directory is directories[0] else Progress(quiet=True))
        if run_dir is not None and not resume:
            directories = group.create(run_dir, descriptions, overwrite)
            if not held:
                stack.enter_context(locked(run_dir))
        stop = stack.enter_context(StopSignal(progress.quiet))
        state, recorder = None, group.GroupRecorder(names, plan.steps_per_iteration, progress)
        if directories:
            keep, abstract = train_config.keep_checkpoints, programs.abstract_state
            greedy = jax.eval_shape(jax.vmap(lambda learner: built[0].policy(learner, "greedy")), abstract.learner)
            state = recorder.open(stack, directories, keep, resume, abstract, greedy)
        if state is None:
            state = programs.init(key, varied, init_policy, programs.arrays)
        with progress.phase("training"):
            state = run_epochs(programs, varied, schedule, train_config, state, recorder, stop, after_epoch)
        states = group.of_each(state)
        with progress.phase("writing the runs' own checkpoints"):
            recorder.save_each(states)
        recorder.check_any()
    interrupted = int(state.iteration) < plan.num_iterations
    for directory in directories:
        draw_curve(directory, progress)
    found = {}
    for own, of_run, (name, member) in zip(states, built, recorder.members.items(), strict=True):
        policy = of_run.policy(own.learner, "greedy")
        found[name] = Run(own, member.history, policy, interrupted, recorder.failed.get(name, ""))
    return found


def build_algorithm(module: Any, config: Any, env: Environment, plan: Plan) -> Algorithm:
    """Checks the settings of an algorithm and makes it. Raises UserError for those that cannot work."""
    settings.check_types(config, "algo.")
    check = getattr(module, "check", None)
    if check:
        check(config, env.spec, plan)
    return module.make(config, env.spec, plan)


def check_policy(algorithm: Algorithm, policy: Policy | None) -> None:
    """Raises UserError, with the first leaf that differs, where a policy to start from is of another kind."""
    if policy is None:
        return
    key = jax.random.key(0)
    wanted = jax.eval_shape(lambda key: algorithm.policy(algorithm.init(key), "greedy"), key)
    try:  # one of another algorithm may do: a cloned policy has what fine-tuning takes
        begun = jax.eval_shape(lambda key, policy: algorithm.policy(algorithm.init(key, policy), "greedy"), key, policy)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
        begun = policy
    has, takes = (
        {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (begun, wanted))
    )
    for name in takes | has:
        found, allowed = has.get(name, "nothing"), takes.get(name, "nothing")
        if found != allowed:
            raise UserError(f"the policy to start from has {found} at {name}; this run's learner takes {allowed}.")


def distance_between(before: Algorithm, after: Algorithm, policy: Policy, spec: Spec) -> float:
    """By how much greedy actions of `policy`, one of `before`, differ at most once `after` starts from it. () float.

    Observations are made up: normal numbers of several sizes. Discrete actions differ by 0 or 1.
    """
    obs_key, key, sizes = jax.random.key(0), jax.random.key(1), jnp.geomspace(0.01, 10.0, 64)
    leaves, tree = jax.tree.flatten(spec.obs)
    draws = [jax.random.normal(jax.random.fold_in(obs_key, i), (len(sizes), *x.shape)) for i, x in enumerate(leaves)]
    obs = jax.tree.unflatten(
        tree,
        [
            (draw * sizes.reshape(-1, *[1] * (draw.ndim - 1))).astype(x.dtype)
            for draw, x in zip(draws, leaves, strict=True)
        ],
    )

    def actions(algorithm: Algorithm, policy: Policy) -> jax.Array:
        memory = jax.vmap(algorithm.memory)(jax.random.split(key, len(sizes)))
        return algorithm.act(policy, memory, obs, key, "greedy")[1]

    @jax.jit
    def distance(policy: Policy) -> jax.Array:
        begun = after.policy(after.init(key, policy), "greedy")
        difference = actions(before, policy) - actions(after, begun)
        return (
            jnp.minimum(jnp.abs(difference), 1).max()
            if isinstance(spec.action, Discrete)
            else jnp.abs(difference).max()
        )

    return float(distance(policy))


def maker(module: Any, config: Any, env: Environment, plan: Plan) -> Callable[..., Algorithm]:
    """(varied settings, draws out of a data set or None) -> the algorithm; draws only where its `make` takes `data`."""
    takes = "data" in inspect.signature(module.make).parameters

    def make(varied: Mapping[str, jax.Array], draw: Callable[..., Any] | None) -> Algorithm:
        keywords = {"data": draw} if takes and draw else {}
        return module.make(dataclasses.replace(config, **varied), env.spec, plan, **keywords)

    return make


def check_data(module: Any, config: Any, algorithm: Algorithm, env: Environment, data: Data | None) -> Data | None:
    """The data as this learner takes them: in the place of environments, or beside them (without `source`).

    `uses_data(config)` of its module says which, "alone" or "beside", or "" for neither; a module without it takes any
    learner's trajectories. Raises UserError for one that needs data without any, or that data cannot serve.
    """
    name = getattr(module, "__name__", type(module).__name__).rpartition(".")[2]
    kind = module.uses_data(config) if hasattr(module, "uses_data") else None
    if data is None:
        allowed = f"at these settings {name} learns from a data set (--data FILE; `rlx collect` makes one)"
        require(not kind, "data", None, allowed)
        return None
    if kind is not None:
        files = [entry["path"] for entry in data.record]
        require(bool(kind), "data", files, f"none: at these settings {name} takes nothing out of it (algo.data_batch)")
        return data if kind == "alone" else data._replace(source=None)

    def act(key: Key) -> PyTree:
        memory, obs = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), (algorithm.memory(key), env.spec.obs))
        return algorithm.act(algorithm.policy(algorithm.init(key), "explore"), memory, obs, key, "explore")[2]

    extras = jax.eval_shape(act, jax.random.key(0))
    if jax.tree.leaves(extras):
        raise UserError(f"{name} cannot learn from data: its update needs {type(extras).__name__}, noted while acting.")
    return data


def load_policy(
    run_dir: str | Path,
    env: Environment,
    algorithm: Any,
    train_config: TrainConfig,
    config: Any,
    best: bool = False,
    mode: Mode = "greedy",
    step: int | None = None,
) -> tuple[Algorithm, Policy, int]:
    """The algorithm of a run and the policy of its newest whole checkpoint, or of its best evaluation; the step.

    `step`: the checkpoint of that step instead of the newest.

    Raises UserError where there is none, or where it is of another algorithm or environment.
    """
    plan = make_schedule(env, one_device(train_config)).plan
    built = algorithm.make(config, env.spec, plan)  # unchecked: what it needs to learn need not be here
    directory = RunDirectory.open(storage.fetch(run_dir))
    check_alone(directory)
    checkpointer = open_checkpoints(directory, train_config.keep_checkpoints)
    learner = without_past(jax.eval_shape(built.init, jax.random.key(0)))
    if best:
        greedy = jax.eval_shape(lambda learner: built.policy(learner, "greedy"), learner)
        return built, *checkpointer.restore_best(greedy)
    # The learner alone: the environments' part depends on the physics engine, which may be another one here.
    state, step = checkpointer.restore(TrainState(learner, (), (), ()), step, partial=True)  # type: ignore[arg-type]
    return built, built.policy(state.learner, mode), step
