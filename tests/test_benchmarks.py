"""The benchmarks measure what they say and write what they promise; their numbers are not tests."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from rlx import benchmark, cli
from rlx.errors import UserError
from rlx.footprint import KINDS
from rlx.machine import commit
from rlx.measuring import alternate, iterations_per_block, rate_with_refresh

PEERS = Path(__file__).resolve().parent.parent / "experiments" / "benchmarks" / "against_peers.py"
TINY = ["--num-envs", "8", "--iterations", "1", "--repeats", "1", "--unroll-length", "4"]


def script(name):
    """A script of experiments/benchmarks as a module."""
    spec = importlib.util.spec_from_file_location(name, PEERS.with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peers():
    return script("against_peers")


@pytest.mark.parametrize(
    ("kind", "one", "eight"),
    [
        ("all-reduce", (0.0, 0), (2 * 7 / 8 * 300, 3 * 14)),
        ("all-gather", (0.0, 0), (7 / 8 * 300, 3 * 7)),
        ("all-to-all", (0.0, 0), (7 / 8 * 300, 3 * 7)),
        ("ragged-all-to-all", (0.0, 0), (7 / 8 * 300, 3 * 7)),
        ("reduce-scatter", (0.0, 0), (7 * 300, 3 * 7)),
        ("collective-permute", (300, 3), (300, 3)),
    ],
)
def test_bytes_and_hops_of_a_ring_by_hand(kind, one, eight):
    """Three messages of 100 bytes of result."""
    sent = script("scaling").sent
    assert kind in KINDS
    message = {"kind": kind, "bytes": 100, "times": 3}
    assert (sent(message, 1), sent(message, 8)) == (pytest.approx(one), pytest.approx(eight))


def row(physics, num_envs, program, rate, tracing=1.0, compiling=1.0):
    seconds = {} if program == benchmark.RAW else {"tracing_s": tracing, "compiling_s": compiling}
    speeds = {"median": rate, "min": rate / 2, "max": rate * 2}
    return {"physics": physics, "num_envs": num_envs, "program": program, "steps_per_second": speeds, **seconds}


@pytest.mark.slow
def test_the_environment_and_training_are_measured_and_recorded(tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = ["benchmark", "probe/lqr", "ppo", *TINY, "--algo.num_minibatches=2", "--out", str(out)]
    assert cli.main(arguments) == 0
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert [r["program"] for r in rows] == ["environment", "training"]
    for r in rows:
        speeds = r["steps_per_second"]
        assert 0 < speeds["min"] <= speeds["median"] <= speeds["max"]
        assert r["physics"] == "" and r["num_envs"] == 8 and r["iterations_per_block"] == 1
        assert r["steps_per_refresh"] == 3_000_000 // 32 // 50 * 32  # of the preset: a fiftieth, in whole iterations
        assert all(r[name] > 0 for name in ("building_s", "tracing_s", "compiling_s", "refresh_s"))
        assert r["peak_memory_mib"] >= r["running_memory_mib"] > 50
    (ratio,) = result["ratios"]
    speeds = [r["steps_per_second"]["median"] for r in rows]
    assert ratio == {"num_envs": 8, "ratio": "training / environment", "value": speeds[1] / speeds[0]}
    assert result["settings"]["algo.num_minibatches"] == 2 and result["settings"]["unroll_length"] == 4
    assert (
        result["command"].startswith("rlx benchmark probe/lqr ppo --num-envs 8 ") and "--out" not in result["command"]
    )
    assert result["versions"]["rlx"] and "cores" in result["device"] and result["commit"] == commit()
    printed = capsys.readouterr()
    assert "training / environment" in printed.out and "compiling" in printed.err


@pytest.mark.slow
def test_every_engine_of_the_machine_is_measured_beside_the_raw_simulator(tmp_path):
    out = tmp_path / "result.json"
    assert cli.main(["benchmark", "playground/CartpoleBalance", *TINY, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    kinds = [(r["program"], r["physics"]) for r in result["rows"]]
    assert kinds == [("environment", "mujoco"), ("environment", "mjx"), (benchmark.RAW, "mujoco")]
    assert {r["ratio"] for r in result["ratios"]} == {
        "environment steps/s: mujoco / mjx",
        "environment tracing + compiling: mujoco / mjx",
        "environment / raw C rollout, mujoco",
    }


def test_ratios_are_those_of_medians_at_equal_batch_size():
    rows = [
        row("mujoco", 256, "environment", 90.0, 0.5, 1.5),
        row("mjx", 256, "environment", 10.0, 3.0, 5.0),
        row("mujoco", 256, "training", 45.0, 2.0, 2.0),
        row("mjx", 256, "training", 9.0, 4.0, 4.0),
        row("mujoco", 256, benchmark.RAW, 120.0),
        row("mujoco", 1024, "environment", 100.0),
    ]
    assert {(r["num_envs"], r["ratio"]): r["value"] for r in benchmark.ratios(rows)} == {
        (256, "environment steps/s: mujoco / mjx"): 9.0,
        (256, "environment tracing + compiling: mujoco / mjx"): 0.25,
        (256, "training steps/s: mujoco / mjx"): 5.0,
        (256, "training tracing + compiling: mujoco / mjx"): 0.5,
        (256, "training / environment, mujoco"): 0.5,
        (256, "training / environment, mjx"): 0.9,
        (256, "environment / raw C rollout, mujoco"): 0.75,
    }


def test_the_refresh_counts_as_often_as_in_a_real_run():
    # 10 steps a second and a refresh of 5 s every 100 steps: 100 steps in 15 s, however short the timed block was.
    assert rate_with_refresh(100, 5.0, 20, 2.0) == rate_with_refresh(100, 5.0, 200, 20.0) == pytest.approx(100 / 15)
    assert rate_with_refresh(100, 0.0, 20, 2.0) == pytest.approx(10)


def test_a_block_has_as_many_iterations_as_last_a_second():
    assert iterations_per_block(lambda n: 0.3 * n) == 4
    assert iterations_per_block(lambda n: 25.0 * n) == 1


def test_programs_take_turns_and_two_warm_ups_do_not_count():
    class Counted:
        def __init__(self, name):
            self.name, self.calls = name, 0

        def rate(self):
            order.append(self.name)
            self.calls += 1
            return float(self.calls)

    order: list = []
    measured = alternate({"a": Counted("a"), "b": Counted("b")}, repeats=3)
    assert order == ["a", "b"] * 5
    assert measured == {"a": [3.0, 4.0, 5.0], "b": [3.0, 4.0, 5.0]}


def test_the_spread_is_median_minimum_and_maximum():
    assert benchmark.spread([4.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 4.0}


def test_the_command_line_takes_the_settings_of_training():
    words = "probe/lqr ppo --num-envs 64,16,64 --physics mjx,mujoco --repeats=3 --unroll-length 5 --algo.gamma=0.5"
    options = benchmark.parse([*words.split(), "--env.episode-length", "20", "--out", "r.json"])
    assert (options.env, options.algorithm, options.repeats, options.iterations) == ("probe/lqr", "ppo", 3, 0)
    assert options.num_envs == (16, 64) and options.physics == ("mjx", "mujoco")
    assert options.settings == {"unroll_length": 5, "algo.gamma": 0.5, "env.episode_length": 20}
    assert options.command == f"rlx benchmark {words} --env.episode-length 20" and str(options.out) == "r.json"
    assert benchmark.parse(["probe/lqr"]).algorithm == "" and benchmark.parse(["probe/lqr"]).num_envs == (256, 1024)


def test_a_setting_between_environment_and_algorithm_is_not_taken_for_an_algorithm():
    options = benchmark.parse("probe/lqr --reset always ppo --repeats 2".split())
    assert options.algorithm == "ppo" and options.settings == {"reset": "always"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: ENV"),
        (["probe/lqe"], "Did you mean probe/lqr"),
        (["probe/lqr", "pppo"], "algorithm 'pppo' does not exist. Did you mean ppo"),
        (["probe/lqr", "--num-envs", "many"], "--num-envs = 'many' is not possible"),
        (["probe/lqr", "--num-envs", "256,0"], "--num-envs = '256,0' is not possible"),
        (["probe/lqr", "--repeats", "0"], "--repeats = 0 is not possible"),
        (["probe/lqr", "--iterations", "-1"], "--iterations = -1 is not possible"),
        (["probe/lqr", "--out", "no/such/folder/r.json"], "--out = 'no/such/folder/r.json' is not possible"),
        (["probe/lqr", "--physics", "mjy"], "physics 'mjy' does not exist. Did you mean mjx"),
        (["probe/lqr", "--physics", "mjx"], "physics = 'mjx' is not available for probe/lqr"),
        (["probe/lqr", "--algo.gamma", "0.9"], "name an ALGORITHM after ENV"),
        (["probe/lqr", "--unroll-lenght", "5"], "Did you mean unroll_length"),
        (["probe/lqr", "--unroll-length"], "--unroll-length needs a value"),
        (["probe/lqr", "--unroll-length", "0"], "unroll_length = 0 is not possible"),
        (["probe/lqr", "--env.size", "3"], "'size' does not exist"),
        (["probe/lqr", "ppo", "--algo.gamma", "2.0"], "algo.gamma = 2.0 is not possible"),
        (["probe/lqr", "ppo", "--num-envs", "256,3", "--algo.num_minibatches", "7"], "algo.num_minibatches = 7"),
    ],
)
def test_what_a_user_can_correct_is_said_before_anything_is_measured(arguments, message, capsys, monkeypatch):
    def never(*arguments):
        raise AssertionError("measured")

    monkeypatch.setattr(benchmark, "in_new_process", never)
    assert cli.main(["benchmark", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in " ".join(err.split()) and "Traceback" not in err and out == ""


def die(*arguments):
    os._exit(1)


def test_a_process_that_dies_is_reported(monkeypatch):
    monkeypatch.setattr("rlx.measuring.measure_alone", die)
    with pytest.raises(UserError, match="training: its process died"):
        benchmark.in_new_process("training", None, None, "")


def test_memory_is_that_of_the_process():
    from rlx.measuring import forget_peak, peak_memory_mib

    forget_peak()
    before = peak_memory_mib()
    block = bytearray(100 * 2**20)
    assert peak_memory_mib() > before + 90
    assert len(block) == 100 * 2**20


def test_against_peers_finds_the_first_update_inside_the_first_epoch(peers):
    raw = {"called": 110.0, "first_epoch": 130.0, "seconds": [8.0, 9.0, 7.0], "physics": "mjx", "note": ""}
    measured = peers.times(raw, started=100.0, ended=160.0, iterations=4, steps=18)
    assert measured["steps_per_second"] == [9.0, 8.0, 72 / 7]
    assert measured["first_update_from_start_s"] == 24.0  # 130 less three of four iterations in 8 s, less 100
    assert measured["first_update_from_call_s"] == 14.0 and measured["total_s"] == 60.0


def test_against_peers_divides_the_medians_of_rlx_by_those_of_brax(peers):
    def run(speeds, start, call, total):
        times = dict(zip(peers.TIMES, (start, call, total), strict=True))
        return {"steps_per_second": speeds, **times, "physics": "mjx", "note": ""}

    brax = peers.summarize([run([8.0, 12.0], 60.0, 40.0, 100.0), run([10.0], 70.0, 50.0, 120.0)])
    rlx = peers.summarize([run([30.0, 20.0, 10.0], 13.0, 9.0, 22.0)])
    assert brax["steps_per_second"] == {"median": 10.0, "min": 8.0, "max": 12.0}
    assert brax["total_s"]["median"] == 110.0 and len(brax["runs"]) == 2
    summaries = {"brax mjx": brax, "rlx mjx": brax, "rlx auto": rlx}
    found = peers.ratios(summaries)
    assert set(found["rlx mjx / brax mjx"].values()) == {1.0}
    assert found["rlx auto / brax mjx"]["steps_per_second"] == 2.0
    assert [found["rlx auto / brax mjx"][name] for name in peers.TIMES] == [0.2, 0.2, 0.2]
    shown = peers.show("CheetahRun", summaries)
    assert "10 (8 to 12)" in shown and "2.00" in shown and "rlx auto / brax mjx" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epochs", "2"], "--epochs must be above 2"),
        (["--rounds", "0"], "--rounds at least 1"),
        (["--num-envs", "20", "--num-minibatches", "8"], "--num-envs must be divisible by --num-minibatches"),
    ],
)
def test_against_peers_refuses_sizes_that_cannot_be_compared(peers, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        peers.parse(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_against_peers_writes_a_file_for_each_environment_or_the_one_that_is_named(peers, tmp_path, monkeypatch):
    run = {"steps_per_second": [2.0], "physics": "mjx", "note": "", **dict.fromkeys(peers.TIMES, 1.0)}
    monkeypatch.setattr(peers, "in_new_process", lambda *arguments: run)
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    peers.main(["--envs", "CheetahRun", "HopperHop"])
    peers.main(["--envs", "CheetahRun", "HopperHop", "--out", str(tmp_path / "both.json")])
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert {name: list(content["results"]) for name, content in found.items()} == {
        "against_peers-CheetahRun.json": ["CheetahRun"],
        "against_peers-HopperHop.json": ["HopperHop"],
        "both.json": ["CheetahRun", "HopperHop"],
    }
    assert all(content["commit"] == commit() for content in found.values())


@pytest.mark.slow
def test_against_peers_trains_with_both_and_records_what_was_supplied_to_brax(peers, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUMPY_RANK_PROMOTION", "allow")  # brax's code broadcasts freely
    out = tmp_path / "peers.json"
    sizes = "--num-envs 8 --unroll-length 4 --num-epochs 1 --num-minibatches 2 --iterations 2 --epochs 4 --rounds 1"
    peers.main(["--envs", "CartpoleBalance", *sizes.split(), "--hidden", "8", "--out", str(out)])
    content = json.loads(out.read_text())
    contenders = content["results"]["CartpoleBalance"]["contenders"]
    assert list(contenders) == ["brax mjx", "rlx mjx", "rlx auto"]
    assert [c["physics"] for c in contenders.values()] == ["mjx", "mjx", "mujoco"]
    assert "device_put_replicated" in contenders["brax mjx"]["note"] and contenders["rlx mjx"]["note"] == ""
    for c in contenders.values():
        (measured,) = c["runs"]
        assert len(measured["steps_per_second"]) == 2 and min(measured["steps_per_second"]) > 0
        assert 0 < measured["first_update_from_call_s"] < measured["first_update_from_start_s"] < measured["total_s"]
    assert content["settings"]["num_envs"] == 8 and content["command"].startswith("python experiments/benchmarks/")


def test_the_benchmark_of_replay_has_a_row_for_each_capacity(tmp_path, capsys):
    out = tmp_path / "replay.json"
    sizes = "--capacities 200 400 --num-envs 4 --unroll-length 4 --batch-size 8 --inner 2 --rounds 1 --n-step 2"
    sizes += " --cold-inner 2 --evict 1"
    script("replay").main([*sizes.split(), "--out", str(out)])
    content = json.loads(out.read_text())
    assert [row["capacity"] for row in content["rows"]] == [208, 400]
    times = ("insert_us", "draw_us", "cold_insert_us", "cold_draw_us")
    assert all(row[name] > 0 for row in content["rows"] for name in times)
    assert content["rows"][0]["bytes"] == 208 * (2 * 17 * 4 + 6 * 4 + 4 + 2)
    assert "1.00x" in capsys.readouterr().out


def test_the_products_of_a_sac_update_are_counted():
    """One hidden layer of 2 and a batch of 1: worked out by hand, two flops for each weight and sample."""
    updates = script("sac_updates")
    actor, critic = 17 * 2 + 2 * 12, 2 * (23 * 2 + 2 * 1)
    target = actor + critic
    critic_step = 2 * critic + 2 * 2
    actor_step = 2 * actor + 2 * 12 + critic + 2 * (6 * 2 + 2)
    assert updates.flops_of_an_update(1, [2]) == 2 * (target + critic_step + actor_step)


@pytest.mark.slow
def test_sac_updates_are_measured_in_both(tmp_path):
    out = tmp_path / "updates.json"
    sizes = "--rounds 1 --epochs 4 --iterations 2 --num-envs 4 --updates 2 --batch-size 8 --hidden 8"
    script("sac_updates").main([*sizes.split(), "--out", str(out)])
    content = json.loads(out.read_text())
    assert set(content["contenders"]) == {"brax", "rlx"}
    for contender in content["contenders"].values():
        assert len(contender["runs"][0]["updates_per_second"]) == 2
        assert contender["updates_per_second"]["min"] > 0
    assert "device_put_replicated" in content["contenders"]["brax"]["note"]


def test_the_benchmark_of_acting_has_a_row_for_each_actor_and_mode(tmp_path, capsys):
    out = tmp_path / "acting.json"
    sizes = "--steps 2 --num-envs 4 --hidden 8 --inner 2 --rounds 1"
    script("acting").main([*sizes.split(), "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["actor"] for row in rows[::2]] == ["ppo", "fpo, 2 steps", "dppo, 2 steps"]
    assert all(row["us_per_decision"] > 0 for row in rows) and rows[0]["times_ppo"] == rows[1]["times_ppo"] == 1
    assert "1.0x" in capsys.readouterr().out


def test_the_benchmark_of_particle_worlds_compares_with_mpe2(tmp_path, capsys):
    out = tmp_path / "particle.json"
    sizes = "--worlds simple_spread --num-envs 2 --steps 50 --mpe2-steps 25 --rounds 1"
    script("particle").main([*sizes.split(), "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["program"] for row in rows] == ["mpe2", "rlx, 2 envs"] and rows[0]["times_mpe2"] == 1
    assert all(0 < row["slowest"] <= row["steps_per_second"] <= row["fastest"] for row in rows)
    assert "1.0x" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_of_agents_has_a_row_for_each_learner_and_number(tmp_path, capsys):
    out = tmp_path / "agents.json"
    sizes = "--agents 2 3 --num-envs 4 --unroll-length 2 --updates 1 --batch-size 4 --hidden 8 --compiles 1 --rounds 1"
    script("agents").main([*sizes.split(), "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["learner"], row["agents"]) for row in rows[:3]] == [("hasac", 2), ("hasac", 3), ("masac", 2)]
    assert len(rows) == 10 and all(row["updates_per_second"] > 0 and row["compile_s"] > 0 for row in rows)
    assert rows[0]["times_first"] == 1 and "times that of 2" in capsys.readouterr().out
