from __future__ import annotations

import io
import json
import math
import os
import struct
import subprocess
import sys
import threading
import types

import pytest

from rlx import logging
from rlx.errors import UserError
from rlx.files import locked
from rlx.logging import JsonlWriter, Progress, TensorboardWriter, WandbWriter
from rlx.run_directory import RunDirectory, group_of, read_metrics


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_run_directory_records_config_format_and_versions(tmp_path):
    run = RunDirectory.create(tmp_path / "a" / "b", {"algorithm": "ppo", "sizes": (1, 2)})
    assert run.config == RunDirectory.open(tmp_path / "a" / "b").config
    assert run.config["algorithm"] == "ppo" and run.config["sizes"] == [1, 2] and run.config["format"] == 1
    assert {"python", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint"} <= set(run.config["versions"])
    assert [p.name for p in run.path.iterdir()] == ["config.json"]
    assert run.metrics_path == run.path / "metrics.jsonl" and run.checkpoints_path == run.path / "checkpoints"


def test_a_run_is_not_overwritten_unless_asked(tmp_path):
    run = RunDirectory.create(tmp_path, {"seed": 1})
    (run.checkpoints_path / "10").mkdir(parents=True)
    run.metrics_path.write_text("{}\n")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds a run: use `rlx resume .*`, or --overwrite"):
        RunDirectory.create(tmp_path, {"seed": 2})
    assert RunDirectory.open(tmp_path).config["seed"] == 1
    RunDirectory.create(tmp_path, {"seed": 2}, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "notes.txt"]
    assert RunDirectory.open(tmp_path).config["seed"] == 2


def test_a_folder_that_is_no_run_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"not empty and holds no run \(thesis.tex\)"):
            RunDirectory.create(tmp_path, {}, overwrite)
    with pytest.raises(UserError, match="is a file"):
        RunDirectory.create(tmp_path / "thesis.tex", {})
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_opening_what_is_no_run_says_why(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        RunDirectory.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no config.json"):
        RunDirectory.open(tmp_path)
    for text in ('{"format": 1', "[]", "{}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json' is damaged"):
            RunDirectory.open(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 9}')
    with pytest.raises(UserError, match="has format 9; this version of rlx reads format 1"):
        RunDirectory.open(tmp_path)


def test_metrics_are_one_json_object_a_line_readable_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(2**31 + 1, {"train/return": 1.5, "train/loss": math.nan, "time/x": math.inf})
    expected = {"step": 2**31 + 1, "train/return": 1.5, "train/loss": None, "time/x": None}
    assert [json.loads(line) for line in path.read_text().splitlines()] == [expected]
    assert list(expected) == list(json.loads(path.read_text()))
    row = read_metrics(path)[0]
    assert row["step"] == 2**31 + 1 and row["train/return"] == 1.5 and math.isnan(row["train/loss"])
    writer.close()


def test_metrics_behind_the_restored_step_and_a_torn_line_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(f'{{"step": {step}, "a": {step}.5, "b": null}}\n' for step in (10, 20, 30))
    path.write_text(whole + '{"step": 20, "a"')
    writer = JsonlWriter(path, resume_step=20)
    writer.write(25, {"a": 1.0})
    writer.close()
    assert path.read_text() == whole[: whole.index('{"step": 30')] + '{"step": 25, "a": 1.0}\n'


def test_a_new_file_starts_empty_and_resuming_at_zero_keeps_only_step_zero(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    JsonlWriter(path, resume_step=0).close()
    assert path.read_text() == '{"step": 0}\n'
    JsonlWriter(path).close()
    assert path.read_text() == ""


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 of .* is damaged"):
        read_metrics(path)
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "none.jsonl")


def events(folder) -> list[tuple[int, str, float]]:
    """All scalars in a folder of event files, in the order of time."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in folder.glob("*tfevents*"):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            event = event_pb2.Event.FromString(data[start + 12 : start + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            start += length + 16
        assert start == len(data)
    return sorted(found)


def test_events_behind_the_restored_step_are_gone(tmp_path):
    writer = TensorboardWriter(tmp_path)
    for step, value in ((10, 5.0), (20, 6.0), (2**31 + 4, 6.5)):
        writer.write(step, {"eval/return": value, "train/loss": math.nan})
    writer.close()
    assert events(tmp_path) == [(10, "eval/return", 5.0), (20, "eval/return", 6.0), (2**31 + 4, "eval/return", 6.5)]
    writer = TensorboardWriter(tmp_path, resume_step=10)
    writer.write(15, {"eval/return": 7.0})
    writer.close()
    assert events(tmp_path) == [(10, "eval/return", 5.0), (15, "eval/return", 7.0)]
    assert all("tfevents" in path.name for path in tmp_path.iterdir())


def test_an_event_file_torn_by_a_kill_is_cut_too(tmp_path):
    writer = TensorboardWriter(tmp_path)
    for step in (10, 20):
        writer.write(step, {"a": step})
    writer.close()
    (path,) = tmp_path.glob("*tfevents*")
    path.write_bytes(path.read_bytes()[:-3])
    TensorboardWriter(tmp_path, resume_step=30).close()
    assert events(tmp_path) == [(10, "a", 10.0)]


def test_writers_hold_no_file_open(tmp_path):
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    writers = [TensorboardWriter(tmp_path / str(i)) for i in range(20)]
    writers += [JsonlWriter(tmp_path / f"{i}.jsonl") for i in range(20)]
    for writer in writers:
        writer.write(1, {"a": 1.0})
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert events(tmp_path / "3") == [(1, "a", 1.0)]


def test_a_run_that_one_process_trains_is_refused_to_another(tmp_path):
    code = "import sys\nfrom rlx.files import locked\n"
    code += "with locked(sys.argv[1]): print('in', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(UserError, match="another process trains there"), locked(tmp_path):
            pass
        other.kill()
        other.wait()
    with locked(tmp_path):  # a killed one holds nothing
        pass


def test_the_group_of_a_run_is_the_folder_that_lists_it(tmp_path):
    (tmp_path / "runs.json").write_text('{"runs": ["a", "b"]}')
    assert group_of(tmp_path / "a") == tmp_path
    assert group_of(tmp_path / "c") is None and group_of(tmp_path) is None


def test_without_wandb_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install 'rlx\\[wandb\\]'"):
        WandbWriter(RunDirectory.create(tmp_path, {}))


def test_a_resumed_run_goes_on_with_the_same_wandb_run(tmp_path, monkeypatch):
    seen = []
    run = types.SimpleNamespace(log=lambda row, step: seen.append((row, step)), finish=lambda: seen.append("finish"))
    fake = types.SimpleNamespace(init=lambda **options: (seen.append(options["id"]), run)[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    directory = RunDirectory.create(tmp_path, {})
    for resume_step in (None, 5, None):
        writer = WandbWriter(directory, resume_step=resume_step)
    writer.write(7, {"a": 1.0})
    writer.close()
    first, second, third, row, end = seen
    assert first == second != third
    assert (row, end) == (({"a": 1.0}, 7), "finish")


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves two seconds each time it is read."""
    ticks = iter(range(0, 1000, 2))
    monkeypatch.setattr(logging.time, "perf_counter", lambda: float(next(ticks)))


def test_without_a_terminal_progress_is_plain_lines(clock):
    stream = io.StringIO()
    progress = Progress(2_000_000, stream)
    with progress.phase("compiling"):
        assert stream.getvalue() == "compiling ...\n"
    progress.update(500_000, 1000.0, {"train/return": 1.25, "train/loss": 3.0})
    progress.update(1_000_000, 0.0, {"eval/return": -7.0})
    progress.message("saved [1]")
    progress.close()
    assert stream.getvalue().splitlines() == [
        "compiling ...",
        "compiling: 2.0 s",
        "500,000/2,000,000 steps  1,000 steps/s  train/return 1.25  25 min left",
        "1,000,000/2,000,000 steps  0 steps/s  train/return 1.25  eval/return -7  4 s left",
        "saved [1]",
    ]


def test_time_left_of_a_second_run_is_by_its_own_pace(clock):
    progress = Progress(100, stream := io.StringIO())
    progress.update(10, 5, {})
    for _ in range(100):
        logging.time.perf_counter()
    for step in (10, 20, 30):
        progress.update(step, 5, {})
    assert stream.getvalue().splitlines()[-1].endswith("14 s left")  # 10 steps take 2 s


def test_a_phase_that_comes_again_is_summed_and_not_announced(clock):
    stream = io.StringIO()
    progress = Progress(10, stream)
    for _ in range(3):
        with progress.phase("evaluating"):
            pass
    assert progress.phases == {"evaluating": 6.0}
    assert stream.getvalue() == "evaluating ...\nevaluating: 2.0 s\n"


def test_a_phase_that_fails_is_not_reported_as_done(clock):
    stream = io.StringIO()
    progress = Progress(10, stream)
    with pytest.raises(KeyError), progress.phase("building"):
        raise KeyError
    assert stream.getvalue() == "building ...\n"
    assert progress.phases == {"building": 2.0}


def test_quiet_progress_measures_and_prints_nothing(clock):
    stream = Terminal()
    progress = Progress(10, stream, quiet=True)
    with progress.phase("compiling"):
        progress.update(5, 1.0, {})
    progress.message("hello")
    progress.close()
    assert stream.getvalue() == "" and progress.phases == {"compiling": 2.0}


def test_on_a_terminal_phases_and_the_last_report_stay_on_the_screen():
    stream = Terminal()
    progress = Progress(100, stream)
    with progress.phase("compiling"):
        pass
    progress.update(50, 10.0, {"eval/return": 3.0})
    progress.message("[saved]")
    progress.close()
    progress.close()
    text = stream.getvalue()
    assert "compiling: 0.0 s" in text and "[saved]" in text
    assert "50/100 steps  10 steps/s  eval/return 3  5 s left" in text.splitlines()[-1]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.9, "59 s"), (61, "1 min"), (3660, "1 h 01 min")])
def test_time_left_is_given_in_two_units_at_most(seconds, text):
    assert logging._duration(seconds) == text


def test_a_run_goes_on_when_nobody_reads_its_progress_any_more():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    progress = Progress(10, stream=Closed())
    progress.update(5, 1.0, {})
    progress.message("unheard")
    assert progress.quiet


def test_a_run_directory_that_cannot_be_made_is_refused_before_it_is_asked_for(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/below/run' cannot be written: see .*file'"):
        RunDirectory.check_free(tmp_path / "file" / "below" / "run")
