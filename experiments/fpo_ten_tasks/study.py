"""PPO, FPO, FPO++ and DPPO from scratch on the ten dm_control tasks of the FPO paper (arXiv 2507.21053, section 4.2).

The same normaliser, advantages, sizes of networks and budgets for all; each learner's own settings are those that ship,
its activation (PPO tanh, FPO and FPO++ swish, DPPO mish) and largest gradient (0.5, 0.5, 1, 1) among them. The paper
gives means over the ten tasks alone; of one task its authors' notebook (seed 42) gives a curve, in README.md.
`references` are brax's PPO, of whose settings both the paper and Playground speak.
"""

from rlx.study import Reference, Size, Study, Task, Variant

SOURCE = (
    "brax's PPO, last evaluation of other groups' public runs; steps are those of Playground's settings, taken to be "
    "theirs, and whether actions were deterministic is not known"
)
# mean, sd over runs (experiments/ppo_dm_control)
BRAX_PPO = {
    "BallInCup": (565, 462),
    "CartpoleBalance": (1000, None),
    "CheetahRun": (825, 70),
    "FingerSpin": (570, 96),
    "FingerTurnEasy": (970, None),
    "FingerTurnHard": (953, 11),
    "FishSwim": (632, 24),
    "PointMass": (897, None),
    "ReacherEasy": (982, None),
    "ReacherHard": (978, None),
}
SMALL = ("CheetahRun", "CartpoleBalance")
# The last four tuned on CheetahRun (seed 10, 3M steps), as the presets of the others were: 582; clip_eps 0.2 436. At a
# rate of 3e-3, best at 800,000 steps, losses of all actions pass the clamp soon after, and nothing is learnt any more.
PLUS = {
    "algo.ratio": "per_sample",
    "algo.flow_loss": "velocity",
    "algo.sum_loss": True,
    "algo.asymmetric": True,
    "algo.ema_decay": 0.95,
    "algo.loss_clamp": 20.0,
    "algo.difference_clamp": 10.0,
    "algo.straight_through": True,
    "algo.advantage_clamp": 100.0,
    "algo.max_grad_norm": 1.0,
    "algo.weight_decay": 1e-4,
    "algo.num_samples": 8,
    "algo.learning_rate": 1e-3,
    "algo.clip_eps": 0.5,
    "algo.output_scale": 1.0,
}


def reference(value: float, sd: float | None) -> Reference:
    return Reference(value, sd, runs="up to five", steps=60_000_000, source=SOURCE, trust="medium")


STUDY = Study(
    name="fpo_ten_tasks",
    title="PPO, FPO, FPO++ and DPPO from scratch on ten dm_control tasks",
    about="Which learner returns more, against steps and against minutes, when all have the same correct normaliser, "
    "advantages and sizes of networks. The paper's Gaussian baseline is disputed.",
    algorithms={
        "ppo": Variant("ppo"),
        "fpo": Variant("fpo"),
        "fpo_plus": Variant("fpo", PLUS),
        # Drawn, as its paper evaluates: actions that begin at zero noise return half as much (CheetahRun, seed 10).
        "dppo": Variant("dppo", {"eval_mode": "sample"}),
    },
    environments={f"playground/{task}": Task(low=0.0, high=1000.0) for task in BRAX_PPO},
    references={("ppo", f"playground/{task}"): reference(*figures) for task, figures in BRAX_PPO.items()},
    tuning_seeds=(0, 1, 2, 10, 11),
    settings={"num_evals": 20},
    sizes={
        "small": Size(
            seeds=(30, 31, 32),
            settings={"total_steps": 3_000_000},
            environments={f"playground/{task}": {} for task in SMALL},
        ),
        "full": Size(seeds=tuple(range(20, 25)), settings={"total_steps": 60_000_000}),
    },
)
