"""What a compiled program takes: memory and messages, on programs whose answer is known."""

from __future__ import annotations

import dataclasses
import io
import re
import sys

import jax
import jax.numpy as jnp
import pytest

from rlx import footprint
from rlx.algorithms import ppo, sac
from rlx.errors import UserError
from rlx.footprint import Collective, collectives, sizes_of
from rlx.logging import Progress
from rlx.machine import available_memory
from rlx.training import train
from tests.test_training import SMALL
from tests.worlds import Counter

MODULE = """
HloModule jit_f, entry_computation_layout={()->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%body.1 (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = f32[8,4]{1,0} get-tuple-element(%arg), index=1
  %all-reduce.3 = (f32[8,4]{1,0}, f32[4]{0}) all-reduce(%x, %y), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %x)
}

%condition.1 (arg: (s32[], f32[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%branch.0 (arg: f32[4]) -> f32[4] {
  ROOT %all-gather-start.1 = bf16[16]{0} all-gather-start(%arg), dimensions={0}
}

%branch.1 (arg: f32[4]) -> f32[4] {
  ROOT %same = f32[4]{0} copy(%arg)
}

ENTRY %main.9 (p: f32[8,4]) -> f32[] {
  %w = (s32[], f32[8,4]{1,0}) while(%init), condition=%condition.1, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %c = f32[4]{0} conditional(%p, %u, %v), branch_computations={%branch.0, %branch.1}
  ROOT %r = f32[] reduce(%p, %zero), dimensions={0,1}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_are_counted_as_often_as_their_loop_runs():
    assert collectives(MODULE) == [Collective("all-reduce", 144, 5, 2), Collective("all-gather", 32, 1, 1)]


def test_a_compiled_program_without_devices_to_talk_to_has_none():
    assert collectives(jax.jit(lambda x: x.sum()).lower(jnp.ones(8)).compile().as_text()) == []


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("f32[8,4]{1,0}", [128]),
        ("pred[]", [1]),
        ("(u64[3], bf16[2,2], s32[])", [24, 8, 4]),
        ("f32[0,4]", [0]),
        ("f8e4m3fn[3]", [3]),
    ],
)
def test_sizes_of_shapes(shape, sizes):
    assert sizes_of(shape) == sizes


def test_memory_of_a_program_is_its_arguments_and_what_it_makes():
    compiled = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T).lower(jnp.ones((256, 256))).compile()
    found = footprint.memory(compiled)
    assert found.state == 256 * 256 * 4
    assert found.temporaries >= 256 * 256 * 4
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(jnp.ones((256, 256))).compile()
    assert footprint.memory(donated).temporaries < 256 * 256 * 4


def test_this_machine_says_what_is_free():
    free = available_memory()
    assert (free is None and sys.platform != "linux") or 2**20 < (free or 0) < 2**50


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("nothing")


def test_a_run_says_where_it_is_and_what_it_takes():
    stream = io.StringIO()
    train(Counter(5), ppo, SMALL, progress=Progress(stream=stream))
    assert "1 device (cpu): 4 environments each, " in stream.getvalue()
    assert " of state and " in stream.getvalue()
    stream = io.StringIO()
    config = sac.Config(actor_hidden=(8,), critic_hidden=(8,), batch_size=4, replay_size=50_000, prefill_steps=0)
    train(Counter(5), sac, SMALL, config, progress=Progress(stream=stream))
    assert re.search(r"[\d.]+ MiB of state \([\d.]+ MiB of it experience\) and ", stream.getvalue())


def test_a_run_that_does_not_fit_is_refused_with_what_would(tmp_path, monkeypatch):
    monkeypatch.setattr(footprint, "free_memory", lambda num_devices: 300_000)
    sizes = dataclasses.replace(SMALL, num_envs=64)
    with pytest.raises(
        UserError, match=r"takes .* which has 0.3 MiB free. What would help: about num_envs = (8|16|32)\."
    ):
        train(Counter(5), ppo, sizes, run_dir=tmp_path / "run", progress=Progress(quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_share_of_the_experience_that_is_advised_fits(monkeypatch):
    monkeypatch.setattr(footprint, "free_memory", lambda num_devices: 2_000_000)
    config = sac.Config(actor_hidden=(8,), critic_hidden=(8,), batch_size=4, replay_size=50_000, prefill_steps=0)
    with pytest.raises(UserError, match=r"\d% of the experience in the learner") as error:
        train(Counter(5), sac, SMALL, config, progress=Progress(quiet=True))
    assert "num_envs" not in str(error.value)  # fewer of them would change nothing
    percent = int(re.search(r"(\d+)% of the experience", str(error.value))[1])
    assert 10 < percent < 90
    train(
        Counter(5),
        sac,
        SMALL,
        dataclasses.replace(config, replay_size=500 * (percent - 1)),
        progress=Progress(quiet=True),
    )
    with pytest.raises(UserError, match="of the experience"):
        more = dataclasses.replace(config, replay_size=500 * (percent + 3))
        train(Counter(5), sac, SMALL, more, progress=Progress(quiet=True))
