"""Particle worlds: step for step those of mpe2, out of states that are dealt to both; what is ours, by hand."""

from __future__ import annotations

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs import particle
from envs.names import PARTICLE
from envs.particle import BACKGROUND, GREEN, STRIP_COLOUR, Particle
from envs.particle_tasks import BLUE, GREY, ParticleState
from rlx import settings
from rlx.algorithm import Plan
from rlx.collection import random_policy
from rlx.environment import random_action
from rlx.errors import UserError
from rlx.evaluation import make_evaluate
from rlx.rollout import make_source
from rlx.types import Box, Discrete
from tests.test_envs import assert_fixed_point, same

KEY = jax.random.key(0)
EPISODE = 25
TOLERANCE = 1e-5
OPTIONS = (  # other than the defaults, which the names alone are tested with
    ("simple_spread", {"N": 5, "local_ratio": 0.2}),
    ("simple_spread", {"N": 1}),
    ("simple_reference", {"local_ratio": 0.0}),
    ("simple_adversary", {"N": 4}),
    ("simple_tag", {"num_good": 3, "num_adversaries": 2, "num_obstacles": 0}),
    (
        "simple_world_comm",
        {"num_good": 3, "num_adversaries": 2, "num_obstacles": 2, "num_food": 1, "num_forests": 3},
    ),
)


@functools.cache
def built(name, **options):
    """The world without its time limit, and its jitted reset and step of many instances."""
    env = envs.make(f"particle/{name}", **options).env
    assert isinstance(env, Particle)
    return env, jax.jit(jax.vmap(env.reset, in_axes=(0, None))), jax.jit(jax.vmap(env.step, in_axes=(0, 0, None)))


def reference(name, discrete=False, **options):
    version = "v4" if name == "simple_speaker_listener" else "v3"
    module = importlib.import_module(f"mpe2.{name}_{version}")
    return module.raw_env(continuous_actions=not discrete, **options)


class Dealt:
    """Stands for NumPy's generator in a reset of mpe2: deals out `state`, and knows the ranges to draw it from."""

    def __init__(self, env, world, state):
        again = len(getattr(world, "food", ())) + len(getattr(world, "forests", ()))  # mpe2 draws these twice
        position = np.asarray(state.position, np.float64)
        self.places, self.goals = iter([*position, *position[len(position) - again :]]), iter(np.asarray(state.goal))
        ranges = [1.0] * env.num_agents + [env.task.landmark_range] * (len(env.task.landmarks) + again)
        self.ranges, self.num_landmarks = iter(ranges), len(env.task.landmarks)

    def uniform(self, low, high, size):
        assert -low == high == next(self.ranges) and size == 2
        return next(self.places).copy()

    def integers(self, high):
        assert high == self.num_landmarks
        return next(self.goals)


def deal(env, theirs, state):
    """Puts mpe2's world into `state`."""
    dealt = Dealt(env, theirs.world, state)
    theirs.scenario.reset_world(theirs.world, dealt)
    assert not [*dealt.places, *dealt.goals, *dealt.ranges]
    for agent, velocity, message in zip(theirs.world.agents, state.velocity, state.message, strict=True):
        agent.state.p_vel = np.asarray(velocity, np.float64)
        if message.size:
            agent.state.c = np.asarray(message, np.float64)


def native(env, actions):
    """What mpe2 takes for our actions [N, a]: [0, 1], of as many entries as each agent has; or whole numbers."""
    actions = actions[None] if env.num_agents == 1 else actions
    if env.discrete:
        return [int(action) for action in actions]
    mask = np.ones_like(actions, bool) if env.num_agents == 1 else env.spec.action_mask
    return [(action[has] + 1) / 2 for action, has in zip(actions, mask, strict=True)]


def starts(env, rng, count):
    """As many states at rest, every other one within a quarter of the square."""
    N, L, C, G = env.num_agents, len(env.task.landmarks), env.task.message_size, env.task.num_goals
    extent = np.where(np.arange(count) % 2 == 0, 0.25, 1.0)[:, None, None]
    position = extent * rng.uniform(-1.0, 1.0, (count, N + L, 2))
    state = ParticleState(position, np.zeros((count, N, 2)), np.zeros((count, N, C)), rng.integers(L, size=(count, G)))
    return jax.tree.map(jnp.asarray, state)


def played(name, num_episodes, seed, reset_state=True, semi_implicit=False, **options):
    """Random episodes of both; yields our and their (all observations, rewards) step by step.

    Half of the episodes start within a quarter of the square, where much touches. mpe2 is put into our state before
    every step if `reset_state`, else at the start alone.
    """
    env, _, step = built(name, **options, semi_implicit=semi_implicit)
    theirs, rng = reference(name, **options), np.random.default_rng(seed)
    states, actions, steps = [starts(env, rng, num_episodes)], [], []
    for _ in range(EPISODE):
        if env.discrete:
            allowed = env.spec.action.num_values if env.num_agents == 1 else env.spec.action_mask.sum(axis=1)
            actions.append(rng.integers(allowed, size=(num_episodes, *env.spec.action.shape)).astype(np.int32))
        else:
            uniform = rng.uniform(-1.5, 1.5, (num_episodes, *env.spec.action.shape))
            actions.append(np.clip(uniform, -1, 1).astype(np.float32))
        state, timestep = step(states[-1], actions[-1], KEY)
        states.append(state)
        steps.append(timestep)
    states, steps = jax.device_get((states, steps))
    for b, t in itertools.product(range(num_episodes), range(EPISODE)):
        before = jax.tree.map(lambda x: x[b], states[t])  # noqa: B023
        if t == 0:
            theirs.reset()
        if t == 0 or reset_state:
            deal(env, theirs, before)
        for action in native(env, actions[t][b]):
            theirs.step(action)
        assert set(theirs.truncations.values()) == {t == EPISODE - 1} and not any(theirs.terminations.values())
        rewards = np.array(list(theirs.rewards.values()))
        yield (all_of(env, steps[t].obs, b), steps[t].reward[b]), (theirs.state(), rewards)


def all_of(env, obs, b):
    """All agents' observations, one behind the other, of episode b."""
    if env.num_agents == 1:
        return obs[b]
    padded, state = obs["agents"][b], obs["state"][b]
    np.testing.assert_allclose(padded[env.spec.obs_mask], state, atol=1e-6)  # XLA rounds the two differently
    assert not padded[~env.spec.obs_mask].any()
    return state


def largest_error(*arguments, **options):
    """Of observations and of rewards."""
    pairs = played(*arguments, **options)
    errors = [[np.abs(x - y).max() for x, y in zip(ours, theirs, strict=True)] for ours, theirs in pairs]
    return np.max(errors, axis=0)


def test_names_are_those_that_the_registry_lists():
    assert sorted(particle.NAMES) == sorted(PARTICLE)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("name", PARTICLE)
def test_a_step_is_that_of_mpe2(name, discrete):
    options = {"discrete": True} if discrete else {}
    assert (largest_error(name, 4, 0, **options) < TOLERANCE).all()


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_step_with_options_is_that_of_mpe2(name, options):
    assert (largest_error(name, 4, 1, **options) < TOLERANCE).all()


@pytest.mark.parametrize("name", ["simple_tag", "simple_spread"])
def test_a_semi_implicit_step_is_that_of_mpe2_with_positions_moved_last(name, monkeypatch):
    """Contacts are those before the step all the same."""
    from mpe2._mpe_utils.core import World

    move = World.integrate_state

    def velocities_first(world, forces):
        agents = [entity for entity in world.entities if entity.movable]
        places = [agent.state.p_pos.copy() for agent in agents]
        move(world, forces)
        for agent, place in zip(agents, places, strict=True):
            agent.state.p_pos = place + agent.state.p_vel * world.dt

    monkeypatch.setattr(World, "integrate_state", velocities_first)
    assert (largest_error(name, 4, 3, semi_implicit=True) < TOLERANCE).all()


@pytest.mark.slow
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("name", PARTICLE)
def test_each_of_1000_steps_with_20_seeds_is_that_of_mpe2(name, discrete):
    options = {"discrete": True} if discrete else {}
    errors = [largest_error(name, 1000 // EPISODE, seed, **options) for seed in range(20)]
    assert (np.max(errors, axis=0) < TOLERANCE).all()


@pytest.mark.parametrize("name", ["simple_tag", "simple_spread"])
def test_whole_episodes_in_float64_are_those_of_mpe2(name):
    built.cache_clear()
    with jax.enable_x64(True):
        assert (largest_error(name, 4, 2, reset_state=False) < TOLERANCE).all()
    built.cache_clear()


@pytest.mark.parametrize(
    ("name", "widths", "entries", "values"),
    [
        ("simple", [4], [5], [5]),
        ("simple_adversary", [8, 10, 10], [5, 5, 5], [5, 5, 5]),
        ("simple_crypto", [4, 8, 8], [4, 4, 4], [4, 4, 4]),
        ("simple_push", [8, 19], [5, 5], [5, 5]),
        ("simple_reference", [21, 21], [15, 15], [50, 50]),
        ("simple_speaker_listener", [3, 11], [3, 5], [3, 5]),
        ("simple_spread", [18] * 3, [5] * 3, [5] * 3),
        ("simple_tag", [16, 16, 16, 14], [5] * 4, [5] * 4),
        ("simple_world_comm", [34] * 4 + [28] * 2, [9] + [5] * 5, [20] + [5] * 5),
    ],
)
def test_every_world_is_an_environment_of_25_steps_with_the_sizes_that_mpe2_documents(name, widths, entries, values):
    for discrete, sizes in ((False, entries), (True, values)):
        env = envs.make(f"particle/{name}", discrete=discrete)
        assert_fixed_point(env)
        spec, N = env.spec, len(widths)
        assert (spec.num_agents, spec.episode_length) == (N, EPISODE)
        shape = (N,) if N > 1 else ()
        assert spec.action == (Discrete(max(sizes), shape) if discrete else Box((*shape, max(sizes)), 0.0, 1.0))
        if N > 1:
            assert (spec.obs["agents"].shape, spec.obs["state"].shape) == ((N, max(widths)), (sum(widths),))
            for mask, counts in ((spec.obs_mask, widths), (spec.action_mask, sizes)):
                assert mask.tolist() == [[k < count for k in range(max(counts))] for count in counts]


def test_random_actions_are_those_that_an_agent_has():
    spec = envs.make("particle/simple_speaker_listener", discrete=True).spec
    drawn = jax.vmap(lambda key: random_action(spec, key))(jax.random.split(KEY, 500))
    assert drawn.dtype == jnp.int32 and drawn.shape == (500, 2)
    assert [np.unique(drawn[:, i]).tolist() for i in range(2)] == [[0, 1, 2], [0, 1, 2, 3, 4]]


def test_what_an_agent_does_not_have_is_ignored():
    env, reset, step = built("simple_speaker_listener")
    state, _ = reset(KEY[None], ())
    action = jax.random.uniform(KEY, (1, *env.spec.action.shape))
    after = step(state, action, KEY)
    assert same(after, step(state, jnp.where(env.spec.action_mask[None], action, 7.0), KEY))
    np.testing.assert_array_equal(after[0].position[:, 0], state.position[:, 0])  # the speaker stays
    np.testing.assert_array_equal(after[0].message, [[(action[0, 0, :3] + 1) / 2, [0, 0, 0]]])


def test_time_runs_out_after_25_steps_or_those_that_are_asked_for():
    assert envs.make("particle/simple").spec.episode_length == 25  # each parity test goes through 25 steps
    env = envs.make("particle/simple", episode_length=3)
    start, _ = env.reset(KEY, ())
    _, timesteps = jax.lax.scan(lambda state, key: env.step(state, jnp.ones(5), key), start, jax.random.split(KEY, 3))
    assert timesteps.truncated.tolist() == [False, False, True] and not timesteps.terminated.any()


def test_resets_are_uniform_and_at_rest():
    _, reset, _ = built("simple_world_comm")
    state, _ = reset(jax.random.split(KEY, 2000), ())
    assert not state.velocity.any() and not state.message.any()
    for x, reach in ((state.position[:, :6], 1.0), (state.position[:, 6:], 0.9)):
        assert -reach <= x.min() < -0.99 * reach and 0.99 * reach < x.max() <= reach
        np.testing.assert_allclose([x.mean(), x.std()], [0.0, reach / 3**0.5], atol=0.02)
    _, reset, _ = built("simple_reference")
    goals = reset(jax.random.split(KEY, 2000), ())[0].goal
    counts = np.zeros((3, 3))
    np.add.at(counts, tuple(goals.T), 1)
    np.testing.assert_allclose(counts / 2000, 1 / 9, atol=0.03)  # 4 standard errors


def test_two_agents_at_one_place_stay_finite():
    _, reset, step = built("simple_spread")
    state, _ = reset(KEY[None], ())
    position = state.position.at[:, 1].set(state.position[:, 0])
    after, timestep = step(state._replace(position=position), jnp.zeros((1, 3, 5)), KEY)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after, timestep)))


def test_episodes_pay_each_agent_and_are_returned_as_the_sum():
    env = envs.make("particle/simple_spread")
    random = random_policy(env.spec)
    source = make_source(env, Plan(8, 30, 1))
    _, trajectory, stats = jax.jit(lambda key: source.collect(random, (), source.init(random, key), key))(KEY)
    assert trajectory.reward.shape == (30, 8, 3) and trajectory.action.shape == (30, 8, 3, 5)
    assert stats.episodes == 8
    np.testing.assert_allclose(stats.returns, trajectory.reward[:25].sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"), [("simple_spread", -74.0), ("simple_speaker_listener", -72.0), ("simple_reference", -54.0)]
)
def test_random_actions_return_what_they_are_known_to(name, expected):
    env = envs.make(f"particle/{name}")
    returns = jax.jit(make_evaluate(env, random_policy(env.spec), 2048))((), KEY).returns
    np.testing.assert_allclose(returns.mean(), expected, atol=max(1.0, 4 * returns.std() / 2048**0.5))


def steer(env, state, agent, target):
    """Five entries that bring `agent` to `target` [2] by the velocity that they give it, as fast as it can."""
    velocity, ahead = state.velocity[agent], state.position[agent]
    if not env.semi_implicit:  # the velocity of before moves it first
        ahead += 0.1 * velocity
    x, y = jnp.clip(((target - ahead) / 0.1 - 0.75 * velocity) / 0.5, -1.0, 1.0)
    return jnp.stack([-jnp.ones_like(x), -x, x, -y, y])


@pytest.mark.parametrize("semi_implicit", [False, True])
def test_a_speaker_who_names_the_goal_and_a_listener_who_obeys_return_what_the_fastest_way_does(semi_implicit):
    """Distances along an axis have density (2 - d) / 2, so of those that s was gone along E[d^2] = (2 - s)^4 / 24.

    The word arrives after the first step; a step moves by the velocity before it, or after it.
    """
    env, reset, _ = built("simple_speaker_listener", semi_implicit=semi_implicit)

    def step(state, key):
        word = 2 * jax.nn.one_hot(state.goal[0], 3) - 1
        heard = state.message[0].argmax()
        listen = jnp.where(state.message[0].any(), steer(env, state, 1, state.position[2 + heard]), -jnp.ones(5))
        state, timestep = env.step(state, jnp.stack([jnp.pad(word, (0, 2)), listen]), key)
        return state, timestep.reward.sum()

    states, _ = reset(jax.random.split(KEY, 1024), ())
    rewards = jax.jit(jax.vmap(lambda state: jax.lax.scan(step, state, jax.random.split(KEY, EPISODE))[1]))(states)
    pushes = np.arange(EPISODE - 1) + semi_implicit  # at full force from the second step on
    speeds = 2.0 * (1 - 0.75**pushes)
    gone = np.minimum(np.append(0.0, 0.1 * np.cumsum(speeds)), 2.0)
    best = -4 * ((2 - gone) ** 4 / 24).sum()  # two axes, two agents
    np.testing.assert_allclose(rewards.sum(axis=1).mean(), best, atol=1.0)  # 3 standard errors


def test_a_picture_shows_agents_over_landmarks_and_goals_in_green():
    env = envs.make("particle/simple_push")
    state, _ = env.reset(KEY, ())
    places = jnp.array([[0.7, -0.7], [0.0, 0.0], [-0.7, 0.7], [0.7, 0.7]])
    state = state._replace(env=state.env._replace(position=places, goal=jnp.array([1])))
    frames = env.render([state])
    assert frames.shape == (1, 200, 200, 3) and frames.dtype == np.uint8
    red = env.env.task.agents[0].colour
    expected = {(50, 50): GREY, (50, 150): GREEN, (150, 150): red, (100, 100): BLUE, (0, 0): BACKGROUND}
    assert {cell: tuple(frames[0][cell].tolist()) for cell in expected} == expected
    assert env.render([]).shape == (0, 200, 200, 3)


def test_a_picture_shows_the_word_of_crypto_and_not_its_key():
    env = envs.make("particle/simple_crypto")
    state, _ = env.reset(KEY, ())
    corners = jnp.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [0.5, 0.0], [-0.5, 0.0]])
    state = state._replace(env=state.env._replace(position=corners, goal=jnp.array([1, 0])))
    green, grey = (np.argwhere((env.render([state])[0] == colour).all(axis=-1)) for colour in (GREEN, GREY))
    assert (green[:, 1] < 100).all() and (grey[:, 1] > 100).all() and len(green) == len(grey) > 0


def test_a_picture_shows_what_is_said_as_bars_of_the_speaker():
    env = envs.make("particle/simple_world_comm")
    state, _ = env.reset(KEY, ())
    message = state.env.message.at[0].set(jnp.array([1.0, 0.0, 0.5, 0.25])).at[1].set(1.0)  # agent 1 has no voice
    (frame,) = env.render([state._replace(env=state.env._replace(message=message))])
    assert frame.shape == (220, 200, 3)
    said = (frame[200:] == env.env.task.agents[0].colour).all(axis=-1)
    assert ((frame[200:] == STRIP_COLOUR).all(axis=-1) ^ said).all()
    np.testing.assert_array_equal(said[:, [25, 75, 125, 175]].sum(axis=0), [20, 0, 10, 5])
    assert said[-1, 125] and not said[0, 125]  # bars stand on the ground


def test_a_picture_follows_who_leaves_it():
    env = envs.make("particle/simple")
    state, _ = env.reset(KEY, ())
    near, far = (state._replace(env=state.env._replace(position=jnp.array([[x, 0.0], [0.0, x]]))) for x in (0.7, 5.0))
    blue, landmark = ((env.render([near, far]) == colour).all(axis=-1) for colour in (BLUE, GREY))
    assert blue.any(axis=(1, 2)).all() and landmark.any(axis=(1, 2)).all()
    for frame, x in zip(blue, (0.7, 5.0), strict=True):  # one scale for a whole film
        np.testing.assert_allclose(np.argwhere(frame).mean(axis=0), [99.5, 99.5 + 100 * x / 5.5], atol=1)
    assert blue[0].sum() < (env.render([near])[0] == BLUE).all(axis=-1).sum() / 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("simple_spred", {}, "Did you mean particle/simple_spread"),
        ("simple_spread", {"N": 0}, "N = 0 .* at least 1"),
        ("simple_spread", {"N": 2.5}, "N = 2.5"),
        ("simple_spread", {"local_ratio": 1.5}, "local_ratio = 1.5 .* 0 to 1"),
        ("simple_reference", {"local_ratio": -0.1}, "local_ratio = -0.1"),
        ("simple_tag", {"num_god": 1}, "Did you mean num_good"),
        ("simple_tag", {"num_adversaries": 0}, "num_adversaries = 0"),
        ("simple_tag", {"num_obstacles": -1}, "num_obstacles = -1 .* at least 0"),
        ("simple_world_comm", {"num_food": 0}, "num_food = 0"),
        ("simple_world_comm", {"num_forests": -1}, "num_forests = -1"),
        ("simple", {"discrete": 1}, "discrete = 1"),
        ("simple", {"semi_implicit": 1}, "semi_implicit = 1"),
        ("simple", {"N": 2}, "override 'N' does not exist"),
        ("simple_spread", {"action_chunk": 2}, "action_chunk = 2 needs continuous actions"),
    ],
)
def test_what_cannot_be_had_is_said_plainly(name, options, message):
    with pytest.raises(UserError, match=message):
        envs.make(f"particle/{name}", **options)


def test_there_is_no_physics_engine_to_choose():
    with pytest.raises(UserError, match="mjx.*not available for particle/simple"):
        envs.make("particle/simple", "mjx")


@pytest.mark.parametrize("name", ["hasac", "maddpg", "mappo"])
def test_learners_of_teams_meet_new_worlds(name):
    """Of a few starts a listener learns by heart which goal belongs to which landmarks."""
    preset = settings.preset("particle/simple_speaker_listener", name)
    env = envs.make("particle/simple_speaker_listener")
    source = make_source(env, Plan(4, 50, 1), reset=preset["reset"], pool_size=1)
    algorithm = random_policy(env.spec)
    _, trajectory, _ = source.collect(algorithm, (), source.init(algorithm, KEY), KEY)
    starts = np.asarray(trajectory.obs["state"])[25].round(4)  # of every environment's second episode
    first = np.asarray(trajectory.obs["state"])[0].round(4)
    assert len(np.unique(np.concatenate([first, starts]), axis=0)) == 8
