"""Runs on object storage: `gs://` through gcsfs (logs, manifests) and tensorstore (arrays), on a server of our own."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from rlx import checkpoint_store, cli, storage, training
from rlx.algorithms import ppo
from rlx.checkpoint import Checkpointer
from rlx.errors import UserError
from rlx.logging import Progress
from rlx.run_directory import read_metrics
from rlx.training import train, train_many
from tests.test_distributed import Processes
from tests.test_kill import REPORT
from tests.test_training import CONFIG, SMALL, assert_same_state, quiet, without_time
from tests.worlds import Counter

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read at its import; it would speak gRPC to the server
pytest.importorskip("gcsfs")
emulator = pytest.importorskip("gcp_storage_emulator.server")

ANOTHER = json.dumps({"id": "another", "host": "elsewhere", "pid": 1})


@pytest.fixture(scope="module", autouse=True)
def server():
    """tensorstore and gcsfs keep the address that they meet first, so there is one server for all tests.

    One with a thread for each connection: its own waits for ever on one that tensorstore keeps open. Requests are
    served one after another all the same: what it keeps in memory knows no threads. It does not say which generation of
    an object it sends, which tensorstore must know to write that object again, and checks no such condition.
    """
    handle, one_by_one = emulator.Router.handle, threading.Lock()
    download = emulator.objects.download

    def alone(*arguments):
        with one_by_one:
            return handle(*arguments)

    def with_generation(request, response, storage):
        download(request, response, storage)
        if response.status < 300:
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http.server, "HTTPServer", http.server.ThreadingHTTPServer)
        patch.setattr(emulator.Router, "handle", alone)
        patch.setattr(emulator.objects, "download", with_generation)
        started = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
        started.start()
        address = f"http://127.0.0.1:{started._api._httpd.server_address[1]}"
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, address)
        patch.setenv("FSSPEC_GCS_TOKEN", "anon")  # for processes that begin here
        import fsspec

        fsspec.config.conf["gcs"] = {"token": "anon"}
        yield
    started.stop()


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """Moves to a machine whose staging folder is empty."""

    def move(name: str) -> None:
        monkeypatch.setenv("RLX_STAGING", str(tmp_path / name))

    move("first")
    return move


@pytest.fixture
def address(request):
    return f"gs://bucket/{request.node.name}"


def run(address, **keywords):
    return train(Counter(5), ppo, SMALL, CONFIG, run_dir=address, **({"progress": quiet()} | keywords))


def stop_after(num_rows: int):
    rows = []
    return lambda row: rows.append(row) or len(rows) == num_rows


def names(address: str) -> set[str]:
    return {path.name for path in storage.home(address).iterdir()}


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_run_resumed_on_another_machine_equals_an_uninterrupted_one(address, machine, tmp_path):
    whole = run(None)
    assert run(address, on_epoch=stop_after(3)).interrupted
    machine("second")
    there = storage.home(address)
    later = json.dumps({"step": 10**6, "eval/return": 1.0}) + "\n"  # what a kill leaves behind the last checkpoint
    (there / "metrics.jsonl").write_text((there / "metrics.jsonl").read_text() + later)
    resumed = run(address, resume=True)
    assert_same_state(resumed.state, whole.state)
    assert without_time(resumed.history) == without_time(whole.history)
    (tmp_path / "metrics.jsonl").write_bytes((there / "metrics.jsonl").read_bytes())
    assert without_time(read_metrics(tmp_path / "metrics.jsonl")) == without_time(whole.history)
    own = {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "eval.json", "curve.png", "writer.json"}
    assert names(address) == own
    staged = {path.name for path in (tmp_path / "second" / "gs" / "bucket" / there.name).iterdir()}
    assert staged == own - {"checkpoints", "writer.json"}


@pytest.mark.slow
def test_many_runs_of_one_program_resume_bit_for_bit(address, machine):
    runs = {f"seed-{seed}": (dataclasses.replace(SMALL, seed=seed), CONFIG) for seed in (0, 1)}
    whole = train_many(Counter(5), ppo, runs, progress=quiet())
    train_many(Counter(5), ppo, runs, run_dir=address, progress=quiet(), on_epoch=stop_after(3))
    machine("third")  # which knows nothing of the others
    with pytest.raises(UserError, match=f"one of the runs in '{address}', which go on together"):
        run(f"{address}/seed-0", resume=True)
    machine("second")
    resumed = train_many(Counter(5), ppo, runs, run_dir=address, progress=quiet(), resume=True)
    for name, of_run in whole.items():
        assert_same_state(resumed[name].state, of_run.state)
        assert without_time(resumed[name].history) == without_time(of_run.history)
        assert names(f"{address}/{name}") >= {"config.json", "metrics.jsonl", "tensorboard", "checkpoints"}


STATE = {"a": np.arange(1000.0, dtype=np.float32)}

DIES = """
import os, sys
import numpy as np
from rlx import checkpoint_store, storage
from rlx.checkpoint import Checkpointer

keeper = Checkpointer(sys.argv[1])
keeper.save(1, {"a": np.arange(1000, dtype=np.float32)})
keeper.wait()
checkpoint_store._hashes = lambda folder: os._exit(9)  # taken when the arrays are there
keeper.save(2, {"a": np.arange(1000, dtype=np.float32)})
keeper.wait()
"""


def test_a_process_that_dies_between_arrays_and_manifest_leaves_what_was_whole(address):
    done = subprocess.run([sys.executable, "-c", DIES, address], env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    keeper = Checkpointer(address)
    assert names(address) == {"1", "2"}
    assert names(f"{address}/2") and "manifest.json" not in names(f"{address}/2")
    state, step = keeper.restore(STATE)
    assert step == 1
    np.testing.assert_array_equal(state["a"], STATE["a"])
    keeper.save(3, STATE)
    keeper.close()
    assert names(address) == {"1", "3"}  # the half one is removed by the next writer


@pytest.mark.slow
def test_two_whole_checkpoints_are_kept_and_one_best(address):
    keeper = Checkpointer(address)
    for step in (10, 20, 30, 40):
        keeper.save(step, STATE)
        keeper.save_best(step, STATE, value=-abs(step - 20))
    keeper.close()
    assert keeper.steps() == [30, 40]
    assert names(address) == {"30", "40", "best"}
    assert names(f"{address}/best") == {"20"}
    keeper = Checkpointer(address)
    keeper.save(30, STATE)  # over one that is there, and before one of a future that was given up
    keeper.close()
    assert keeper.steps() == [30]


@pytest.mark.parametrize("damage", [flip, lambda path: path.unlink()], ids=["flipped", "missing"])
@pytest.mark.parametrize("what", ["manifest.json", "data"])
def test_a_damaged_object_is_detected_and_the_checkpoint_before_restored(damage, what, request):
    address = f"gs://bucket/damage/{what}/{request.node.callspec.id}"
    keeper = Checkpointer(address, warn=(warnings := []).append)
    for step in (1, 2):
        keeper.save(step, STATE)
    keeper.wait()
    folder = storage.home(address) / "2"
    data = max(checkpoint_store._files(folder), key=lambda path: path.stat().length)
    damage(folder / "manifest.json" if what == "manifest.json" else data)
    assert keeper.restore(STATE)[1] == 1
    assert len(warnings) == (0 if what == "manifest.json" and damage is not flip else 1)  # without: never completed
    keeper.close()


def test_the_older_of_two_writers_stops_and_commits_nothing(address):
    rows = []

    def claimed_meanwhile(row):
        rows.append(row["step"])
        if len(rows) == 2:
            (storage.home(address) / storage.WRITER).write_text(ANOTHER)

    with pytest.raises(UserError, match="another process .process 1 on elsewhere. trains there since"):
        run(address, on_epoch=claimed_meanwhile)
    assert len(rows) == 2
    lines = (storage.home(address) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, *rows]  # nothing was uploaded after the claim
    assert all(step < rows[-1] for step in Checkpointer(f"{address}/checkpoints").steps())


def test_a_writer_that_is_overtaken_while_it_saves_writes_no_manifest(address, monkeypatch):
    hashes = checkpoint_store._hashes

    def overtaken(folder):
        (storage.home(address) / storage.WRITER).write_text(ANOTHER)
        return hashes(folder)

    keeper = Checkpointer(f"{address}/checkpoints")
    keeper.save(1, STATE)
    keeper.wait()
    monkeypatch.setattr(checkpoint_store, "_hashes", overtaken)
    keeper.save(2, STATE)
    with pytest.raises(UserError, match="another process"):
        keeper.wait()
    keeper.save_best(2, STATE, value=1.0)
    with pytest.raises(UserError, match="another process"):
        keeper.wait()
    assert keeper.steps() == [1]
    keeper.close()


@pytest.mark.slow
def test_logs_out_of_reach_wait_for_the_next_visit(address, monkeypatch, capsys):
    put, calls = storage.put, []

    def unreliable(path):
        calls.append(path.name)
        if calls.count("metrics.jsonl") == 2 and path.name == "metrics.jsonl":
            raise UserError("out of reach")
        put(path)

    monkeypatch.setattr(storage, "put", unreliable)
    done = run(address, progress=Progress(1))
    assert "not uploaded, which is tried again: out of reach" in capsys.readouterr().err
    assert len((storage.home(address) / "metrics.jsonl").read_text().splitlines()) == len(done.history)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("s3://bucket/run", "gs://BUCKET/PATH alone"),
        ("nowhere://bucket/run", "gs://BUCKET/PATH alone"),
        ("gs://bucket", "gs://BUCKET/PATH alone"),
        (Path("gs://bucket/run"), "an address is a str"),
        ("gs://no-such-bucket/run", "Does the bucket exist"),
        ("gs://bucket/foreign", "is not empty and holds no run .weights.bin."),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_before_anything_compiles(where, message, monkeypatch):
    storage.home("gs://bucket/foreign/weights.bin").write_text("of somebody else")
    monkeypatch.setattr(training, "compile_run", None)
    with pytest.raises(UserError, match=message):
        run(where)


def test_a_missing_library_is_named(address, monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rlx\[gcs\]'"):
        run(address)


@pytest.mark.slow
def test_a_run_that_is_there_is_kept_unless_it_is_overwritten(address):
    run(address)
    first = names(f"{address}/checkpoints")
    with pytest.raises(UserError, match=f"{address}' already holds a run: use `rlx resume {address}`"):
        run(address)
    second = run(address, overwrite=True, on_epoch=stop_after(2))
    assert len((storage.home(address) / "metrics.jsonl").read_text().splitlines()) == len(second.history)
    assert names(f"{address}/checkpoints") != first


@pytest.mark.slow
def test_two_processes_train_there_survive_a_kill_and_one_goes_on(address, machine, tmp_path):
    words = "train ppo probe/lqr --total-steps 2304 --num-envs 4 --unroll-length 8 --eval-episodes 4 --num-evals 2 "
    words += "--iterations-per-epoch 1 --algo.actor-hidden 8 --algo.critic-hidden 8 --algo.num-epochs 1 "
    words += "--algo.num-minibatches 2 --num-groups 2 --num-checkpoints 12"
    run = Processes(2, *words.split(), "--run-dir", address)
    run.each[0].read(REPORT, times=12)  # of 72
    run.kill(1)
    assert "resuming at step" in Processes(2, *words.split(), "--run-dir", address).succeed()
    Processes(2, *words.split(), "--run-dir", tmp_path / "local").succeed()
    there = storage.home(address)
    lines = [json.loads(line) for line in (there / "metrics.jsonl").read_text().splitlines()]
    assert without_time(lines) == without_time(read_metrics(tmp_path / "local" / "metrics.jsonl"))
    assert {path.name for path in (tmp_path / "first" / "gs" / "bucket" / there.name).iterdir()} >= {"metrics.jsonl"}
    machine("second")
    assert cli.main(["resume", address, "--quiet"]) == 0


@pytest.mark.slow
def test_commands_take_an_address(address, machine, tmp_path, capsys):
    words = "--total-steps 512 --num-envs 4 --unroll-length 16 --eval-episodes 4 --num-evals 2 --quiet "
    words += "--algo.actor-hidden 8 --algo.critic-hidden 8 --algo.num-epochs 1 --algo.num-minibatches 2"
    assert cli.main(["train", "ppo", "probe/lqr", "--run-dir", address, *words.split()]) == 0
    assert f"done: {address}" in capsys.readouterr().out
    machine("second")
    assert cli.main(["evaluate", address, "--episodes", "3"]) == 0
    assert len(json.loads((storage.home(address) / "eval.json").read_text())["returns"]) == 3
    assert cli.main(["plot", address, "--out", str(tmp_path / "curve.png")]) == 0
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert cli.main(["resume", address, "--quiet"]) == 0
    assert f"done: {address}" in capsys.readouterr().out
    assert not Path("gs:").exists()
