"""What stands on the command line of `rlx train`, merged with file, preset and defaults."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
from collections.abc import Collection, Sequence
from typing import Annotated, Any, NamedTuple

import tyro

from rlx import settings
from rlx.errors import UserError

RATES = ("algo.learning_rate", "algo.actor_learning_rate", "algo.critic_learning_rate")
ELSEWHERE = {  # what CleanRL, Stable-Baselines3 and brax call the same
    "lr": RATES,
    "learning_rate": RATES,
    "ent_coef": ("algo.entropy_coef",),
    "entropy_cost": ("algo.entropy_coef",),
    "vf_coef": ("algo.value_coef",),
    "clip_coef": ("algo.clip_eps",),
    "clip_range": ("algo.clip_eps",),
    "clipping_epsilon": ("algo.clip_eps",),
    "discounting": ("algo.gamma",),
    "gamma": ("algo.gamma",),
    "update_epochs": ("algo.num_epochs",),
    "n_epochs": ("algo.num_epochs",),
    "num_updates_per_batch": ("algo.num_epochs",),
    "buffer_size": ("algo.replay_size",),
    "learning_starts": ("algo.prefill_steps",),
    "num_steps": ("unroll_length",),
    "n_steps": ("unroll_length",),
    "n_envs": ("num_envs",),
    "total_timesteps": ("total_steps",),
    "num_timesteps": ("total_steps",),
    "episode_length": ("env.episode_length",),
}


@dataclasses.dataclass(frozen=True)
class Options:
    physics: str = "auto"  # engine, for suites that have a choice: auto, mjx, warp, mujoco
    config: str = ""  # JSON or TOML file of settings, keys and paths as here; the command line stands above it
    run_dir: str = ""  # where the run goes; empty: a new folder of runs/
    from_run: Annotated[str, tyro.conf.arg(name="from")] = ""  # run whose policy to start from; the critic starts anew
    data: tuple[str, ...] = ()  # data sets to learn from, FILE or FILE:SHARE each; of SAC and the like: algo.data_batch
    num_seeds: int = 1  # runs of the seeds SEED, SEED + 1, ... as one program, each with a folder in --run-dir
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False  # replace the run that --run-dir holds
    wandb: str = ""  # W&B project to log to as well; empty: none
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False  # print nothing but errors and the result


class TrainArguments(NamedTuple):
    options: Options
    merged: dict[str, settings.Setting]


def take_env_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Splits `--env.KEY VALUE` and `--env.KEY=VALUE` off, as {"env.KEY": value}.

    A value is a Python literal, true, false or none; anything else is a string. Raises UserError for a missing value.
    """
    rest: list[str] = []
    overrides: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--env."):
            rest.append(word)
            continue
        flag, equals, text = word.partition("=")
        if not equals:
            text = next(words, "--")
            if text.startswith("--"):
                raise UserError(f"{flag} needs a value.")
        overrides[flag.removeprefix("--").replace("-", "_")] = literal(text)
    return rest, overrides


def literal(text: str) -> Any:
    """`text` as a Python literal, or as itself."""
    names = {"true": True, "false": False, "none": None}
    if text.lower() in names:
        return names[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def option_value(arguments: Sequence[str], flag: str) -> str:
    """The value of `flag`, before tyro sees the arguments; empty if it is not there."""
    for index, word in enumerate(arguments):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag:
            return next(iter(arguments[index + 1 :]), "")
    return ""


def boolean(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[bool] | None:
    """tyro's rule for a bool that takes a value: true or false as in TOML, or as Python writes them."""
    if info.type is not bool:
        return None
    words = {"true": True, "false": False}
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}",
        instance_from_str=lambda given: words[given[0].lower()],
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value).lower()],
        choices=("true", "false", "True", "False"),
    )


def whole(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[int] | None:
    """tyro's rule for a whole number, which may be written as 1_000_000 or 1e6."""
    if info.type is not int:
        return None

    def read(given: list[str]) -> int:
        with contextlib.suppress(ValueError):
            return int(given[0])
        with contextlib.suppress(ValueError):
            if float(given[0]).is_integer():
                return int(float(given[0]))
        raise ValueError(f"{given[0]!r} is no whole number")

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def check_words(arguments: Sequence[str], known: Collection[str]) -> None:
    """Raises UserError for a flag that goes by another name here, with that name; others are tyro's to refuse."""
    for word in arguments:
        given = word.removeprefix("--").partition("=")[0].replace("-", "_")
        name = given.removeprefix("algo.")
        meant = [key for key in ELSEWHERE.get(name, ()) if key in known or key.startswith("env.")]
        if word.startswith("--") and given not in known and meant:
            here = " and ".join(f"--{key.replace('_', '-')}" for key in meant)
            raise UserError(f"--{given.replace('_', '-')} is called {here} here.")


def parse_train(env: str, algorithm: str, arguments: Sequence[str], train_config: type, module: Any) -> TrainArguments:
    """Merges the defaults of two dataclasses, the preset, `--config` and the command line, the strongest last.

    `module`: of the algorithm that `algorithm` names; its `Config` is the second dataclass.

    tyro reports flags that do not exist and values of a wrong type, and exits with status 2. Raises UserError for
    what is wrong in the file.
    """
    algo_config = module.Config
    arguments, overrides = take_env_overrides(arguments)
    layers: list[tuple[str, settings.Flat]] = [("preset", settings.preset_for(module, env, algorithm))]
    file = option_value(arguments, "--config")
    if file:
        layers.append(("config", settings.read_file(file)))
    below = settings.merge(train_config, algo_config, layers)
    train, algo = train_config(**settings.values(below)), algo_config(**settings.values(below, "algo."))
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(boolean)
    registry.primitive_rule(whole)
    check_words(arguments, {*below, *(field.name for field in dataclasses.fields(Options))})
    omit_prefix, take_values = tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff
    fields: list[Any] = [
        ("options", Annotated[Options, omit_prefix], dataclasses.field(default=Options())),
        ("train", Annotated[train_config, omit_prefix, take_values], dataclasses.field(default=train)),
        ("algo", Annotated[algo_config, take_values], dataclasses.field(default=algo)),
    ]
    parsed: Any = tyro.cli(
        dataclasses.make_dataclass("Arguments", fields, frozen=True),
        args=arguments,
        prog=f"rlx train {algorithm} {env}",
        description="--env.KEY VALUE overrides a setting of the environment. --debug shows tracebacks.",
        registry=registry,
    )
    flat = dataclasses.asdict(parsed.train) | {f"algo.{k}": v for k, v in vars(parsed.algo).items()}
    given = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in arguments if word[:2] == "--"}
    layers.append(("command line", {key: value for key, value in flat.items() if key in given} | overrides))
    return TrainArguments(parsed.options, settings.merge(train_config, algo_config, layers))
