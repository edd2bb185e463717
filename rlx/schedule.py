"""The sizes of a run, over how many devices it is split, and when its driver visits the host."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax

from rlx import settings
from rlx.algorithm import Plan
from rlx.environment import Environment
from rlx.errors import check_seed, require
from rlx.sharding import same_on_any_device

MAX_STEPS_PER_EPOCH = 2**19  # seconds on a CPU: a signal is answered at an epoch's end


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    total_steps: int = 1_000_000  # budget of inner environment steps; rounded down to whole iterations, at least one
    num_envs: int = 256  # parallel environments
    unroll_length: int = 32  # decisions an environment takes in one iteration
    seed: int = 0  # decides everything that is random
    iterations_per_epoch: int = 0  # iterations in one compiled block; 0: a fiftieth of the run, at most 2^19 steps
    num_evals: int = 10  # evaluations after the one at the start, evenly spaced, the last at the end; 0: none
    eval_episodes: int = 64  # episodes an evaluation
    eval_decisions: int = 0  # cut of an episode without an ending; 0: the environment's time limit
    eval_mode: Literal["greedy", "sample"] = "greedy"  # of evaluations: deterministic, or draws from the policy
    reset: Literal["pool", "always"] = "pool"  # where new episodes start: a pool of drawn states, or anew
    reset_pool_size: int = 128  # states in that pool; a quarter is drawn anew once an epoch
    num_groups: int = 0  # of environments, each shuffled by itself, whole on a device; 0: a power of 2 up to 32
    num_devices: int = 0  # over which environments, or the runs of one program, are split; 0: as many as it can
    split: Literal["auto", "envs", "runs"] = "auto"  # what is split; auto: runs where they divide by the devices
    stagger: bool = True  # cut first episodes at random, so that environments do not start all later ones together
    num_checkpoints: int = 10  # saves, evenly spaced, the last at the end
    keep_checkpoints: int = 2  # whole ones kept beside the best policy


class Schedule(NamedTuple):
    """When the driver visits the host: a pure function of the iteration, so that a resumed run keeps it."""

    plan: Plan
    iterations_per_epoch: int
    num_run_devices: int = 1  # over which the runs of one program are split

    @property
    def num_devices(self) -> int:
        return self.plan.num_devices * self.num_run_devices

    @property
    def num_epochs(self) -> int:
        return -(-self.plan.num_iterations // self.iterations_per_epoch)

    def describe(self) -> dict[str, int]:
        """What decides the numbers of a run; the devices do not."""
        sizes = {name: size for name, size in self.plan._asdict().items() if name != "num_devices"}
        return {**sizes, "iterations_per_epoch": self.iterations_per_epoch}

    def after(self, iteration: int) -> int:
        """The iteration at the next epoch's end."""
        return min(iteration + self.iterations_per_epoch, self.plan.num_iterations)

    def due(self, iteration: int, times: int) -> bool:
        """Whether one of `times` evenly spaced events falls on the epoch that ends at `iteration`."""
        epoch = -(-iteration // self.iterations_per_epoch)
        return epoch * times // self.num_epochs > (epoch - 1) * times // self.num_epochs


def make_schedule(env: Environment, config: TrainConfig, num_runs: int = 1) -> Schedule:
    """Sizes of a run, or of `num_runs` in one program, from its settings. Raises UserError for one that cannot be."""
    settings.check_types(config)
    at_least_1 = ("total_steps", "num_envs", "unroll_length", "eval_episodes", "reset_pool_size")
    for name in (*at_least_1, "num_checkpoints", "keep_checkpoints"):
        require(getattr(config, name) >= 1, name, getattr(config, name), "at least 1")
    for name in ("iterations_per_epoch", "num_evals", "eval_decisions"):
        require(getattr(config, name) >= 0, name, getattr(config, name), "at least 0")
    if config.num_evals and not env.spec.episode_length:
        allowed = "at least 1, for the environment has no time limit"
        require(config.eval_decisions > 0, "eval_decisions", config.eval_decisions, allowed)
    check_seed(config.seed)
    require(config.reset in ("pool", "always"), "reset", config.reset, "pool or always")
    require(config.eval_mode in ("greedy", "sample"), "eval_mode", config.eval_mode, "greedy or sample")
    num_groups = config.num_groups or math.gcd(config.num_envs, 32)
    allowed = f"at least 0, and a divisor of num_envs = {config.num_envs}"
    require(num_groups >= 1 and config.num_envs % num_groups == 0, "num_groups", num_groups, allowed)
    env_devices, run_devices = split_devices(config, num_groups, num_runs)
    plan = Plan(config.num_envs, config.unroll_length, 0, env.spec.action_repeat, num_groups, env_devices)
    num_iterations = max(1, config.total_steps // plan.steps_per_iteration)
    largest = max(1, MAX_STEPS_PER_EPOCH // plan.steps_per_iteration)
    per_epoch = config.iterations_per_epoch or min(max(1, num_iterations // 50), largest)
    return Schedule(plan._replace(num_iterations=num_iterations), min(per_epoch, num_iterations), run_devices)


def split_devices(config: TrainConfig, num_groups: int, num_runs: int) -> tuple[int, int]:
    """Over how many devices environments are split, and runs: with `num_devices` = 0 over as many as divide them.

    `split` = "auto": runs where they divide by the devices, else environments. CPU devices share their cores; there
    runs alone are split, over as many devices as divide them (`rlx.cli.programs.spread_over_cpu` says why).
    Environments are on request: on two cores it made nothing faster. Several processes split the environments of one
    run over all their devices; nothing else, but for what each does by itself on one device (`one_device`).

    Raises UserError for a number that does not divide them.
    """
    found = len(jax.devices())
    wanted = config.num_devices
    processes = jax.process_count()
    if processes > 1 and not (wanted == 1 and config.split == "envs" and num_runs == 1):
        allowed = f"0 or {found}: several processes use all their devices"
        require(wanted in (0, found), "num_devices", wanted, allowed)
        require(num_runs == 1, "runs in one program", num_runs, f"1 in each run of {processes} processes")
        require(config.split in ("auto", "envs"), "split", config.split, f"auto or envs with {processes} processes")
        allowed = f"a multiple of the {found} devices of {processes} processes, and a divisor of num_envs"
        require(num_groups % found == 0, "num_groups", num_groups, allowed)
        return found, 1
    more = "" if jax.devices()[0].platform != "cpu" else "; JAX_NUM_CPU_DEVICES=N makes N of a CPU"
    require(0 <= wanted <= found, "num_devices", wanted, f"from 1 to {found}, or 0 for as many as can be used{more}")
    require(config.split in ("auto", "envs", "runs"), "split", config.split, "auto, envs or runs")
    devices = wanted or found
    if config.split == "auto" and jax.devices()[0].platform == "cpu" and not wanted:
        return 1, largest_divisor(num_runs, found) if same_on_any_device() else 1
    if config.split == "runs" or (config.split == "auto" and num_runs > 1 and num_runs % devices == 0):
        if not wanted:
            return 1, largest_divisor(num_runs, found)
        require(num_runs % wanted == 0, "num_devices", wanted, f"a divisor of the {num_runs} runs to split")
        return 1, wanted
    if not wanted:
        return largest_divisor(num_groups, found), 1
    allowed = f"a divisor of num_groups = {num_groups}, the groups of environments to split"
    require(num_groups % wanted == 0, "num_devices", wanted, allowed)
    return wanted, 1


def largest_divisor(number: int, at_most: int) -> int:
    return max(divisor for divisor in range(1, at_most + 1) if number % divisor == 0)


def one_device(config: TrainConfig) -> TrainConfig:
    """The same run where nothing is to be split: its sizes for an evaluation or a benchmark."""
    return dataclasses.replace(config, num_devices=1, split="envs")
