"""PPO on the 25 dm_control tasks of MuJoCo Playground, beside brax's PPO.

The figures of brax are the mean and standard deviation, over up to five runs, of the last evaluation (episodes of 1000
steps) in public runs of other groups; they agree roughly with those of the Playground report (arXiv 2502.08844).
Budgets are those of Playground's own configuration of brax's PPO. An sd that those runs do not give is None.

Trust: high on tasks that several groups solve alike (the balancing Cartpoles, Reacher, Walker, Cheetah, FingerTurn,
PointMass); low on Humanoid, where public runs of one code base disagree by a factor of ten.
"""

from rlx.study import Reference, Size, Study, Task, Variant

SOURCE = (
    "brax's PPO, last evaluation of other groups' public runs; steps are those of Playground's settings, taken to be "
    "theirs, and whether actions were deterministic is not known"
)
AGREED = ("CartpoleBalance", "CheetahRun", "FingerTurn", "PointMass", "Reacher", "Walker")
LONG = ("AcrobotSwingup", "AcrobotSwingupSparse", "SwimmerSwimmer6", "WalkerRun")  # 100M steps, the others 60M

# mean, sd over runs
BRAX_PPO = {
    "AcrobotSwingup": (222, 25),
    "AcrobotSwingupSparse": (12, 16),
    "BallInCup": (565, 462),
    "CartpoleBalance": (1000, None),
    "CartpoleBalanceSparse": (999, None),
    "CartpoleSwingup": (693, 261),
    "CartpoleSwingupSparse": (158, 289),
    "CheetahRun": (825, 70),
    "FingerSpin": (570, 96),
    "FingerTurnEasy": (970, None),
    "FingerTurnHard": (953, 11),
    "FishSwim": (632, 24),
    "HopperHop": (2, None),
    "HopperStand": (205, 225),
    "HumanoidRun": (143, 35),
    "HumanoidStand": (782, 80),
    "HumanoidWalk": (459, 252),
    "PendulumSwingup": (63, 40),
    "PointMass": (897, None),
    "ReacherEasy": (982, None),
    "ReacherHard": (978, None),
    "SwimmerSwimmer6": (579, 32),
    "WalkerRun": (634, 117),
    "WalkerStand": (983, None),
    "WalkerWalk": (969, None),
}

# Millions of steps a seed, by what two cores do with native physics in about two hours: 40,000 to 50,000 training steps
# a second where physics is cheap, 20,000 to 25,000 on Finger and Hopper, 10,000 on BallInCup and Walker.
SMALL = {
    "AcrobotSwingupSparse": 1.5,
    "BallInCup": 4,
    "CartpoleBalance": 6,
    "CartpoleBalanceSparse": 6,
    "CartpoleSwingup": 4,
    "CartpoleSwingupSparse": 2,
    "CheetahRun": 4,
    "FingerSpin": 8,
    "HopperHop": 3,
    "HopperStand": 3,
    "PendulumSwingup": 6,
    "PointMass": 5,
    "ReacherEasy": 7,
    "ReacherHard": 7,
    "WalkerStand": 2.5,
}


def budget(task: str) -> int:
    return 100_000_000 if task in LONG else 60_000_000


def reference(task: str, value: float, sd: float | None) -> Reference:
    trust = "low" if task.startswith("Humanoid") else "high" if task.startswith(AGREED) else "medium"
    return Reference(value, sd, runs="up to five", steps=budget(task), source=SOURCE, trust=trust)


STUDY = Study(
    name="ppo_dm_control",
    title="PPO on the dm_control tasks of MuJoCo Playground",
    about="How the PPO of rlx, with the settings that it ships, stands to brax's PPO on the same tasks. Settings were "
    "tuned on CheetahRun alone, on seeds that are not reported; the discounts of BallInCup and FingerSpin are those "
    "that Playground publishes. The reference took 60M steps a task (100M on Acrobot, Swimmer and WalkerRun).",
    algorithms={"ppo": Variant("ppo")},
    environments={f"playground/{task}": Task(low=0.0, high=1000.0) for task in BRAX_PPO},
    references={("ppo", f"playground/{task}"): reference(task, *figures) for task, figures in BRAX_PPO.items()},
    tuning_seeds=(0, 1, 2, 10, 11),  # 0 to 2: earlier tables, and the discount of FingerSpin
    sizes={
        "small": Size(
            seeds=(30, 31, 32),
            settings={"num_evals": 10, "eval_episodes": 64},
            environments={f"playground/{task}": {"total_steps": int(m * 1e6)} for task, m in SMALL.items()},
        ),
        "full": Size(
            seeds=tuple(range(20, 30)),
            settings={"num_evals": 20, "eval_episodes": 128},
            environments={f"playground/{task}": {"total_steps": budget(task)} for task in BRAX_PPO},
        ),
    },
)
