"""The algorithms by name. A module exports `Config`, `check` and `make`; it is imported when it is asked for."""

from __future__ import annotations

ALGORITHMS = {
    "ppo": "rlx.algorithms.ppo",
    "sac": "rlx.algorithms.sac",
    "td3": "rlx.algorithms.td3",
    "bc": "rlx.algorithms.bc",
    "fpo": "rlx.algorithms.fpo",
    "dppo": "rlx.algorithms.dppo",
    "hasac": "rlx.algorithms.hasac",
    "maddpg": "rlx.algorithms.maddpg",
    "mappo": "rlx.algorithms.mappo",
}
