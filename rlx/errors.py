"""The one error a user can correct. Free of jax, so that a misspelt name is found before jax is imported."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input that a user can correct. The command line prints its message without a traceback."""


def unknown(what: str, value: str, allowed: Iterable[str]) -> UserError:
    """An error for a name that does not exist: it proposes close matches, or lists what is allowed."""
    names = sorted(allowed)
    by_lower = {name.lower(): name for name in names}
    close = [by_lower[match] for match in difflib.get_close_matches(value.lower(), by_lower, n=4, cutoff=0.6)]
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Allowed: {', '.join(names)}."
    return UserError(f"{what} {value!r} does not exist. {hint}")


def require(ok: bool, field: str, value: object, allowed: str) -> None:
    """Raises UserError that names the field, its value and what is allowed, unless `ok`."""
    if not ok:
        raise UserError(f"{field} = {value!r} is not possible: {allowed}.")


def is_whole(value: object, lowest: int = 0) -> bool:
    """Whether `value` is an integer, and no bool, of at least `lowest`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


def check_seed(seed: int, field: str = "seed") -> None:
    """Raises UserError for one that would silently be another one's keys."""
    require(0 <= seed < 2**32, field, seed, "an integer from 0 to 2^32 - 1")


class NonFiniteError(UserError):
    """Training met a NaN or an infinity. The last good checkpoint stays."""


def require_above(config: object, low: float, *fields: str) -> None:
    """Raises UserError unless each of these settings of an algorithm is above `low`."""
    for field in fields:
        value = getattr(config, field)
        require(value > low, f"algo.{field}", value, f"above {low}")


def require_at_least(config: object, low: float, *fields: str) -> None:
    """As `require_above`, where `low` itself is allowed too."""
    for field in fields:
        value = getattr(config, field)
        require(value >= low, f"algo.{field}", value, f"at least {low}")
