"""Runs killed, stopped and damaged at every stage: `rlx resume` ends with what an uninterrupted run ends with."""

from __future__ import annotations

import array
import fcntl
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from rlx.algorithms import ALGORITHMS
from rlx.checkpoint import Checkpointer
from rlx.cli.pairs import load_run
from rlx.collection import Part, collect, random_policy
from rlx.data import read
from rlx.epoch import init_state
from rlx.logging import Progress
from rlx.rollout import make_source
from rlx.run_directory import read_metrics
from rlx.schedule import make_schedule
from tests.kinds import of_each_kind

# The smallest run of each algorithm. Its episodes are longer than an unroll, so a kill falls into the middle of some.
# Replay is full, and goes around, several times before a kill.
OFF_POLICY = "--algo.actor-hidden 8 --algo.critic-hidden 8 --algo.batch-size 16 --algo.utd-ratio 1 4 "
OFF_POLICY += "--algo.prefill-steps 32 --algo.replay-size 100 --algo.n-step 3 "
RUNS = {
    "ppo": "probe/lqr --env.scale 1 --algo.actor-hidden 8 --algo.critic-hidden 8 --algo.num-epochs 1 "
    "--algo.num-minibatches 2 --algo.learning-rate 0.003",
    "sac": f"probe/lqr --env.scale 1 {OFF_POLICY} --algo.gamma 0.9 --algo.init-alpha 0.1 "
    "--algo.actor-learning-rate 0.01 --algo.critic-learning-rate 0.01",
    "td3": f"probe/lqr --env.scale 4 {OFF_POLICY} --algo.gamma 0.8 "
    "--algo.actor-learning-rate 0.003 --algo.critic-learning-rate 0.003",
    "fpo": "probe/lqr --env.scale 1 --algo.actor-hidden 8 --algo.num-epochs 1 --algo.num-minibatches 2 "
    "--algo.learning-rate 0.03 --algo.num-flow-steps 3 --algo.ema-decay 0.5",
    "dppo": "probe/lqr --env.scale 1 --algo.actor-hidden 8 --algo.num-epochs 1 --algo.num-minibatches 2 "
    "--algo.num-denoising-steps 3 --algo.finetuned-steps 2 --algo.normalize-reward True",
    "mappo": "particle/simple_spread --env.N 2 --algo.actor-hidden 8 --algo.critic-hidden 8 --algo.num-epochs 1 "
    "--algo.num-minibatches 2 --algo.sequential True --algo.gamma 0.9 --algo.gae-lambda 0.9 --algo.learning-rate 0.03",
    "hasac": f"particle/simple_speaker_listener {OFF_POLICY} --algo.anneal-alpha True --algo.tune-alpha False",
    "maddpg": f"particle/simple_speaker_listener {OFF_POLICY} --algo.policy-delay 2 --algo.actor-learning-rate 0.003",
    "bc": "probe/lqr --env.scale 1 --algo.actor-hidden 8 --algo.num-minibatches 2 --algo.learning-rate 0.03 "
    "--data DATA",
}
EPOCHS = 120
SIZES = (
    f"--seed 3 --num-envs 4 --unroll-length 4 --total-steps {EPOCHS * 16} --iterations-per-epoch 1 "
    "--num-evals 8 --eval-episodes 4 --reset-pool-size 4"
)
CHECKPOINTS = 12  # one every 10 epochs
PIPE = 4096  # bytes of progress that a child writes ahead of its reader: about 50 reports
REPORT = " steps/s "  # in each line of progress
LIMIT = 300  # seconds after which a child is given up; a whole run takes 5


class Rlx:
    """The command line in a process of its own. It stops when it is `PIPE` bytes ahead of what is read of its stderr:
    so a run of 120 epochs of which 55 reports were read still goes on, however slowly this process gets its turn."""

    def __init__(self, *arguments: object):
        command = [sys.executable, "-m", "rlx.cli", *map(str, arguments)]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0, "pipesize": PIPE}
        plain = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # hides reentrancy
        self.process = subprocess.Popen(command, env=plain, **pipes)
        self.err = ""
        self._watchdog = threading.Timer(LIMIT, self.process.kill)
        self._watchdog.start()

    def read(self, text: str, times: int = 1) -> None:
        """Reads stderr up to the line that is the `times`-th to hold `text`; no further."""
        while times:
            line = self.process.stderr.readline().decode()
            self.err += line
            if not line:
                status, out, err = self.finish()
                pytest.fail(f"ended with {status} before {text!r} was read {times} more times:\n{out}{err}")
            times -= text in line

    def fill(self) -> None:
        """Returns when the pipe is full and stays so: the child waits in the middle of a report."""
        held, same = array.array("i", [0]), 0
        while same < 20 and self.process.poll() is None:
            before = held[0]
            time.sleep(0.02)
            fcntl.ioctl(self.process.stderr, termios.FIONREAD, held)
            same = same + 1 if held[0] == before > PIPE - 200 else 0

    def kill(self) -> None:
        """SIGKILL, which must meet the run before its end."""
        self.process.kill()
        status, out, err = self.finish()
        assert status == -signal.SIGKILL, out + err

    def finish(self) -> tuple[int, str, str]:
        """Waits for the end: exit status, stdout, stderr."""
        out, err = self.process.communicate()
        self._watchdog.cancel()
        self.err += err.decode()
        return self.process.returncode, out.decode(), self.err


@pytest.fixture(scope="module", autouse=True)
def data_set(tmp_path_factory):
    """DATA in `RUNS`: random actions."""
    env, path = envs.make("probe/lqr", scale=1), tmp_path_factory.mktemp("data") / "a.npz"
    collect(env, [Part(random_policy(env.spec), (), 1000)], path, progress=Progress(quiet=True))
    RUNS["bc"] = RUNS["bc"].replace("DATA", str(path))


def train(name: str, folder: Path, checkpoints: int = CHECKPOINTS, num_seeds: int = 1) -> Rlx:
    sizes = [*SIZES.split(), "--num-checkpoints", checkpoints, "--num-seeds", num_seeds]
    return Rlx("train", name, *RUNS[name].split(), *sizes, "--run-dir", folder)


def resume(folder: Path) -> str:
    """Goes on to the end; what it said on stderr."""
    status, out, err = Rlx("resume", folder).finish()
    assert status == 0, err
    assert out.splitlines()[-1].startswith("done: ")
    return err


def leaves(tree: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every array and key."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        found[jax.tree_util.keystr(path)] = (str(leaf.dtype), leaf.shape, np.asarray(data).tobytes())
    return found


def restored(folder: Path) -> tuple[Any, ...]:
    """Leaves and step of the newest checkpoint, and of the best policy."""
    run = load_run(str(folder))
    plan = make_schedule(run.env, run.train_config).plan
    learner = run.module.make(run.config, run.env.spec, plan)
    source = make_source(run.env, plan, run.train_config.reset, run.train_config.reset_pool_size)
    if "data" in run.directory.config:
        found = read([(entry["path"], entry["share"]) for entry in run.directory.config["data"]], run.env)
        source = found.source(found.arrays, plan, None)
    state = jax.eval_shape(lambda key: init_state(learner, source, key), jax.random.key(0))
    checkpointer = Checkpointer(run.directory.checkpoints_path)
    newest, step = checkpointer.restore(state)
    policy = jax.eval_shape(lambda learned: learner.policy(learned, "greedy"), state.learner)
    best, best_step = checkpointer.restore_best(policy)
    return leaves(newest), step, leaves(best), best_step


def events(folder: Path) -> list[tuple[int, str, float]]:
    """Every scalar of the TensorBoard files, in order, but those of time."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in folder.glob("tensorboard/*tfevents*"):
        data, start = path.read_bytes(), 0
        while start < len(data):  # length, its checksum, event, its checksum
            (length,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            start += length + 16
        assert start == len(data)
    return sorted(event for event in found if not event[1].startswith("time/"))


def assert_same_run(folder: Path, whole: Path) -> None:
    """Checkpoints, metrics, TensorBoard events and the last evaluation are equal to the last bit."""
    rows, expected_rows = (
        [{name: value for name, value in row.items() if not name.startswith("time/")} for row in read_metrics(path)]
        for path in (folder / "metrics.jsonl", whole / "metrics.jsonl")
    )
    assert [row["step"] for row in rows] == [16 * epoch for epoch in range(EPOCHS + 1)]
    assert rows == expected_rows
    assert restored(folder) == restored(whole)
    assert events(folder) == events(whole)
    assert json.loads((folder / "eval.json").read_text()) == json.loads((whole / "eval.json").read_text())
    assert not list((folder / "checkpoints").glob("**/*.new")) + list((folder / "checkpoints").glob("**/*.old"))


EVERY = pytest.mark.parametrize("name", sorted(RUNS), scope="module")
TWO = pytest.mark.parametrize("name", of_each_kind(sorted(RUNS)), scope="module")
ONE = pytest.mark.parametrize("name", of_each_kind(sorted(RUNS), ("ppo",)), scope="module")


@pytest.fixture(scope="module")
def whole(name, tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp(name) / "whole"
    status, _, err = train(name, folder).finish()
    assert status == 0, err
    return folder


@pytest.fixture(scope="module")
def killed(name, tmp_path_factory):
    """A run killed about half-way. Whoever resumes it takes a copy."""
    folder = tmp_path_factory.mktemp(name) / "killed"
    run = train(name, folder)
    run.read(REPORT, times=55)  # epoch 54: saving at 50 waited for the checkpoints of 10 to 40
    run.kill()
    assert 55 <= len(read_metrics(folder / "metrics.jsonl")) < EPOCHS
    return folder


def test_every_algorithm_is_killed_here():
    assert set(RUNS) == set(ALGORITHMS)


@TWO
def test_the_runs_here_have_a_best_policy_that_is_not_the_first_nor_the_last(whole):
    assert 0 < restored(whole)[3] < EPOCHS * 16


@TWO
def test_a_run_killed_half_way_ends_as_if_nothing_had_happened(whole, killed, tmp_path):
    shutil.copytree(killed, tmp_path / "run")
    steps = Checkpointer(tmp_path / "run" / "checkpoints").steps()
    assert f"resuming at step {steps[-1]}\n" in resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@ONE
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_serves(whole, killed, tmp_path):
    shutil.copytree(killed, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    before, newest = Checkpointer(folder).steps()[-2:]
    # Where the kill fell between a checkpoint's manifest and its last renaming, the folder still has the other name.
    damaged = next(path for path in (folder / f"{newest}", folder / f"{newest}.new") if path.exists())
    largest = max((path for path in damaged.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    err = resume(tmp_path / "run")
    assert f"checkpoint {damaged} is passed over" in err and largest.name in err
    assert f"resuming at step {before}\n" in err
    assert_same_run(tmp_path / "run", whole)


@ONE
def test_a_run_killed_before_its_first_checkpoint_starts_again(whole, name, tmp_path):
    run = train(name, tmp_path / "run", checkpoints=1)  # at the end
    run.read(REPORT, times=30)
    run.kill()
    assert "no checkpoint yet: starting from the beginning" in resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@ONE
@pytest.mark.parametrize("reader", ["reads on", pytest.param("has stopped reading", marks=pytest.mark.slow)])
def test_sigterm_saves_says_how_to_go_on_and_loses_nothing(whole, name, tmp_path, reader):
    """The signal may come while a report is being written, which takes as long as the reader likes."""
    run = train(name, tmp_path / "run")
    run.read(REPORT, times=45)  # between checkpoints
    if reader == "has stopped reading":
        run.fill()
    run.process.send_signal(signal.SIGTERM)
    status, out, err = run.finish()
    assert status == 130, err
    assert "SIGTERM: saving at the end of this epoch, then stopping" in err
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["step"] == Checkpointer(tmp_path / "run" / "checkpoints").steps()[-1] < EPOCHS * 16
    assert out == f"stopped at step {rows[-1]['step']:,}; go on with: rlx resume {tmp_path / 'run'}\n"
    assert f"resuming at step {rows[-1]['step']}\n" in resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@EVERY
@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(whole, name, tmp_path):
    chance, folder = random.Random(0), tmp_path / "run"
    for _ in range(10):  # 110 reports at most, of 120
        run = Rlx("resume", folder) if folder.exists() else train(name, folder)
        run.read(REPORT, times=chance.randrange(1, 12))
        for _ in range(chance.choice([0, 1000])):  # at once, or in the middle of a checkpoint
            if any((folder / "checkpoints").glob("*.new")):
                break
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        run.kill()
    resume(folder)
    assert_same_run(folder, whole)


@EVERY
@pytest.mark.slow
def test_seeds_in_one_program_have_devices_of_their_own_and_end_as_if_no_kill_had_happened(name, tmp_path):
    for folder in ("whole", "killed"):
        run = train(name, tmp_path / folder, num_seeds=3)
        if folder == "whole":
            assert run.finish()[0] == 0
        else:
            run.read(REPORT, times=55)
            run.kill()
    err = resume(tmp_path / "killed")
    assert "resuming at step" in err and "3 devices (cpu): 1 run of" in err and "begun on" not in err
    for seed in (3, 4, 5):
        assert_same_run(tmp_path / "killed" / f"seed-{seed}", tmp_path / "whole" / f"seed-{seed}")
