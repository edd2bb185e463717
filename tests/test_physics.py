"""The native physics engine: exact, pure, alike under every transformation, and honest about what it cannot do."""

from __future__ import annotations

import copy
import functools
import hashlib
import operator
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from mujoco import mjx

from envs import physics
from envs.adapter import foreign
from envs.physics import batches, native
from envs.physics.native import STATE, Native
from rlx.errors import UserError

# Contacts between boxes, a plane and a jointed arm; activations, a mocap body that pulls by a weld, a tendon, sensors.
CONTACTS = """
<mujoco>
  <option timestep="0.004"/>
  <worldbody>
    <geom type="plane" size="5 5 .1" friction="0.8"/>
    <body name="box" pos="0 0 .35"><freejoint/><geom type="box" size=".1 .15 .2"/><site name="box"/></body>
    <body pos=".1 0 .8" euler="30 20 0"><freejoint/><geom type="box" size=".1 .1 .1"/></body>
    <body name="arm" pos=".5 0 .4">
      <joint name="shoulder" axis="0 1 0" damping=".1" frictionloss=".05"/>
      <geom name="arm" type="capsule" fromto="0 0 0 -.3 0 0" size=".04"/>
      <body pos="-.3 0 0">
        <joint name="elbow" axis="0 1 0" range="-90 90" armature=".01"/>
        <geom type="capsule" fromto="0 0 0 -.2 0 0" size=".03"/><site name="hand" pos="-.2 0 0"/>
      </body>
    </body>
    <body name="hook" mocap="true" pos="1 0 1"><geom size=".02" contype="0" conaffinity="0"/></body>
    <body name="ball" pos="1 0 .9"><freejoint/><geom size=".05"/></body>
  </worldbody>
  <tendon><fixed name="both"><joint joint="shoulder" coef="1"/><joint joint="elbow" coef="-1"/></fixed></tendon>
  <equality><weld body1="hook" body2="ball"/></equality>
  <actuator>
    <motor joint="shoulder" gear="5"/><position joint="elbow" kp="4"/>
    <general joint="elbow" dyntype="filter" dynprm="0.1" gainprm="2"/>
  </actuator>
  <sensor>
    <jointpos joint="elbow"/><jointvel joint="shoulder"/><accelerometer site="box"/><touch site="hand"/>
    <framelinvel objtype="body" objname="ball"/><subtreelinvel body="arm"/>
  </sensor>
</mujoco>
"""
# No contacts: compiles in seconds on MJX.
PENDULUM = """
<mujoco>
  <option timestep="0.01" integrator="Euler"><flag contact="disable"/></option>
  <worldbody>
    <body name="upper" pos="0 0 1">
      <joint name="a" axis="0 1 0" damping=".1" frictionloss=".02" armature=".01"/>
      <geom type="capsule" fromto="0 0 0 0 0 -.5" size=".05"/>
      <body name="lower" pos="0 0 -.5">
        <joint name="b" axis="0 1 0" damping=".05"/>
        <geom type="capsule" fromto="0 0 0 0 0 -.4" size=".04"/><site name="tip" pos="0 0 -.4"/>
      </body>
    </body>
    <body name="block" pos="1 0 1"><freejoint/><geom type="box" size=".1 .2 .3"/></body>
  </worldbody>
  <actuator><motor joint="a"/><position joint="b" kp="3" kv=".1"/></actuator>
  <sensor><jointpos joint="b"/><jointvel joint="b"/><framelinvel objtype="site" objname="tip"/></sensor>
</mujoco>
"""
FIELDS = ("sensordata", "xpos", "xmat", "cvel", "actuator_force", "qfrc_constraint", "subtree_com", "site_xpos")
BATCH = 6


@functools.cache
def contacts() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_string(CONTACTS)


@functools.cache
def pendulum() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_string(PENDULUM)


def engine_of(model: mujoco.MjModel, fields=FIELDS, **options) -> Native:
    engine = Native(model, **options)
    engine.bind(*fields)
    return engine


def row(data: mjx.Data) -> jax.Array:
    """MuJoCo's integration state of one simulation."""
    return jnp.concatenate([jnp.asarray(getattr(data, f), jnp.float32).reshape(-1) for f in STATE])


def observed(data: mjx.Data) -> dict[str, jax.Array]:
    return {field: getattr(data, field) for field in FIELDS} | {"row": row(data), "diverged": data._impl.diverged}


def roll(engine, qvel, controls, substeps=2):
    """Unbatched: controls [T, nu] -> the observed fields [T, ...]."""

    def body(data, ctrl):
        data = engine.step(engine.model, data, ctrl, substeps)
        return data, observed(data)

    return jax.lax.scan(body, engine.make_data(qvel=qvel), controls)[1]


def draws(model: mujoco.MjModel, *lead: int, steps: int = 20):
    """Random velocities [*lead, nv] and controls [*lead, T, nu]."""
    rng = np.random.default_rng(0)
    qvel, ctrl = rng.normal(size=(*lead, model.nv)), rng.uniform(-1, 1, (*lead, steps, model.nu))
    return jnp.asarray(qvel, jnp.float32), jnp.asarray(ctrl, jnp.float32)


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@functools.cache
def rolled():
    """The reference of many tests: BATCH rolls of the contact model under one vmap."""
    return jax.jit(jax.vmap(functools.partial(roll, engine_of(contacts()))))(*draws(contacts(), BATCH))


def rounded_state(model: mujoco.MjModel, data: mujoco.MjData) -> np.ndarray:
    """The integration state in float32, to which that of `data` is rounded as well."""
    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, spec))
    mujoco.mj_getState(model, data, state, spec)
    mujoco.mj_setState(model, data, state.astype(np.float32).astype(np.float64), spec)
    return state.astype(np.float32)


@pytest.mark.parametrize("substeps", [1, 4])
def test_it_is_exactly_a_loop_over_mj_step_whose_state_is_rounded_to_float32_after_each_control_step(substeps):
    model, (qvel, controls) = contacts(), draws(contacts(), BATCH, steps=150)
    out = jax.jit(jax.vmap(functools.partial(roll, engine_of(model), substeps=substeps)))(qvel, controls)
    out, qvel, controls = jax.tree.map(np.asarray, (out, qvel, controls))
    data, touched = mujoco.MjData(model), 0
    for i in range(BATCH):
        mujoco.mj_resetData(model, data)
        data.qvel[:] = qvel[i]
        rounded_state(model, data)
        for t in range(controls.shape[1]):
            data.ctrl[:] = controls[i, t]
            for _ in range(substeps):
                mujoco.mj_step(model, data)
            np.testing.assert_array_equal(out["row"][i, t], rounded_state(model, data))
            for field in FIELDS:
                expected = getattr(data, field).astype(np.float32).reshape(out[field].shape[2:])
                np.testing.assert_array_equal(out[field][i, t], expected, err_msg=field)
            touched += data.ncon
    assert touched > 2 * BATCH * controls.shape[1]  # the boxes do lie on the plane


def test_forward_is_mj_forward_and_lets_no_time_pass():
    model, engine = contacts(), engine_of(contacts())
    qvel, _ = draws(model)
    data = jax.jit(lambda v: engine.forward(engine.model, engine.make_data(qvel=v)))(qvel)
    reference = mujoco.MjData(model)
    reference.qvel[:] = qvel
    rounded_state(model, reference)
    mujoco.mj_forward(model, reference)
    for field in FIELDS:
        expected = getattr(reference, field).astype(np.float32)
        np.testing.assert_array_equal(np.ravel(getattr(data, field)), expected.ravel(), err_msg=field)
    assert data.time == 0
    np.testing.assert_array_equal(data.qvel, qvel)


@pytest.mark.parametrize("field", sorted(set(native.STATE) - {"history", "userdata", "plugin_state"}))
def test_every_part_of_the_state_goes_in_and_comes_out(field):
    engine, base = engine_of(contacts()), engine_of(contacts()).make_data()
    (value,) = (p for p in engine._state if p.name == field)
    changed = jnp.zeros(value.shape, bool) if value.dtype == jnp.bool_ else getattr(base, field) + 0.1
    forward = engine.forward(engine.model, base.replace(**{field: changed}))
    np.testing.assert_array_equal(getattr(forward, field), changed)
    one, other = (engine.step(engine.model, d, base.ctrl, 3) for d in (base, base.replace(**{field: changed})))
    unread = ("time", "ctrl")  # no force depends on the time; `step` takes ctrl as an argument
    if field == "qacc_warmstart":  # where the solver starts from shows in its last bits alone
        assert not np.array_equal(one.qacc_warmstart, other.qacc_warmstart)
    else:
        assert np.array_equal(one.qvel, other.qvel) == (field in unread)


@pytest.mark.parametrize("engine", ["mujoco", pytest.param("mjx", marks=pytest.mark.slow)])
def test_derived_fields_describe_the_state_before_the_last_substep(engine):
    model = mujoco.MjModel.from_xml_string(PENDULUM.replace('contact="disable"', 'constraint="disable"'))
    engine = engine_of(model, ("sensordata", "xpos", "xmat")) if engine == "mujoco" else physics.make("mjx", model)
    qvel, controls = draws(model, steps=1)
    start = engine.make_data(qvel=qvel, ctrl=controls[0])
    # Traced substeps are one program of MJX's; the native engine takes static ones.
    after = jax.jit(
        lambda n: engine.step(engine.model, start, controls[0], n), static_argnums=(0,) * (engine.name == "mujoco")
    )
    forward = jax.jit(lambda data: engine.forward(engine.model, data))
    with foreign():
        stepped, earlier = after(3), after(2)
        before, current = forward(earlier), forward(stepped)
    for field in ("sensordata", "xpos"):
        # The state between is rounded to float32 where the steps of one call are not.
        np.testing.assert_allclose(getattr(stepped, field), getattr(before, field), rtol=2e-5, atol=2e-6)
        assert np.abs(getattr(stepped, field) - getattr(current, field)).max() > 1e-3
    np.testing.assert_allclose(stepped.sensordata[0], earlier.qpos[1], rtol=1e-5)


def test_simulations_under_vmap_equal_single_ones():
    single = jax.jit(functools.partial(roll, engine_of(contacts())))
    qvel, controls = draws(contacts(), BATCH)
    for i in range(BATCH):
        assert_equal(jax.tree.map(lambda x: x[i], rolled()), single(qvel[i], controls[i]))  # noqa: B023


@pytest.mark.parametrize("lead", [(1,), (2, 3), (1, 3, 2)])
def test_any_number_of_leading_axes_gives_the_same_bits(lead):
    function = functools.partial(roll, engine_of(contacts()))
    for _ in lead:
        function = jax.vmap(function)
    size = int(np.prod(lead))
    qvel, controls = (x[:size].reshape(*lead, *x.shape[1:]) for x in draws(contacts(), BATCH))
    out = jax.jit(function)(qvel, controls)
    assert_equal(
        jax.tree.map(lambda x: x.reshape(size, *x.shape[len(lead) :]), out), jax.tree.map(lambda x: x[:size], rolled())
    )


def test_a_model_of_each_seed_and_a_state_of_each_environment_equal_one_by_one():
    engine, (qvel, controls) = engine_of(contacts()), draws(contacts(), 2, 3, steps=5)
    masses = jnp.asarray(np.outer([0.8, 1.3], contacts().body_mass), jnp.float32)

    def simulate(mass, qvel, controls):
        model = physics.with_overrides(engine.model, {"body_mass": mass})
        return engine.step(model, engine.make_data(qvel=qvel), controls[0], 4)

    def get(*arguments):
        return observed(simulate(*arguments))

    nested = jax.jit(jax.vmap(jax.vmap(get, in_axes=(None, 0, 0))))(masses, qvel, controls)
    single = jax.jit(get)
    for i in range(2):
        for j in range(3):
            expected = single(masses[i], qvel[i, j], controls[i, j])
            assert_equal(jax.tree.map(lambda x: x[i, j], nested), expected)  # noqa: B023
    assert not np.array_equal(single(masses[0], qvel[0, 0], controls[0, 0])["row"], nested["row"][1, 0])


def test_tracing_it_again_gives_the_same_bits():
    arguments = draws(contacts(), BATCH)
    engine = engine_of(contacts())
    for _ in range(2):  # two functions, two programs, one engine
        assert_equal(jax.jit(jax.vmap(lambda v, u: roll(engine, v, u)))(*arguments), rolled())


def test_a_scan_equals_single_calls_whose_state_is_donated():
    engine = engine_of(contacts())
    qvel, controls = draws(contacts(), BATCH)
    step = jax.jit(jax.vmap(lambda d, u: engine.step(engine.model, d, u, 2)), donate_argnums=0)
    data = jax.jit(jax.vmap(lambda v: engine.forward(engine.model, engine.make_data(qvel=v))))(qvel)
    data = data.replace(qacc_warmstart=jnp.zeros_like(data.qacc_warmstart))  # a new simulation has none
    for t in range(controls.shape[1]):
        before, data = data, step(data, controls[:, t])
        assert before.qpos.is_deleted()
        assert_equal(jax.vmap(observed)(data), jax.tree.map(lambda x: x[:, t], rolled()))  # noqa: B023


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(threads):
    engine = engine_of(contacts(), threads=threads)
    assert_equal(jax.jit(jax.vmap(functools.partial(roll, engine)))(*draws(contacts(), BATCH)), rolled())


def test_the_callback_of_accelerators_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(native, "through_buffers", native.through_copies)
    function = jax.jit(jax.vmap(functools.partial(roll, engine_of(contacts()))))
    arguments = draws(contacts(), BATCH)
    assert "pure_callback" in str(function.trace(*arguments).jaxpr)
    assert_equal(function(*arguments), rolled())
    single = jax.jit(functools.partial(roll, engine_of(contacts())))(*(x[0] for x in arguments))
    assert_equal(single, jax.tree.map(lambda x: x[0], rolled()))


def diverging(engine, what: str, sick: int):
    """One control step of BATCH simulations, of which number `sick` is given something impossible."""
    qvel, controls = draws(contacts(), BATCH)
    qpos = jnp.tile(engine.make_data().qpos, (BATCH, 1))
    ctrl = controls[:, 0]
    if what == "velocity":
        qvel = qvel.at[sick, 7].set(1e11)
    elif what == "nan":
        qpos = qpos.at[sick, 2].set(jnp.nan)
    elif what == "control":
        ctrl = ctrl.at[sick, 0].set(jnp.inf)
    elif what == "force":  # a huge acceleration, seen after the forces are known
        ctrl = ctrl.at[sick, 0].set(3e9)
    before = jax.vmap(lambda p, v: engine.make_data(qpos=p, qvel=v))(qpos, qvel)
    return before, jax.jit(jax.vmap(lambda d, u: engine.step(engine.model, d, u, 3)))(before, ctrl), ctrl


@pytest.mark.parametrize("what", ["velocity", "nan", "control", "force"])
def test_a_simulation_that_diverges_keeps_its_state_and_the_others_never_notice(what, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    engine = engine_of(contacts())
    before, after, ctrl = diverging(engine, what, sick=2)
    np.testing.assert_array_equal(engine.diverged(after), np.arange(BATCH) == 2)
    expected = jax.tree.map(lambda x: x[2], before.replace(ctrl=ctrl))
    np.testing.assert_array_equal(row(jax.tree.map(lambda x: x[2], after)), row(expected))
    assert not np.any(after.sensordata[2]) and not np.any(after.xpos[2])
    _, healthy, _ = diverging(engine, "", sick=2)
    others = np.array([i for i in range(BATCH) if i != 2])
    assert_equal(*(jax.tree.map(lambda x: x[others], jax.vmap(observed)(d)) for d in (after, healthy)))
    assert not healthy._impl.diverged.any()
    again = jax.jit(jax.vmap(lambda d, u: engine.step(engine.model, d, u, 3)))(healthy, ctrl.at[2].set(0.0))
    assert not again._impl.diverged.any()  # nothing of it is left in the engine
    assert list(tmp_path.iterdir()) == []  # no MUJOCO_LOG.TXT
    assert "WARNING" not in "".join(capfd.readouterr())


def test_a_failure_in_any_call_since_make_data_stays_marked():
    engine = engine_of(contacts())
    data = engine.forward(engine.model, engine.make_data(qvel=jnp.full(contacts().nv, jnp.nan)))
    assert data._impl.diverged
    well = engine.step(engine.model, data.replace(qvel=jnp.zeros(contacts().nv)), data.ctrl, 1)
    assert well._impl.diverged and np.isfinite(well.qvel).all()


def test_batch_sizes_and_overridden_models_in_turn_do_not_meet():
    engine = engine_of(contacts())
    heavy = physics.with_overrides(engine.model, {"opt.gravity": jnp.array([0.0, 0.0, -20.0])})
    qvel, _ = draws(contacts(), 5)

    def fall(model, qvel):
        data = engine.make_data(qvel=qvel)
        return row(engine.step(model, data, data.ctrl, 2))

    plain, pulled = (jax.jit(jax.vmap(functools.partial(fall, model))) for model in (engine.model, heavy))
    expected = [plain(qvel), pulled(qvel)]
    assert not np.array_equal(*expected)
    for size in (2, 5, 3, 5):
        np.testing.assert_array_equal(plain(qvel[:size]), expected[0][:size])
        np.testing.assert_array_equal(pulled(qvel[:size]), expected[1][:size])


FORK = """
import gc, os
import mujoco, numpy as np
from envs.physics.batches import Batches
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><body><joint/><geom size='.1' pos='1 0 0'/></body></worldbody></mujoco>"
)
batches = Batches(model)
width = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION)
def run():
    out, failed = np.empty((4, width), np.float32), np.empty(4, bool)
    batches.run(2, 3, (), (), out, failed, np.zeros((4, width), np.float32))
    return out
first = run()
child = os.fork()
if child == 0:
    same = np.array_equal(run(), first)
    del batches
    gc.collect()
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), np.array_equal(run(), first))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_simulates_and_ends():
    assert script(FORK, 120).split() == ["0", "True"]


def test_a_model_that_needs_memory_of_its_own_is_refused():
    sleepy = mujoco.MjModel.from_xml_string(
        CONTACTS.replace('<option timestep="0.004"/>', "<option timestep='0.004'><flag sleep='enable'/></option>")
    )
    with pytest.raises(UserError, match="cannot simulate this model"):
        Native(sleepy)


def test_an_error_of_mujoco_in_one_simulation_marks_that_one(monkeypatch):
    def step(batch, **options):
        original(batch, **options)
        raise batches.SimulationError(np.array([1]), "out of memory")

    original = batches.Batch.step
    monkeypatch.setattr(batches.Batch, "step", step)
    monkeypatch.setattr(
        batches.Batch, "status", property(lambda self: np.arange(self.nsim) == 1, lambda self, _: None), raising=False
    )
    engine = engine_of(contacts())
    before, after, ctrl = diverging(engine, "", sick=0)
    np.testing.assert_array_equal(after._impl.diverged, np.arange(BATCH) == 1)
    np.testing.assert_array_equal(after.qpos[1], before.qpos[1])
    assert not np.array_equal(after.qpos[0], before.qpos[0])


@pytest.mark.parametrize("memory", ["8K", "32K"])  # too little for the contacts, or for the constraints alone
def test_contacts_that_do_not_fit_in_memory_are_told_once(memory, recwarn):
    boxes = "".join(f'<body pos="{i} 0 .09"><freejoint/><geom type="box" size=".1 .1 .1"/></body>' for i in range(6))
    ground = '<geom type="plane" size="9 9 .1"/>'
    xml = f'<mujoco><size memory="{memory}"/><worldbody>{ground}{boxes}</worldbody></mujoco>'
    engine = Native(mujoco.MjModel.from_xml_string(xml))
    step = jax.jit(lambda: engine.step(engine.model, engine.make_data(), jnp.zeros(0), 2))
    for _ in range(2):
        assert not step()._impl.diverged
    (warning,) = (w for w in recwarn if "memory is full" in str(w.message))
    assert "raise `memory` in <size>" in str(warning.message)


@pytest.mark.parametrize(("qvel", "diverged"), [(1.0, False), (jnp.nan, True), (1e11, True)])
def test_mjx_marks_what_is_not_finite_or_huge(qvel, diverged):
    engine = physics.make("mjx", pendulum())
    assert bool(engine.diverged(engine.make_data(qvel=jnp.full(pendulum().nv, qvel)))) is diverged


def test_an_impossible_model_shows_without_a_step():
    native, xla = engine_of(pendulum()), physics.make("mjx", pendulum())
    masses = {"body_mass": jnp.full(pendulum().nbody, jnp.nan)}
    for engine in (native, xla):
        model = physics.with_overrides(engine.model, masses)
        with foreign():
            data = jax.jit(lambda engine=engine, model=model: engine.forward(model, engine.make_data()))()
        assert engine.diverged(data)


def test_asking_for_gradients_is_refused_and_the_way_out_is_named():
    engine = engine_of(contacts())

    def height(ctrl):
        return engine.step(engine.model, engine.make_data(), ctrl, 1).qpos.sum()

    for differentiate in (jax.grad(height), jax.jit(jax.grad(height)), lambda u: jax.jvp(height, (u,), (u,))):
        with pytest.raises(UserError, match="no gradients: take physics = 'mjx'"):
            differentiate(jnp.zeros(3))


def test_a_gradient_that_does_not_pass_through_the_simulation_is_none_of_its_business():
    engine = engine_of(contacts())

    def loss(ctrl):
        data = engine.step(engine.model, engine.make_data(), jax.lax.stop_gradient(ctrl), 1)
        return (ctrl * data.sensordata[0]).sum()

    assert np.isfinite(jax.grad(loss)(jnp.ones(3))).all()


def test_a_field_that_was_not_bound_says_so_at_any_use():
    engine = Native(contacts())
    field = jax.jit(lambda: engine.forward(engine.model, engine.make_data()))().xpos
    arithmetic = "add sub mul matmul truediv floordiv mod pow lshift rshift and_ or_ xor"
    binary = [getattr(operator, name) for name in f"{arithmetic} lt le eq ne gt ge".split()] + [divmod]
    uses = [functools.partial(op, 2.0) for op in binary] + [
        functools.partial(lambda op, x: op(x, 2.0), op) for op in binary
    ]
    uses += [operator.neg, operator.pos, operator.abs, operator.invert, operator.index, bool, int, float, complex]
    uses += [len, iter, round, np.asarray, jnp.asarray, jnp.sum, jnp.sin, lambda x: x[0], lambda x: 1.0 in x]
    uses += [lambda x: x.shape, lambda x: x.at, lambda x: x.reshape(-1), lambda x: jnp.stack([x, x])]
    uses += [
        lambda x: jnp.where(True, x, 0.0),
        lambda x: jnp.zeros(3) + x,
        lambda x: np.zeros(3) @ x,
    ]
    for use in uses:
        with pytest.raises(native.UnboundField, match=r"data\.xpos is not computed.*bind\('xpos'\)") as caught:
            use(field)
        assert caught.value.field == "xpos"


def test_only_what_a_step_computes_can_be_bound():
    with pytest.raises(UserError, match="data.xpso .* there are .*xpos"):
        Native(contacts()).bind("xpso")
    with pytest.raises(UserError, match="data.qfrc_inverse"):
        Native(contacts()).bind("qfrc_inverse")  # of another simulation, or none


def test_whatever_can_be_bound_is_the_same_at_any_number_of_threads_and_in_the_first_call():
    fields = Native(contacts())._derivable
    qvel, controls = draws(contacts(), 64)

    def derived(threads):
        engine = engine_of(contacts(), fields, threads=threads)
        step = jax.jit(jax.vmap(lambda v, u: engine.step(engine.model, engine.make_data(qvel=v), u, 3)))
        return [{f: np.asarray(getattr(step(qvel, controls[:, 0]), f)) for f in fields} for _ in range(2)]

    first, second = derived(1)
    assert_equal(first, second)
    assert_equal(first, derived(2)[0])


def test_unknown_engines_get_the_close_ones_and_auto_on_a_cpu_is_mujoco(monkeypatch):
    with pytest.raises(UserError, match="Did you mean mujoco"):
        physics.resolve("mujoko")
    assert physics.resolve("auto") == "mujoco" and physics.resolve("mjx") == "mjx"
    monkeypatch.setattr(physics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="warp-lang, which is not installed"):
        physics.resolve("warp")


@pytest.mark.parametrize(
    ("platform", "warp", "engine"), [("tpu", True, "mjx"), ("gpu", True, "warp"), ("gpu", False, "mjx")]
)
def test_auto_picks_by_device(platform, warp, engine, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(physics.importlib.util, "find_spec", lambda name: warp or None)
    assert physics.resolve("auto") == engine


@pytest.mark.parametrize("threads", [-1, 1.5, True])
def test_a_number_of_threads_that_is_none_is_refused(threads):
    with pytest.raises(UserError, match=f"physics_threads = {threads}.*0 for all cores"):
        physics.make("mujoco", pendulum(), threads=threads)


def override_cases(model: mujoco.MjModel) -> dict[str, np.ndarray]:
    """Changes of the usual fields, per simulation [BATCH, ...]."""
    rng = np.random.default_rng(1)

    def scaled(field, spread=0.3):
        value = np.asarray(getattr(model, field))
        return value * rng.uniform(1 - spread, 1 + spread, (BATCH, *value.shape))

    def moved(field, by):
        value = np.asarray(getattr(model, field))
        return value + rng.uniform(-by, by, (BATCH, *value.shape))

    names = (
        "body_mass",
        "body_inertia",
        "geom_friction",
        "dof_damping",
        "dof_frictionloss",
        "dof_armature",
        "geom_size",
    )
    cases = {name: scaled(name) for name in (*names, "actuator_gainprm", "actuator_biasprm", "jnt_stiffness")}
    ipos = np.tile(model.body_ipos, (BATCH, 1, 1))
    body = int(np.flatnonzero((model.body_simple == 0) & (model.body_dofnum > 0))[0])
    ipos[:, body] += rng.uniform(-0.05, 0.05, (BATCH, 3))
    cases |= {"body_ipos": ipos, "qpos0": moved("qpos0", 0.05), "geom_pos": moved("geom_pos", 0.02)}
    gravity = np.array([0.0, 0.0, -9.81]) + rng.uniform(-2, 2, (BATCH, 3))
    cases |= {"opt.gravity": gravity, "body_pos": moved("body_pos", 0.02)}
    return {name: value.astype(np.float32) for name, value in cases.items()}


OVERRIDES = tuple(override_cases(pendulum()))


def overridden_step(engine, field, values, qvel, ctrl):
    def step(value, qvel, ctrl):
        model = physics.with_overrides(engine.model, {field: value})
        data = engine.step(model, engine.make_data(qvel=qvel), ctrl, 2)
        return {"qpos": data.qpos, "qvel": data.qvel, "sensordata": data.sensordata}

    return jax.jit(jax.vmap(step))(values, qvel, ctrl)


def fresh_step(model: mujoco.MjModel, field: str, value: np.ndarray, qvel, ctrl) -> np.ndarray:
    """[nq + nv]: two steps of a model of its own, with the constants that MJX too would keep."""
    own = copy.copy(model)
    owner, name = (own.opt, field[4:]) if field.startswith("opt.") else (own, field)
    getattr(owner, name)[:] = value
    data = mujoco.MjData(own)
    mujoco.mj_setConst(own, data)
    for kept in batches.NOMINAL - {field}:
        if not kept.startswith("opt.") and isinstance(getattr(own, kept), np.ndarray):
            getattr(own, kept)[...] = getattr(model, kept)
    if field == "body_mass":  # in float32, as the environment's code sees it
        own.body_subtreemass[:] = physics.with_overrides(
            mjx.put_model(model, impl="cpp"), {field: value}
        ).body_subtreemass
    start = mujoco.MjData(model)
    rounded_state(model, start)
    mujoco.mj_copyState(own, start, data, mujoco.mjtState.mjSTATE_INTEGRATION)
    data.qvel[:], data.ctrl[:] = qvel, ctrl
    for _ in range(2):
        mujoco.mj_step(own, data)
    return np.concatenate([data.qpos, data.qvel]).astype(np.float32)


@pytest.mark.parametrize("field", OVERRIDES)
@pytest.mark.parametrize("model", [contacts(), pendulum()], ids=["contacts", "pendulum"])
def test_overrides_equal_a_model_with_those_values(field, model):
    engine, values = engine_of(model, ("sensordata",)), override_cases(model)[field]
    qvel, controls = draws(model, BATCH, steps=1)
    for order in (slice(None), slice(None, None, -1)):  # the second call finds the first one's values
        out = overridden_step(engine, field, values[order], qvel, controls[:, 0])
        for i in range(BATCH):
            expected = fresh_step(model, field, values[order][i], qvel[i], controls[i, 0])
            np.testing.assert_array_equal(np.concatenate([out["qpos"][i], out["qvel"][i]]), expected)


def test_a_geom_that_grows_is_hit():
    xml = """<mujoco><option gravity="0 0 0"/><worldbody><geom name="wall" type="box" size=".1 .1 .1"/>
      <body pos="1 0 0"><joint type="slide" axis="1 0 0"/><geom size=".1"/></body></worldbody></mujoco>"""
    engine = Native(mujoco.MjModel.from_xml_string(xml))
    sizes = jnp.asarray([[[0.1, 0.1, 0.1], [0.1, 0.0, 0.0]], [[0.95, 0.1, 0.1], [0.1, 0.0, 0.0]]])

    def speed(size):
        return engine.step(
            physics.with_overrides(engine.model, {"geom_size": size}), engine.make_data(), jnp.zeros(0), 1
        ).qvel[0]

    near, far = jax.jit(jax.vmap(speed))(sizes)[::-1]
    assert far == 0.0 and near > 0.01


SHAPES = """
<mujoco>
  <asset><mesh name="tet" vertex="0 0 0 1 0 0 0 1 0 0 0 1"/></asset>
  <worldbody>
    <geom type="plane" size="5 5 .1"/><geom type="sphere" size="{0}"/><geom type="capsule" size="{0} .2"/>
    <geom type="ellipsoid" size=".1 {0} .3"/><geom type="cylinder" size="{0} .2"/><geom type="box" size=".1 .2 {0}"/>
    <geom type="mesh" mesh="tet"/>
  </worldbody>
</mujoco>
"""


def test_what_bounds_a_geom_of_another_size_is_what_mujoco_compiles():
    small, large = (mujoco.MjModel.from_xml_string(SHAPES.format(size)) for size in (0.1, 0.7))
    model = mjx.put_model(small, impl="jax")
    sizes = {"geom_size": jnp.asarray(large.geom_size, jnp.float32)}
    found = physics.with_overrides(model, sizes)
    np.testing.assert_allclose(found.geom_rbound, large.geom_rbound, rtol=1e-6)
    np.testing.assert_allclose(found.geom_aabb, large.geom_aabb, rtol=1e-6, atol=1e-7)
    kept = physics.with_overrides(model, sizes | {"geom_rbound": model.geom_rbound})
    np.testing.assert_array_equal(kept.geom_rbound, model.geom_rbound)


def test_constants_are_derived_again_only_when_overrides_change(monkeypatch):
    engine, calls = engine_of(contacts()), []
    derive = batches.Batch.set_const
    monkeypatch.setattr(
        batches.Batch, "set_const", lambda batch, ids: calls.append(int(ids.sum())) or derive(batch, ids)
    )
    qvel, controls = draws(contacts(), BATCH, steps=1)
    masses = override_cases(contacts())["body_mass"]
    out = [overridden_step(engine, "body_mass", values, qvel, controls[:, 0]) for values in (masses, masses)]
    assert calls == [BATCH]
    assert_equal(*out)
    overridden_step(engine, "body_mass", np.concatenate([masses[:2] * 2, masses[2:]]), qvel, controls[:, 0])
    assert calls == [BATCH, 2]


def test_a_simulation_whose_overrides_mujoco_refuses_is_marked_and_the_others_never_notice():
    engine, model, sick = engine_of(pendulum(), ("sensordata",)), pendulum(), np.arange(BATCH) == 2
    values = np.tile(np.asarray(model.body_ipos, np.float32), (BATCH, 1, 1))
    values[:, 2, 2] -= np.linspace(0, 0.1, BATCH, dtype=np.float32)  # the lower arm's
    healthy = overridden_step(engine_of(model, ("sensordata",)), "body_ipos", values, *first_draws(model))
    values[2, 3] += 0.01  # the free block was compiled as balanced

    def step(value, qvel, ctrl):
        model = physics.with_overrides(engine.model, {"body_ipos": value})
        data = engine.step(model, engine.make_data(qvel=qvel), ctrl, 2)
        return {"qpos": data.qpos, "qvel": data.qvel, "sensordata": data.sensordata}, engine.diverged(data)

    with pytest.warns(UserWarning, match="cannot take: .*simple='false'"):
        out, diverged = jax.jit(jax.vmap(step))(values, *first_draws(model))
    np.testing.assert_array_equal(diverged, sick)
    assert_equal(*(jax.tree.map(lambda x: np.asarray(x)[~sick], values) for values in (out, healthy)))
    np.testing.assert_array_equal(out["qpos"][2], model.qpos0.astype(np.float32))
    again = jax.jit(jax.vmap(step))(values, *first_draws(model))  # without another warning
    assert_equal(again, (out, diverged))
    values[2, 3] -= 0.01
    out, diverged = jax.jit(jax.vmap(step))(values, *first_draws(model))
    assert not diverged.any()
    np.testing.assert_allclose(out["qpos"], healthy["qpos"], rtol=1e-6)


def first_draws(model):
    qvel, controls = draws(model, BATCH, steps=1)
    return qvel, controls[:, 0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"body_mas": np.ones(4)}, "Did you mean body_mass"),
        ({"opt.gravty": np.ones(3)}, "opt.gravity"),
        ({"body_mass": np.ones(3)}, r"body_mass has shape \(4,\); the override has \(3,\)"),
        ({"opt.gravity": np.ones((2, 3))}, r"opt.gravity has shape \(3,\)"),
    ],
)
def test_overrides_that_do_not_fit_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        physics.with_overrides(Native(pendulum()).model, overrides)


def test_a_model_that_came_as_an_argument_is_refused():
    engine = Native(pendulum())
    with pytest.raises(UserError, match="argument of a jitted function.*override some of engine.model"):
        jax.jit(lambda model: engine.forward(model, engine.make_data()).qpos)(engine.model)


@pytest.mark.slow
def test_overrides_lead_mjx_to_the_same_step():
    model, fields = pendulum(), [f for f in OVERRIDES if f != "jnt_stiffness"]
    cases, (qvel, controls) = override_cases(model), draws(model, BATCH, steps=1)
    nominal = {
        f: np.asarray(model.opt.gravity if f == "opt.gravity" else getattr(model, f), np.float32) for f in fields
    }

    def stacked(field):  # [cases * BATCH, ...]: each case changes one field
        plain = np.broadcast_to(nominal[field], cases[field].shape)
        return np.concatenate([cases[field] if other == field else plain for other in fields])

    overrides = {field: stacked(field) for field in fields}
    tiled = [np.tile(x, (len(fields), 1)) for x in (qvel, controls[:, 0])]
    results = []
    for engine in (engine_of(model, ("sensordata",)), physics.make("mjx", model)):

        def step(overrides, qvel, ctrl, engine=engine):
            data = engine.make_data(qvel=qvel)
            return engine.step(physics.with_overrides(engine.model, overrides), data, ctrl, 2)

        with foreign():
            data = jax.jit(jax.vmap(step))(overrides, *tiled)
        results.append(np.concatenate([data.qpos, data.qvel, data.sensordata], axis=1).reshape(len(fields), BATCH, -1))
    for field, one, other in zip(fields, *results, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-5, err_msg=field)
    plain = results[0][fields.index("geom_friction")]  # there are no contacts
    idle = ("geom_friction", "geom_size", "geom_pos", "actuator_biasprm", "actuator_gainprm")
    changes = [np.abs(one - plain).max() for field, one in zip(fields, results[0], strict=True) if field not in idle]
    assert min(changes) > 1e-4


HEADER = """
import faulthandler, hashlib
faulthandler.dump_traceback_later({limit}, exit=True)
import jax, jax.numpy as jnp, numpy as np
from tests.test_physics import contacts, draws, engine_of, pendulum, roll
"""
DEVICES = """
import functools
from jax.sharding import Mesh, PartitionSpec as P
assert jax.device_count() == 4
engine = engine_of(contacts(), threads=2)
batch = jax.vmap(functools.partial(roll, engine))
arguments = [jnp.concatenate([x, x[:2]]) for x in draws(contacts(), 6)]
over = functools.partial(jax.shard_map, mesh=Mesh(jax.devices(), "x"), in_specs=P("x"), out_specs=P("x"))
sharded = over(batch, check_vma=False)  # the scan's start holds constants, which do not vary over devices
outs = [jax.jit(f)(*arguments) for f in (batch, sharded)]
assert len(outs[1]["row"].sharding.device_set) == 4
jax.tree.map(np.testing.assert_array_equal, *outs)
print(hashlib.sha256(np.asarray(outs[0]["row"][:6]).tobytes()).hexdigest())
"""
MANY = """
jax.config.update("jax_cpu_enable_async_dispatch", {asynchronous})
engine = engine_of(pendulum(), ("sensordata",))
data = jax.jit(jax.vmap(lambda v: engine.make_data(qvel=v)))(draws(pendulum(), 4096)[0])

@jax.jit
def advance(data, w):
    def body(carry, _):
        data, w = carry
        w = jnp.tanh(w @ w)  # on the cores that the physics wants
        ctrl = jnp.clip(data.sensordata[:, :2] + w[:2, :2].sum(), -1, 1)
        return (jax.vmap(lambda d, u: engine.step(engine.model, d, u, 1))(data, ctrl), w), None
    return jax.lax.scan(body, (data, w), None, {length})[0]

w = jnp.ones((256, 256))
for _ in range({calls}):
    data, w = advance(data, w)
print(float(data.time[0]), bool(jnp.isfinite(data.qpos).all()))
"""


def script(code: str, limit: int, **environment: str) -> str:
    """What a process of its own prints; after `limit` seconds it ends with a traceback of each thread."""
    result = subprocess.run(
        [sys.executable, "-c", HEADER.format(limit=limit) + code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_four_devices_of_one_host_give_the_bits_of_one():
    printed = script(DEVICES, 300, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert printed.strip() == hashlib.sha256(np.asarray(rolled()["row"]).tobytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [True, False])
def test_calls_at_4096_environments_do_not_wait_for_each_other(asynchronous):
    printed = script(MANY.format(asynchronous=asynchronous, length=5, calls=4), 300)
    time, finite = printed.split()
    assert abs(float(time) - 0.2) < 1e-4 and finite == "True"


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [True, False])
def test_thousands_of_calls_at_4096_environments_do_not_wait_for_each_other(asynchronous):
    scanned = script(MANY.format(asynchronous=asynchronous, length=50, calls=40), 1200)
    single = script(MANY.format(asynchronous=asynchronous, length=1, calls=2000), 1200)
    assert scanned == single and scanned.split()[1] == "True"
