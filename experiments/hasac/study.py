"""HASAC, MASAC, MADDPG, MAPPO and HAPPO on particle worlds: returns are sums over agents and 25 steps.

The worlds move by the velocity after a step (`semi_implicit`), as those did that the references are of: curves of
HASAC's paper (arXiv 2306.10715), converted, for its simple_spread counts each agent as colliding with itself, a
constant -37.5. mpe2 moves by the velocity before it. `low` is what random actions return.
"""

from rlx.study import Reference, Size, Study, Task, Variant

SOURCE = "read off a plot of HASAC's paper, converted to worlds in which no agent collides with itself"
AT_250K = {"simple_speaker_listener": -11.0, "simple_spread": -43.0}
AT_5M = {"simple_speaker_listener": -9.5, "simple_spread": -26.0, "simple_reference": -11.5}
RANDOM = {"simple_speaker_listener": -72.0, "simple_spread": -74.0, "simple_reference": -54.0}

STUDY = Study(
    name="hasac",
    title="Learners of several agents on particle worlds",
    about="Which learner of a team returns more, after as many steps and after as many minutes.",
    algorithms={
        "hasac": Variant("hasac"),
        "masac": Variant("hasac", {"algo.sequential": False}),
        "maddpg": Variant("maddpg"),
        "mappo": Variant("mappo"),
        "happo": Variant("mappo", {"algo.sequential": True}),
    },
    environments={f"particle/{world}": Task(low=RANDOM[world], high=AT_5M[world]) for world in RANDOM},
    references={
        ("hasac", f"particle/{world}"): Reference(value, None, "unknown", 250_000, SOURCE, trust="low")
        for world, value in AT_250K.items()
    },
    tuning_seeds=(0, 1, 2),
    settings={"env.semi_implicit": True, "num_evals": 10, "eval_episodes": 512},
    sizes={
        "small": Size(seeds=(30, 31, 32), settings={"total_steps": 250_000}),
        "full": Size(seeds=tuple(range(20, 30)), settings={"total_steps": 1_000_000}),
    },
)
