"""Algorithms and environments that live outside this repository: `path/to/file.py`, `module`, each with `:function`.

Finds, fingerprints and loads their files. Free of jax.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from rlx.errors import UserError


def canonical(reference: str) -> str:
    """`reference` with its file's absolute path, so that it means the same in another working directory."""
    target, colon, function = reference.partition(":")
    return str(Path(target).absolute()) + colon + function if target.endswith(".py") else reference


def source_file(reference: str) -> Path | None:
    """The file behind `reference`, None if there is none. Runs nothing but the parents of a dotted module name.

    The folder of a file, or the working directory for a module, joins the end of Python's search path: neighbours can
    be imported, and a folder of the user's called `envs` or `jax` hides nothing.
    """
    target = reference.partition(":")[0]
    folder = str(Path(target).absolute().parent) if target.endswith(".py") else os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    if target.endswith(".py"):
        return Path(target) if Path(target).is_file() else None
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", target):
        return None
    try:
        spec = importlib.util.find_spec(target)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def fingerprint(reference: str, what: str, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
    """The file behind `reference` and its hash, for config.json: {"path", "sha256"}.

    Raises UserError if there is none; it names the place where a run that is to go on had it (`recorded`).
    """
    path = source_file(reference)
    if path is None:
        target = reference.partition(":")[0]
        missing = f"the file {target!r} does not exist" if target.endswith(".py") else f"there is no module {target!r}"
        was = f" It was in {recorded['path']}." if recorded else ""
        raise UserError(f"{what}: {missing}; run from its folder, or install it.{was}")
    return {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def changed(reference: str, what: str, recorded: Mapping[str, str]) -> str | None:
    """A warning if the file is not as recorded, else None. Raises UserError if it is missing."""
    now = fingerprint(reference, what, recorded)
    if now["sha256"] == recorded["sha256"]:
        return None
    return f"warning: {now['path']} has changed since the run began, so it may not go on as it would have."


def load_algorithm(reference: str) -> ModuleType:
    """A user's module of an algorithm. Raises UserError if it lacks Config or make."""
    module = load_file(Path(reference)) if reference.endswith(".py") else importlib.import_module(reference)
    for name in ("Config", "make"):
        if getattr(module, name, None) is None:
            raise UserError(f"algorithm {reference!r} has no {name}; see `rlx list algorithms` for those that ship.")
    if not dataclasses.is_dataclass(module.Config):
        raise UserError(f"algorithm {reference!r}: Config must be a dataclass.")
    return module


def load_file(path: Path) -> ModuleType:
    """Imports a file under a name of its own, so that it hides no other module."""
    name = f"rlx_external_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, SyntaxError):
            raise UserError(f"{path}, line {error.lineno}: {error.msg}.") from error
        raise
    return module
