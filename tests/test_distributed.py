"""Several processes, one run, on this machine (gloo): started, killed, told to stop, gone on with in other numbers."""

from __future__ import annotations

import dataclasses
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from rlx import cli, distributed, external
from rlx.checkpoint import Checkpointer
from rlx.cli.processes import lost_others, take_flags
from rlx.errors import UserError
from rlx.files import locked
from rlx.machine import versions
from rlx.run_directory import read_metrics
from rlx.schedule import TrainConfig, make_schedule
from tests.test_kill import CHECKPOINTS, EPOCHS, REPORT, RUNS, SIZES, Rlx, assert_same_run, restored
from tests.worlds import Counter

ROOT = Path(__file__).resolve().parent.parent
free_port = external.load_file(ROOT / "experiments" / "launch" / "local.py").free_port
END = 60  # seconds in which a lost process ends the others


class Processes:
    """The command line in several processes that know of each other. The first one's stderr holds it up, and so all."""

    def __init__(self, count: int, *arguments: object):
        flags = ["--distributed", "--coordinator", f"localhost:{free_port()}", "--num-processes", count]
        self.each = [Rlx(*arguments, *flags, "--process-index", index) for index in range(count)]

    def finish(self) -> list[tuple[int, str, str]]:
        return [process.finish() for process in self.each]

    def succeed(self) -> str:
        """Waits for the end of all; what the first one said on stderr."""
        found = self.finish()
        assert [status for status, _, _ in found] == [0] * len(found), "\n".join(err for _, _, err in found)
        assert found[0][1].splitlines()[-1].startswith("done: ")
        return found[0][2]

    def kill(self, index: int) -> float:
        """SIGKILL to one; the others must end, with a message. The seconds that it took them."""
        self.each[index].kill()
        began = time.monotonic()
        for process in self.each[:index] + self.each[index + 1 :]:
            status, out, err = process.finish()
            assert status not in (0, 130), out + err
            assert "lost the others" in err or "distributed service" in err, err
        assert time.monotonic() - began < END
        return time.monotonic() - began


def train(name: str, folder: Path, count: int, checkpoints: int = CHECKPOINTS) -> Processes:
    """Begins the run, or goes on with it."""
    sizes = [*SIZES.split(), "--num-checkpoints", checkpoints]
    return Processes(count, "train", name, *RUNS[name].split(), *sizes, "--run-dir", folder)


def rows(folder: Path) -> list[dict[str, float]]:
    found = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in found]


def assert_close(folder: Path, expected: Path, tolerance: float, until: int = EPOCHS) -> None:
    """The same rows, each step once, and values that are close."""
    for row, other in zip(rows(folder), rows(expected), strict=True):
        if row["step"] <= 16 * until:
            assert row == pytest.approx(other, rel=tolerance, abs=tolerance), row["step"]
    assert [row["step"] for row in rows(folder)] == [16 * epoch for epoch in range(EPOCHS + 1)]


# What is wrong before anything starts.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:9", None, None), "all three, or none"),
        (("", 2, 0), "all three, or none"),
        (("localhost:9", 2, 2), "process_index = 2 .* from 0 to 1"),
        (("localhost:9", 2, -1), "process_index = -1 .* from 0 to 1"),
        (("localhost:9", 0, 0), "num_processes = 0 .* at least 1"),
        (("localhost", 2, 0), "coordinator = 'localhost' .* HOST:PORT"),
        (("localhost:99999", 2, 0), "coordinator = 'localhost:99999' .* HOST:PORT"),
        (("no-such-host.invalid:9", 2, 1), "no address for 'no-such-host.invalid'"),
    ],
)
def test_flags_that_cannot_be_are_refused_at_once(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.start(*arguments)


def test_the_flags_are_taken_off_the_others():
    words = "ppo probe/lqr --distributed --coordinator a:1 --num-processes 2 --process-index=1 --algo.gamma 0.9".split()
    flags, rest = take_flags(words)
    assert rest == ["ppo", "probe/lqr", "--algo.gamma", "0.9"]
    assert (flags.coordinator, flags.num_processes, flags.process_index) == ("a:1", 2, 1)


def test_other_commands_are_not_for_several_processes(capsys):
    assert cli.main(["sweep", "ppo", "probe/lqr", "--distributed"]) == 2
    assert "not for `rlx sweep`" in capsys.readouterr().err


def test_different_versions_are_named(monkeypatch):
    other = versions() | {"jax": "0.0.1"}
    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, value, other])
    with pytest.raises(UserError, match=f"jax is {jax.__version__} on process 0 and 0.0.1 on process 2"):
        distributed.check_versions()
    monkeypatch.setattr(distributed, "gather", lambda value: [value, value])
    distributed.check_versions()


@pytest.mark.parametrize(
    ("change", "num_runs", "message"),
    [
        ({"num_devices": 2}, 1, "num_devices = 2 .* 0 or 4"),
        ({}, 2, "runs in one program = 2 .* 1 in each run of 2 processes"),
        ({"split": "runs"}, 1, "split = 'runs' .* auto or envs"),
        ({"num_groups": 2}, 1, "num_groups = 2 .* a multiple of the 4 devices of 2 processes"),
    ],
)
def test_several_processes_split_the_environments_of_one_run_over_all_devices(change, num_runs, message, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda: [None] * 4)
    sizes = TrainConfig(num_envs=8, eval_decisions=5)
    assert make_schedule(Counter(5), sizes).num_devices == 4
    with pytest.raises(UserError, match=message):
        make_schedule(Counter(5), dataclasses.replace(sizes, **change), num_runs)


def test_a_folder_is_waited_for_as_long_as_processes_may_take_to_end(tmp_path):
    with locked(tmp_path):
        began = time.monotonic()
        with pytest.raises(UserError, match="another process trains there"), locked(tmp_path, patience=0.6):
            pass
        assert time.monotonic() - began > 0.5
    with locked(tmp_path):
        pass


def test_one_process_asks_nobody():
    assert distributed.is_first() and not distributed.several() and not distributed.told_to_stop()
    assert distributed.on_first(lambda: (1, "a")) == (1, "a")  # as it is, not as JSON


def test_what_xla_says_of_the_others_is_told_from_errors_of_this_process():
    gone = "Gloo all-reduce failed: Connection closed by peer"
    for error in (jax.errors.JaxRuntimeError(f"UNAVAILABLE: {gone}"), ValueError(f"UNKNOWN: {gone}")):
        assert lost_others(error)
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    for error in (full, ValueError("rows of unequal length"), UserError("gamma = 2 is not possible"), OSError("disk")):
        assert not lost_others(error)


# What goes wrong while they start.


def arguments_alone(index: int, port: int) -> list[str]:
    """Of one of two processes."""
    flags = f"--distributed --coordinator localhost:{port} --num-processes 2 --process-index {index} --start-timeout"
    return ["train", "ppo", *RUNS["ppo"].split(), "--run-dir", "never", *flags.split()]


def test_a_process_that_does_not_come_and_an_address_that_nobody_answers_are_told_apart():
    waits, searches = (Rlx(*arguments_alone(index, free_port()), 3) for index in (0, 1))
    status, _, err = waits.finish()
    assert status == 2 and "not all 2 processes have come" in err.splitlines()[-1], err
    status, _, err = searches.finish()
    assert status == 2 and "nobody answers at 'localhost:" in err.splitlines()[-1], err


# Runs.


def short(folder: Path, *more: object) -> Processes:
    """Two processes, six epochs."""
    small = ["--total-steps", 16 * 6, "--num-evals", 2, "--run-dir", folder]
    return Processes(2, "train", "ppo", *RUNS["ppo"].split(), *SIZES.split(), *small, *more)


def test_two_processes_train_one_run(tmp_path):
    assert "2 devices of 2 processes (cpu): 2 environments each" in short(tmp_path / "run").succeed()
    assert [row["step"] for row in rows(tmp_path / "run")] == [16 * epoch for epoch in range(7)]
    assert Checkpointer(tmp_path / "run" / "checkpoints").steps() == [80, 96]


SLOW = pytest.mark.slow
POD = [SLOW, pytest.mark.pod]
EVERY = pytest.mark.parametrize(
    ("name", "count"),
    [
        pytest.param(name, count, marks=SLOW if (name, count) == ("ppo", 2) else POD)
        for name in ("ppo", "sac", "hasac")
        for count in (2, 4)
    ],
    scope="module",
)
FOUR = pytest.mark.parametrize(
    ("name", "count"), [pytest.param(name, 4, marks=POD) for name in ("ppo", "sac", "hasac")], scope="module"
)


@pytest.fixture(scope="module")
def whole(name, count, tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp(f"{name}-{count}") / "whole"
    train(name, folder, count).succeed()
    return folder


@EVERY
def test_the_curve_is_that_of_one_process_with_as_many_devices(whole, name, count, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(count))
    sizes = [*SIZES.split(), "--num-checkpoints", CHECKPOINTS, "--split", "envs"]
    status, _, err = Rlx("train", name, *RUNS[name].split(), *sizes, "--run-dir", tmp_path / "one").finish()
    assert status == 0, err
    equal = rows(tmp_path / "one") == rows(whole) and restored(tmp_path / "one") == restored(whole)
    print(f"{name}, {count} processes beside one with {count} devices: {'bit for bit' if equal else 'not equal'}")
    # Sums over devices may be taken in another order, and learning makes more of it from epoch to epoch.
    assert_close(whole, tmp_path / "one", 1e-4, until=20)


@pytest.fixture(scope="module")
def stopped(name, count, tmp_path_factory):
    """A run of which one process was told to stop, and how each of them ended. Whoever goes on with it takes a copy."""
    folder = tmp_path_factory.mktemp(f"{name}-{count}") / "stopped"
    index, number = (count - 1, signal.SIGTERM) if count == 2 else (0, signal.SIGINT)
    run = train(name, folder, count)
    run.each[0].read(REPORT, times=12)  # behind a checkpoint
    run.each[index].process.send_signal(number)
    time.sleep(4)  # it is heard within a second or two; until then the pipe that is full holds the run up
    found = run.finish()
    print(f"{name}, {count} processes: {number.name} to process {index}")
    return folder, found


@EVERY
def test_a_signal_to_any_process_saves_once_and_ends_all(stopped, name, count):
    folder, found = stopped
    assert [status for status, _, _ in found] == [130] * count, found
    last = rows(folder)[-1]["step"]
    assert last == Checkpointer(folder / "checkpoints").steps()[-1] < EPOCHS * 16
    assert f"stopped at step {last:,}; go on with: the same command again\n" in found[0][1]
    print(f"{name}, {count} processes: all saved and ended at step {last}")


@EVERY
def test_a_lost_process_ends_the_others_and_the_same_command_goes_on_as_if_nothing_had_happened(
    whole, stopped, name, count, tmp_path
):
    folder, index = tmp_path / "run", 0 if count == 2 else count - 1
    shutil.copytree(stopped[0], folder)
    run = train(name, folder, count)
    run.each[0].read(REPORT, times=3)  # not so far that the run could end
    print(f"{name}, {count} processes: process {index} killed, the others ended in {run.kill(index):.1f} s")
    assert "resuming at step" in train(name, folder, count).succeed()
    assert_same_run(folder, whole)


@FOUR
def test_saved_by_four_goes_on_in_two_and_in_one(whole, stopped, name, count, tmp_path):
    step = Checkpointer(stopped[0] / "checkpoints").steps()[-1]
    assert restored(stopped[0])[1] == step  # in this one process, on one device
    for number in (2, 1):
        folder = tmp_path / str(number)
        shutil.copytree(stopped[0], folder)
        if number == 2:
            said = Processes(2, "resume", folder).succeed()
        else:
            status, _, said = Rlx("resume", folder).finish()
            assert status == 0, said
        assert f"resuming at step {step}\n" in said and f"begun on 4 devices, goes on on {number}" in said
        assert_close(folder, whole, 1e-4, until=step // 16 + 5)
        assert rows(folder)[: step // 16 + 1] == rows(whole)[: step // 16 + 1]
        print(f"{name}: saved by four at step {step}, gone on with by {number}")


@pytest.mark.parametrize(("name", "count"), [pytest.param("ppo", 4, marks=POD)], scope="module")
def test_twenty_kills_lose_nothing_and_repeat_nothing(whole, name, count, tmp_path):
    chance, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        folder, steps = tmp_path / f"run-{runs}", [0]
        while kills < 20 and len(steps) < EPOCHS - 60:  # so far from the end that no run comes to it unkilled
            run = train(name, folder, count, checkpoints=EPOCHS // 2)  # so that it gets further between the kills
            run.each[0].read(REPORT, times=chance.randrange(1, 6))
            for _ in range(chance.choice([0, 1000])):  # at once, or in the middle of a checkpoint
                if any((folder / "checkpoints").glob("*.new*")):
                    break
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.05))
            index = chance.randrange(count)
            seconds, kills = run.kill(index), kills + 1
            steps = [row["step"] for row in rows(folder)]
            assert steps == [16 * epoch for epoch in range(len(steps))]
            kept = Checkpointer(folder / "checkpoints").steps()
            print(f"kill {kills}: process {index} at step {steps[-1]}, others ended in {seconds:.1f} s, kept {kept}")
        train(name, folder, count, checkpoints=EPOCHS // 2).succeed()
        assert_same_run(folder, whole)
        print(
            f"{EPOCHS + 1} rows, each once; checkpoints, metrics, events, evaluation are those of a run without kills"
        )
        runs += 1


WITH_VERSION = """
import sys, rlx.machine
found = rlx.machine.versions() | {"jax": sys.argv.pop(1)}
rlx.machine.versions = lambda: found
from rlx.cli import main
sys.exit(main())
"""


@SLOW
def test_the_command_begun_again_is_done_and_one_with_other_settings_is_refused(tmp_path):
    short(tmp_path / "run").succeed()
    assert "resuming at step 96\n" in short(tmp_path / "run").succeed()
    for more, message in ((("--seed", 4), "train.seed = 4"), (("--env.scale", 2), "env_overrides = {'scale': 2}")):
        for status, _, err in short(tmp_path / "run", *more).finish():
            assert status == 2 and message in err, err


@SLOW
def test_two_processes_with_different_versions_are_refused():
    started, port = [], free_port()
    for index, version in enumerate(("1.0", "2.0")):
        command = [sys.executable, "-c", WITH_VERSION, version, *arguments_alone(index, port), "60"]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and "jax is 1.0 on process 0 and 2.0 on process 1" in err, err


@SLOW
def test_what_the_first_process_alone_meets_is_told_by_all(tmp_path):
    """A run directory that cannot be made. Root may write where nobody may: hence a file in its way."""
    (tmp_path / "file").write_text("")
    for status, _, err in train("ppo", tmp_path / "file" / "run", 2).finish():
        assert status == 2 and "error: " in err and str(tmp_path / "file") in err, err
