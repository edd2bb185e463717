from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlx import checkpoint_store
from rlx.checkpoint import Checkpointer, first_nonfinite
from rlx.errors import UserError


class Inner(NamedTuple):
    a: Any
    b: Any


@flax.struct.dataclass
class Learner:
    params: Any
    optimiser: Any
    extra: Any


def nasty_state(seed: int = 0):
    key = jax.random.key(seed)
    params = {"dense/0": {"kernel": jax.random.normal(key, (3, 4)), "bias.x": jnp.zeros(4, jnp.bfloat16) + 1 / 3}}
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params)
    extra = {
        "keys": jax.random.split(key, 5),
        "rbg": jax.random.key(1, impl="rbg"),
        "no_keys": jax.random.split(key, 0),
        "pixels": jnp.arange(6, dtype=jnp.uint8).reshape(2, 3),
        "flags": jnp.array([True, False]),
        "none": None,
        "empty": (),
        "nothing": jnp.zeros((0, 3), jnp.float16),
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "by_number": {1: jnp.int32(2**31 - 1)},
    }
    return (Learner(params, optimiser, extra), Inner(jnp.float32(0.1), Inner((), jnp.uint32(7))), [key])


def bits(leaf: jax.Array) -> bytes:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf).tobytes()


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype, x.aval.weak_type) == (y.shape, y.dtype, False), path
        assert bits(x) == bits(y), path


def abstract(state):
    return jax.eval_shape(lambda: state)


def small(value: float):
    return {"w": jnp.full((4, 8), value, jnp.float32), "key": jax.random.key(int(value))}


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def largest_file(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.fixture
def warnings_seen():
    return []


@pytest.fixture
def make(tmp_path, warnings_seen):
    made = []

    def make(**options):
        made.append(Checkpointer(tmp_path / "checkpoints", warn=warnings_seen.append, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def saved(make, *steps, **options):
    """A Checkpointer that holds `small(step)` at each of `steps`."""
    checkpointer = make(**options)
    for step in steps:
        checkpointer.save(step, small(step))
    checkpointer.wait()
    return checkpointer


def test_a_round_trip_keeps_structure_dtypes_and_every_bit(make):
    state = nasty_state()
    checkpointer = make()
    checkpointer.save(2**31 + 5, state)
    checkpointer.wait()
    restored, step = checkpointer.restore(abstract(state))
    assert step == 2**31 + 5
    assert_same(restored, state)


def test_a_state_without_any_element_is_kept_too(make):
    checkpointer = make()
    checkpointer.save(1, {"a": (), "b": jnp.zeros((0,))})
    checkpointer.wait()
    restored, _ = checkpointer.restore(abstract({"a": (), "b": jnp.zeros((0,))}))
    assert_same(restored, {"a": (), "b": jnp.zeros((0,))})


def test_the_state_may_be_donated_as_soon_as_save_returns(make):
    state = {"w": jnp.arange(100_000, dtype=jnp.float32)}
    expected = np.array(state["w"])
    checkpointer = make()
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    checkpointer.save(1, state)
    for _ in range(5):
        state = step(state)
    checkpointer.save(2, state)
    jax.tree.map(lambda x: x.delete(), state)
    checkpointer.wait()
    shapes = {"w": jax.ShapeDtypeStruct((100_000,), jnp.float32)}
    np.testing.assert_array_equal(checkpointer.restore(shapes, step=1)[0]["w"], expected)
    np.testing.assert_array_equal(checkpointer.restore(shapes, step=2)[0]["w"], -1.0)


def test_a_restored_state_may_be_donated(make):
    checkpointer = saved(make, 3)
    state, _ = checkpointer.restore(abstract(small(3)))
    double = jax.jit(lambda s: {**s, "w": s["w"] * 2}, donate_argnums=0)
    np.testing.assert_array_equal(double(double(state))["w"], np.full((4, 8), 12.0))
    assert_same(checkpointer.restore(abstract(small(3)))[0], small(3))


def test_two_are_kept_and_the_newest_is_restored(make, tmp_path):
    checkpointer = saved(make, 10, 20, 30)
    assert checkpointer.steps() == [20, 30]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["20", "30"]
    assert_same(checkpointer.restore(abstract(small(0)))[0], small(30))
    assert_same(checkpointer.restore(abstract(small(0)), step=20)[0], small(20))


def test_older_ones_stay_until_the_new_manifest_is_written(make, monkeypatch):
    checkpointer = saved(make, 10, 20)
    seen = []
    original = checkpoint_store.write_atomically

    def spy(path, content):
        seen.append(checkpointer.steps())
        original(path, content)

    monkeypatch.setattr(checkpoint_store, "write_atomically", spy)
    checkpointer.save(30, small(30))
    checkpointer.wait()
    assert seen == [[10, 20]]
    assert checkpointer.steps() == [20, 30]


def test_a_flipped_byte_is_found_and_the_checkpoint_before_is_used(make, tmp_path, warnings_seen):
    saved(make, 10, 20)
    flip_a_byte(largest_file(tmp_path / "checkpoints" / "20"))
    state, step = make().restore(abstract(small(0)))
    assert step == 10
    assert_same(state, small(10))
    assert len(warnings_seen) == 1
    assert str(tmp_path / "checkpoints" / "20") in warnings_seen[0] and "checksum" in warnings_seen[0]


def test_a_flip_anywhere_in_a_manifest_is_found(make, tmp_path, warnings_seen):
    saved(make, 10, 20)
    manifest = tmp_path / "checkpoints" / "20" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("float32", "float64"))
    assert make().restore(abstract(small(0)))[1] == 10
    assert "manifest is damaged" in warnings_seen[0]


def test_half_written_checkpoints_are_passed_over(make, tmp_path, warnings_seen):
    saved(make, 10, 20, 30, 40, keep=4)
    folder = tmp_path / "checkpoints"
    (folder / "40" / "manifest.json").unlink()
    victim = largest_file(folder / "30")
    victim.write_bytes(victim.read_bytes()[:-7])
    largest_file(folder / "20").unlink()
    assert make().restore(abstract(small(0)))[1] == 10
    assert ["40" in warnings_seen[0], "30" in warnings_seen[1], "20" in warnings_seen[2]] == [True] * 3
    assert "no manifest" in warnings_seen[0] and "missing" in warnings_seen[2]


def test_damaged_checkpoints_do_not_count_as_kept(make, tmp_path):
    saved(make, 10, 20)
    flip_a_byte(largest_file(tmp_path / "checkpoints" / "20"))
    checkpointer = make()
    checkpointer.restore(abstract(small(0)))
    checkpointer.save(30, small(30))
    checkpointer.wait()
    assert checkpointer.steps() == [10, 30]


def test_with_none_left_the_message_says_what_was_found(make, tmp_path):
    with pytest.raises(UserError, match="no whole checkpoint .*holds none"):
        make().restore(abstract(small(0)))
    assert make().empty()
    saved(make, 10)
    (tmp_path / "checkpoints" / "10" / "manifest.json").unlink()
    with pytest.raises(UserError, match="10: it has no manifest"):
        make().restore(abstract(small(0)))
    assert make().steps() == [] and not make().empty()
    with pytest.raises(UserError, match="no checkpoint of step 5"):
        make().restore(abstract(small(0)), step=5)


def test_going_on_from_an_earlier_step_drops_the_abandoned_ones(make):
    checkpointer = saved(make, 10, 20, 30, keep=3)
    checkpointer.restore(abstract(small(0)), step=10)
    checkpointer.save(15, small(15))
    checkpointer.wait()
    assert checkpointer.steps() == [10, 15]


def test_a_step_can_be_written_again(make):
    checkpointer = saved(make, 10)
    checkpointer.save(10, small(11))
    checkpointer.wait()
    assert_same(checkpointer.restore(abstract(small(0)))[0], small(11))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": jnp.zeros(4), "key": jax.random.key(0)}, r"\['w'\]: found float32\[4, 8\], expected float32\[4\]"),
        ({"w": jnp.zeros((4, 8), jnp.int32), "key": jax.random.key(0)}, r"found float32\[4, 8\], expected int32"),
        (
            {"w": jnp.zeros((4, 8)), "key": jax.random.key(0, impl="rbg")},
            r"\['key'\]: found key<fry>\[\], expected key<r",
        ),
        ({"w": jnp.zeros((4, 8)), "key": jax.random.key(0), "x": jnp.zeros(2)}, r"\['x'\]: found nothing"),
        ({"key": jax.random.key(0)}, r"\['w'\]: found float32\[4, 8\], expected nothing"),
    ],
)
def test_a_checkpoint_of_another_shape_names_the_first_leaf_that_differs(make, other, message):
    checkpointer = saved(make, 10, metadata={"algorithm": "sac"})
    with pytest.raises(UserError, match=message + ".*algorithm = 'sac'"):
        checkpointer.restore(abstract(other))


def test_a_part_of_what_was_saved_can_be_restored_alone(make):
    checkpointer = saved(make, 10)
    part = abstract({"key": jax.random.key(0)})
    restored, step = checkpointer.restore(part, partial=True)
    assert step == 10
    assert_same(restored, {"key": small(10)["key"]})
    with pytest.raises(UserError, match=r"\['x'\]: found nothing"):
        checkpointer.restore(abstract({"x": jnp.zeros(2)}), partial=True)


def test_a_checkpoint_of_another_algorithm_is_refused_by_name(make):
    saved(make, 10, metadata={"algorithm": "sac", "env": "probe/one", "note": 1})
    with pytest.raises(UserError, match="algorithm = 'sac', not 'ppo'"):
        make(metadata={"algorithm": "ppo"}).restore(abstract(small(0)))
    agreeing = make(metadata={"algorithm": "sac", "note": 2})
    assert agreeing.restore(abstract(small(0)))[1] == 10
    with pytest.raises(UserError, match="note = 1, not 2"):
        agreeing.restore(abstract(small(0)), expect=["note"])


@pytest.mark.parametrize(("version", "word"), [(0, "older"), (2, "newer")])
def test_another_format_is_refused_with_a_message(make, tmp_path, version, word):
    saved(make, 10)
    path = tmp_path / "checkpoints" / "10" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["format"] = version
    path.write_text(json.dumps({**manifest, "sha256": checkpoint_store._digest(manifest)}))
    with pytest.raises(UserError, match=f"{word} format {version}; this version of rlx reads format 1"):
        make().restore(abstract(small(0)))


def test_a_disk_without_room_is_refused_before_anything_is_touched(make, monkeypatch):
    checkpointer = saved(make, 10, 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match="disk full.*needs 1.0 MiB, 0.0 MiB free"):
        checkpointer.save(30, small(30))
    monkeypatch.undo()
    assert checkpointer.steps() == [10, 20]


@pytest.mark.parametrize("surface", ["wait", "save", "close"])
def test_a_failure_in_the_background_surfaces_later_and_older_ones_stay(make, monkeypatch, tmp_path, surface):
    checkpointer = saved(make, 10, 20)

    def fails(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_store, "write_atomically", fails)
    checkpointer.save(30, small(30))
    call = {"wait": checkpointer.wait, "close": checkpointer.close, "save": lambda: checkpointer.save(40, small(40))}
    with pytest.raises(UserError, match="could not be written.*No space left"):
        call[surface]()
    monkeypatch.undo()
    assert checkpointer.steps() == [10, 20]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "20"]


def test_leftovers_of_a_killed_process_are_ignored_then_removed(make, tmp_path):
    saved(make, 10, 20)
    folder = tmp_path / "checkpoints"
    for name in ("30.new", "30.new.orbax-checkpoint-tmp", "5.old"):
        shutil.copytree(folder / "20" / "state", folder / name)
    checkpointer = make()
    assert checkpointer.steps() == [10, 20]
    assert checkpointer.restore(abstract(small(0)))[1] == 20
    assert (folder / "30.new").exists()  # reading removes nothing: another process may be writing
    checkpointer.save(40, small(40))
    checkpointer.wait()
    assert sorted(p.name for p in folder.iterdir()) == ["20", "40"]


def test_a_kill_just_before_the_last_renaming_loses_nothing(make, tmp_path):
    saved(make, 10, 20)
    folder = tmp_path / "checkpoints"
    (folder / "20").rename(folder / "20.new")
    checkpointer = make()
    assert checkpointer.steps() == [10, 20]
    assert_same(checkpointer.restore(abstract(small(0)))[0], small(20))
    checkpointer.save(30, small(30))
    checkpointer.wait()
    assert sorted(p.name for p in folder.iterdir()) == ["20", "30"]


def test_the_best_policy_survives_a_restart(make):
    first = make()
    assert [first.save_best(10, small(10), 1.0), first.save_best(20, small(20), 3.0)] == [True, True]
    assert [first.save_best(30, small(30), 2.0), first.save_best(31, small(31), 3.0)] == [False, False]
    assert first.save_best(32, small(32), float("nan")) is False
    first.close()
    second = make()
    assert second.save_best(40, small(40), 2.5) is False
    state, step = second.restore_best(abstract(small(0)))
    assert step == 20
    assert_same(state, small(20))
    assert second.save_best(15, small(15), -1.0) is False
    assert second.save_best(15, small(15), 4.0) is True
    second.wait()
    assert second.restore_best(abstract(small(0)))[1] == 15
    assert second.steps() == []


def test_the_best_policy_and_the_state_do_not_mix(make):
    checkpointer = make()
    checkpointer.save(10, small(10))
    checkpointer.save_best(10, {"w": jnp.ones(3)}, -5.0)
    checkpointer.wait()
    assert_same(checkpointer.restore_best(abstract({"w": jnp.ones(3)}))[0], {"w": jnp.ones(3)})
    assert_same(checkpointer.restore(abstract(small(0)))[0], small(10))


def test_first_nonfinite_names_the_leaf():
    state = nasty_state()
    assert first_nonfinite(state) == "[0].extra['nan']"
    assert first_nonfinite({"a": jnp.ones(3), "b": {"c": jnp.array([1.0, jnp.nan], jnp.bfloat16)}}) == "['b']['c']"
    assert first_nonfinite({"a": jnp.array(-jnp.inf)}) == "['a']"
    assert first_nonfinite({"a": jnp.ones(3), "k": jax.random.key(0), "i": jnp.int32(1), "e": jnp.zeros(0)}) is None
    assert first_nonfinite(()) is None


ENDLESS = """
import sys, jax.numpy as jnp
from rlx.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1])
start = max(checkpointer.steps(), default=0)
for step in range(start + 1, start + 10**6):
    checkpointer.save(step, {"w": jnp.full((256, 256), step, jnp.int32)})
    checkpointer.wait()
    print(step, flush=True)
"""


def test_a_process_killed_at_any_moment_leaves_two_whole_checkpoints(tmp_path, make, warnings_seen):
    for delay in (0.003, 0.02, 0.05):
        command = [sys.executable, "-c", ENDLESS, str(tmp_path / "checkpoints")]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            confirmed = [int(child.stdout.readline()) for _ in range(3)]
            time.sleep(delay)
            child.kill()
        checkpointer = make()
        steps = checkpointer.steps()
        assert len(steps) >= 2 and steps[-1] >= confirmed[-1]
        shapes = {"w": jax.ShapeDtypeStruct((256, 256), jnp.int32)}
        for step in steps:
            np.testing.assert_array_equal(checkpointer.restore(shapes, step=step)[0]["w"], step)
    assert warnings_seen == []
