"""Domain randomisation: when params are drawn, that they reach the physics, and what a draw may be."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from mujoco import mjx

import envs
from envs import physics
from envs.randomization import check, from_playground, randomized
from envs.wrappers import DomainRandomization, FixedPoint, TimeLimit
from rlx.algorithm import Plan
from rlx.algorithms import ppo
from rlx.errors import UserError
from rlx.logging import Progress
from rlx.rollout import make_source
from rlx.schedule import TrainConfig
from rlx.training import train
from rlx.types import Box, Spec, TimeStep
from tests.worlds import constant_algorithm

KEY = jax.random.key(0)
MASS = 0.3  # of PointMass's body, kg; its motors pull with 0.1 N, a step takes 0.02 s
PLAN = Plan(num_envs=6, unroll_length=5, num_iterations=1)


class Slope:
    """A bead that slides `slope` a step; obs = [position, slope]."""

    spec = Spec(obs=None, action=Box((1,)), params={"slope": jnp.ones(())})

    def reset(self, key, params):
        return (jnp.zeros(()), params), jnp.stack([jnp.zeros(()), params["slope"]])

    def step(self, state, action, key):
        position, params = state[0] + state[1]["slope"], state[1]
        obs = jnp.stack([position, params["slope"]])
        return (position, params), TimeStep(obs, position, jnp.zeros((), bool), jnp.zeros((), bool), obs, {})


def uniform_slope(key):
    return {"slope": jax.random.uniform(key)}


def slopes(env, num=64, key=KEY):
    """The slopes of `num` episodes."""
    return jax.vmap(env.reset, (0, None))(jax.random.split(key, num), env.spec.params)[1][:, 1]


@pytest.mark.parametrize("outside", [False, True])
def test_each_reset_draws_and_the_episode_keeps_its_draw(outside):
    env = DomainRandomization(FixedPoint(Slope()) if outside else Slope(), uniform_slope)
    env = env if outside else FixedPoint(env)
    drawn = slopes(env)
    assert len(np.unique(drawn)) == 64 and 0 <= drawn.min() and drawn.max() < 1
    state, obs = env.reset(KEY, env.spec.params)
    for i in (1, 2):
        state, timestep = env.step(state, jnp.zeros(1), KEY)
        np.testing.assert_allclose(timestep.obs, [i * obs[1], obs[1]], rtol=1e-6)


def test_the_key_decides_the_draw_and_the_default_stays():
    env = FixedPoint(DomainRandomization(Slope(), uniform_slope))
    np.testing.assert_array_equal(slopes(env), slopes(env))
    assert not np.array_equal(slopes(env), slopes(env, key=jax.random.key(1)))
    assert env.spec.params == {"slope": 1.0}


def test_variants_are_the_same_few_whatever_the_key():
    env = FixedPoint(DomainRandomization(Slope(), uniform_slope, num_variants=3))
    first, second = np.unique(slopes(env)), np.unique(slopes(env, key=jax.random.key(1)))
    np.testing.assert_array_equal(first, second)
    assert len(first) == 3
    other = FixedPoint(DomainRandomization(Slope(), uniform_slope, num_variants=3, seed=1))
    assert not set(first.tolist()) & set(np.unique(slopes(other)).tolist())


def test_a_draw_of_other_entries_extends_the_params_it_is_given():
    env = FixedPoint(DomainRandomization(Slope(), lambda key: {"friction": jax.random.uniform(key)}))
    (_, params), obs = env.reset(KEY, {"slope": jnp.full((), 5.0)})
    assert obs[1] == 5.0 and set(params) == {"slope", "friction"}


def test_params_that_are_no_mapping_are_drawn_whole():
    env = envs.make("gymnax/Pendulum-v1")
    light = DomainRandomization(env, lambda key: env.spec.params.replace(m=jax.random.uniform(key)))
    state, _ = light.reset(KEY, light.spec.params)
    masses = [leaf for leaf in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "m")) if hasattr(leaf, "m")]
    assert 0 < masses[0].m < 1
    with pytest.raises(UserError, match="structure"):
        DomainRandomization(env, lambda key: {"m": jnp.ones(())})


@pytest.mark.parametrize("num_variants", [0, -1, 1.5, True])
def test_the_number_of_variants_is_whole_and_positive(num_variants):
    with pytest.raises(UserError, match="num_variants"):
        DomainRandomization(Slope(), uniform_slope, num_variants)


@pytest.mark.parametrize(("reset", "most"), [("pool", 2), ("always", 24)])
def test_under_a_source_pool_states_or_all_episodes_have_their_own_draw(reset, most):
    env = TimeLimit(FixedPoint(DomainRandomization(Slope(), uniform_slope)), 2)
    source = make_source(env, PLAN, reset, pool_size=2)
    algorithm = constant_algorithm(PLAN)
    learner = algorithm.init(KEY)
    state = source.refresh(source.init(algorithm, KEY), jax.random.key(5))
    _, trajectory, _ = jax.jit(lambda s: source.collect(algorithm, learner, s, KEY))(state)
    slope = np.asarray(trajectory.obs[..., 1])  # [5, 6]: episodes of 2 steps, the last of 1
    np.testing.assert_array_equal(slope[0], slope[1])
    np.testing.assert_array_equal(slope[2], slope[3])
    assert len(np.unique(slope[0])) == 6
    later = np.unique(slope[2:])
    assert len(later) == min(most, 12)
    if reset == "pool":
        np.testing.assert_array_equal(later, np.unique(state.pool_obs[:, 1]))


# --- models of MuJoCo ---


def mass_and_gravity(key, model):
    mass_key, gravity_key = jax.random.split(key)
    mass = model.body_mass * jax.random.uniform(mass_key, minval=1.0, maxval=4.0)
    return {"body_mass": mass, "opt.gravity": jax.random.uniform(gravity_key, (3,), minval=-1.0) * jnp.array([1, 1, 0])}


def rail_and_mass(key, model):
    """Gravity along the rail alone, other masses, no friction."""
    drawn = mass_and_gravity(key, model)
    return drawn | {"opt.gravity": drawn["opt.gravity"] * jnp.array([2, 0, 0]), "dof_damping": jnp.zeros(2)}


def any_mass(key, model):
    return {"body_mass": model.body_mass * jax.random.uniform(key, (), minval=1.0, maxval=4.0)}


def heavy_in_playgrounds_form(model, rng):
    masses = jax.vmap(lambda key: model.body_mass * jax.random.uniform(key, (), minval=1.0, maxval=4.0))(rng)
    axes = jax.tree.map(lambda x: None, model).tree_replace({"body_mass": 0})
    return model.tree_replace({"body_mass": masses}), axes


@functools.cache
def first_steps(name, engine, action, randomize):
    """The drawn overrides, and observations before and after one step, of six episodes."""
    env = envs.make(name, engine, randomize=randomize)
    keys = jax.random.split(KEY, 6)
    state, before = jax.jit(jax.vmap(env.reset, (0, None)))(keys, env.spec.params)
    actions = jnp.tile(jnp.array(action, jnp.float32), (6, 1))
    return state.env.overrides, before, jax.jit(jax.vmap(env.step))(state, actions, keys)[1].obs


@pytest.mark.parametrize("engine", ["mujoco", pytest.param("mjx", marks=pytest.mark.slow)])
def test_a_draw_reaches_the_physics_of_playground(engine):
    """From rest, one step of 0.02 s: v = (F / m + g) dt."""
    overrides, _, after = first_steps("playground/PointMass", engine, (1.0, -0.5), mass_and_gravity)
    mass, gravity = overrides["body_mass"][:, 1:], overrides["opt.gravity"][:, :2]
    assert mass.min() >= np.float32(MASS) and len(np.unique(mass)) == 6
    expected = (np.array([[0.1, -0.05]]) / mass + gravity) * 0.02
    np.testing.assert_allclose(after[:, 2:], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("engine", ["mujoco", pytest.param("mjx", marks=pytest.mark.slow)])
def test_a_draw_reaches_the_physics_of_brax(engine):
    """Under gravity along the rail cart and pole fall together, whatever they weigh: the pole turns as it did."""
    overrides, before, after = first_steps("brax/inverted_pendulum", engine, (0.0,), rail_and_mass)
    speed = overrides["opt.gravity"][:, 0] * (2 * 0.02)  # two physics steps a control step
    np.testing.assert_allclose(after[:, 2] - before[:, 2], speed, atol=1e-5)
    np.testing.assert_allclose(after[:, 3], before[:, 3], atol=1e-5)
    assert np.abs(speed).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "action", "draw"),
    [
        ("playground/PointMass", (1.0, -0.5), mass_and_gravity),
        ("brax/inverted_pendulum", (0.0,), rail_and_mass),
    ],
)
def test_both_engines_take_the_same_step_under_the_same_draw(name, action, draw):
    (drawn, *native), (other, *xla) = (first_steps(name, engine, action, draw) for engine in ("mujoco", "mjx"))
    jax.tree.map(np.testing.assert_array_equal, drawn, other)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), native, xla)


def test_playgrounds_form_is_known_by_its_parameters_and_draws_the_same():
    ours, theirs = (
        first_steps("playground/PointMass", "mujoco", (1.0, 1.0), randomize=function)
        for function in (any_mass, heavy_in_playgrounds_form)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), ours, theirs)


def test_a_randomiser_of_playgrounds_own_becomes_a_draw():
    """That of Go1, on a stand-in of the same sizes: a free trunk with twelve hinges."""
    from mujoco_playground import registry

    legs = "".join(f'<body pos="0 {i} 0"><joint axis="1 0 0"/><geom size=".1"/></body>' for i in range(12))
    trunk = f'<body pos="0 0 3"><freejoint/><geom size=".1"/>{legs}</body>'
    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><worldbody><geom type="plane" size="1 1 1"/>{trunk}</worldbody></mujoco>'
    )
    draw = from_playground(registry.get_domain_randomizer("Go1JoystickFlatTerrain"))
    for implementation in ("jax", "cpp"):
        put = mjx.put_model(model, impl=implementation)
        drawn = jax.jit(lambda key, put=put: check("it", draw(key, put), put))(KEY)
        fields = "geom_friction body_ipos body_mass qpos0 dof_frictionloss dof_armature"
        assert set(drawn) == set(fields.split())
        assert 0.4 <= drawn["geom_friction"][0, 0] <= 1.0
        np.testing.assert_array_equal(drawn["geom_friction"][1:], model.geom_friction[1:].astype(np.float32))
        assert np.abs(drawn["qpos0"] - model.qpos0)[7:].max() <= 0.05 + 1e-6


def test_true_takes_the_tasks_own_randomiser(monkeypatch):
    from mujoco_playground import registry

    with pytest.raises(UserError, match="playground/PointMass: randomize = True.*no randomiser of its own"):
        envs.make("playground/PointMass", randomize=True)
    with pytest.raises(UserError, match="brax/ant: randomize = True.*no randomiser of its own"):
        envs.make("brax/ant", randomize=True)
    monkeypatch.setattr(registry, "get_domain_randomizer", lambda name: heavy_in_playgrounds_form)
    overrides, _, _ = first_steps("playground/PointMass", "mujoco", (1.0, 1.0), randomize=True)
    assert len(np.unique(overrides["body_mass"][:, 1])) == 6


def test_a_file_names_the_function_and_variants_repeat(tmp_path):
    file = tmp_path / "masses.py"
    body = "return {'body_mass': model.body_mass * (1 + jax.random.uniform(key))}"
    file.write_text(f"import jax\n\ndef draw(key, model):\n    {body}\n")
    env = envs.make("playground/PointMass", "mujoco", randomize=f"{file}:draw", randomize_variants=2)
    reset = jax.jit(jax.vmap(env.reset, (0, None)))
    state, obs = reset(jax.random.split(KEY, 32), env.spec.params)
    assert len(np.unique(obs[:, 0])) == 32
    assert len(np.unique(state.env.overrides["body_mass"][:, 1])) == 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda key, model: {"body_mas": model.body_mass}, "Did you mean body_mass"),
        (lambda key, model: {"gravity": jnp.zeros(3)}, "Did you mean opt.gravity"),
        (lambda key, model: {"body_mass": jnp.ones(99)}, r"body_mass has shape .*\(99,\)"),
        (lambda key, model: {"nbody": 3}, "nbody is not of floats"),
        (lambda key, model: model, "must return a dict"),
        (lambda model, rng: model, "must return .batched model, in_axes"),
        (lambda model, rng: (model, jax.tree.map(lambda x: 0, model)), "in_axes has 0 for"),
        (lambda seed: {}, "draw.key, model. or randomize.model, rng."),
        ("masses", "randomize = 'masses'.*path/to/file.py:function"),
        ("absent.py:draw", "randomize: the file 'absent.py' does not exist"),
        ("json:dmups", "Did you mean dumps"),
        (3, "randomize = 3"),
    ],
)
@pytest.mark.parametrize("name", ["playground/PointMass", "brax/inverted_pendulum"])
def test_what_is_no_draw_is_refused_when_the_environment_is_built(name, function, message):
    with pytest.raises(UserError, match=message):
        envs.make(name, "mujoco", randomize=function)


class Still:
    """Holds params; nothing moves."""

    spec = Spec(obs=None, action=Box((1,)), params={})


def cube_and_arm():
    """As in Playground's manipulation tasks: a cube that the compiler found balanced, and something that is not."""
    cube = '<body name="cube"><freejoint/><geom type="box" size=".1 .1 .1"/></body>'
    arm = '<body name="arm" pos="1 0 0"><joint axis="0 1 0"/><geom size=".1" pos=".2 0 0"/></body>'
    return mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{cube}{arm}</worldbody></mujoco>")


def shifted(key, model, body):
    shift = jax.random.uniform(key, (3,), minval=-5e-3, maxval=5e-3)
    return {"body_mass": 1.1 * model.body_mass, "body_ipos": model.body_ipos.at[body].add(shift)}


@pytest.mark.parametrize("variants", [None, 3])
def test_a_field_that_the_engine_can_never_override_is_refused_when_the_environment_is_built(variants):
    model = cube_and_arm()
    engines = {name: physics.make(name, model) for name in ("mujoco", "mjx")}
    cube, arm = ({"randomize": functools.partial(shifted, body=body)} for body in (1, 2))
    message = "it: randomize: .*can never override body_ipos: .*body 'cube' is compiled as simple.*physics = 'mjx'"
    options = {"randomize_variants": variants} if variants else {}
    with pytest.raises(UserError, match=message):
        randomized("it", Still(), engines["mujoco"], cube | options)
    randomized("it", Still(), engines["mjx"], cube | options)
    randomized("it", Still(), engines["mujoco"], arm | options)


def test_a_draw_of_nothing_is_a_draw():
    randomized("it", Still(), physics.make("mujoco", cube_and_arm()), {"randomize": lambda key, model: {}})


def larger(key, model, geom):
    return {"geom_size": model.geom_size.at[geom].mul(jax.random.uniform(key, (), minval=1.0, maxval=2.0))}


@pytest.mark.parametrize("engine", ["mujoco", "mjx"])
def test_the_size_of_a_mesh_is_not_to_be_drawn(engine):
    mesh = '<asset><mesh name="tet" vertex="0 0 0 1 0 0 0 1 0 0 0 1"/></asset>'
    geoms = '<geom type="mesh" mesh="tet"/><geom size=".1"/>'
    found = physics.make(
        engine, mujoco.MjModel.from_xml_string(f"<mujoco>{mesh}<worldbody>{geoms}</worldbody></mujoco>")
    )
    with pytest.raises(UserError, match="geom_size: geom 0 takes its shape from a mesh"):
        randomized("it", Still(), found, {"randomize": functools.partial(larger, geom=0)})
    randomized("it", Still(), found, {"randomize": functools.partial(larger, geom=1)})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"randomize_variants": 3}, "needs the override randomize"),
        ({"randomize": any_mass, "randomize_variants": 0}, "randomize_variants = 0"),
        ({"randomize": any_mass, "backend": "spring"}, "randomize needs the backend 'mjx'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        envs.make("brax/inverted_pendulum", **overrides)


@pytest.mark.slow
def test_training_goes_on_under_fresh_draws():
    env = envs.make("playground/PointMass", "mujoco", randomize=any_mass, episode_length=8)
    config = TrainConfig(total_steps=2 * 8 * 8, num_envs=8, unroll_length=8, num_evals=1, eval_episodes=4)
    small = ppo.Config(actor_hidden=(8,), critic_hidden=(8,), num_epochs=1, num_minibatches=2)
    run = train(env, ppo, config, small, progress=Progress(1, quiet=True))
    assert run.history[-1]["step"] == 128 and np.isfinite(run.history[-1]["eval/return"])
    masses = run.state.source.episodes.env.env.overrides["body_mass"][:, 1]
    assert len(np.unique(masses)) > 1 and masses.min() >= np.float32(MASS)
