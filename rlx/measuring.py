"""Speed, compile time and memory of one program: an environment alone, or whole training. `rlx.benchmark` compares.

On one device, whatever there are.

The environment alone takes random actions through the source that training uses, auto reset included. A run refreshes
its reset pool once an epoch, a fiftieth of the run (`rlx.schedule.make_schedule`): more steps than a slow engine takes
in many seconds. So every timed block is one refresh and, timed apart, as many iterations as last a second, and

    steps/s = S / (refresh + S * seconds / steps),    S the steps of an epoch of the real run,

which is what that epoch would give, whatever the engine's speed. Evaluations, checkpoints and logs are left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from rlx import settings
from rlx.algorithm import Algorithm, Plan
from rlx.collection import random_policy
from rlx.compilation import compile_program
from rlx.environment import Environment
from rlx.epoch import init_state, make_epoch
from rlx.learners import build_algorithm
from rlx.rollout import make_source
from rlx.schedule import TrainConfig, make_schedule, one_device

BLOCK_SECONDS = 1.0  # a timed block lasts at least this long


class Case(NamedTuple):
    """What is measured. Can be sent to another process."""

    physics: str  # "" where the environment has one engine
    program: str  # "environment" or "training"
    train: TrainConfig
    algo: Mapping[str, Any]  # fields of the algorithm's Config


class Target(NamedTuple):
    """How to build it, in this process or another: module-level functions, or partials of them."""

    build: Callable[[str], Environment]  # engine -> environment
    load_algorithm: Callable[[], Any]  # -> a module with Config and make
    imports: tuple[str, ...] = ()  # modules that `build` loads: their import is no part of building


def make_algorithm(target: Target, case: Case, env: Environment, plan: Plan) -> Algorithm:
    """The algorithm of `case` for `plan`. Raises UserError for settings that cannot work."""
    if case.program == "environment":
        return random_policy(env.spec)
    module = target.load_algorithm()
    return build_algorithm(module, settings.build(module.Config, case.algo), env, plan)


def rate_with_refresh(steps_per_refresh: int, refresh_s: float, steps: int, seconds: float) -> float:
    """Steps/s of epochs that hold `steps_per_refresh` steps, `steps` of which take `seconds`, and one refresh."""
    return steps_per_refresh / (refresh_s + steps_per_refresh * seconds / steps)


def iterations_per_block(seconds_of: Callable[[int], float]) -> int:
    """How many iterations last BLOCK_SECONDS; `seconds_of(n)` runs n of them."""
    seconds_of(1)  # warms up
    return max(1, math.ceil(BLOCK_SECONDS / seconds_of(1)))


class Running:
    """A compiled program and its state. Raises UserError for settings that cannot work."""

    def __init__(self, target: Target, case: Case, env: Environment):
        schedule = make_schedule(env, one_device(case.train))
        plan = schedule.plan._replace(num_iterations=2**30)  # it is never over
        source = make_source(env, plan, case.train.reset, case.train.reset_pool_size, case.train.stagger)
        algorithm = make_algorithm(target, case, env, plan)
        apart = source._replace(refresh=lambda state, key: state)

        def iterate(state: Any, count: Any) -> Any:
            return make_epoch(algorithm, apart, plan, count)(state)

        def refresh(state: Any, key: Any) -> Any:
            return state._replace(source=source.refresh(state.source, key))

        key = self._key = jax.random.key(case.train.seed)
        start = time.perf_counter()
        late = jnp.asarray(2**20, jnp.int32)  # behind whatever a learner begins with, such as gathering experience
        traced = [jax.jit(lambda key: init_state(algorithm, source, key)._replace(iteration=late)).trace(key)]
        state = traced[0].out_info
        traced.append(jax.jit(refresh, donate_argnums=0).trace(state, key))
        traced.append(jax.jit(iterate, donate_argnums=0).trace(state, jnp.zeros((), jnp.int32)))
        middle = time.perf_counter()
        init, self._refresh, self._iterate = (compile_program(program.lower()) for program in traced)
        self.times = {"tracing_s": middle - start, "compiling_s": time.perf_counter() - middle}
        self._state = init(key)
        self._steps = plan.steps_per_iteration
        self.steps_per_refresh = schedule.iterations_per_epoch * plan.steps_per_iteration
        self.iterations = 0  # of a block
        self.refreshes: list[float] = []  # seconds

    def _seconds(self, count: int) -> float:
        start = time.perf_counter()
        self._state, metrics = self._iterate(self._state, jnp.asarray(count, jnp.int32))
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - start

    def calibrate(self, iterations: int = 0) -> None:
        """Fixes the length of a block: `iterations`, or as many as last BLOCK_SECONDS."""
        self.iterations = iterations or iterations_per_block(self._seconds)

    def rate(self) -> float:
        """Runs a refresh and a block; steps/s."""
        start = time.perf_counter()
        self._state = jax.block_until_ready(self._refresh(self._state, self._key))
        self.refreshes.append(time.perf_counter() - start)
        seconds = self._seconds(self.iterations)
        return rate_with_refresh(self.steps_per_refresh, self.refreshes[-1], self.iterations * self._steps, seconds)


class RawRunning:
    """The simulator stepped from a plain loop: `roll(n)` takes n control steps of `num_envs` simulations."""

    def __init__(self, roll: Callable[[int], None], num_envs: int, unroll_length: int):
        self._roll, self._num_envs, self._unroll_length = roll, num_envs, unroll_length
        self.iterations = 0

    def _seconds(self, count: int) -> float:
        start = time.perf_counter()
        self._roll(count * self._unroll_length)
        return time.perf_counter() - start

    def calibrate(self, iterations: int = 0) -> None:
        self.iterations = iterations or iterations_per_block(self._seconds)

    def rate(self) -> float:
        return self.iterations * self._unroll_length * self._num_envs / self._seconds(self.iterations)


def alternate(running: Mapping[Any, Running | RawRunning], repeats: int) -> dict[Any, list[float]]:
    """Steps/s of each, `repeats` times after two warm-ups, taking turns."""
    measured: dict[Any, list[float]] = {name: [] for name in running}
    for repeat in range(repeats + 2):
        for name, program in running.items():
            rate = program.rate()
            if repeat >= 2:
                measured[name].append(rate)
    return measured


@contextlib.contextmanager
def compiled_into(folder: str) -> Iterator[None]:
    """Compiled programs are looked for, and kept, in `folder`: in an empty one compile times are true."""
    previous = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", previous)
        compilation_cache.reset_cache()


def peak_memory_mib() -> float:
    """The largest resident set of this process, since `forget_peak` where the system can forget it."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin at the parent's
        return int(dict(line.split(":", 1) for line in status.read_text().splitlines())["VmHWM"].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def forget_peak() -> None:
    """Gives freed memory back to the system and starts `peak_memory_mib` anew, on Linux."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def device_memory_mib() -> float | None:
    """The accelerator's peak in this process; None where the device keeps no count, as a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in stats else None


def measure_alone(target: Target, case: Case, cache: str) -> dict[str, float | None]:
    """Seconds of building, tracing and compiling, and peak memory. For a process in which nothing else happens.

    `cache`: a folder for compiled programs, in which this one is not.
    """
    for name in target.imports:
        importlib.import_module(name)
    with compiled_into(cache):
        start = time.perf_counter()
        env = target.build(case.physics)
        building = time.perf_counter() - start
        running = Running(target, case, env)
        peak = peak_memory_mib()
        forget_peak()
        running.calibrate(1)
        running.rate()
        running.rate()
    while_running = peak_memory_mib()
    memory = {"peak_memory_mib": max(peak, while_running), "running_memory_mib": while_running}
    return {"building_s": building, **running.times, **memory, "device_memory_mib": device_memory_mib()}
