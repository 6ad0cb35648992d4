"""Settings: one frozen dataclass; defaults < TOML file < environment < flags. Needs no PyTorch."""

from __future__ import annotations

import dataclasses
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from recurra.errors import ConfigError, suggest

PREFIX = "RECURRA_"
# Variables of the house that are no settings of a run: where compiled code is kept.
NO_SETTINGS = {"RECURRA_CACHE_DIR"}
C = TypeVar("C")


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A field of a configuration: its default, what it means, and the values it can take.

    ``low`` is the least value and ``high`` the greatest; ``above`` and ``below`` are limits that are not reached.
    """
    return dataclasses.field(
        default=default,
        metadata={"help": help, "low": low, "above": above, "high": high, "below": below, "choices": choices},
    )


@dataclass(frozen=True)
class TrainingConfig:
    """How to train, whatever the task. One update is one step of the optimiser (AdamW, Loshchilov & Hutter 2019)."""

    batch_size: int = setting(32, "Sequences, or streams of a text, trained side by side.", low=1, high=1_000_000)
    window: int = setting(64, "Steps that backpropagation through time reaches back.", low=1, high=1_000_000)
    epochs: int = setting(10, "Times to go through the training data.", low=1)
    updates: int | None = setting(None, "Stop after this many updates, whatever the epochs say.", low=1)
    learning_rate: float = setting(3e-3, "The highest learning rate.", above=0)
    warmup: int = setting(100, "Updates over which the learning rate rises from zero.", low=0)
    schedule: str = setting("cosine", "What it does then.", choices=("cosine", "linear", "constant"))
    final_rate: float = setting(0.05, "Share of the learning rate left at the end of a decay.", low=0, high=1)
    weight_decay: float = setting(0.01, "Decay of weight matrices per unit of learning rate.", low=0)
    clip_norm: float | None = setting(
        1.0, "Longest gradient, as a norm over all parameters; none for no limit.", above=0
    )
    clip_value: float | None = setting(None, "Largest single entry of a gradient; none for no limit.", above=0)
    accumulate: int = setting(1, "Windows whose gradients make one update.", low=1)
    patience: int | None = setting(None, "Stop after this many evaluations without a better one.", low=1)
    evaluate_every: int | None = setting(None, "Updates between evaluations; none for once an epoch.", low=1)
    save_minutes: float = setting(2.0, "Minutes between checkpoints, beside one at each evaluation.", above=0)
    skip_limit: int = setting(5, "Updates in a row with a gradient that is not finite before training stops.", low=1)
    precision: str = setting("float32", "Of the arithmetic; weights stay float32.", choices=("float32", "bfloat16"))
    seed: int = setting(1, "Where all randomness begins.", low=0, high=10**18)
    threads: int | None = setting(None, "Threads of the processor; none for PyTorch's choice.", low=1, high=1024)
    tensorboard: bool = setting(False, "Write TensorBoard files, too (pip install 'recurra[tracking]').")


def resolve(
    kind: type[C],
    *,
    toml: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> C:
    """The configuration of class ``kind``: its defaults, overruled by a TOML file, the environment and flags.

    ``kind`` is a frozen dataclass of sections, each a frozen dataclass of ``setting``s. A TOML file has the sections
    as tables. An environment variable is named ``RECURRA_`` and the setting in capitals. ``flags`` has settings
    by name; None is a flag that was not given, the text "none" the value None.

    Raises ConfigError for an unknown section or setting, with the nearest known one, and for a value out of range.
    """
    known = settings(kind)
    values: dict[str, Any] = {}
    if toml is not None:
        for name, value in _read_toml(kind, toml):
            values[name] = _parse(known[name], value, f"in {toml}")
    for variable, text in (os.environ if environ is None else environ).items():
        if variable.startswith(PREFIX) and variable not in NO_SETTINGS:
            name = variable.removeprefix(PREFIX).lower()
            if name not in known:
                nearest = suggest(variable, [PREFIX + each.upper() for each in known])
                raise ConfigError(f"unknown environment variable {variable}: {nearest}")
            values[name] = _parse(known[name], text, f"in the environment variable {variable}")
    for name, value in (flags or {}).items():
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}: {suggest(name, known)}")
        if value is not None:
            values[name] = _parse(known[name], value, f"of --{name.replace('_', '-')}")
    return build(kind, values)


def build(kind: type[C], values: Mapping[str, Any]) -> C:
    """The configuration of class ``kind`` with these settings, by name, and defaults for the rest."""
    sections = {}
    for section, section_kind in section_kinds(kind):
        names = {field.name for field in dataclasses.fields(section_kind)}
        sections[section] = section_kind(**{name: value for name, value in values.items() if name in names})
    return kind(**sections)


def read_complete(kind: type[C], path: Path) -> C:
    """The configuration that ``to_toml`` wrote to ``path``. Raises ConfigError where a setting is missing or wrong."""
    known = settings(kind)
    values = {name: _parse(known[name], value, f"in {path}") for name, value in _read_toml(kind, path)}
    missing = [name for name in known if name not in values]
    if missing:
        raise ConfigError(f"{path} is not complete: it lacks {', '.join(missing)}")
    return build(kind, values)


def to_toml(config: Any) -> str:
    """A configuration as a TOML file that ``resolve`` reads back to the same one."""
    lines = []
    for section, _ in section_kinds(type(config)):
        lines.append(f"[{section}]")
        for each in settings(type(config)).values():
            if each.section == section:
                value = _toml_value(getattr(getattr(config, section), each.name))
                lines.append(f"{each.name} = {value}  # {each.help}")
        lines.append("")
    return "\n".join(lines)


@dataclass(frozen=True)
class Setting:
    """One setting as ``setting`` declared it; ``kind`` is its type without None."""

    section: str
    name: str
    kind: type
    optional: bool
    default: Any
    help: str
    limits: Mapping[str, Any]


def settings(kind: type) -> dict[str, Setting]:
    """Every setting of a configuration class, by name."""
    found = {}
    for section, section_kind in section_kinds(kind):
        hints = typing.get_type_hints(section_kind)
        for field in dataclasses.fields(section_kind):
            hint = hints[field.name]
            optional = isinstance(hint, types.UnionType)
            if optional:
                hint = next(part for part in typing.get_args(hint) if part is not type(None))
            limits = dict(field.metadata)
            text = limits.pop("help")
            found[field.name] = Setting(section, field.name, hint, optional, field.default, text, limits)
    return found


def section_kinds(kind: type) -> list[tuple[str, type]]:
    """The sections of a configuration class: (name, class)."""
    hints = typing.get_type_hints(kind)
    return [(field.name, hints[field.name]) for field in dataclasses.fields(kind)]


def _read_toml(kind: type, path: Path) -> list[tuple[str, Any]]:
    try:
        with open(path, "rb") as file:
            return _settings_of(kind, tomllib.load(file), f"in {path}")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error


def _settings_of(kind: type, stored: Mapping[str, Any], where: str) -> list[tuple[str, Any]]:
    sections = dict(section_kinds(kind))
    found = []
    for section, table in stored.items():
        if section not in sections:
            raise ConfigError(f"unknown section [{section}] {where}: {suggest(section, sections)}")
        if not isinstance(table, Mapping):
            raise ConfigError(f"expected a section [{section}] {where}, got the value {table!r}")
        known = [field.name for field in dataclasses.fields(sections[section])]
        for name, value in table.items():
            if name not in known:
                raise ConfigError(f"unknown setting {name!r} in section [{section}] {where}: {suggest(name, known)}")
            found.append((name, value))
    return found


def _parse(setting: Setting, value: Any, where: str) -> Any:
    kind, optional, limits = setting.kind, setting.optional, setting.limits
    if isinstance(value, str) and value.lower() == "none" and optional:
        return None
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
    if limits["choices"]:
        wanted = "one of " + ", ".join(limits["choices"])
    if optional:
        wanted += ", or none"
    for limit, words in (("low", "at least"), ("above", "above"), ("high", "at most"), ("below", "below")):
        if limits[limit] is not None:
            wanted += f", {words} {limits[limit]}"
    parsed = _convert(kind, value)
    if (
        parsed is None
        or (limits["choices"] and parsed not in limits["choices"])
        or (limits["low"] is not None and not parsed >= limits["low"])
        or (limits["above"] is not None and not parsed > limits["above"])
        or (limits["high"] is not None and not parsed <= limits["high"])
        or (limits["below"] is not None and not parsed < limits["below"])
        or parsed == float("inf")
    ):
        raise ConfigError(f"expected {setting.name} to be {wanted}, got {value!r} {where}")
    return parsed


def _convert(kind: type, value: Any) -> Any:
    """``value`` as an int, float, bool or str, or None where it is none of it."""
    if isinstance(value, str) and kind is not str:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(value.lower())
        try:
            return kind(value)
        except ValueError:
            return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if type(value) is kind else None


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)
