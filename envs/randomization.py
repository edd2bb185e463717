"""Domain randomisation of MuJoCo models, for the suites playground and brax: their overrides, and what they take.

`randomize`: a function, or a reference `path/to/file.py:function` or `module:function` to one, of either form:

    def draw(key, model): ...            -> {"body_mass": [nbody], "opt.gravity": [3], ...}
    def randomize(model, rng): ...       -> batched model, in_axes: Playground's form

Which of the two it is the place of the parameter `model` tells: the task's `mujoco.mjx.Model`, on every engine. Only
arrays of floats may be drawn. True takes the randomiser that Playground has for the task. `randomize_variants`: each
reset takes one of so many fixed draws, in place of a fresh one (`envs.wrappers.DomainRandomization`).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from envs import physics
from envs.adapter import foreign
from envs.external import load_function
from envs.wrappers import DomainRandomization
from rlx.environment import Environment
from rlx.errors import UserError, is_whole, require

if TYPE_CHECKING:
    from mujoco import mjx

OVERRIDES: dict[str, Any] = {"randomize": None, "randomize_variants": None}
SHAPED = [mujoco.mjtGeom.mjGEOM_HFIELD, mujoco.mjtGeom.mjGEOM_MESH, mujoco.mjtGeom.mjGEOM_SDF]
ModelDraw = Callable[[jax.Array, "mjx.Model"], Mapping[str, jax.Array]]


def randomized(
    name: str, env: Environment, engine: Any, options: Mapping[str, Any], own: Callable[..., Any] | None = None
) -> Environment:
    """`env` on `engine`, randomised as the overrides in `options` ask; `own`: the task's, in Playground's form.

    Raises UserError for a function that is not there or has neither form, for a field that the model does not have, of
    another shape or not of floats, or that the engine took in none of a few draws, and for a number of variants that
    is none.
    """
    wanted, variants = options.get("randomize"), options.get("randomize_variants")
    if wanted is None or wanted is False:
        require(variants is None, f"{name}: randomize_variants", variants, "it needs the override randomize")
        return env
    require(variants is None or is_whole(variants, 1), f"{name}: randomize_variants", variants, "a whole number from 1")
    what = f"{name}: randomize"
    if wanted is True:
        wanted = own
        require(own is not None, what, True, "the task has no randomiser of its own; name a function")
    elif isinstance(wanted, str):
        require(":" in wanted, what, wanted, "path/to/file.py:function, module:function, or true")
        wanted = load_function(wanted, "randomize")
    if not callable(wanted):
        raise UserError(f"{what} = {wanted!r} is not possible: a function, a reference to one, or true.")
    draw, model = as_draw(wanted), engine.model
    adapted = DomainRandomization(env, lambda key: check(what, draw(key, model), model), variants)
    few = jax.random.split(jax.random.key(0), 4)
    check_draws(what, jax.jit(jax.vmap(lambda key: adapted.params(key, {})))(few), engine)
    return adapted


def check_draws(what: str, draws: Mapping[str, jax.Array], engine: Any) -> None:
    """Raises UserError that begins with `what` if `engine` takes none of a few `draws`, leaves [n, ...]."""
    if "geom_size" in draws:
        nominal = np.asarray(engine.model.geom_size, np.float32)
        changed = (np.asarray(draws["geom_size"]) != nominal).any(axis=(0, 2))
        shaped = np.flatnonzero(changed & np.isin(engine.model.geom_type, SHAPED))
        if shaped.size:
            raise UserError(
                f"{what}: geom_size: geom {shaped[0]} takes its shape from a mesh or a height field, not from its size."
            )
    if engine.name != "mujoco" or not draws:
        return
    try:
        engine.check_overrides(draws)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def as_draw(function: Callable[..., Any]) -> ModelDraw:
    """`function` of either form as draw(key, model). Raises UserError if it has neither."""
    names = list(inspect.signature(function).parameters)
    if "model" not in names[:2] or len(names) < 2:
        called = getattr(function, "__name__", function)
        raise UserError(f"randomize: {called}({', '.join(names)}) must be draw(key, model) or randomize(model, rng).")
    return from_playground(function) if names[0] == "model" else foreign_draw(function)


def foreign_draw(function: ModelDraw) -> ModelDraw:
    def draw(key: jax.Array, model: mjx.Model) -> Mapping[str, jax.Array]:
        with foreign():
            return function(key, model)

    return draw


def from_playground(function: Callable[..., Any]) -> ModelDraw:
    """A randomiser of Playground's form, (model, rng [N]) -> (model with some [N, ...] fields, in_axes), as ours.

    It is called with one key, and what it made of the fields that `in_axes` names is the draw. Raises UserError where
    `in_axes` names others than public fields of the model and of its options, or where nothing like it is returned.
    """

    def draw(key: jax.Array, model: mjx.Model) -> Mapping[str, jax.Array]:
        with foreign():
            result = function(model, key[None])
        if not isinstance(result, tuple) or len(result) != 2 or not all(isinstance(x, type(model)) for x in result):
            raise UserError("randomize: a function (model, rng) must return (batched model, in_axes), both models.")
        batched, in_axes = result
        drawn = {}
        for path, axis in jax.tree_util.tree_leaves_with_path(in_axes):
            field = jax.tree_util.keystr(path, simple=True, separator=".")
            if axis != 0 or field.startswith(("_impl", "stat")):
                raise UserError(
                    f"randomize: in_axes has {axis} for {field}; public fields may have 0, all others None."
                )
            value = operator.attrgetter(field)(batched)
            if jnp.shape(value)[:1] != (1,):
                raise UserError(
                    f"randomize: in_axes has 0 for {field}, which has shape {jnp.shape(value)} for one key."
                )
            drawn[field] = value[0]
        return drawn

    return draw


def check(what: str, drawn: Any, model: mjx.Model) -> dict[str, jax.Array]:
    """`drawn` as float32, if it can stand in for fields of `model`. Raises UserError that begins with `what` if not."""
    if not isinstance(drawn, Mapping):
        raise UserError(f"{what}: the function must return a dict of model fields, not {type(drawn).__name__}.")
    try:
        physics.with_overrides(model, drawn)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    for field in drawn:
        old = operator.attrgetter(field)(model)
        if isinstance(old, int) or not jnp.issubdtype(jax.dtypes.result_type(old), jnp.floating):
            raise UserError(f"{what}: model field {field} is not of floats, so it cannot differ between episodes.")
    return {field: jnp.asarray(value, jnp.float32) for field, value in drawn.items()}
