"""Which learners a costly test meets every time: one of each kind. The others meet it with the slow tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

OF_EACH_KIND = ("ppo", "sac")  # on-policy and with a replay


def of_each_kind(names: Iterable[str], kinds: tuple[str, ...] = OF_EACH_KIND) -> list[Any]:
    """Values for `pytest.mark.parametrize`: `names`, those that are not among `kinds` marked slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in kinds)) for name in names]
