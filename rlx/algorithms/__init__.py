"""The algorithms by name. A module exports `Config`, `check` and `make`; it is imported when it is asked for."""

from __future__ import annotations

ALGORITHMS = {
    "ppo": "rlx.algorithms.ppo",
    "bc": "rlx.algorithms.bc",
}
