"""The contract that every member of ALGORITHMS keeps, over continuous, discrete and dict-observation environments."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from rlx.algorithm import Algorithm, Plan
from rlx.algorithms import ALGORITHMS
from rlx.epoch import TrainState, init_state, make_epoch
from rlx.rollout import make_source
from rlx.types import Box, Discrete, UserError
from tests.kinds import OF_EACH_KIND, of_each_kind
from tests.worlds import Counter

PLAN = Plan(num_envs=8, unroll_length=8, num_iterations=4)
WORLDS = {
    "continuous": Counter(5, action=Box((2,), low=(-3.0, -1.0), high=(3.0, 0.5))),
    "discrete": Counter(5, "terminated", action=Discrete(3)),
    "asymmetric": Counter(5, asymmetric=True),
    "team": envs.make("particle/simple_speaker_listener"),
    "discrete team": envs.make("matrix/penalty"),
}
TEAMS = ("hasac", "maddpg", "mappo")  # who train several agents
USUAL = {name: "team" if name in TEAMS else "continuous" for name in ALGORITHMS}
OFF_POLICY = {"batch_size": 16, "utd_ratio": (3, 64), "replay_size": 200, "prefill_steps": 64}
OFF_POLICY |= {"actor_hidden": (16,), "critic_hidden": (16,)}
GENERATIVE = {"actor_hidden": (16,), "critic_hidden": (16,)}
SETTINGS = {name: OFF_POLICY for name in ("sac", "td3", "hasac", "maddpg")}
SETTINGS |= {
    "fpo": GENERATIVE | {"num_flow_steps": 3},
    "dppo": GENERATIVE | {"num_denoising_steps": 3},
}  # in place of defaults that are made for longer runs


def module_of(name: str):
    return importlib.import_module(ALGORITHMS[name])


def config_of(name: str):
    return dataclasses.replace(module_of(name).Config(), **SETTINGS.get(name, {}))


def takes(name: str, world: str) -> bool:
    """Whether the algorithm learns in such a world: it says so itself, and one that takes none would fail below."""
    try:
        module_of(name).check(config_of(name), WORLDS[world].spec, PLAN)
    except UserError as error:
        assert str(error).startswith("env = "), error
        return False
    return True


@functools.cache
def setup(name: str, world: str):
    """Algorithm, its epoch of one iteration (jitted), and a start state."""
    env, module = WORLDS[world], module_of(name)
    config = config_of(name)
    module.check(config, env.spec, PLAN)
    algorithm = module.make(config, env.spec, PLAN)
    source = make_source(env, PLAN)
    pure, traces = make_epoch(algorithm, source, PLAN, 1), []

    @jax.jit
    def epoch(state):
        traces.append(None)
        assert len(traces) == 1, "the epoch was traced twice"
        return pure(state)

    state = jax.jit(lambda key: init_state(algorithm, source, key))(jax.random.key(0))
    return algorithm, epoch, state


PAIRS = [(name, world) for name in ALGORITHMS for world in WORLDS if takes(name, world)]
COSTLY = [(name, "continuous") for name in OF_EACH_KIND]  # those that costly tests meet every time
every = pytest.mark.parametrize(
    ("name", "world"),
    [
        pytest.param(name, world, marks=[pytest.mark.slow] * (name not in OF_EACH_KIND and world != USUAL[name]))
        for name, world in PAIRS
    ],
)


def test_every_algorithm_takes_a_world():
    assert {name for name, _ in PAIRS} == set(ALGORITHMS)


@every
def test_one_trace_serves_all_iterations_and_the_state_is_a_fixed_point(name, world):
    _, epoch, state = setup(name, world)
    one, _ = epoch(state)
    two, _ = epoch(one)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, one) == jax.tree.map(jax.typeof, two)


@every
def test_the_key_decides_everything(name, world):
    _, epoch, state = setup(name, world)
    one, two = epoch(state), epoch(state)
    other = epoch(state._replace(key=jax.random.key(1)))
    jax.tree.map(np.testing.assert_array_equal, one[0].learner, two[0].learner)
    leaves = zip(jax.tree.leaves(one[0].learner), jax.tree.leaves(other[0].learner), strict=True)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in leaves)


@every
def test_an_update_changes_the_policy_and_metrics_are_finite_scalars(name, world):
    algorithm, epoch, state = setup(name, world)
    for _ in range(PLAN.num_iterations):
        before, (state, metrics) = state, epoch(state)
    assert metrics.train
    for key, value in metrics.train.items():
        assert value.shape == () and np.isfinite(value), key
    old, new = (algorithm.policy(s.learner, "greedy") for s in (before, state))
    leaves = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in leaves)


@every
@pytest.mark.parametrize("mode", ["explore", "sample", "greedy"])
def test_actions_are_what_the_spec_says(name, world, mode):
    algorithm, _, state = setup(name, world)
    spec = WORLDS[world].spec
    policy = algorithm.policy(state.learner, mode)
    memory, action, _ = algorithm.act(
        policy, state.source.episodes.memory, state.source.episodes.obs, jax.random.key(1), mode
    )
    assert jax.tree.map(jax.typeof, memory) == jax.tree.map(jax.typeof, state.source.episodes.memory)
    if isinstance(spec.action, Discrete):
        assert action.dtype == jnp.int32 and action.shape == (PLAN.num_envs, *spec.action.shape)
        assert ((action >= 0) & (action < spec.action.num_values)).all()
    else:
        assert action.dtype == jnp.float32 and action.shape == (PLAN.num_envs, *spec.action.shape)
        assert (jnp.abs(action) <= 1).all()


@every
def test_greedy_is_deterministic_and_sampling_is_not(name, world):
    algorithm, _, state = setup(name, world)
    draw = lambda mode, seed: np.asarray(  # noqa: E731
        algorithm.act(
            algorithm.policy(state.learner, mode),
            state.source.episodes.memory,
            state.source.episodes.obs,
            jax.random.key(seed),
            mode,
        )[1]
    )
    np.testing.assert_array_equal(draw("greedy", 0), draw("greedy", 1))
    assert (draw("sample", 0) != draw("sample", 1)).any()


@every
def test_a_policy_is_enough_to_start_another_learner(name, world):
    algorithm, epoch, state = setup(name, world)
    policy = algorithm.policy(epoch(state)[0].learner, "greedy")
    other = algorithm.policy(algorithm.init(jax.random.key(5), policy), "greedy")
    memory, obs = state.source.episodes.memory, state.source.episodes.obs
    act = lambda p: algorithm.act(p, memory, obs, jax.random.key(0), "greedy")[1]  # noqa: E731
    np.testing.assert_array_equal(act(policy), act(other))
    assert len(jax.tree.leaves(policy)) < len(jax.tree.leaves(state.learner))


@every
def test_the_ratio_of_the_first_minibatch_is_one(name, world):
    _, epoch, state = setup(name, world)
    for _ in range(2):
        state, metrics = epoch(state)
        if "first_ratio_deviation" not in metrics.train:
            pytest.skip("has no ratio")
        assert float(metrics.train["first_ratio_deviation"]) < 2e-6


@pytest.mark.parametrize("name", of_each_kind(ALGORITHMS))
def test_no_key_is_consumed_twice(name):
    """jax's own checker over init, act (through collect) and update."""
    env, module = WORLDS["continuous"], module_of(name)
    algorithm = module.make(config_of(name), env.spec, PLAN)
    source = make_source(env, PLAN)
    with jax.debug_key_reuse(True):
        learner = jax.jit(lambda key: algorithm.init(key))(jax.random.key(0))
        state = jax.jit(lambda key: source.init(algorithm, key))(jax.random.key(1))
        policy = algorithm.policy(learner, "explore")
        _, trajectory, _ = jax.jit(lambda s, k: source.collect(algorithm, policy, s, k))(state, jax.random.key(2))
        jax.jit(algorithm.update)(learner, trajectory, jnp.asarray(3), jax.random.key(3))


@pytest.mark.parametrize(
    ("name", "world"),
    [pytest.param(n, w, marks=[pytest.mark.slow] * ((n, w) not in COSTLY)) for n, w in PAIRS],
)
def test_seeds_and_float_settings_can_be_mapped_over(name, world):
    """`make` runs inside vmap: learning rates times seeds are one program, equal to each run alone."""
    env, module = WORLDS[world], module_of(name)
    source = make_source(env, PLAN)
    config = config_of(name)
    floats = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.type == "float"}
    traced = {k: jnp.asarray([v, v * 0.9], jnp.float32) for k, v in floats.items()}
    keys = jax.random.split(jax.random.key(0), 2)

    def run(key, floats):
        algorithm = module.make(dataclasses.replace(config, **floats), env.spec, PLAN)
        assert isinstance(algorithm, Algorithm)
        state = init_state(algorithm, source, key)
        return make_epoch(algorithm, source, PLAN, 3)(state)[0]

    # `iteration` is never mapped: gates rely on it
    axes = TrainState(0, 0, 0, None)
    both = jax.jit(jax.vmap(run, out_axes=axes))(keys, traced)
    one = jax.jit(run)
    for i in range(2):
        alone = one(keys[i], {k: v[i] for k, v in traced.items()})
        mapped = jax.tree.map(lambda x, i=i: x[i], both.learner)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), mapped, alone.learner)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_setting_is_explained_and_the_file_reads_in_the_agreed_order(name):
    module = module_of(name)
    source = inspect.getsource(module)
    config = inspect.getsource(module.Config)
    for field in dataclasses.fields(module.Config):
        assert re.search(rf"^    {field.name}: [^#]+  # \S+", config, re.M), f"{field.name} has no comment"
        assert field.type in ("float", "int", "bool", "str", "tuple[int, ...]"), field.type
    assert source.index("class Config") < source.index("def check") < source.index("def make")
    assert re.search(r"\d{4}\.\d{4,5}", module.__doc__), "the docstring cites the paper"


@pytest.mark.parametrize("name", of_each_kind(ALGORITHMS, ("ppo",)))
def test_the_epoch_with_mjx_physics_lowers_for_tpu_and_cuda(name):
    env, module = envs.make("playground/CartpoleBalance", physics="mjx"), module_of(name)
    algorithm = module.make(module.Config(), env.spec, PLAN)
    source = make_source(env, PLAN)
    epoch = jax.jit(make_epoch(algorithm, source, PLAN, 2), donate_argnums=0)
    state = jax.eval_shape(lambda key: init_state(algorithm, source, key), jax.random.key(0))
    exported = jax.export.export(epoch, platforms=("tpu", "cuda"))(state)
    assert exported.platforms == ("tpu", "cuda")
    assert "stablehlo.while" in exported.mlir_module()
