"""DPPO on CheetahRun from a medium policy's data: cloning, then fine-tuning, beside a Gaussian from the same data.

As in the paper (arXiv 2409.00588): 20 denoising steps, the last 10 of which are fine-tuned, chunks of 4 actions,
5 epochs. README.md has the commands that make the data.
"""

from typing import Any

from rlx.study import Size, Study, Task, Variant

ENV = "playground/CheetahRun"
DATA = {ENV: ("../../runs/dppo-medium.npz",)}
CLONE: dict[str, Any] = {
    "total_steps": 24_000_000,
    "num_envs": 1024,
    "unroll_length": 1,
    "algo.num_minibatches": 1,
    "algo.anneal_lr": True,
    "algo.weight_decay": 1e-6,
    "algo.ema_decay": 0.995,
    "algo.activation": "mish",
}
FINETUNE: dict[str, Any] = {
    "total_steps": 3_000_000,
    "num_envs": 128,
    "unroll_length": 32,
    "algo.freeze_statistics": True,
    "algo.num_epochs": 5,
    "algo.num_minibatches": 8,
    "algo.activation": "mish",
    "algo.critic_hidden": [128, 128],
    "algo.normalize_reward": True,
    "algo.learning_rate": 1e-3,  # at the paper's 1e-4 three million steps change little
    "algo.anneal_lr": True,
}
DIFFUSION = {"algo.num_denoising_steps": 20, "algo.actor_hidden": [128, 128, 128], "algo.residual": True}
GAUSSIAN = {"algo.actor_hidden": [128, 128, 128], "algo.min_std": 0.05}

STUDY = Study(
    name="dppo_locomotion",
    title="Fine-tuning on CheetahRun from a medium policy's data",
    about="By how much fine-tuning improves on cloning, with a diffusion policy and with a Gaussian of the same data.",
    algorithms={
        "clone": Variant("bc", {**CLONE, **DIFFUSION, "algo.distribution": "diffusion"}, DATA),
        "dppo": Variant(
            "dppo",
            {**FINETUNE, **DIFFUSION, "algo.finetuned_steps": 10, "algo.clip_eps": 0.03, "algo.clip_base": 0.03},
            start="clone",
        ),
        "gaussian_clone": Variant("bc", {**CLONE, **GAUSSIAN, "algo.init_std": 0.2}, DATA),
        "gaussian": Variant(
            "ppo",
            {**FINETUNE, **GAUSSIAN, "algo.clip_eps": 0.2, "algo.learning_rate": 3e-4, "algo.critic_lr_scale": 3.0},
            start="gaussian_clone",
        ),
    },
    environments={ENV: Task(low=0.0, high=1000.0, settings={"env.action_chunk": 4})},
    settings={"num_evals": 10, "eval_mode": "sample"},
    tuning_seeds=(0, 1, 2, 10, 11),
    sizes={"small": Size(seeds=(30, 31, 32)), "full": Size(seeds=tuple(range(20, 30)))},
)
