"""Massively parallel reinforcement learning in JAX.

Importing this package imports nothing else: every name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlx.algorithms import ALGORITHMS
from rlx.errors import UserError

if TYPE_CHECKING:
    from rlx.algorithm import Algorithm, Plan, Source
    from rlx.cli.pairs import load
    from rlx.environment import Environment
    from rlx.epoch import TrainState
    from rlx.evaluation import make_evaluate
    from rlx.export import export_policy
    from rlx.gymnasium import evaluate_gymnasium
    from rlx.learners import tuned
    from rlx.plotting import plot
    from rlx.schedule import TrainConfig
    from rlx.training import Run, train, train_many
    from rlx.types import Box, Discrete, Spec, TimeStep, Transition

__version__ = "0.1.0"

_HOMES = {
    "Algorithm": "rlx.algorithm",
    "Box": "rlx.types",
    "Discrete": "rlx.types",
    "Environment": "rlx.environment",
    "Plan": "rlx.algorithm",
    "Run": "rlx.training",
    "Source": "rlx.algorithm",
    "Spec": "rlx.types",
    "TimeStep": "rlx.types",
    "TrainConfig": "rlx.schedule",
    "TrainState": "rlx.epoch",
    "Transition": "rlx.types",
    "evaluate_gymnasium": "rlx.gymnasium",
    "export_policy": "rlx.export",
    "load": "rlx.cli.pairs",
    "make_evaluate": "rlx.evaluation",
    "plot": "rlx.plotting",
    "train": "rlx.training",
    "train_many": "rlx.training",
    "tuned": "rlx.learners",
}

__all__ = [
    "Algorithm",
    "Box",
    "Discrete",
    "Environment",
    "Plan",
    "Run",
    "Source",
    "Spec",
    "TimeStep",
    "TrainConfig",
    "TrainState",
    "Transition",
    "UserError",
    "evaluate_gymnasium",
    "export_policy",
    "load",
    "make_evaluate",
    "plot",
    "train",
    "train_many",
    "tuned",
]


def __getattr__(name: str) -> Any:
    """Names of `_HOMES`, and the algorithms' modules: `rlx.ppo` is `rlx.algorithms.ppo` (PEP 562)."""
    if name in ALGORITHMS:
        return importlib.import_module(ALGORITHMS[name])
    if name not in _HOMES:
        raise AttributeError(f"module 'rlx' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *ALGORITHMS})
