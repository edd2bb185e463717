"""A command in N processes of this machine that know of each other: to try what a pod does, or one for each GPU.

    python experiments/launch/local.py 4 rlx train ppo brax/ant --num-envs 1024 --run-dir runs/ant
    python experiments/launch/local.py --gpu-each 2 rlx train ppo brax/ant --run-dir runs/ant
    python experiments/launch/local.py 2 python experiments/launch/smoke.py --run-dir /tmp/smoke

Each gets `--distributed`, the address at which the first one listens, how many they are and which of them it is.
SIGTERM and Ctrl-C are handed on; the exit status is the highest of all.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_processes", type=int)
    parser.add_argument("--gpu-each", action="store_true", help="process I sees the I-th GPU alone")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what each runs, without the flags of --distributed")
    options = parser.parse_args()
    if options.num_processes < 1 or not options.command:
        parser.error("how many processes (at least 1), then the command")
    flags = [
        "--distributed",
        "--coordinator",
        f"localhost:{free_port()}",
        "--num-processes",
        str(options.num_processes),
    ]
    processes: list[subprocess.Popen[bytes]] = []
    # To one, which tells the others; before they have found each other, none could. A terminal sends Ctrl-C to all.
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in processes[:1]])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for index in range(options.num_processes):
        own = {"CUDA_VISIBLE_DEVICES": str(index)} if options.gpu_each else {}
        command = [*options.command, *flags, "--process-index", str(index)]
        processes.append(subprocess.Popen(command, env=os.environ | own))
    statuses = [process.wait() for process in processes]
    return max(status if status >= 0 else 128 - status for status in statuses)  # as shells count signals


if __name__ == "__main__":
    raise SystemExit(main())
