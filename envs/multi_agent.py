"""Bodies whose joints several agents share out: `multi_brax/<env>_<split>`, `multi_playground/<Task>_<split>`, and any
other body, or split, of the two suites by a mapping: `multi_playground/<Task>` with the override `split`.

After Multi-Agent MuJoCo (Peng et al. 2021, FACMAC, arXiv 2003.06709): N agents drive one body and are paid as one; the
reward stays (). The environment underneath, its physics, overrides and time limit are those of `envs.brax` and
`envs.playground`.

obs = {"agents": [N, d] float32, "state": [D]}. "state" is the whole observation of the environment underneath. Agent i
sees, in this order, zeros behind the end of shorter rows (`spec.obs_mask`):

1. which agent it is, one-hot [N];
2. entries of the state that the task shows to all, `shared`: the way to the target, say;
3. the joints of the root: those at the world that no actuator drives. Of a body that moves as a whole the horizontal
   position is left out (velocities stay);
4. its own joints, in the order of its actions;
5. the joints within `hops` hops, the nearer first, then in the model's order.

A joint is its entries of qpos, then those of qvel (units of MuJoCo: m, rad, m/s, rad/s; a quaternion for a ball). Two
joints are one hop apart if they hold the same rigid link: all hips of the ant, by its torso. All of it is read from the
MuJoCo model and the physics state, the same on every engine, not from the environment's own observation, which mixes
joints in some tasks (positions of limbs, centres of mass) and leaves them out in others.

Actions [N, a], -1 to 1, in the order in which the split names the joints; entries beyond an agent's own
(`spec.action_mask`) are ignored. Multi-Agent MuJoCo names joints too, yet hands agent i the i-th slice of the body's
action, which on the ant and the cheetah drives other joints than those that the agent sees as its own.

Overrides, beside those of the environment underneath: `hops` (1); `split`, where the name has none or in place of that:
a mapping {agent: (names of joints or actuators)} in which every actuator has one agent; `shared`, indices of the state.
Action chunks are not possible. In a shell the names with a | need quotes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from envs.adapter import limit_and_repeat
from envs.names import BRAX, PLAYGROUND
from envs.wrappers import DomainRandomization, FixedPoint, Wrapper
from rlx.environment import Environment
from rlx.errors import UserError, is_whole, require, unknown
from rlx.types import Box, PyTree


def apart(joints: str) -> str:
    """The split in which every joint is an agent."""
    return " | ".join(joints.replace("|", " ").split())


CHEETAH = "bthigh bshin bfoot | fthigh fshin ffoot"
ANT = "hip_1 ankle_1 | hip_2 ankle_2 | hip_3 ankle_3 | hip_4 ankle_4"
WALKER2D = "thigh_joint leg_joint foot_joint | thigh_left_joint leg_left_joint foot_left_joint"
WALKER = "right_hip right_knee right_ankle | left_hip left_knee left_ankle"
UPPER = "abdomen_y abdomen_z abdomen_x " + " ".join(
    f"{side}_{joint}" for side in ("right", "left") for joint in ("shoulder1", "shoulder2", "elbow")
)
LOWER = "right_hip_x right_hip_z right_hip_y right_knee left_hip_x left_hip_z left_hip_y left_knee"
ANKLES = "right_ankle_x right_ankle_y left_ankle_x left_ankle_y"

Splits = dict[str, str]  # name -> the joints of one agent | those of the next
OF_CHEETAH: Splits = {"2x3": CHEETAH, "3x2": "bshin bfoot | bthigh ffoot | fthigh fshin", "6x1": apart(CHEETAH)}
OF_WALKER: Splits = {
    "2x3": WALKER,
    "3x2": "right_knee right_ankle | right_hip left_ankle | left_hip left_knee",
    "6x1": apart(WALKER),
}
OF_HOPPER: Splits = {"2x2": "waist hip | knee ankle", "4x1": "waist | hip | knee | ankle"}
OF_HUMANOID: Splits = {"9|12": f"{UPPER} | {LOWER} {ANKLES}", "21x1": apart(f"{UPPER} {LOWER} {ANKLES}")}
OF_REACHER: Splits = {"2x1": "shoulder | wrist"}

SPLITS: dict[str, Splits] = {  # of the bodies of brax and of the tasks of Playground
    "ant": {
        "2x4": "hip_1 ankle_1 hip_2 ankle_2 | hip_3 ankle_3 hip_4 ankle_4",  # legs side by side
        "2x4d": "hip_1 ankle_1 hip_3 ankle_3 | hip_2 ankle_2 hip_4 ankle_4",  # diagonal
        "4x2": ANT,
        "8x1": apart(ANT),
    },
    "halfcheetah": OF_CHEETAH,
    "hopper": {"3x1": "thigh_joint | leg_joint | foot_joint"},
    "humanoid": {"9|8": f"{UPPER} | {LOWER}", "17x1": apart(f"{UPPER} {LOWER}")},
    "reacher": {"2x1": "joint0 | joint1"},
    "swimmer": {"2x1": "rot2 | rot3"},
    "walker2d": {
        "2x3": WALKER2D,
        "3x2": "leg_joint foot_joint | thigh_joint foot_left_joint | thigh_left_joint leg_left_joint",
        "6x1": apart(WALKER2D),
    },
    "CheetahRun": OF_CHEETAH,
    "HopperHop": OF_HOPPER,
    "HopperStand": OF_HOPPER,
    "HumanoidRun": OF_HUMANOID,
    "HumanoidStand": OF_HUMANOID,
    "HumanoidWalk": OF_HUMANOID,
    "ReacherEasy": OF_REACHER,
    "ReacherHard": OF_REACHER,
    "SwimmerSwimmer6": {"5x1": " | ".join(f"joint_{i}" for i in range(5))},
    "WalkerRun": OF_WALKER,
    "WalkerStand": OF_WALKER,
    "WalkerWalk": OF_WALKER,
}
# Targets that no joint moves: from the finger, and from the nose in the frame of the head.
SHARED: dict[str, tuple[int, ...]] = {"ReacherEasy": (2, 3), "ReacherHard": (2, 3), "SwimmerSwimmer6": (5, 6)}

# Integers: MuJoCo's enumerators do not equal the NumPy integers in its models.
FREE, BALL, SLIDE = map(int, (mujoco.mjtJoint.mjJNT_FREE, mujoco.mjtJoint.mjJNT_BALL, mujoco.mjtJoint.mjJNT_SLIDE))
ON_JOINTS = tuple(map(int, (mujoco.mjtTrn.mjTRN_JOINT, mujoco.mjtTrn.mjTRN_JOINTINPARENT)))


class Body(Protocol):
    """What the adapters of brax and Playground say of their simulation."""

    @property
    def mj_model(self) -> mujoco.MjModel: ...

    def joint_state(self, state: Any) -> tuple[jax.Array, jax.Array]:
        """qpos [nq] and qvel [nv] float32 in a state of the environment."""
        ...


class MultiAgent(Wrapper):
    """`env`, of one agent, whose state `body` reads, split among the agents of `split`; see the module.

    It goes inside of time limits and action repeats. Raises UserError for a split that does not give every
    actuator to one of at least two agents, where actuators drive something else than joints, for `hops` below 0 and for
    `shared` entries that the state has not.
    """

    def __init__(
        self,
        env: Environment,
        body: Body,
        split: Mapping[str, Sequence[str]],
        hops: int = 1,
        shared: Sequence[int] = (),
    ):
        require(is_whole(hops), "hops", hops, "a whole number of at least 0")
        model = body.mj_model
        actuators = actuators_of(model, split)
        self.env, self.body, self.agents = env, body, tuple(split)
        (full,) = jax.tree.leaves(jax.eval_shape(full_obs, env.spec.obs))
        in_range = [is_whole(i) and i < full.size for i in shared]
        require(all(in_range), "shared", tuple(shared), f"indices of the state, 0 to {full.size - 1}")
        rows = rows_of(model, actuators, hops, [2 + model.nq + model.nv + i for i in shared])
        self.index, obs_mask = padded(rows)
        slots, action_mask = padded(actuators)
        num_agents, size = slots.shape
        self.source = np.empty(model.nu, np.int32)  # where in the flat action each actuator finds its own
        self.source[slots[action_mask]] = np.flatnonzero(action_mask)
        agents: Any = jax.ShapeDtypeStruct(self.index.shape, jnp.float32)
        self.spec = dataclasses.replace(
            env.spec,
            obs={"agents": agents, "state": full},
            action=Box((num_agents, size)),
            num_agents=num_agents,
            obs_mask=obs_mask,
            action_mask=action_mask,
        )

    def obs(self, joint_state: tuple[jax.Array, jax.Array], obs: PyTree) -> dict[str, jax.Array]:
        """What the agents see of qpos, qvel and `obs`, the observation of the environment underneath."""
        # A reset that diverged may hold NaN, where the environment underneath shows zeros.
        finite = [jnp.where(jnp.abs(x) <= mujoco.mjMAXVAL, x, 0.0) for x in joint_state]
        state = full_obs(obs)
        entries = jnp.concatenate([jnp.array([0.0, 1.0], jnp.float32), *finite, state])
        return {"agents": entries[self.index], "state": state}

    def reset(self, key: jax.Array, params: PyTree):
        state, obs = self.env.reset(key, params)
        return state, self.obs(self.body.joint_state(state), obs)

    def step(self, state: Any, action: jax.Array, key: jax.Array):
        before, (state, timestep) = state, self.env.step(state, action.ravel()[self.source], key)
        joint_state = self.body.joint_state(state)
        if "diverged" in timestep.info:  # `timestep` has the observation before it
            diverged, last = timestep.info["diverged"] > 0, self.body.joint_state(before)
            joint_state = jax.tree.map(lambda x, y: jnp.where(diverged, x, y), last, joint_state)
        obs = self.obs(joint_state, timestep.obs)
        return state, timestep._replace(obs=obs, final_obs=obs)


def full_obs(obs: PyTree) -> jax.Array:
    """[D]: all leaves of an observation, one behind the other."""
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(obs)])


def padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """`rows` [N, longest] int32 with zeros behind the shorter ones, and [N, longest] bool: what is no such zero."""
    sizes = np.array([len(row) for row in rows])
    mask = np.arange(sizes.max())[None] < sizes[:, None]
    table = np.zeros(mask.shape, np.int32)
    table[mask] = np.concatenate(rows)
    return table, mask


def actuators_of(model: mujoco.MjModel, split: Mapping[str, Sequence[str]]) -> list[list[int]]:
    """The actuators of each agent, in the order of the names of its joints or actuators.

    Raises UserError, with close matches for unknown names, unless every actuator has one of at least two agents.
    """
    require(isinstance(split, Mapping) and len(split) > 1, "split", split, "{agent: (joints)} of at least two agents")
    known: dict[str, list[int]] = {}
    labels = []
    for i in range(model.nu):
        name = model.actuator(i).name
        if model.actuator_trntype[i] not in ON_JOINTS:
            raise UserError(f"split: actuator {name or i} drives no joint, and bodies are split by joints.")
        joint = model.joint(model.actuator_trnid[i, 0]).name
        known.setdefault(joint or name, []).append(i)
        labels.append(joint or name)
    for i in range(model.nu):  # a joint before an actuator of that name
        known.setdefault(model.actuator(i).name, [i])
    known.pop("", None)
    owners: dict[int, str] = {}
    for agent, names in split.items():
        field = f"split[{agent!r}]"
        several = isinstance(names, Sequence) and not isinstance(names, str) and len(names) > 0
        require(several, field, names, "a list of at least one joint")
        for name in names:
            if name not in known:
                raise unknown(f"{field}: joint", str(name), known)
            for i in known[name]:
                require(i not in owners, field, name, f"agent {owners.get(i)!r} has it already")
                owners[i] = agent
    missing = [label for i, label in enumerate(labels) if i not in owners]
    require(not missing, "split", dict(split), f"no agent has {', '.join(missing)}")
    return [[i for name in names for i in known[name]] for names in split.values()]


def rows_of(
    model: mujoco.MjModel, actuators: Sequence[Sequence[int]], hops: int, shared: Sequence[int]
) -> list[list[int]]:
    """What each agent sees: indices into (0, 1, qpos, qvel, state), of which `shared` are the entries for all."""
    root = root_joints(model)
    identity = np.eye(len(actuators), dtype=int).tolist()
    rows = []
    for one_hot, own in zip(identity, actuators, strict=True):
        joints = within(model, [int(model.actuator_trnid[i, 0]) for i in own], hops)
        entries = [i for j in [*root, *(j for j in joints if j not in root)] for i in entries_of(model, j)]
        rows.append([*one_hot, *shared, *entries])
    return rows


def ends_of(model: mujoco.MjModel) -> np.ndarray:
    """[njnt, 2]: the rigid links that each joint holds together, the inner one last; the world is 0."""
    outer = model.body_weldid[model.jnt_bodyid]
    return np.stack([outer, model.body_weldid[model.body_parentid[outer]]], axis=1)


def root_joints(model: mujoco.MjModel) -> list[int]:
    """The joints at the world that no actuator drives."""
    driven = set(model.actuator_trnid[:, 0])
    return [j for j, (_, inner) in enumerate(ends_of(model)) if inner == 0 and j not in driven]


def within(model: mujoco.MjModel, own: Sequence[int], hops: int) -> list[int]:
    """`own`, then the joints up to `hops` hops from them, the nearer first. No way leads by the world."""
    ends = ends_of(model)
    same = ends[:, None, :, None] == ends[None, :, None, :]
    meet = (same & (ends != 0)[:, None, :, None]).any(axis=(2, 3))
    seen = list(dict.fromkeys(own))
    for _ in range(hops):
        seen += [int(j) for j in np.flatnonzero(meet[seen].any(axis=0)) if j not in seen]
    return seen


def entries_of(model: mujoco.MjModel, joint: int) -> list[int]:
    """Indices of a joint into (0, 1, qpos, qvel), without the horizontal place of a body that moves as a whole."""
    kind = model.jnt_type[joint]
    positions, velocities = (7, 6) if kind == FREE else (4, 3) if kind == BALL else (1, 1)
    trees = model.body_treeid[model.jnt_bodyid]
    hidden = 0
    if joint in root_joints(model) and trees[joint] in trees[model.actuator_trnid[:, 0]]:
        data = mujoco.MjData(model)
        mujoco.mj_kinematics(model, data)
        level = kind == SLIDE and abs(data.xaxis[joint, 2]) < 1e-6
        hidden = 2 if kind == FREE else int(level)
    q, v = 2 + int(model.jnt_qposadr[joint]), 2 + model.nq + int(model.jnt_dofadr[joint])
    return [*range(q + hidden, q + positions), *range(v, v + velocities)]


def innermost(env: Any) -> Any:
    """The adapter within fixed types and randomisation, which pass states on as they are."""
    while isinstance(env, FixedPoint | DomainRandomization):
        env = env.env
    return env


def make(name: str, physics: str = "auto", **overrides: Any) -> Environment:
    """Builds `multi_brax/<name>` or `multi_playground/<name>`.

    Raises UserError for a split, an override or an engine that the body has not.
    """
    body, _, split_name = (name, "", "") if name in (*BRAX, *PLAYGROUND) else name.rpartition("_")
    suite = "brax" if body in BRAX else "playground"
    own: dict[str, Any] = {"split": None, "hops": 1, "shared": SHARED.get(body, ())}
    if suite == "brax":
        from envs.brax import build
    else:
        from envs.playground import build
    env, options = build(body, physics, overrides, own, f"multi_{suite}/{name}")
    chosen = own | options.rest
    split = chosen["split"]
    if split is None and not split_name:
        ready = [f"multi_{suite}/{body}_{ready}" for ready in SPLITS.get(body, ())]
        allowed = "{agent: (joints)} of at least two agents" + (f"; or {', '.join(ready)}" if ready else "")
        require(False, "split", split, allowed)
    if split is None:
        split = {f"agent_{i}": joints.split() for i, joints in enumerate(SPLITS[body][split_name].split("|"))}
    return limit_and_repeat(MultiAgent(env, innermost(env), split, chosen["hops"], chosen["shared"]), options)
