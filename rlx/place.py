"""Where runs are recorded: looked at before anything compiles, held while they train, made when they begin."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlx import group, storage
from rlx.distributed import check_shared, on_first, several
from rlx.errors import UserError, require
from rlx.files import locked
from rlx.logging import Progress
from rlx.records import check_same_settings, note_resume, say_other_devices
from rlx.run_directory import RunDirectory, group_of

LOST = 60.0  # seconds in which processes of a run that lost one of them end, and leave its directory


def check_free(path: Path, names: Sequence[str], many: bool, overwrite: bool) -> None:
    """Raises UserError where a run, or `many` with these names, may not begin in `path`."""
    if many:
        group.check_free(path, names, overwrite)
    else:
        check_alone(path)
        RunDirectory.check_free(path, overwrite)


def check_alone(path: Path) -> None:
    """Raises UserError for one of the runs of a program: it would be taken back, or begun anew, with the others."""
    whole = group_of(path)
    if whole:
        there = os.fspath(storage.home(whole))
        raise UserError(
            f"{path.name!r} is one of the runs in {there!r}, which go on together: `rlx resume {there}`. A copy of its "
            "folder in another place goes on alone."
        )


class Place:
    """A run directory, a folder of those of many runs of one program, or nowhere.

    Of several processes the first one reads and writes; all call this alike.
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        descriptions: Mapping[str, Mapping[str, Any]],
        many: bool,
        overwrite: bool,
        resume: bool,
        progress: Progress,
    ):
        """Raises UserError where runs may not begin there, or those that lie there may not go on."""
        require(run_dir is not None or not resume, "run_dir", run_dir, "resume needs the directory that holds the run")
        self._path = None if run_dir is None else storage.fetch(run_dir)
        self._descriptions, self._many, self._overwrite, self._resume = descriptions, many, overwrite, resume
        self._progress, self._held = progress, False
        self._directories: list[RunDirectory] = []
        if self._path is None:
            return
        if resume:
            self._directories = self._reopen(self._path)
            say_other_devices(self._directories[0].config, next(iter(descriptions.values())), progress)
        else:
            on_first(partial(check_free, self._path, list(descriptions), many, overwrite))
        check_shared(self._path)

    def _reopen(self, path: Path) -> list[RunDirectory]:
        if self._many:
            return group.reopen(path, self._descriptions)
        (description,) = self._descriptions.values()
        on_first(partial(check_alone, path))
        directory = RunDirectory(path, on_first(lambda: RunDirectory.open(path).config))
        check_same_settings(directory.config, description)
        return [directory]

    def _create(self, path: Path) -> list[RunDirectory]:
        if self._many:
            return group.create(path, self._descriptions, self._overwrite)
        (description,) = self._descriptions.values()
        config = on_first(lambda: RunDirectory.create(path, description, self._overwrite).config)
        return [RunDirectory(path, config)]

    def _lock(self, stack: contextlib.ExitStack) -> None:
        patience = LOST if several() else 0.0
        on_first(lambda: stack.enter_context(locked(str(self._path), patience)))

    def hold(self, stack: contextlib.ExitStack) -> None:
        """Keeps other processes from what is there, until `stack` ends. Raises UserError where one trains into it."""
        if self._path is None:
            return
        self._held = on_first(self._path.is_dir)  # a run to resume, or to overwrite
        if self._held:
            self._lock(stack)
        on_first(partial(storage.claim, self._path))

    def begin(self, stack: contextlib.ExitStack) -> list[RunDirectory]:
        """The directory of each run, made anew unless they go on; none if they are recorded nowhere."""
        if self._path is None:
            return []
        for index, directory in enumerate(self._directories):
            on_first(partial(note_resume, directory, self._progress if index == 0 else Progress(quiet=True)))
        if not self._resume:
            if not self._held:  # whoever came first holds it, before anything in it is made or replaced
                on_first(partial(self._path.mkdir, parents=True, exist_ok=True))
                self._lock(stack)
            self._directories = self._create(self._path)
        return self._directories
