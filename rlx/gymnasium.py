"""Policies on Gymnasium's tasks: whole episodes in its simulators, one batched `act` a decision. Evaluation alone.

What rlx trains on beside it (Gymnasium 1.3, brax 0.14.2, gymnax 1.0.1): gymnax's CartPole-v1 and Pendulum-v1 are the
same, step for step. brax's inverted_pendulum, halfcheetah, hopper, walker2d and pusher have the observations and the
actions of the v5 tasks, ant those of Ant-v5 made without its contact forces. halfcheetah's model is Gymnasium's but for
fewer contacts and solver iterations: of 200 random steps from the same states 97 % agree to 1e-5. pusher has another
object, and the rest integrate by Euler's method, Gymnasium's by RK4: every step differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from rlx.algorithm import Algorithm, Mode, Policy
from rlx.errors import UserError, check_seed, require, unknown
from rlx.evaluation import EvalResult
from rlx.types import Discrete, PyTree, Spec

if TYPE_CHECKING:
    import gymnasium

Task = str | Callable[[], "gymnasium.Env"]


def evaluate_gymnasium(
    task: Task,
    spec: Spec,
    algorithm: Algorithm,
    policy: Policy,
    num_episodes: int = 16,
    mode: Mode = "greedy",
    seed: int = 0,
    max_decisions: int = 0,
) -> EvalResult:
    """Plays a policy on a task of Gymnasium: N episodes on N instances, each counted once from reset to first end.

    Args:
        task: what `gymnasium.make` takes, or a function that makes an instance.
        spec: that of the environment which the policy was trained on. The task must have its observations and
            actions in shape; continuous actions are mapped affinely from [-1, 1] to the task's bounds, and chunks
            and repeats of actions are played as in training.
        algorithm: what acts, such as `rlx.ppo.make(config, spec, rlx.Plan(1, 1, 1))`.
        policy: its policy, such as that of a Run.
        mode: "greedy" or "sample".
        seed: decides the starts and the noise. The same one gives the same episodes.
        max_decisions: where an episode is cut; 0 takes the task's own limit (`max_episode_steps`).

    Raises:
        UserError: a task that does not exist, that lacks a package, that does not fit, or that has no limit.
    """
    require(num_episodes >= 1, "num_episodes", num_episodes, "at least 1")
    require(mode in ("greedy", "sample"), "mode", mode, "greedy or sample")
    check_seed(seed)
    require(max_decisions >= 0, "max_decisions", max_decisions, "at least 0")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.closing(make(task)))
        name = task if isinstance(task, str) else str(first)
        check_fit(spec, first, name)
        limit = first.spec.max_episode_steps if first.spec else None
        allowed = f"at least 1, for {name} has no time limit"
        require(bool(max_decisions or limit), "max_decisions", max_decisions, allowed)
        others = [stack.enter_context(contextlib.closing(make(task))) for _ in range(num_episodes - 1)]
        decisions = max_decisions or -(-(limit or 0) // spec.action_repeat)
        return play([first, *others], spec, algorithm, policy, mode, seed, decisions)


def play(
    instances: Sequence[gymnasium.Env],
    spec: Spec,
    algorithm: Algorithm,
    policy: Policy,
    mode: Mode,
    seed: int,
    decisions: int,
) -> EvalResult:
    """An episode of each instance, cut after so many decisions."""
    number = len(instances)
    returns, lengths, ended = np.zeros(number), np.zeros(number), np.zeros(number, bool)
    starts = np.random.SeedSequence(seed).generate_state(number)
    observations = [env.reset(seed=int(start))[0] for env, start in zip(instances, starts, strict=True)]
    memory_key, run_key = jax.random.split(jax.random.key(seed))
    memory = jax.vmap(algorithm.memory)(jax.random.split(memory_key, number))

    @jax.jit
    def act(policy: Policy, memory: PyTree, obs: PyTree, decision: int) -> tuple[PyTree, jax.Array]:
        return algorithm.act(policy, memory, obs, jax.random.fold_in(run_key, decision), mode)[:2]

    for decision in range(decisions):
        memory, actions = act(policy, memory, stack_like(spec.obs, observations), decision)
        native = native_actions(np.asarray(actions), spec, instances[0].action_space)
        for index in np.flatnonzero(~ended).tolist():
            for action in native[index]:
                observations[index], reward, terminated, truncated, _ = instances[index].step(action)
                returns[index] += float(reward)
                lengths[index] += 1
                if terminated or truncated:
                    ended[index] = True
                    break
        if ended.all():
            break
    return EvalResult(*(jax.numpy.asarray(x, np.float32) for x in (returns, lengths)))


def make(task: Task) -> gymnasium.Env:
    """An instance. Raises UserError where there is none of that name, or where a package is missing."""
    import gymnasium
    from gymnasium.error import Error, UnregisteredEnv

    if not isinstance(task, str):
        return task()
    try:
        return gymnasium.make(task, disable_env_checker=True)
    except UnregisteredEnv as error:
        raise unknown("Gymnasium's task", task, gymnasium.registry) from error
    except (Error, ImportError) as error:  # most name the package that is missing
        module = getattr(error, "name", None)
        hint = "; pip install 'gymnasium[mujoco]' has it" if module in ("mujoco", "imageio", "packaging") else ""
        raise UserError(f"Gymnasium's {task} cannot be made: {str(error).rstrip('.')}{hint}.") from error


def check_fit(spec: Spec, env: gymnasium.Env, name: str) -> None:
    """Raises UserError, with both, where observations or actions of a task are not those of the policy."""
    from gymnasium import spaces

    policy = f"the policy of {spec.name}" if spec.name else "the policy"
    require(spec.num_agents == 1, "num_agents", spec.num_agents, f"1, as {name} has")
    reads, gives = shapes(spec.obs), shapes(env.observation_space)
    if reads != gives:
        raise UserError(f"{policy} reads observations {describe(reads)}; those of {name} are {describe(gives)}.")
    space = env.action_space
    if isinstance(spec.action, Discrete):
        fits = isinstance(space, spaces.Discrete) and spec.action.num_values == space.n
        given = f"one of {spec.action.num_values} values"
    else:
        single = (spec.action.shape[0] // spec.action_chunk, *spec.action.shape[1:]) if spec.action.shape else ()
        fits = isinstance(space, spaces.Box) and single == space.shape and bool(space.is_bounded())
        given = f"{list(single)} between bounds"
    if not fits:
        raise UserError(f"{policy} gives actions of {given}; {name} takes {space}.")


def shapes(tree: PyTree) -> dict[str, tuple[int, ...] | None]:
    """Path -> shape of the leaves of a Spec's observations, or of a space."""
    leaves = dict(tree) if isinstance(tree, Mapping) else getattr(tree, "spaces", None)
    if not isinstance(leaves, Mapping):
        return {"": tree.shape}
    return {f"/{name}{path}": shape for name, leaf in leaves.items() for path, shape in shapes(leaf).items()}


def describe(found: Mapping[str, tuple[int, ...] | None]) -> str:
    return ", ".join(f"{path[1:]} {shape if shape is None else list(shape)}".strip() for path, shape in found.items())


def stack_like(like: PyTree, observations: Sequence[Any]) -> PyTree:
    """A batch of observations in the structure and dtypes of a Spec's."""
    if isinstance(like, Mapping):
        return {name: stack_like(like[name], [obs[name] for obs in observations]) for name in like}
    return np.stack([np.asarray(obs, like.dtype) for obs in observations])


def native_actions(actions: np.ndarray, spec: Spec, space: Any) -> np.ndarray:
    """[N, K, ...]: the K steps of each instance's decision, as the task takes them."""
    if isinstance(spec.action, Discrete):
        steps = (actions + space.start).astype(space.dtype)[:, None]
    else:
        steps = actions.reshape(len(actions), spec.action_chunk, *space.shape).astype(np.float64)
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        steps = np.clip((low + high) / 2 + (high - low) / 2 * steps, low, high).astype(space.dtype)
    return np.repeat(steps, spec.action_repeat // spec.action_chunk, axis=1)
