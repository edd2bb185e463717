"""The scripts of experiments/launch: what they start, what they hand on, and what the smoke test says."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from rlx import external

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "experiments" / "launch"
free_port = external.load_file(LAUNCH / "local.py").free_port
SMOKE = [sys.executable, str(LAUNCH / "smoke.py")]
LIMIT = 300  # seconds
SLOW = pytest.mark.slow


def local(count: int, *command: object, **keywords) -> subprocess.Popen:
    full = [sys.executable, str(LAUNCH / "local.py"), str(count), *map(str, command)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(full, **pipes, **keywords)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err


def checks(out: str) -> list[str]:
    """The lines of the smoke test alone: gloo greets its peers on stdout, every process when it likes."""
    return [line for line in out.splitlines() if line.startswith(("ok    ", "all "))]


def is_free(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("localhost", port)) != 0


SAYS = """
import json, os, sys
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
os.write(1, (json.dumps([sys.argv[1], words]) + "\\n").encode())  # at once: others write there too
sys.exit(int(words["--process-index"]))
"""


def test_local_starts_each_with_its_flags_and_ends_with_the_highest_status():
    status, out, err = finish(local(3, sys.executable, "-c", SAYS))
    assert status == 2, err
    found = sorted((json.loads(line) for line in out.splitlines()), key=lambda line: line[1]["--process-index"])
    assert [flag for flag, _ in found] == ["--distributed"] * 3
    assert [words["--process-index"] for _, words in found] == ["0", "1", "2"]
    assert {words["--num-processes"] for _, words in found} == {"3"}
    assert len({words["--coordinator"] for _, words in found}) == 1


WAITS = """
import os, signal, sys, time
index = sys.argv[-1]
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, f"told {index}\\n".encode()), sys.exit(130)))
os.write(1, f"waits {index}\\n".encode())
time.sleep(60 if index == "0" else 0)
"""


def test_local_hands_sigterm_to_the_first():
    process = local(2, sys.executable, "-c", WAITS)
    seen = {process.stdout.readline().strip() for _ in range(2)}
    assert seen == {"waits 0", "waits 1"}
    process.send_signal(signal.SIGTERM)
    status, out, err = finish(process)
    assert (status, out.strip()) == (130, "told 0"), err


def test_each_may_have_a_gpu_of_its_own():
    says = "import os; os.write(1, os.environ['CUDA_VISIBLE_DEVICES'].encode() + b' ')"
    command = [sys.executable, str(LAUNCH / "local.py"), "--gpu-each", "3", sys.executable, "-c", says]
    assert sorted(subprocess.run(command, capture_output=True, text=True).stdout.split()) == ["0", "1", "2"]


def test_local_refuses_what_starts_nothing():
    for words in ((0, "true"), (2,)):
        status, _, err = finish(local(*words))
        assert status == 2 and "at least 1" in err


def run_slurm(tmp_path: Path, *words: str, status: int) -> tuple[int, str, list[str]]:
    """The job's script beside an `srun` that ends with `status`; the lines that `srun` and `scontrol` were given."""
    log = tmp_path / "log"
    log.touch()
    for name in ("srun", "scontrol"):
        ends = status if name == "srun" else 0
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {log}\nexit {ends}\n')
        (tmp_path / name).chmod(0o755)
    # The script puts ./.venv/bin first in PATH, where these are not.
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    command = ["bash", str(LAUNCH / "slurm.sh"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, cwd=tmp_path)
    return done.returncode, done.stderr, log.read_text().splitlines()


def test_a_job_that_saved_itself_is_queued_anew_and_one_that_failed_is_not(tmp_path):
    train = ("rlx", "train", "ppo", "brax/ant", "--run-dir", "a b")
    srun = "srun --kill-on-bad-exit=0 --cpus-per-task=1 rlx train ppo brax/ant --run-dir a b --distributed"
    assert run_slurm(tmp_path, *train, status=130)[::2] == (130, [srun, "scontrol requeue 7"])
    for status in (0, 1, 2):
        (tmp_path / "log").unlink()
        assert run_slurm(tmp_path, *train, status=status)[::2] == (status, [srun])
    (tmp_path / "log").unlink()
    _, _, (line,) = run_slurm(tmp_path, "--smoke", "/shared", status=0)
    assert line.endswith("python experiments/launch/smoke.py --run-dir /shared --distributed")
    (tmp_path / "log").unlink()
    for words, message in (((), "what to run"), ((*train, "--overwrite"), "begin anew")):
        (tmp_path / "log").unlink(missing_ok=True)
        status, err, lines = run_slurm(tmp_path, *words, status=0)
        assert (status, lines) == (2, []) and message in err


def test_a_job_told_to_stop_waits_for_how_its_processes_end(tmp_path):
    """SIGTERM comes to the script and to `srun`, which ends at once or after a while."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/log\n')
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    for wait in ("0", "0.5"):
        (tmp_path / "srun").write_text(
            f"#!{sys.executable}\nimport signal, sys, time\n"
            f"signal.signal(signal.SIGTERM, lambda *_: (time.sleep({wait}), sys.exit(130)))\n"
            f"open('{tmp_path}/ready-{wait}', 'w')\ntime.sleep(60)\n"
        )
        for name in ("srun", "scontrol"):
            (tmp_path / name).chmod(0o755)
        command = ["bash", str(LAUNCH / "slurm.sh"), "rlx", "train"]
        job = subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE)
        while not (tmp_path / f"ready-{wait}").exists():
            time.sleep(0.02)
        os.killpg(job.pid, signal.SIGTERM)
        job.communicate(timeout=LIMIT)
        assert job.returncode == 130
    assert (tmp_path / "log").read_text() == "requeue 7\n" * 2


def test_the_pods_commands_reach_every_host(tmp_path):
    log = tmp_path / "log"
    (tmp_path / "gcloud").write_text(f'#!/bin/sh\nfor word in "$@"; do echo "$word" >> {log}; done\n')
    (tmp_path / "gcloud").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TPU": "pod", "ZONE": "z"}

    def run(*words: str) -> tuple[int, list[str], str]:
        log.write_text("")
        command = ["bash", str(LAUNCH / "tpu_pod.sh"), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, cwd=ROOT)
        return done.returncode, log.read_text().splitlines(), done.stderr

    status, said, _ = run("create", "v5litepod-16", "--spot")
    assert status == 0 and said[:5] == ["compute", "tpus", "tpu-vm", "create", "pod"] and said[-1] == "--spot"
    status, said, _ = run(
        "run", "rlx", "train", "ppo", "brax/ant", "--env.split", "{'a': ['b c']}", "--run-dir", "gs://b/r"
    )
    assert status == 0 and "--worker=all" in said and "--worker=0" in said
    (line,) = [word for word in said if "nohup" in word]
    command = line.split("nohup ")[1].split(" > run.log")[0]
    plain = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True
    ).stdout.splitlines()
    assert plain == [
        *"rlx train ppo brax/ant --env.split".split(),
        "{'a': ['b c']}",
        "--run-dir",
        "gs://b/r",
        "--distributed",
    ]
    with_path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "rlx" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "rlx" / ".venv" / "bin" / "rlx").write_text("#!/bin/sh\nexec sleep 5\n")
    (tmp_path / "rlx" / ".venv" / "bin" / "rlx").chmod(0o755)
    began = time.monotonic()
    subprocess.run(["bash", "-c", line], cwd=tmp_path, env=os.environ | with_path, capture_output=True, timeout=LIMIT)
    assert time.monotonic() - began < 4  # a connection may end, and the run goes on
    status, said, _ = run("smoke", "gs://b/r")
    assert status == 0 and any("smoke.py --run-dir gs://b/r" in word for word in said)
    assert run("start")[0] == 2 and run("smoke")[0] != 0
    del environment["TPU"]
    status, said, err = run("delete")
    assert status != 0 and not said and "the name of the pod" in err


def alone(index: int, port: int, *more: object) -> list[str]:
    """The smoke test as one of two processes."""
    flags = f"--coordinator localhost:{port} --num-processes 2 --process-index {index}".split()
    return [*SMOKE, "--run-dir", "never", *flags, *map(str, more)]


def test_the_smoke_test_says_that_a_process_is_missing_or_that_an_address_is_wrong():
    each = [
        subprocess.Popen(alone(index, free_port(), "--start-timeout", 3), stderr=subprocess.PIPE, text=True)
        for index in (0, 1)
    ]
    for process, message in zip(each, ("not all 2 processes have come", "nobody answers at 'localhost:"), strict=True):
        _, err = process.communicate(timeout=LIMIT)
        assert process.returncode == 1 and f"FAIL  {message}" in err, err


@SLOW
def test_the_smoke_test_passes_on_two_processes_and_leaves_nothing(tmp_path):
    status, out, err = finish(local(2, *SMOKE, "--run-dir", tmp_path / "runs"))
    print(out)
    assert status == 0, err
    *lines, last = checks(out)
    names = ["devices", "collectives", "run directory", "save, restore", "resume"]
    assert [line.split(":")[0] for line in lines] == [f"ok    {name}" for name in names]
    assert "2 processes on 1 host, 2 x cpu" in lines[0] and last.startswith("all 5 checks passed in ")
    assert not any((tmp_path / "runs").iterdir())


@SLOW
def test_the_smoke_test_names_a_folder_that_cannot_be_written_to():
    """Root may write wherever the disk lets it, not into /sys."""
    status, out, err = finish(local(2, *SMOKE, "--run-dir", "/sys/smoke"))
    print(err)
    failed = [line for line in err.splitlines() if line.startswith("FAIL  run_dir = '/sys/smoke/")]
    assert status == 1 and len(failed) == 2 and all("cannot be written to" in line for line in failed), err
    assert [line.split(":")[0] for line in checks(out)] == ["ok    devices", "ok    collectives"]


WITH_VERSION = """
import runpy, sys, rlx.machine
found = rlx.machine.versions() | {"jax": sys.argv[1]}
rlx.machine.versions = lambda: found
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@SLOW
def test_the_smoke_test_names_versions_that_differ():
    port = free_port()
    each = [
        subprocess.Popen(
            [sys.executable, "-c", WITH_VERSION, version, *alone(index, port)[1:]], stderr=subprocess.PIPE, text=True
        )
        for index, version in enumerate(("1.0", "2.0"))
    ]
    for process in each:
        _, err = process.communicate(timeout=LIMIT)
        print(err)
        assert process.returncode == 1 and "FAIL  the processes have different versions: jax is 1.0" in err, err


ASKS = """
from rlx import distributed
distributed.start(timeout=60)
import jax
print(jax.process_index(), jax.process_count(), distributed.gather(jax.process_index()), flush=True)
"""


@SLOW
def test_slurms_variables_are_enough():
    """Of a step of two tasks on this machine; jax makes the port of the job's number: 61440 and that modulo 4096."""
    job = next(job for job in range(os.getpid() % 4096, 8192) if is_free(61440 + job % 4096))
    shared = {"SLURM_JOB_ID": str(job), "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    each = []
    for index in range(2):
        own = {"SLURM_PROCID": str(index), "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        each.append(subprocess.Popen([sys.executable, "-c", ASKS], env=os.environ | shared | own, **pipes))
    for index, process in enumerate(each):
        out, err = process.communicate(timeout=LIMIT)
        assert f"{index} 2 [0, 1]" in out.splitlines(), err


@SLOW
def test_weak_scaling_is_measured_and_recorded(tmp_path):
    script = [sys.executable, str(ROOT / "experiments" / "benchmarks" / "processes.py")]
    sizes = "--env probe/lqr --num-envs 4 --iterations 1 --repeats 1 --processes 1 2".split()
    done = subprocess.run(
        [*script, *sizes, "--out", str(tmp_path / "a.json")], capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["devices"] for row in rows] == [1, 2] and [row["num_envs"] for row in rows] == [4, 8]
    assert rows[1]["steps"] == 2 * rows[0]["steps"]
    assert rows[0]["sums"] == 0 < rows[1]["sums"]
    assert all(len(found) == 1 and found[0] > 0 for row in rows for found in row["seconds"].values())
    assert str(jax.__version__) == json.loads((tmp_path / "a.json").read_text())["versions"]["jax"]
