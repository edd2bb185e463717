"""The command line: the one package that may import environments and algorithms together.

Nothing heavy is imported before it is needed: names are checked before jax is loaded.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rlx import __version__
from rlx.cli.collection import collect
from rlx.cli.evaluation import evaluate
from rlx.cli.export import export
from rlx.cli.inspection import benchmark, doctor, list_names, plot
from rlx.cli.processes import joined, take_flags
from rlx.cli.runs import resume, train
from rlx.cli.studies import reproduce
from rlx.cli.sweeps import sweep
from rlx.errors import UserError, unknown

HELP = """\
usage: rlx COMMAND ...

  train ALGORITHM ENV [...]    train; `rlx train ALGORITHM ENV --help` lists every setting
                               --distributed: as one of several processes, on a pod, a cluster or one machine
  sweep ALGORITHM ENV [...]    settings times seeds as few compiled programs; --grid KEY=V,V --random KEY=LOW:HIGH
  reproduce STUDY [...]        run what is missing of a study in experiments/, and write its report
  resume RUN_DIR               go on with a run, runs of many seeds or a sweep that was stopped; --distributed as above
  evaluate RUN_DIR [...]       play whole episodes with a run's policy
  collect RUN_DIR... [...]     roll policies out into a data set, for `rlx train bc ENV --data FILE`
  plot RUN_DIR... --out FILE   draw learning curves
  export RUN_DIR --out FOLDER  write the policy as a function that needs no rlx
  list envs|algorithms         what there is
  benchmark ENV [ALGORITHM]    steps/s, compile time and memory on every physics engine
  doctor                       what this machine has, and what each missing piece costs

  --version, --help            --debug with any command: show tracebacks

ALGORITHM: a name, path/to/file.py or a module, with Config and make.
ENV: a name such as gymnax/Pendulum-v1, path/to/file.py:function or module:function.
"""


def keep_compiled_programs() -> None:
    """Points jax's compilation cache at a folder in the user's home, unless the environment names another.

    A folder a host: a program compiled for one processor may crash on another.
    """
    with contextlib.suppress(RuntimeError):  # a user without a home
        cache = Path.home() / ".cache" / "rlx" / f"jax-{platform.node()}"
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0; 1 a fault of ours; 2 a user's; 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    keep_compiled_programs()
    try:
        return dispatch([argument for argument in arguments if argument != "--debug"], debug)
    except SystemExit as exit:  # argparse and tyro have said why
        return exit.code if isinstance(exit.code, int) else 2
    except BrokenPipeError:  # `rlx list envs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        return report(error)


def report(error: Exception, debug: bool = False) -> int:
    """One line on stderr for an exception, behind its traceback with `debug`, and the exit status."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, UserError | OSError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = f"internal error: {type(error).__name__}: {error}; run again with --debug for the traceback"
    print(text, file=sys.stderr)
    return 1


def dispatch(arguments: list[str], debug: bool) -> int:
    """Runs the command that `arguments` begin with."""
    commands = {"train": train, "sweep": sweep, "resume": resume, "evaluate": evaluate, "plot": plot}
    commands |= {"list": list_names, "doctor": doctor, "benchmark": benchmark, "reproduce": reproduce}
    commands |= {"collect": collect, "export": export}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        print(f"rlx {__version__}")
        return 0
    if arguments[0] not in commands:
        raise unknown("command", arguments[0], commands)
    if "--distributed" not in arguments or "--help" in arguments or "-h" in arguments:
        return commands[arguments[0]](arguments[1:])
    if arguments[0] not in ("train", "resume"):
        raise UserError(f"--distributed is for `rlx train` and `rlx resume`, not for `rlx {arguments[0]}`.")
    flags, rest = take_flags(arguments[1:])
    with joined(flags, partial(report, debug=debug)):
        return commands[arguments[0]](rest)
