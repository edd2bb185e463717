"""Run directories: what each file in them is for, how they are made, opened and kept from being lost."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlx import storage
from rlx.errors import UserError
from rlx.files import RUNS, write_atomically
from rlx.machine import versions

FORMAT = 1  # of config.json
FAILED = "failed.json"  # of a run among many that met a NaN or an infinity: step, error
ON_GYMNASIUM = "eval_gymnasium.json"  # as eval.json, of one of Gymnasium's tasks
OWN_FILES = tuple("config.json metrics.jsonl tensorboard wandb checkpoints eval.json curve.png".split())
OWN_FILES += (ON_GYMNASIUM, FAILED)
FINISHED = "finished.json"  # in the folder of a sweep's or a study's program, once nothing of it is left to run


def run_directories(path: str | os.PathLike[str]) -> list[Path]:
    """The run directories in a folder of many runs, or `path` itself. Raises UserError for a damaged list."""
    folder = Path(path).absolute()
    file = folder / RUNS
    if not file.is_file():
        return [folder]
    try:
        return [folder / str(name) for name in json.loads(file.read_text())["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(file)!r} is damaged: {error!r}.") from error


def group_of(path: str | os.PathLike[str]) -> Path | None:
    """The folder of many runs, trained as one program, that a run directory is one of; None for a run alone."""
    folder = Path(path).absolute()
    whole = folder.parent
    return whole if (whole / RUNS).is_file() and folder in run_directories(whole) else None


class RunDirectory:
    """One run on disk: `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `eval.json`, `curve.png`."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = path
        self.config = config
        self.metrics_path = path / "metrics.jsonl"
        self.checkpoints_path = path / "checkpoints"
        self.tensorboard_path = path / "tensorboard"

    @staticmethod
    def check_free(path: str | os.PathLike[str], overwrite: bool = False) -> list[str]:
        """What the folder holds now. Raises UserError for a run (unless `overwrite`) and for anything else."""
        folder = Path(path).absolute()
        if folder.exists() and not folder.is_dir():
            raise UserError(f"run directory {str(folder)!r} is a file; name another.")
        above = next(path for path in (folder, *folder.parents) if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"run directory {str(folder)!r} cannot be written: see {str(above)!r}; name another.")
        present = sorted(p.name for p in folder.iterdir() if not p.name.endswith(".tmp")) if folder.exists() else []
        name = os.fspath(storage.home(folder))
        if "config.json" in present and not overwrite:
            raise UserError(f"{name!r} already holds a run: use `rlx resume {name}`, or --overwrite.")
        if RUNS in present:
            raise UserError(f"{name!r} already holds many runs; name another run directory.")
        if present and "config.json" not in present:
            names = ", ".join(present[:4])
            raise UserError(f"{name!r} is not empty and holds no run ({names}); name another run directory.")
        return present

    @staticmethod
    def create(path: str | os.PathLike[str], config: Mapping[str, Any], overwrite: bool = False) -> RunDirectory:
        """Makes the folder and its `config.json`: `config`, plus "format" and "versions".

        Raises UserError as `check_free` does. `overwrite` removes what a run writes and nothing more.
        """
        folder = Path(path).absolute()
        present = RunDirectory.check_free(folder, overwrite)
        for name in present:
            if name in OWN_FILES:
                target = folder / name
                shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink()
        if present:
            storage.clear(folder, sorted(OWN_FILES, key="config.json".__eq__))  # without it the rest belongs to no run
        folder.mkdir(parents=True, exist_ok=True)
        full = {**config, "format": FORMAT, "versions": versions()}
        write_atomically(folder / "config.json", json.dumps(full, indent=2) + "\n")
        return RunDirectory(folder, json.loads(json.dumps(full)))

    @staticmethod
    def open(path: str | os.PathLike[str]) -> RunDirectory:
        """An existing run. Raises UserError if there is none, or if its `config.json` cannot be read."""
        folder = Path(path).absolute()
        file = folder / "config.json"
        if not file.is_file():
            what = "holds no run (no config.json)" if folder.is_dir() else "does not exist"
            inside = sorted({path.parent.name for name in (RUNS, "config.json") for path in folder.glob(f"*/{name}")})
            more = ", ..." if len(inside) > 4 else ""
            what += f"; name one of the folders of runs in it: {', '.join(inside[:4])}{more}" if inside else ""
            raise UserError(f"run directory {str(folder)!r} {what}.")
        try:
            config = json.loads(file.read_text())
            found = int(config["format"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{str(file)!r} is damaged: {error!r}.") from error
        if found != FORMAT:
            raise UserError(f"{str(file)!r} has format {found}; this version of rlx reads format {FORMAT}.")
        return RunDirectory(folder, config)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`; null becomes NaN. A torn last line is left out, as after a kill.

    Raises UserError if there is no such file, or if a line before the last cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{str(file)!r} does not exist.")
    rows = []
    lines = file.read_bytes().split(b"\n")  # what follows the last line break is torn, or nothing
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            rows.append({"step": int(row.pop("step")), **{k: math.nan if v is None else v for k, v in row.items()}})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"line {number} of {str(file)!r} is damaged: {error!r}.") from error
    return rows
