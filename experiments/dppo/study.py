"""DPPO on the avoiding task of its paper (arXiv 2409.00588, section 6): cloning both modes, fine-tuning towards one.

Demonstrations go around the first obstacle on either side; the reward is paid for one side alone. The table over K',
the denoising steps that are fine-tuned, beside a Gaussian cloned and fine-tuned from the same data. 20 denoising steps,
chunks of 4 actions, 50 environments, 25 decisions, 51 iterations, as in the paper; networks are smaller (128 x 3).
"""

from typing import Any

from rlx.study import Size, Study, Task, Variant

ENV = "avoid/obstacles"
DATA = {ENV: ("avoid.npz",)}
CLONE: dict[str, Any] = {
    "total_steps": 16_000_000,
    "num_envs": 512,
    "unroll_length": 1,
    "algo.num_minibatches": 1,
    "algo.anneal_lr": True,
    "algo.weight_decay": 1e-6,
    "algo.ema_decay": 0.995,
    "algo.statistics": "range",
    "algo.activation": "mish",
}
FINETUNE: dict[str, Any] = {
    "total_steps": 255_000,
    "num_envs": 50,
    "unroll_length": 25,
    "algo.gae_lambda": 0.95,
    "algo.freeze_statistics": True,
    "algo.num_epochs": 10,
    "algo.num_minibatches": 2,
    "algo.activation": "mish",
    "algo.critic_hidden": [128, 128, 128],
    "algo.normalize_reward": True,
    "algo.learning_rate": 1e-4,
    "algo.anneal_lr": True,  # at a constant rate a solved task was at times lost again
    "algo.critic_lr_scale": 10.0,
}
DIFFUSION = {"algo.num_denoising_steps": 20, "algo.actor_hidden": [128, 128, 128], "algo.residual": True}
DPPO = {
    **FINETUNE,
    **DIFFUSION,
    "algo.gamma_denoising": 0.95,
}
GAUSSIAN = {"algo.actor_hidden": [128, 128, 128], "algo.min_std": 0.05}
STEPS = (1, 3, 5, 10, 20)  # K'

STUDY = Study(
    name="dppo",
    title="DPPO on avoiding: fine-tuning K' of 20 denoising steps",
    about="Whether fine-tuning the last K' denoising steps of a cloned two-mode policy makes it take the mode that is "
    "paid: the share of episodes that cross the left half of the line, of draws from the policy.",
    algorithms={
        "clone": Variant("bc", {**CLONE, **DIFFUSION, "algo.distribution": "diffusion"}, DATA),
        **{f"dppo_{k}": Variant("dppo", {**DPPO, "algo.finetuned_steps": k}, start="clone") for k in STEPS},
        "gaussian_clone": Variant("bc", {**CLONE, **GAUSSIAN, "algo.init_std": 0.2}, DATA),
        "gaussian": Variant("ppo", {**FINETUNE, **GAUSSIAN}, start="gaussian_clone"),
    },
    environments={ENV: Task(low=0.0, high=1.0, settings={"env.action_chunk": 4})},
    settings={"num_evals": 10, "eval_episodes": 500, "eval_mode": "sample"},
    tuning_seeds=(0, 1, 2, 10, 11),
    sizes={
        "small": Size(seeds=(30, 31, 32)),
        "full": Size(seeds=tuple(range(20, 30))),
    },
)
