"""`rlx evaluate`: whole episodes with the policy of a run, or of each of many, here or on a task of Gymnasium."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rlx import storage
from rlx.cli.pairs import load_run, settings_of
from rlx.errors import check_seed, require
from rlx.files import write_atomically
from rlx.logging import Progress
from rlx.run_directory import FAILED, ON_GYMNASIUM, RunDirectory, run_directories


def evaluate(arguments: list[str]) -> int:
    """`rlx evaluate RUN_DIR`: writes eval.json and prints the mean return."""
    options = parse(arguments)
    if options.video:
        from rlx.video import check_video, choose_gl

        check_video(options.video, options.fps)
        if not options.video.endswith(".html"):
            choose_gl()
    with Progress() as shown:
        with shown.phase("building"):
            members = run_directories(storage.fetch(options.run_dir))
            require(len(members) == 1 or not options.video, "--video", options.video, "it takes one run at a time")
            evaluation = Evaluation(options, members[0])
            if options.video:
                from rlx.video import check_drawn

                check_drawn(evaluation.run.env, options.video)
        for path in members:
            name = f"{path.name}: " if len(members) > 1 else ""
            if name and (path / FAILED).exists():
                print(f"{name}stopped: {json.loads((path / FAILED).read_text())['error']}")
            else:
                evaluation.of(path, name, shown)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    text = "Play episodes with a run's policy; whole ones in the run's own mode are written to its eval.json."
    parser = argparse.ArgumentParser("rlx evaluate", description=text, allow_abbrev=False)
    parser.add_argument("run_dir")
    parser.add_argument("--episodes", type=int, default=128, help="how many, in parallel (128)")
    parser.add_argument("--seed", type=int, help="decides the starts and the noise (the run's own, as in training)")
    parser.add_argument("--decisions", type=int, default=0, help="cut an episode there (0: as the run does)")
    parser.add_argument("--best", action="store_true", help="the policy of the best evaluation, not the newest")
    parser.add_argument("--mode", choices=("greedy", "sample"), help="greedy is deterministic (the run's own)")
    parser.add_argument("--physics", default="", help="another engine than the run's: mjx, warp or mujoco")
    what = "play this task of Gymnasium instead, HalfCheetah-v5 say; whole episodes go to eval_gymnasium.json"
    parser.add_argument("--gymnasium", metavar="TASK", help=what)
    formats = "a .mp4, .gif, animated .png or .webp, or for bodies a .html, which loads brax's viewer from the network"
    parser.add_argument("--video", metavar="FILE", help=f"draw the first of them: {formats}")
    parser.add_argument("--video-episodes", type=int, metavar="N", help="how many of them (1)")
    parser.add_argument("--fps", type=float, help="decisions a second of the video (those of the simulated time)")
    options = parser.parse_args(arguments)
    require(options.episodes >= 1, "--episodes", options.episodes, "at least 1")
    require(options.decisions >= 0, "--decisions", options.decisions, "at least 0")
    if options.seed is not None:
        check_seed(options.seed, "--seed")
    if options.gymnasium:
        require(not options.physics, "--physics", options.physics, "nothing beside --gymnasium, which has its own")
    if options.video:
        allowed = "nothing beside --gymnasium: it draws the run's own environment"
        require(not options.gymnasium, "--video", options.video, allowed)
        drawn = options.video_episodes = 1 if options.video_episodes is None else options.video_episodes
        allowed = f"from 1 to the {options.episodes} episodes"
        require(1 <= drawn <= options.episodes, "--video-episodes", drawn, allowed)
    else:
        for flag, value in (("--video-episodes", options.video_episodes), ("--fps", options.fps)):
            require(value is None, flag, value, "nothing without --video FILE")
    return options


class Evaluation:
    """Of runs of one program: they share the environment and what is compiled."""

    def __init__(self, options: argparse.Namespace, first: Path):
        self.options = options
        self.run = load_run(first, options.physics)
        self.mode = options.mode or self.run.train_config.eval_mode
        self._players: dict[str, Any] = {}  # runs of one program may differ in their settings

    def _playing(self, config: Any) -> tuple[Any, ...]:
        """What plays the episodes of a run: the arguments of `make_evaluate` and `make_player`."""
        from rlx.schedule import make_schedule, one_device

        decisions = self.options.decisions or self.run.train_config.eval_decisions
        plan = make_schedule(self.run.env, one_device(self.run.train_config)).plan
        algorithm = self.run.module.make(config, self.run.env.spec, plan)
        return self.run.env, algorithm, self.options.episodes, self.mode, decisions, None

    def _play(self, config: Any, policy: Any, seed: int) -> Any:
        import jax

        from rlx.evaluation import make_evaluate

        key = key_of(seed)
        kind = repr(config)  # a user's Config need not be hashable
        if kind not in self._players:
            self._players[kind] = jax.jit(make_evaluate(*self._playing(config)))
        return jax.device_get(self._players[kind](policy, key))

    def _play_gymnasium(self, algorithm: Any, policy: Any, seed: int) -> Any:
        from rlx.gymnasium import evaluate_gymnasium

        options = self.options
        acting = (self.run.env.spec, algorithm, policy, options.episodes, self.mode, seed, options.decisions)
        return evaluate_gymnasium(options.gymnasium, *acting)

    def of(self, path: Path, name: str, shown: Progress) -> None:
        """Plays, prints and records the run in `path`, and films it where that was asked for."""
        from rlx.learners import load_policy
        from rlx.recording import episodes

        train_config, config = settings_of(RunDirectory.open(path), self.run.module)
        built = (self.run.env, self.run.module, train_config, config)
        algorithm, policy, step = load_policy(path, *built, self.options.best, self.mode)
        seed = train_config.seed if self.options.seed is None else self.options.seed
        task = self.options.gymnasium
        with shown.phase("evaluating"):
            result = self._play_gymnasium(algorithm, policy, seed) if task else self._play(config, policy, seed)
        entry = {"step": step, "mode": self.mode, "seed": seed, "best": self.options.best}
        entry |= {"task": task} if task else {"physics": self.run.env.spec.physics or self.run.pair.physics}
        cut = self.options.decisions
        whole = not cut if task else cut in (0, train_config.eval_decisions)
        if whole and (task or self.mode == train_config.eval_mode):
            target = path / (ON_GYMNASIUM if task else "eval.json")
            write_atomically(target, json.dumps(entry | episodes(result)) + "\n")
            storage.put(target)
        print(f"{name}step {step:,}{f' on {task}' if task else ''}: {summary(result)}")
        if self.options.video:
            with shown.phase("drawing"):
                self._film(config, policy, seed)
            print(self.options.video)

    def _film(self, config: Any, policy: Any, seed: int) -> None:
        from rlx.evaluation import make_player
        from rlx.video import film, pace, page, write_video

        video, count = self.options.video, self.options.video_episodes
        playing = (self.run.env, make_player(*self._playing(config)), policy, key_of(seed), count)
        fps, every = pace(video, self.run.env.spec, self.options.fps)
        if video.endswith(".html"):
            write_atomically(Path(video).absolute(), page(*playing, fps, every))
        else:
            write_video(video, film(*playing, every), fps)


def key_of(seed: int) -> Any:
    """Of the evaluations of a run with this seed."""
    import jax

    return jax.random.split(jax.random.key(seed), 4)[3]  # the fourth, as in training


def summary(result: Any) -> str:
    """Of an EvalResult, in a line."""
    mean, std = result.returns.mean(), result.returns.std()
    text = f"mean return {mean:.4g}, standard deviation {std:.4g}, {len(result.returns)} episodes"
    lost = 0 if result.diverged is None else int(result.diverged.sum())
    text += f", of which {lost} ended early because their simulation diverged" if lost else ""
    if result.agent_returns is not None:
        text += f"; of each agent {', '.join(f'{x:.4g}' for x in result.agent_returns.mean(axis=0))}"
    return text
