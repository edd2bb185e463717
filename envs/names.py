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
    "particle": PARTICLE,
    "playground": PLAYGROUND,
    "probe": PROBE,
}
