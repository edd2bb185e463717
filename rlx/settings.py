"""Settings of a run as flat dictionaries, and how layers of them merge: command line, file, preset, default.

Keys: a field of TrainConfig (`num_envs`), `algo.FIELD` of the algorithm's Config, `env.KEY` an override of the
environment. Free of jax.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from rlx.errors import UserError, require, unknown

Flat = Mapping[str, Any]


class Setting(NamedTuple):
    """A merged value and the layer it came from."""

    value: Any
    origin: str  # "command line", "config", "preset" or "default"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"algo": {"gamma": 0.9}} and {"algo.gamma": 0.9} become the same flat dictionary."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        flat |= flatten(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def read_file(path: str | Path) -> dict[str, Any]:
    """Flat settings of a JSON or TOML file. Raises UserError if it cannot be read."""
    file = Path(path)
    readers = {".json": json.loads, ".toml": tomllib.loads}
    if file.suffix not in readers:
        raise UserError(f"config file {str(path)!r} must end in .json or .toml.")
    try:
        content = readers[file.suffix](file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"config file {str(path)!r} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"config file {str(path)!r} must hold a table of settings, not {type(content).__name__}.")
    return flatten(content)


def presets() -> dict[str, dict[str, dict[str, Any]]]:
    """Everything that `rlx/presets/*.toml` holds: environment, or "suite/*" -> algorithm -> flat settings."""
    found = {}
    for file in sorted(resources.files("rlx").joinpath("presets").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            suite = file.name.removesuffix(".toml")
            for env, table in tomllib.loads(file.read_text()).items():
                found[f"{suite}/{env}"] = {algorithm: flatten(values) for algorithm, values in table.items()}
    return found


def preset_for(module: Any, env: str, algorithm: str) -> dict[str, Any]:
    """Tuned settings for an environment and the module of an algorithm, which `algorithm` names.

    Own work takes those of the algorithm that its `PRESET` names, as far as its Config has the fields. Raises UserError
    for a PRESET without any.
    """
    own = getattr(module, "PRESET", "")
    require(isinstance(own, str), "PRESET", own, "the name of the algorithm whose settings to take")
    if not own:
        return preset(env, algorithm)
    known = {name for tables in presets().values() for name in tables}
    if own not in known:
        raise unknown("PRESET: algorithm", own, known)
    fields = {f"algo.{field.name}" for field in dataclasses.fields(module.Config)}
    return {key: value for key, value in preset(env, own).items() if not key.startswith("algo.") or key in fields}


def hints(config: type) -> dict[str, Any]:
    """The types that the fields of a dataclass are declared with."""
    return typing.get_type_hints(config)


def preset(env: str, algorithm: str) -> dict[str, Any]:
    """Tuned settings for a pair, flat: the environment's above its suite's ("*") above those of every environment."""
    found, suite = presets(), env.partition("/")[0]
    layers = (found.get(name, {}).get(algorithm, {}) for name in ("default/*", f"{suite}/*", env))
    return {key: value for layer in layers for key, value in layer.items()}


def defaults(train: type, algo: type) -> dict[str, Any]:
    """The flat defaults of a TrainConfig and of an algorithm's Config."""
    flat = {field.name: getattr(train(), field.name) for field in dataclasses.fields(train)}
    return flat | {f"algo.{field.name}": getattr(algo(), field.name) for field in dataclasses.fields(algo)}


def merge(train: type, algo: type, layers: Sequence[tuple[str, Flat]]) -> dict[str, Setting]:
    """Merges layers, the strongest last, over the defaults of two dataclasses.

    Keys `env.KEY` pass unchecked: `envs.make` knows which exist. Raises UserError for a key that is no field, and for
    a value of the wrong type.
    """
    merged = {key: Setting(value, "default") for key, value in defaults(train, algo).items()}
    return override(merged, train, algo, layers)


def override(
    merged: Mapping[str, Setting], train: type, algo: type, layers: Sequence[tuple[str, Flat]]
) -> dict[str, Setting]:
    """`merged` with more layers above it. Raises UserError as `merge` does."""
    merged = dict(merged)
    hints = typing.get_type_hints(train) | {f"algo.{k}": hint for k, hint in typing.get_type_hints(algo).items()}
    fields = set(hints)
    for origin, layer in layers:
        for key, value in layer.items():
            if key.startswith("env."):
                merged[key] = Setting(value, origin)
                continue
            if key not in fields:
                raise unknown(f"setting (from the {origin})", key, fields)
            merged[key] = Setting(coerce(key, value, hints[key]), origin)
    return merged


def coerce(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type that a field asks for: JSON's lists become tuples, an int serves as a float.

    Raises UserError if it is of another type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal and value in args:
        return value
    if origin in (typing.Union, types.UnionType):
        for arg in args:
            try:
                return coerce(key, value, arg)
            except UserError:
                continue
    if origin is tuple and isinstance(value, list | tuple):
        inner = args[:1] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        if len(inner) == len(value):
            return tuple(coerce(key, v, hint) for v, hint in zip(value, inner, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    allowed = f"one of {', '.join(map(repr, args))}" if origin is typing.Literal else getattr(hint, "__name__", hint)
    raise UserError(f"{key} = {value!r} is not possible: it must be {hint if origin is tuple else allowed}.")


def check_types(config: Any, prefix: str = "") -> None:
    """Raises UserError where a field of a dataclass holds a value of another type than it is declared with."""
    for name, hint in typing.get_type_hints(type(config)).items():
        coerce(f"{prefix}{name}", getattr(config, name), hint)


def values(merged: Mapping[str, Setting], prefix: str = "") -> dict[str, Any]:
    """Plain values of one part: "" for TrainConfig's fields, "algo." or "env." for the others, without the prefix."""
    if not prefix:
        return {key: setting.value for key, setting in merged.items() if "." not in key}
    return {key.removeprefix(prefix): s.value for key, s in merged.items() if key.startswith(prefix)}


def entries(merged: Mapping[str, Setting]) -> dict[str, dict[str, Any]]:
    """What config.json and sweep.json keep of merged settings: {key: {"value": ..., "from": ...}}."""
    return {key: {"value": setting.value, "from": setting.origin} for key, setting in merged.items()}


def read_entries(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Setting]:
    """Undoes `entries`."""
    return {key: Setting(entry["value"], entry["from"]) for key, entry in entries.items()}


def build(cls: type, fields: Mapping[str, Any]) -> Any:
    """The dataclass `cls` from what JSON kept of it. Raises UserError for fields it does not have."""
    hints = typing.get_type_hints(cls)
    for name in fields:
        if name not in hints:
            raise UserError(f"the run was made with the setting {name!r}, which this version does not have.")
    return cls(**{name: coerce(name, value, hints[name]) for name, value in fields.items()})


def describe(merged: Mapping[str, Setting]) -> str:
    """One line: what is not at its default and where it came from, and how many are."""
    changed = [f"{key}={s.value!r} ({s.origin})" for key, s in merged.items() if s.origin != "default"]
    same = len(merged) - len(changed)
    return f"settings: {', '.join([*changed, f'{same} at their defaults'])}"
