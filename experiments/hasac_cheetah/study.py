"""HASAC, MASAC, MAPPO and HAPPO on the cheetah of MuJoCo Playground, a joint an agent, beside SAC on the whole of it.

Networks, rates and batches are those of SAC and PPO on this task (`rlx/presets/multi_playground.toml`), of which these
learners are extensions. The off-policy ones take 500,000 steps, the others 4M, which cost them fewer minutes.
"""

from rlx.study import Size, Study, Task, Variant

CHEETAH = "multi_playground/CheetahRun_6x1"
BRAX_CHEETAH = "multi_brax/halfcheetah_2x3"
OFF_POLICY = {"total_steps": 500_000, "algo.replay_size": 500_000}
HASAC = OFF_POLICY | {"algo.utd_ratio": [1, 8]}

STUDY = Study(
    name="hasac_cheetah",
    title="A cheetah of six agents",
    about="How near to one agent for the whole body learners come whose agents drive a joint each.",
    algorithms={
        "hasac": Variant("hasac", HASAC),
        "masac": Variant("hasac", HASAC | {"algo.sequential": False}),
        "mappo": Variant("mappo", {"total_steps": 4_000_000}),
        "happo": Variant("mappo", {"total_steps": 4_000_000, "algo.sequential": True}),
        "sac": Variant("sac", OFF_POLICY, instead={CHEETAH: "playground/CheetahRun", BRAX_CHEETAH: "brax/halfcheetah"}),
    },
    environments={CHEETAH: Task(low=0.0, high=1000.0), BRAX_CHEETAH: Task(low=0.0, high=8000.0)},
    tuning_seeds=(0, 1, 2, 10, 11),
    settings={"num_evals": 10, "eval_episodes": 32},
    sizes={
        "small": Size(seeds=(30, 31, 32), environments={CHEETAH: {}}),
        "full": Size(seeds=tuple(range(20, 30))),
    },
)
