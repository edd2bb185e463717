"""A learner made from its settings, what it may start from and learn from, and the policy of a run."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlx import settings, storage
from rlx.algorithm import Algorithm, Data, Key, Mode, Plan, Policy
from rlx.checkpoint import Checkpointer
from rlx.environment import Environment
from rlx.epoch import TrainState
from rlx.errors import UserError, require
from rlx.recording import open_checkpoints
from rlx.records import reference_of
from rlx.run_directory import RunDirectory, group_of
from rlx.schedule import TrainConfig, make_schedule, one_device
from rlx.sharding import without_past
from rlx.types import Discrete, PyTree, Spec


def tuned(env: Environment, algorithm: Any) -> tuple[TrainConfig, Any]:
    """The settings that ship for an algorithm's module on this environment (`rlx/presets/`).

    A module of one's own has those of the algorithm that its `PRESET` names, `PRESET = "ppo"` say. As `rlx train`
    merges them, but for overrides of the environment; the defaults where none ship. Change them with
    `dataclasses.replace`.
    """
    layers = [("preset", settings.preset_for(algorithm, env.spec.name, reference_of(algorithm)))]
    merged = settings.merge(TrainConfig, algorithm.Config, layers)
    own = settings.build(algorithm.Config, settings.values(merged, "algo."))
    return settings.build(TrainConfig, settings.values(merged)), own


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
    check_own(directory)
    checkpointer = open_checkpoints(directory, train_config.keep_checkpoints)
    learner = without_past(jax.eval_shape(built.init, jax.random.key(0)))
    if best:
        greedy = jax.eval_shape(lambda learner: built.policy(learner, "greedy"), learner)
        return built, *checkpointer.restore_best(greedy)
    # The learner alone: the environments' part depends on the physics engine, which may be another one here.
    state, step = checkpointer.restore(TrainState(learner, (), (), ()), step, partial=True)  # type: ignore[arg-type]
    return built, built.policy(state.learner, mode), step


def check_own(directory: RunDirectory) -> None:
    """Raises UserError for one of many runs whose state lies in the checkpoints that they share, as after a kill."""
    whole = group_of(directory.path)
    if whole and Checkpointer(directory.checkpoints_path).empty() and not Checkpointer(whole / "checkpoints").empty():
        there = os.fspath(storage.home(whole))
        raise UserError(
            f"{directory.path.name!r} is one of the runs in {there!r}, which share their checkpoints until all end or "
            f"are stopped: `rlx resume {there}` goes on with them."
        )
