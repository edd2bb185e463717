"""Every environment's name, so that a typing error is found without importing a suite. Tested against the packages."""

AVOID = ("obstacles",)

BRAX = (
    "ant",
    "fast",
    "halfcheetah",
    "hopper",
    "humanoid",
    "humanoidstandup",
    "inverted_double_pendulum",
    "inverted_pendulum",
    "pusher",
    "reacher",
    "swimmer",
    "walker2d",
)

GRIDWORLD = (
    "c_shape",
    "three_goals",
    "two_goals",
    "two_goals_deadly",
    "two_slits",
)

GYMNAX = (
    "Acrobot-v1",
    "CartPole-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "Pendulum-v1",
)

DM_CONTROL = (
    "AcrobotSwingup",
    "AcrobotSwingupSparse",
    "BallInCup",
    "CartpoleBalance",
    "CartpoleBalanceSparse",
    "CartpoleSwingup",
    "CartpoleSwingupSparse",
    "CheetahRun",
    "FingerSpin",
    "FingerTurnEasy",
    "FingerTurnHard",
    "FishSwim",
    "HopperHop",
    "HopperStand",
    "HumanoidRun",
    "HumanoidStand",
    "HumanoidWalk",
    "PendulumSwingup",
    "PointMass",
    "ReacherEasy",
    "ReacherHard",
    "SwimmerSwimmer6",
    "WalkerRun",
    "WalkerStand",
    "WalkerWalk",
)

LOCOMOTION = (
    "ApolloJoystickFlatTerrain",
    "BarkourJoystick",
    "BerkeleyHumanoidJoystickFlatTerrain",
    "BerkeleyHumanoidJoystickRoughTerrain",
    "G1JoystickFlatTerrain",
    "G1JoystickRoughTerrain",
    "Go1Footstand",
    "Go1Getup",
    "Go1Handstand",
    "Go1JoystickFlatTerrain",
    "Go1JoystickRoughTerrain",
    "H1InplaceGaitTracking",
    "H1JoystickGaitTracking",
    "Op3Joystick",
    "SpotFlatTerrainJoystick",
    "SpotGetup",
    "SpotJoystickGaitTracking",
    "T1JoystickFlatTerrain",
    "T1JoystickRoughTerrain",
)

MANIPULATION = (
    "AeroCubeRotateZAxis",
    "AlohaHandOver",
    "AlohaSinglePegInsertion",
    "LeapCubeReorient",
    "LeapCubeRotateZAxis",
    "PandaOpenCabinet",
    "PandaPickCube",
    "PandaPickCubeCartesian",
    "PandaPickCubeOrientation",
    "PandaRobotiqPushCube",
)

MATRIX = (
    "climbing",
    "diagonal",
    "penalty",
)

MULTI_BRAX = (
    "ant_2x4",
    "ant_2x4d",
    "ant_4x2",
    "ant_8x1",
    "halfcheetah_2x3",
    "halfcheetah_3x2",
    "halfcheetah_6x1",
    "hopper_3x1",
    "humanoid_17x1",
    "humanoid_9|8",
    "reacher_2x1",
    "swimmer_2x1",
    "walker2d_2x3",
    "walker2d_3x2",
    "walker2d_6x1",
)

MULTI_PLAYGROUND = (
    "CheetahRun_2x3",
    "CheetahRun_3x2",
    "CheetahRun_6x1",
    "HopperHop_2x2",
    "HopperHop_4x1",
    "HopperStand_2x2",
    "HopperStand_4x1",
    "HumanoidRun_21x1",
    "HumanoidRun_9|12",
    "HumanoidStand_21x1",
    "HumanoidStand_9|12",
    "HumanoidWalk_21x1",
    "HumanoidWalk_9|12",
    "ReacherEasy_2x1",
    "ReacherHard_2x1",
    "SwimmerSwimmer6_5x1",
    "WalkerRun_2x3",
    "WalkerRun_3x2",
    "WalkerRun_6x1",
    "WalkerStand_2x3",
    "WalkerStand_3x2",
    "WalkerStand_6x1",
    "WalkerWalk_2x3",
    "WalkerWalk_3x2",
    "WalkerWalk_6x1",
)

PARTICLE = (
    "simple",
    "simple_adversary",
    "simple_crypto",
    "simple_push",
    "simple_reference",
    "simple_speaker_listener",
    "simple_spread",
    "simple_tag",
    "simple_world_comm",
)

PROBE = (
    "action_reward",
    "action_reward_continuous",
    "constant_reward",
    "delayed_reward",
    "final_code",
    "fork",
    "lqr",
    "memory",
    "nan",
    "obs_action_reward",
    "obs_action_reward_continuous",
    "obs_reward",
    "terminate_only",
    "truncate_only",
    "two_modes",
)

PLAYGROUND = (*DM_CONTROL, *LOCOMOTION, *MANIPULATION)

NAMES = {
    "avoid": AVOID,
    "brax": BRAX,
    "gridworld": GRIDWORLD,
    "gymnax": GYMNAX,
    "matrix": MATRIX,
    "multi_brax": MULTI_BRAX,
    "multi_playground": MULTI_PLAYGROUND,
    "particle": PARTICLE,
    "playground": PLAYGROUND,
    "probe": PROBE,
}
