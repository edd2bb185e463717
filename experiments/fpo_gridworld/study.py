"""FPO beside a Gaussian PPO on the gridworld of the FPO paper (arXiv 2507.21053, section 4.1).

Both with the settings that ship (`rlx/presets/gridworld.toml`): the paper's 2,048 steps an iteration, 50 pairs an
action, a Gaussian of fixed covariance 0.5 I; minibatches, normalisation and clipped gradients are ours. Every goal pays
20 and ends the episode: 20 is the best return.
"""

from rlx.study import Size, Study, Task, Variant

STUDY = Study(
    name="fpo_gridworld",
    title="FPO and a Gaussian PPO on gridworlds with more than one goal",
    about="Whether both reach a goal. What sets them apart, which goals, is in the pictures of `figure.py`.",
    algorithms={"ppo": Variant("ppo"), "fpo": Variant("fpo")},
    environments={f"gridworld/{name}": Task(low=0.0, high=20.0) for name in ("two_goals", "three_goals", "two_slits")},
    settings={"num_evals": 10, "eval_episodes": 200},
    sizes={
        "small": Size(seeds=(30, 31, 32), environments={"gridworld/two_goals": {}}),
        "full": Size(seeds=tuple(range(20, 30))),
    },
)
