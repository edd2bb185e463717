"""Two minutes on a new pod, cluster or machine: does everything work that a run of several processes needs?

    srun python experiments/launch/smoke.py --run-dir /shared/smoke                     # a cluster
    python experiments/launch/smoke.py --run-dir gs://BUCKET/smoke                      # every worker of a TPU pod
    python experiments/launch/local.py 2 python experiments/launch/smoke.py --run-dir /tmp/smoke

Every process runs it, and says where the others are as `rlx train --distributed` does. The first one prints a line for
each check; the first that fails ends all with a line that begins with FAIL and an exit status that is not 0.
`--run-dir`: where runs will lie. The test makes a folder of its own there, and removes it when all has passed.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlx import storage
from rlx.cli.processes import joined, take_flags
from rlx.errors import UserError

MEBIBYTES = 64  # of the message that is timed


def agree(right: bool, what: str) -> None:
    """Raises UserError on every process where it is not `right` on one."""
    from rlx.distributed import gather, several

    found = gather(right) if several() else [right]
    if not all(found):
        raise UserError(f"{what} on process {found.index(False)}.")


def same(one: Any, other: Any) -> bool:
    """Whether the parts of two arrays on this process's devices have the same bits."""
    import numpy as np

    parts = zip(one.addressable_shards, other.addressable_shards, strict=True)
    return all(np.array_equal(np.asarray(a.data), np.asarray(b.data), equal_nan=True) for a, b in parts)


def spread(num_values: int) -> Any:
    """Float32, so many on each device of all processes: 0, 1, 2, ..."""
    import jax
    import numpy as np

    from rlx.sharding import make_mesh

    mesh = make_mesh(len(jax.devices()))
    values = np.arange(num_values * len(jax.devices()), dtype=np.float32).reshape(-1, num_values)
    if mesh is None:
        return jax.numpy.asarray(values)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names[0]))
    return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)


def devices(folder: str) -> str:
    import jax

    from rlx.distributed import gather, several
    from rlx.machine import versions

    own = [socket.gethostname(), [device.device_kind for device in jax.local_devices()]]
    found = gather(own) if several() else [own]
    if len({len(kinds) for _, kinds in found}) > 1:
        raise UserError(f"the processes have {[len(kinds) for _, kinds in found]} devices: one of them lost some.")
    kinds = sorted({kind for _, kinds in found for kind in kinds})
    hosts = len({host for host, _ in found})
    text = (
        f"{len(found)} processes on {hosts} host{'s' if hosts > 1 else ''}, {len(jax.devices())} x {', '.join(kinds)}"
    )
    return f"{text}, jax {versions()['jax']} on all"


def collectives(folder: str) -> str:
    import jax

    count = len(jax.devices())
    total = jax.jit(lambda x: x.sum(axis=0))
    found = total(spread(1)).addressable_data(0).item()
    agree(found == sum(range(count)), f"a sum over {count} devices should be {sum(range(count))}, and is {found}")
    large = spread(MEBIBYTES * 2**20 // 4)
    jax.block_until_ready(total(large))
    began = time.perf_counter()
    jax.block_until_ready(total(large))
    return (
        f"a sum over {count} devices is right; {MEBIBYTES} MiB summed in {1e3 * (time.perf_counter() - began):.0f} ms"
    )


def shared(folder: str) -> str:
    from rlx.distributed import check_shared, on_first

    staged = storage.fetch(folder)
    check_shared(staged)
    on_first(lambda: storage.claim(staged))  # writes an object, if that is where it lies
    return f"{folder} can be written to, and all see the same"


def checkpoint(folder: str) -> str:
    import jax

    from rlx.checkpoint import Checkpointer

    state = {"values": spread(2**18)}
    keeper = Checkpointer(f"{folder}/state")
    began = time.perf_counter()
    keeper.save(1, state)
    keeper.wait()
    middle = time.perf_counter()
    restored, _ = keeper.restore(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    )
    ended = time.perf_counter()
    keeper.close()
    agree(same(restored["values"], state["values"]), "what was restored is not what was saved")
    size = state["values"].nbytes / 2**20
    return f"{size:.0f} MiB saved in {middle - began:.1f} s, restored bit for bit in {ended - middle:.1f} s"


def resume(folder: str) -> str:
    import jax

    import envs
    from rlx import TrainConfig, ppo, train
    from rlx.logging import Progress

    count = len(jax.devices())
    sizes = TrainConfig(num_envs=4 * count, unroll_length=8, total_steps=32 * count * 6, iterations_per_epoch=1)
    sizes = dataclasses.replace(
        sizes, num_groups=count, num_devices=count, split="envs", num_evals=2, eval_episodes=count
    )
    config = ppo.Config(actor_hidden=(8,), critic_hidden=(8,), num_epochs=1, num_minibatches=2)

    def run(name: str, **keywords: Any) -> Any:
        shown = Progress(quiet=True)
        return train(envs.make("probe/lqr"), ppo, sizes, config, run_dir=f"{folder}/{name}", progress=shown, **keywords)

    whole, rows = run("whole"), []
    stopped = run("stopped", on_epoch=lambda row: rows.append(row) or len(rows) == 3)
    agree(bool(stopped.interrupted), "a run was to stop after three epochs, and did not")
    resumed = run("stopped", resume=True)
    leaves = zip(jax.tree.leaves(resumed.state), jax.tree.leaves(whole.state), strict=True)
    data = jax.random.key_data
    plain = [(data(a), data(b)) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else (a, b) for a, b in leaves]
    agree(all(same(a, b) for a, b in plain), "a run that was stopped and resumed differs from one that was not")
    return "PPO, stopped after 3 epochs of 6 and resumed, ends with the bits of a run that was not"


CHECKS: dict[str, Callable[[str], str]] = {
    "devices": devices,
    "collectives": collectives,
    "run directory": shared,
    "save, restore": checkpoint,
    "resume": resume,
}


def fail(error: Exception) -> int:
    text = str(error) if isinstance(error, UserError | OSError) else f"{type(error).__name__}: {error}"
    sys.stderr.write(f"FAIL  {text}\n")  # at once: other processes write there too
    return 1


def remove(folder: str) -> None:
    from etils import epath

    epath.Path(storage.home(folder)).rmtree(missing_ok=True)
    if storage.is_remote(folder):
        shutil.rmtree(storage.staging() / folder.replace("://", "/"), ignore_errors=True)


def main() -> int:
    flags, rest = take_flags(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True)
    place = parser.parse_args(rest).run_dir
    place = place.rstrip("/") if storage.is_remote(place) else str(Path(place).absolute())
    began = time.perf_counter()
    with joined(flags, fail):
        from rlx.distributed import is_first, on_first

        folder = f"{place}/smoke-{on_first(lambda: uuid.uuid4().hex[:8])}"
        for name, check in CHECKS.items():
            text = check(folder)  # on all of them
            if is_first():
                print(f"ok    {name}: {text}", flush=True)
        on_first(lambda: remove(folder))
        if is_first():
            print(f"all {len(CHECKS)} checks passed in {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
