"""HASAC under a falling and under a small temperature, and MADDPG, on the penalty game of HASAC's paper.

Two actions of three pay 10 if both agents choose the same of them and k < 0 if they choose both; the third pays 2
against itself. A return is 10, 2, 0 or k: with `low` = 2 and `high` = 10 the mean score is the share of seeds at 10,
where all others are at 2. The dearer missing each other is, the safer the 2 looks to an agent that learns beside
another one: soft best responses under a small temperature go there from a uniform start, under one that falls from 50
to 0.01 to 10 (computed; `rlx/presets/matrix.toml`).
"""

from rlx.study import Size, Study, Task, Variant

PENALTIES = (-25.0, -50.0, -75.0, -100.0)

STUDY = Study(
    name="hasac_penalty",
    title="Temperature and equilibria: the penalty game",
    about="How often each learner ends at one of the two equilibria that pay 10, not at the one that pays 2.",
    algorithms={
        "hasac": Variant("hasac"),
        "hasac_cold": Variant("hasac", {"algo.anneal_alpha": False, "algo.init_alpha": 0.2}),
        "maddpg": Variant("maddpg"),
    },
    environments={
        f"penalty of {k:g}": Task(low=2.0, high=10.0, settings={"env.k": k}, env="matrix/penalty") for k in PENALTIES
    },
    tuning_seeds=tuple(range(8)),
    settings={"num_evals": 10, "eval_episodes": 16},
    sizes={"small": Size(seeds=tuple(range(20, 40))), "full": Size(seeds=tuple(range(20, 120)))},
)
