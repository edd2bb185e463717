"""Bodies split among agents: splits, who sees what, masks, and the same episodes as of one agent."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

import envs
from envs import multi_agent
from envs.multi_agent import SHARED, SPLITS, MultiAgent, actuators_of, innermost, root_joints, rows_of, within
from envs.names import BRAX, NAMES
from rlx.errors import UserError
from rlx.types import Box, Spec, TimeStep

KEY = jax.random.key(5)
SPLIT_BODIES = [(body, split) for body, splits in SPLITS.items() for split in splits]
FIRST_SPLITS = [f"{'multi_brax' if b in BRAX else 'multi_playground'}/{b}_{next(iter(SPLITS[b]))}" for b in SPLITS]


@functools.cache
def model_of(body: str) -> mujoco.MjModel:
    """As the environment has it, without building the environment where that can be left out."""
    if body in BRAX:
        import brax
        from brax.io import mjcf
        from etils import epath

        file = {"halfcheetah": "half_cheetah"}.get(body, body)
        return mjcf.load_mjmodel(epath.resource_path(brax) / f"envs/assets/{file}.xml")
    from mujoco_playground import registry

    return registry.load(body, config_overrides={"impl": "cpp"}).mj_model


def split_of(body: str, split: str) -> dict[str, list[str]]:
    return {f"agent_{i}": part.split() for i, part in enumerate(SPLITS[body][split].split("|"))}


def names_within(body: str, own: list[str], hops: int) -> list[str]:
    model = model_of(body)
    return [model.joint(j).name for j in within(model, [model.joint(name).id for name in own], hops)]


def test_names_are_those_of_the_splits():
    names = {suite: {f"{b}_{s}" for b, s in SPLIT_BODIES if (b in BRAX) == (suite == "multi_brax")} for suite in NAMES}
    for suite in ("multi_brax", "multi_playground"):
        assert names[suite] == set(NAMES[suite])
    assert {b for b in SPLITS if b not in BRAX} <= set(NAMES["playground"])


@pytest.mark.parametrize(
    ("wrong", "right"), [("halfcheetah_6x2", "multi_brax/halfcheetah_6x1"), ("ant_4x3", "ant_4x2")]
)
def test_a_misspelt_split_gets_the_close_ones(wrong, right):
    with pytest.raises(UserError, match=right):
        envs.make(f"multi_brax/{wrong}")


@pytest.mark.parametrize(("body", "split"), SPLIT_BODIES)
def test_agents_drive_all_actuators_once_each_by_its_joints(body, split):
    model, joints = model_of(body), split_of(body, split)
    actuators = actuators_of(model, joints)
    assert sorted(i for row in actuators for i in row) == list(range(model.nu))
    assert [[model.joint(model.actuator_trnid[i, 0]).name for i in row] for row in actuators] == list(joints.values())
    num_agents, _, size = split.removesuffix("d").partition("x")
    sizes = [int(size)] * int(num_agents) if size else [int(n) for n in split.split("|")]
    assert [len(row) for row in actuators] == sizes


def test_the_first_motors_of_the_ant_drive_its_fourth_leg():
    assert actuators_of(model_of("ant"), split_of("ant", "4x2")) == [[2, 3], [4, 5], [6, 7], [0, 1]]


@pytest.mark.parametrize(
    ("body", "own", "hops", "others"),
    [
        # foot - shin - thigh at the back, then by the torso thigh - shin - foot in front
        ("halfcheetah", "bthigh", 1, "bshin fthigh"),
        ("halfcheetah", "bfoot", 1, "bshin"),
        ("halfcheetah", "bfoot", 3, "bshin bthigh fthigh"),
        ("halfcheetah", "bfoot", 9, "bshin bthigh fthigh fshin ffoot"),
        ("halfcheetah", "bshin bfoot", 1, "bthigh"),
        ("halfcheetah", "bthigh ffoot", 1, "bshin fthigh fshin"),
        ("halfcheetah", "bthigh bshin bfoot", 0, ""),
        # legs meet in the torso; its four hips are neighbours
        ("ant", "hip_1 ankle_1", 1, "hip_2 hip_3 hip_4"),
        ("ant", "hip_3 ankle_3", 2, "hip_1 hip_2 hip_4 ankle_1 ankle_2 ankle_4"),
        ("ant", "ankle_4", 1, "hip_4"),
        ("ant", "ankle_4", 2, "hip_4 hip_1 hip_2 hip_3"),
        ("ant", "hip_1 ankle_1 hip_3 ankle_3", 1, "hip_2 hip_4"),
        # three joints on one thigh, which hangs from the pelvis; welded feet and hands are no links
        ("humanoid", "right_knee", 1, "right_hip_x right_hip_z right_hip_y"),
        (
            "humanoid",
            "abdomen_x",
            1,
            "abdomen_z abdomen_y right_hip_x right_hip_z right_hip_y left_hip_x left_hip_z left_hip_y",
        ),
        ("HumanoidRun", "left_knee", 1, "left_hip_x left_hip_z left_hip_y left_ankle_y left_ankle_x"),
        ("CheetahRun", "fthigh", 1, "bthigh fshin"),
        ("SwimmerSwimmer6", "joint_2", 1, "joint_1 joint_3"),
    ],
)
def test_neighbourhoods_are_those_worked_out_by_hand(body, own, hops, others):
    seen = [name for name in names_within(body, own.split(), hops) if name not in ("root", "rootx", "rootz", "rooty")]
    assert seen == own.split() + others.split()


def test_the_target_is_seen_by_all_and_joins_no_arm():
    model = model_of("reacher")
    assert [model.joint(j).name for j in root_joints(model)] == ["target_x", "target_y"]
    assert names_within("reacher", ["joint0"], 5) == ["joint0", "joint1"]


# Indices into (0, 1, qpos [9], qvel [9], state). The root: rootx is hidden, its speed is not; then rootz, rooty.
ROOT = [11, 3, 12, 4, 13]


def test_the_rows_of_the_cheetah_are_those_worked_out_by_hand():
    rows = rows_of(
        model_of("halfcheetah"), actuators_of(model_of("halfcheetah"), split_of("halfcheetah", "3x2")), 1, [20]
    )
    bthigh, bshin, bfoot, fthigh, fshin, ffoot = ([5 + i, 14 + i] for i in range(6))
    assert rows == [
        [1, 0, 0, 20, *ROOT, *bshin, *bfoot, *bthigh],
        [0, 1, 0, 20, *ROOT, *bthigh, *ffoot, *bshin, *fthigh, *fshin],
        [0, 0, 1, 20, *ROOT, *fthigh, *fshin, *bthigh, *ffoot],
    ]


def test_a_free_root_shows_its_height_its_attitude_and_all_velocities():
    rows = rows_of(model_of("ant"), actuators_of(model_of("ant"), split_of("ant", "8x1")), 0, [])
    # qpos of 15: x, y, z, quaternion, 8 joints; qvel of 14 from 17 on.
    assert rows[0] == [1, *[0] * 7, *range(4, 9), *range(17, 23), 9, 23]
    assert rows[7] == [*[0] * 7, 1, *range(4, 9), *range(17, 23), 16, 30]


def test_a_target_shows_where_it_is():
    rows = rows_of(model_of("reacher"), actuators_of(model_of("reacher"), split_of("reacher", "2x1")), 0, [])
    assert rows == [[1, 0, 4, 8, 5, 9, 2, 6], [0, 1, 4, 8, 5, 9, 3, 7]]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            {"a": ["thigh_joint", "leg_join"], "b": ["foot_joint"]},
            r"split\['a'\]: joint 'leg_join'.*Did you mean leg_joint",
        ),
        (
            {"a": ["thigh_joint"], "b": ["rootx"]},
            r"'rootx' does not exist. Allowed: foot_joint, leg_joint, thigh_joint",
        ),
        (
            {"a": ["thigh_joint", "leg_joint"], "b": ["leg_joint", "foot_joint"]},
            r"'leg_joint' is not.*agent 'a' has it already",
        ),
        ({"a": ["thigh_joint", "thigh_joint"], "b": ["leg_joint", "foot_joint"]}, "agent 'a' has it already"),
        ({"a": ["thigh_joint"], "b": ["foot_joint"]}, "no agent has leg_joint"),
        ({"a": ["thigh_joint", "leg_joint", "foot_joint"]}, "at least two agents"),
        ({"a": ["thigh_joint", "leg_joint", "foot_joint"], "b": []}, r"split\['b'\] = \[\] .*at least one joint"),
        ({"a": "thigh_joint", "b": ["leg_joint", "foot_joint"]}, "a list of at least one joint"),
        ([["thigh_joint"], ["leg_joint", "foot_joint"]], "agent: .joints."),
    ],
)
def test_a_split_that_is_none_is_said_plainly(split, message):
    with pytest.raises(UserError, match=message):
        actuators_of(model_of("hopper"), split)


TWO_MOTORS = """
<mujoco><worldbody><body><joint name="slide" type="slide"/><geom size="1"/>
<body><joint name="turn"/><geom size="1"/></body></body></worldbody>
<tendon><fixed name="string"><joint joint="slide" coef="1"/></fixed></tendon>
<actuator><motor name="push" joint="slide"/><motor name="pull" joint="slide"/><motor name="slide" joint="turn"/>
%s</actuator></mujoco>
"""


def test_names_of_actuators_tell_two_on_one_joint_apart():
    model = mujoco.MjModel.from_xml_string(TWO_MOTORS % "")
    assert actuators_of(model, {"a": ["pull"], "b": ["turn", "push"]}) == [[1], [2, 0]]
    assert actuators_of(model, {"a": ["turn"], "b": ["slide"]}) == [[2], [0, 1]]  # a joint before an actuator


def test_an_actuator_on_a_tendon_is_refused():
    model = mujoco.MjModel.from_xml_string(TWO_MOTORS % '<motor name="tug" tendon="string"/>')
    with pytest.raises(UserError, match="actuator tug drives no joint"):
        actuators_of(model, {"a": ["turn"], "b": ["slide"]})


class Fake:
    """A hopper without physics: qpos and qvel count up; an action of 1 in the last actuator makes them diverge."""

    spec = Spec({"a": jax.ShapeDtypeStruct((2,), jnp.float32), "b": jax.ShapeDtypeStruct((), jnp.float32)}, Box((3,)))

    @property
    def mj_model(self):
        return model_of("hopper")

    def joint_state(self, state):
        return state

    def reset(self, key, params):
        state = jnp.arange(6.0), jnp.arange(6.0, 12.0)
        return state, {"a": jnp.ones(2), "b": jnp.ones(())}

    def step(self, state, action, key):
        diverged = action[2] == 1.0
        after = jax.tree.map(lambda x: jnp.where(diverged, jnp.nan, x + 1), state)
        obs = {"a": jnp.where(diverged, 1.0, action[:2]), "b": jnp.where(diverged, 1.0, action[2])}
        never = jnp.zeros((), bool)
        info = {"diverged": diverged.astype(jnp.float32)}
        return after, TimeStep(obs, action.sum(), never, diverged, obs, info)


UNEQUAL = {"foot": ["foot_joint"], "upper": ["leg_joint", "thigh_joint"]}


def unequal() -> MultiAgent:
    return MultiAgent(Fake(), Fake(), UNEQUAL, hops=0, shared=(2,))


def test_unequal_agents_are_padded_behind_and_masked():
    env = unequal()
    assert env.spec.num_agents == 2 and env.spec.action == Box((2, 2)) and env.agents == ("foot", "upper")
    np.testing.assert_array_equal(env.spec.action_mask, [[True, False], [True, True]])
    # one-hot 2, shared 1, root 5, then two entries a joint
    np.testing.assert_array_equal(env.spec.obs_mask, np.arange(12) < np.array([[10], [12]]))
    _, obs = env.reset(KEY, ())
    assert jax.tree.map(jnp.shape, obs) == jax.tree.map(jnp.shape, env.spec.obs) == {"agents": (2, 12), "state": (3,)}
    root = [6, 1, 7, 2, 8]
    np.testing.assert_array_equal(obs["agents"], [[1, 0, 1, *root, 5, 11, 0, 0], [0, 1, 1, *root, 4, 10, 3, 9]])


def test_actions_go_to_their_joints_and_what_is_padded_goes_nowhere():
    env = unequal()
    state, _ = env.reset(KEY, ())
    for padding in (0.0, 0.9):
        _, timestep = env.step(state, jnp.array([[0.1, padding], [0.2, 0.3]]), KEY)
        np.testing.assert_allclose(timestep.obs["state"], [0.3, 0.2, 0.1])  # thigh, leg, foot


def test_a_divergence_shows_the_observation_before_it():
    env = unequal()
    state, first = env.reset(KEY, ())
    state, timestep = env.step(state, jnp.array([[1.0, 0.0], [0.0, 0.0]]), KEY)
    jax.tree.map(np.testing.assert_array_equal, (timestep.obs, timestep.final_obs), (first, first))
    _, timestep = env.step(state, jnp.zeros((2, 2)), KEY)  # whoever goes on sees no NaN
    assert np.isfinite(timestep.obs["agents"]).all()


@pytest.mark.parametrize(("field", "value"), [("hops", -1), ("hops", 0.5), ("shared", (3,)), ("shared", (-1,))])
def test_numbers_that_are_none_are_refused(field, value):
    with pytest.raises(UserError, match=field):
        MultiAgent(Fake(), Fake(), UNEQUAL, **{field: value})


def test_the_humanoid_has_nine_joints_above_and_eight_below():
    model = model_of("humanoid")
    rows = rows_of(model, actuators_of(model, split_of("humanoid", "9|8")), 1, [])
    # one-hot 2, root 11; 9 joints and, a hop away, the six of the hips; 8 joints and, a hop away, abdomen_x
    assert [len(row) for row in rows] == [2 + 11 + 2 * (9 + 6), 2 + 11 + 2 * (8 + 1)]


def play(env, action, num_steps):
    """Jitted. States and time steps of `num_steps` equal actions, each of a time of its own."""
    state, obs = jax.jit(env.reset)(KEY, env.spec.params)
    step, out = jax.jit(env.step), []
    for i in range(num_steps):
        state, timestep = step(state, action * (1 if i % 2 else -1), jax.random.fold_in(KEY, i))
        out.append((state, timestep))
    return obs, out


def check_against_one_agent(suite: str, body: str, split: str, physics: str = "auto", atol: float = 0.0, **overrides):
    """`atol`: where XLA computes the physics, it may fuse the two programs differently."""
    close = functools.partial(np.testing.assert_allclose, rtol=0.0, atol=atol)
    one = envs.make(f"{suite}/{body}", physics, **overrides)
    several = envs.make(f"multi_{suite}/{body}_{split}", physics, **overrides)
    assert several.spec.physics == one.spec.physics and several.spec.episode_length == one.spec.episode_length
    wrapper = several.env  # within the time limit
    flat = np.linspace(-0.9, 0.8, one.spec.action.shape[0], dtype=np.float32)
    action = np.full(several.spec.action.shape, 7.0, np.float32)  # 7 goes nowhere
    for i, row in enumerate(actuators_of(wrapper.body.mj_model, split_of(body, split))):
        action[i, : len(row)] = flat[row]
    (first, alone), (first_of_several, together) = play(one, flat, 3), play(several, action, 3)
    close(first_of_several["state"], first)
    for (state, timestep), (other_state, other) in zip(alone, together, strict=True):
        qpos, qvel = wrapper.body.joint_state(other_state.env)
        jax.tree.map(close, (qpos, qvel), wrapper.body.joint_state(state.env))
        close(other.obs["state"], timestep.obs)
        close(other.reward, timestep.reward)
        assert other.reward.shape == ()
        row = np.concatenate([[0.0, 1.0], qpos, qvel, other.obs["state"]])[wrapper.index]
        np.testing.assert_array_equal(other.obs["agents"], row)
        assert not other.obs["agents"][~several.spec.obs_mask].any()


@pytest.mark.parametrize(("suite", "body", "split"), [("brax", "ant", "2x4d"), ("playground", "HopperHop", "4x1")])
def test_episodes_are_those_of_one_agent(suite, body, split):
    check_against_one_agent(suite, body, split)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "body", "split", "physics"),
    [
        ("brax", "halfcheetah", "3x2", "mjx"),
        ("brax", "humanoid", "9|8", "mujoco"),
        ("brax", "swimmer", "2x1", "auto"),
        ("playground", "CheetahRun", "6x1", "mjx"),
        ("playground", "HumanoidWalk", "9|12", "mujoco"),
    ],
)
def test_episodes_are_those_of_one_agent_on_other_engines(suite, body, split, physics):
    check_against_one_agent(suite, body, split, physics, 0.0 if physics == "mujoco" else 1e-3)


@pytest.mark.slow
def test_episodes_are_those_of_one_agent_on_a_backend_of_brax():
    check_against_one_agent("brax", "halfcheetah", "2x3", atol=1e-3, backend="spring")


@pytest.mark.parametrize("body", [pytest.param("SwimmerSwimmer6", marks=pytest.mark.slow), "ReacherEasy"])
def test_all_agents_see_the_way_to_the_target(body):
    env = envs.make(f"multi_playground/{body}_{next(iter(SPLITS[body]))}")
    state, obs = jax.jit(env.reset)(KEY, env.spec.params)
    model, data = env.env.body.mj_model, state.env.task.data
    truth = mujoco.MjData(model)
    truth.qpos[:], truth.mocap_pos[:] = data.qpos, data.mocap_pos
    mujoco.mj_forward(model, truth)
    tip, frame = ("finger", np.eye(3)) if body == "ReacherEasy" else ("nose", truth.body("head").xmat.reshape(3, 3))
    way = (truth.geom("target").xpos - truth.geom(tip).xpos) @ frame
    n = env.spec.num_agents
    # In its reset Playground sets the target after it computed where all is: the first observation has the nominal one.
    state, timestep = jax.jit(env.step)(state, jnp.zeros(env.spec.action.shape), KEY)
    found = timestep.obs["agents"][:, n : n + 2]
    np.testing.assert_allclose(found, np.broadcast_to(way[:2], (n, 2)), atol=2e-2)
    assert SHARED[body] == tuple(np.flatnonzero(np.isin(timestep.obs["state"], found)))


def test_overrides_reach_the_split_and_the_body_and_a_wrong_one_gets_the_close_ones():
    arm = {"wrist": ["wrist"], "shoulder": ["shoulder"]}
    name = "multi_playground/ReacherEasy_2x1"

    def draw(key, model):
        return {"body_mass": model.body_mass}

    env = envs.make(name, split=arm, hops=0, shared=(), episode_length=7, randomize=draw)
    wrapper = env.env
    assert wrapper.agents == ("wrist", "shoulder") and env.spec.episode_length == 7
    assert wrapper.index.tolist() == [[1, 0, 3, 5], [0, 1, 2, 4]] and wrapper.source.tolist() == [1, 0]
    assert env.spec.name == name and "body_mass" in jax.eval_shape(env.reset, KEY, {})[0].env.overrides
    with pytest.raises(UserError, match="Did you mean hops"):
        envs.make(name, hopps=2)
    with pytest.raises(UserError, match="action_chunk = 2"):
        envs.make(name, action_chunk=2)


def test_a_body_without_a_split_takes_a_mapping():
    split = {"near": ["proximal"], "far": ["distal"]}
    env = envs.make("multi_playground/FingerSpin", split=split)
    assert env.spec.num_agents == 2 and env.spec.name == "multi_playground/FingerSpin"
    with pytest.raises(UserError, match="split = None .*multi_playground/CheetahRun_6x1"):
        envs.make("multi_playground/CheetahRun")
    with pytest.raises(UserError, match="split = None .*at least two agents"):
        envs.make("multi_brax/inverted_pendulum")
    with pytest.raises(UserError, match="does not exist"):
        envs.make("multi_brax/CheetahRun", split=split)
    with pytest.raises(UserError, match="multi_playground/ReacherEasy_2x1: hops = True"):
        envs.make("multi_playground/ReacherEasy_2x1", hops=True)


def test_the_adapter_is_found_within_its_wrappers():
    env = envs.make("playground/ReacherEasy").env  # within the time limit
    assert type(innermost(env)).__name__ == "Playground" and multi_agent.full_obs({"a": jnp.ones((2, 2))}).shape == (4,)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST_SPLITS)
def test_every_body_is_a_fixed_point(name):
    from tests.test_envs import assert_fixed_point

    assert_fixed_point(envs.make(name))
