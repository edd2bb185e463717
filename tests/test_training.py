"""The driver: steps, schedule, one trace, resume bit for bit, signals, values that are not finite."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import types
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from rlx.algorithm import Plan
from rlx.algorithms import ppo
from rlx.checkpoint import Checkpointer
from rlx.epoch import TrainState, init_state, make_epoch
from rlx.errors import NonFiniteError, UserError
from rlx.logging import Progress
from rlx.recording import open_checkpoints
from rlx.records import describe
from rlx.rollout import make_source
from rlx.run_directory import RunDirectory, read_metrics
from rlx.schedule import Schedule, TrainConfig, make_schedule
from rlx.training import train
from tests.worlds import Counter, constant_algorithm

SMALL = TrainConfig(
    total_steps=4 * 8 * 6, num_envs=4, unroll_length=8, iterations_per_epoch=1, num_evals=2, eval_episodes=4
)
CONFIG = ppo.Config(actor_hidden=(8,), critic_hidden=(8,), num_epochs=2, num_minibatches=2)


@dataclasses.dataclass(frozen=True)
class NoSettings:
    pass


class Diverging(NamedTuple):
    weight: jax.Array


def quiet(total: int = 1) -> Progress:
    return Progress(total, quiet=True)


def run(tmp=None, config=SMALL, env=None, **kwargs):
    return train(env or Counter(5), ppo, config, CONFIG, run_dir=tmp, progress=quiet(), **kwargs)


def assert_same_state(a: Any, b: Any) -> None:
    chex.assert_trees_all_equal_structs(a, b)
    as_data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(as_data, a), jax.tree.map(as_data, b))


def without_time(rows):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def test_steps_are_counted_in_inner_steps_and_never_exceed_the_budget():
    schedule = make_schedule(Counter(5), TrainConfig(total_steps=1000, num_envs=4, unroll_length=8))
    assert schedule.plan.num_iterations == 31
    assert schedule.plan.steps_per_iteration == 32
    env = Counter(5)
    env.spec = dataclasses.replace(env.spec, action_repeat=4)
    assert make_schedule(env, TrainConfig(total_steps=1000, num_envs=4, unroll_length=8)).plan.num_iterations == 7


@pytest.mark.parametrize(
    ("iterations", "per_epoch", "times"), [(10, 3, 2), (7, 1, 10), (50, 1, 7), (6, 6, 1), (5, 2, 0)]
)
def test_events_are_evenly_spaced_and_the_last_one_is_at_the_end(iterations, per_epoch, times):
    schedule = Schedule(Plan(1, 1, iterations), per_epoch)
    ends, iteration = [], 0
    while iteration < iterations:
        iteration = schedule.after(iteration)
        ends.append(iteration)
    assert len(ends) == schedule.num_epochs
    due = [end for end in ends if schedule.due(end, times)]
    assert len(due) == min(times, schedule.num_epochs)
    assert not times or due[-1] == iterations


def test_an_epoch_is_traced_once_and_keeps_shapes_dtypes_and_weak_types():
    plan = Plan(4, 8, 100)
    algorithm = constant_algorithm(plan)
    source = make_source(Counter(3), plan)
    epoch = jax.jit(chex.assert_max_traces(make_epoch(algorithm, source, plan, 2), n=1), donate_argnums=0)
    state = jax.jit(lambda key: init_state(algorithm, source, key))(jax.random.key(0))
    before = jax.tree.map(jax.typeof, state)
    for _ in range(4):
        state, metrics = epoch(state)
    assert jax.tree.map(jax.typeof, state) == before
    assert int(state.iteration) == 8
    assert float(metrics.iterations) == 2


def test_the_last_epoch_stops_at_the_last_iteration():
    plan = Plan(4, 8, 5)
    algorithm = constant_algorithm(plan)
    source = make_source(Counter(3), plan)
    epoch = jax.jit(make_epoch(algorithm, source, plan, 3))
    state = init_state(algorithm, source, jax.random.key(0))
    state, metrics = epoch(epoch(state)[0])
    assert int(state.iteration) == 5
    assert float(metrics.iterations) == 2
    assert float(metrics.stats.episodes) == 4 * ((5 * 8) // 3) - 4 * ((3 * 8) // 3)


def test_a_state_that_changes_its_dtype_is_refused_by_name():
    class Weak(Counter):
        def reset(self, key, params):
            return (jnp.zeros(()), jax.random.uniform(key)), jnp.zeros(2)

        def step(self, state, action, key):
            _, timestep = super().step(Counter.reset(self, key, ())[0], action, key)
            return (state[0].astype(jnp.int32), state[1]), timestep

    with pytest.raises(UserError, match=r"the state of environment Weak .*\[0\]: float32\[\] became int32\[\]"):
        run(env=Weak(5))


def test_a_learner_that_changes_its_dtype_is_refused_by_name():
    def make(config, spec, plan):
        def update(learner, trajectory, iteration, key):
            return Diverging(learner.weight.astype(jnp.int32)), {}

        init = lambda key, policy=None: Diverging(jnp.zeros(()))  # noqa: E731
        base = constant_algorithm(plan)
        act = lambda policy, *rest: base.act(base.init(None), *rest)  # noqa: E731
        return base._replace(init=init, act=act, update=update)

    module = types.SimpleNamespace(Config=NoSettings, make=make, __name__="changing")
    with pytest.raises(UserError, match=r"learner.weight: float32\[\] became int32\[\]"):
        train(Counter(5), module, SMALL, progress=quiet())


def test_same_seed_same_run_other_seed_other_run():
    one, two = run(), run()
    assert_same_state(one.state, two.state)
    other = run(config=dataclasses.replace(SMALL, seed=1))
    leaves = zip(jax.tree.leaves(one.state.learner.params), jax.tree.leaves(other.state.learner.params), strict=True)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in leaves)


@pytest.mark.slow
def test_the_length_of_an_epoch_changes_nothing_but_the_pool():
    """With true resets a run is the same whatever the number of iterations between two visits to the host."""
    always = dataclasses.replace(SMALL, reset="always", num_evals=0)
    one = run(config=always)
    two = run(config=dataclasses.replace(always, iterations_per_epoch=4))
    jax.tree.map(np.testing.assert_array_equal, one.state.learner, two.state.learner)


@pytest.mark.parametrize("stop_after", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_stopped_and_resumed_run_equals_one_that_was_not(tmp_path, stop_after):
    whole = run(tmp_path / "whole")
    reports = []

    def on_epoch(row):
        reports.append(row)
        return len(reports) == stop_after

    part = run(tmp_path / "part", on_epoch=on_epoch)
    assert part.interrupted and int(part.state.iteration) < 6
    rest = run(tmp_path / "part", resume=True)
    assert not rest.interrupted
    assert_same_state(whole.state, rest.state)
    assert without_time(rest.history) == without_time(whole.history)
    rows = [read_metrics(tmp_path / d / "metrics.jsonl") for d in ("whole", "part")]
    assert without_time(rows[0]) == without_time(rows[1])
    assert json.loads((tmp_path / "whole/eval.json").read_text()) == json.loads(
        (tmp_path / "part/eval.json").read_text()
    )


@pytest.mark.slow
def test_a_run_on_native_physics_resumes_bit_for_bit(tmp_path):
    """Under randomised models, so that overrides, staggered cuts and the pool are part of what is restored."""

    def heavier(key, model):
        return {"body_mass": model.body_mass * jax.random.uniform(key, (), minval=1.0, maxval=2.0)}

    env = envs.make("playground/PointMass", physics="mujoco", episode_length=9, randomize=heavier)
    whole = run(tmp_path / "whole", env=env)
    part = run(tmp_path / "part", env=env, on_epoch=lambda row: row["step"] > 0)
    assert part.interrupted
    rest = run(tmp_path / "part", env=env, resume=True)
    assert_same_state(whole.state, rest.state)
    assert np.ptp(whole.state.source.episodes.env.env.overrides["body_mass"][:, 1]) > 0


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    config = dataclasses.replace(SMALL, num_checkpoints=1)

    def die(row):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "run", config, on_epoch=die)
    assert_same_state(run(tmp_path / "run", config, resume=True).state, run(config=config).state)


def test_a_resumed_run_must_have_the_settings_it_was_begun_with(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(UserError, match="train.seed = 7"):
        run(tmp_path / "run", dataclasses.replace(SMALL, seed=7), resume=True)


def test_a_resumed_run_must_be_of_the_same_environment(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(UserError, match="env = 'Other'"):
        run(tmp_path / "run", env=type("Other", (Counter,), {})(5), resume=True)
    with pytest.raises(UserError, match="run_dir"):
        run(resume=True)


def test_a_run_without_a_return_to_draw_ends_all_the_same(tmp_path):
    config = dataclasses.replace(SMALL, num_evals=0)
    result = run(tmp_path / "run", config, env=Counter(1000))
    assert not result.interrupted and not (tmp_path / "run/curve.png").exists()
    assert Checkpointer(tmp_path / "run/checkpoints").steps()[-1] == 192


def test_an_environment_without_a_time_limit_needs_a_cut_for_evaluations():
    env = Counter(5)
    env.spec = dataclasses.replace(env.spec, episode_length=None)
    with pytest.raises(UserError, match="eval_decisions"):
        run(env=env)


def test_a_directory_with_a_run_is_not_overwritten_unasked(tmp_path):
    run(tmp_path / "run")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="overwrite"):
        run(tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    run(tmp_path / "run", overwrite=True)


def test_a_run_directory_holds_what_the_design_says(tmp_path):
    result = run(tmp_path / "run")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "eval.json", "curve.png"} <= names
    evaluation = json.loads((tmp_path / "run/eval.json").read_text())
    assert evaluation["step"] == 192 and len(evaluation["returns"]) == len(evaluation["lengths"]) == 4
    assert "diverged" not in evaluation and "eval/diverged" not in result.history[-1]  # it has no simulation
    assert result.history[-1]["eval/return"] == np.mean(evaluation["returns"])
    assert [row["step"] for row in result.history] == [0, 32, 64, 96, 128, 160, 192]
    assert json.loads((tmp_path / "run/config.json").read_text())["machine"]["deterministic"] is True


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_at_the_end_of_the_epoch_and_the_run_goes_on_from_there(tmp_path, number):
    sent = []

    def send(row):
        if not sent:
            sent.append(row)
            os.kill(os.getpid(), number)

    part = run(tmp_path / "run", on_epoch=send)
    assert part.interrupted
    assert_same_state(run(tmp_path / "run", resume=True).state, run().state)


def test_steps_pass_two_to_the_31(tmp_path):
    """A checkpoint far into a run: steps are host integers and go on past what int32 holds."""
    per_iteration = 32
    start = 2**31 // per_iteration - 2
    config = dataclasses.replace(SMALL, total_steps=2**31 + 2 * per_iteration, num_evals=0)
    env, schedule = Counter(5), make_schedule(Counter(5), config)
    algorithm = ppo.make(CONFIG, env.spec, schedule.plan)
    source = make_source(env, schedule.plan, config.reset, config.reset_pool_size)
    state = init_state(algorithm, source, jax.random.key(0))._replace(iteration=jnp.asarray(start, jnp.int32))
    description = describe(ppo, env, config, CONFIG, schedule)
    directory = RunDirectory.create(tmp_path / "run", description)
    keeper = open_checkpoints(directory, 2)
    keeper.save(start * per_iteration, state)
    keeper.close()
    config = dataclasses.replace(config, iterations_per_epoch=1)
    result = run(tmp_path / "run", config, resume=True)
    assert [row["step"] for row in result.history] == [2**31 - 32, 2**31, 2**31 + 32, 2**31 + 64]


def test_a_nan_in_the_environment_stops_the_run_and_names_it(tmp_path):
    with pytest.raises(NonFiniteError, match=r"Environment \d gave a value that is not finite in obs"):
        run(tmp_path / "run", env=Counter(5, nan_at=0.0))
    assert not (tmp_path / "run/checkpoints").exists() or not list((tmp_path / "run/checkpoints").glob("[0-9]*"))


def test_a_nan_in_the_losses_names_the_leaf_and_keeps_the_last_good_checkpoint(tmp_path):
    def make(config, spec, plan):
        def update(learner, trajectory, iteration, key):
            weight = jnp.where(iteration >= 3, jnp.nan, learner.weight)
            return Diverging(weight), {"loss": weight}

        base = constant_algorithm(plan)
        act = lambda policy, memory, obs, key, mode: base.act(base.init(key), memory, obs, key, mode)  # noqa: E731
        init = lambda key, policy=None: Diverging(jnp.zeros(()))  # noqa: E731
        return base._replace(init=init, act=act, update=update)

    module = types.SimpleNamespace(Config=NoSettings, make=make, __name__="diverging")
    with pytest.raises(NonFiniteError, match=r"loss is nan.*weight"):
        train(Counter(5), module, SMALL, run_dir=tmp_path / "run", progress=quiet())
    assert Checkpointer(tmp_path / "run/checkpoints").steps() == [64, 96]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("total_steps", 0),
        ("total_steps", 1e6),
        ("num_checkpoints", 0),
        ("num_envs", 0),
        ("unroll_length", -1),
        ("num_evals", -1),
        ("reset", "sometimes"),
        ("seed", -1),
    ],
)
def test_impossible_sizes_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        run(config=dataclasses.replace(SMALL, **{field: value}))


def test_another_run_s_policy_can_be_the_start():
    first = run()
    second = run(config=dataclasses.replace(SMALL, seed=3), init_policy=first.policy)
    assert second.history[0]["eval/return"] == first.history[-1]["eval/return"]
    state: TrainState = second.state
    assert int(state.learner.statistics.count[0]) == 2 * 192
