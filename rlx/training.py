"""train and train_many: the only training loop. It names no algorithm and no environment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlx import group
from rlx.algorithm import Data, Policy
from rlx.compilation import Programs, compile_run
from rlx.distributed import is_first, on_first, several
from rlx.environment import Environment
from rlx.epoch import EpochMetrics, TrainState
from rlx.errors import require
from rlx.learners import build_algorithm, check_data, check_policy, maker
from rlx.logging import Progress, Writer
from rlx.place import Place
from rlx.recording import Recorder, draw_curve
from rlx.records import describe
from rlx.schedule import Schedule, TrainConfig, make_schedule
from rlx.signals import StopSignal


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
    progress = progress or Progress(quiet=not is_first())
    progress.total_steps = plan.num_iterations * plan.steps_per_iteration
    description = describe(algorithm, env, train_config, config, schedule, data, init_policy) | dict(record or {})
    place = Place(run_dir, {"": description}, False, overwrite, resume, progress)
    key = jax.random.key(train_config.seed)
    make = maker(algorithm, config, env, plan)
    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        place.hold(stack)
        programs = compile_run(env, make, schedule, train_config, key, {}, init_policy, progress, data)
        directory = next(iter(place.begin(stack)), None)
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
    further (`failed.json`, `Run.error`); the others go on. What is not listed is as for `train`.

    Args:
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
    progress = progress or Progress()
    progress.total_steps = plan.num_iterations * plan.steps_per_iteration
    descriptions = {
        name: describe(algorithm, env, *runs[name], schedule, data, init_policy) | dict(records.get(name, {}))
        for name in names
    }
    place = Place(run_dir, descriptions, True, overwrite, resume, progress)
    key = jnp.stack([jax.random.key(of_run.seed) for of_run, _ in runs.values()])
    make = maker(algorithm, config, env, plan)

    def after_epoch(rows: dict[str, dict[str, float]]) -> bool:
        return not rows or bool(on_epoch and on_epoch(rows))  # no rows: every run has failed

    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        place.hold(stack)
        with group.traced(varied):
            programs = compile_run(env, make, schedule, train_config, key, varied, init_policy, progress, data)
        directories = place.begin(stack)
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
