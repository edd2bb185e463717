"""PPO on small tasks whose best return is known, or nearly: what breaks learning shows here within minutes.

References are optima, not other people's runs; of Pendulum none is known in closed form.
"""

from rlx.study import Reference, Size, Study, Task, Variant


def optimum(value: float, source: str) -> Reference:
    return Reference(value, None, runs="none: an optimum", steps=None, source=source, trust="high")


STUDY = Study(
    name="ppo_basics",
    title="PPO on small tasks",
    about="Whether the PPO of rlx, with the settings that it ships, reaches the best return of tasks that every "
    "learner should solve: within 5 % of it, where the table gives one.",
    algorithms={"ppo": Variant("ppo")},
    environments={
        "gymnax/CartPole-v1": Task(low=0.0, high=500.0),
        "gymnax/Pendulum-v1": Task(low=-1600.0, high=0.0),
        "brax/inverted_pendulum": Task(low=0.0, high=1000.0),
        "probe/lqr": Task(low=-45.0, high=0.0),  # 5 % of the optimum are 1 % of this
    },
    references={
        ("ppo", "gymnax/CartPole-v1"): optimum(500.0, "every step pays 1, an episode has 500"),
        ("ppo", "brax/inverted_pendulum"): optimum(1000.0, "every step pays 1, an episode has 1000"),
        ("ppo", "probe/lqr"): optimum(-9.44, "the Riccati equation (`envs.probes`)"),
    },
    tuning_seeds=(0, 1, 2),  # earlier tables
    sizes={
        "small": Size(seeds=(30, 31, 32), settings={"num_evals": 10}),
        "full": Size(seeds=tuple(range(20, 30)), settings={"num_evals": 10}),
    },
)
