"""Settings of a configuration as flags of a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import Group, Parameter

from recurra.training.config import Setting, settings

F = TypeVar("F", bound=Callable[..., Any])


def with_settings(kind: type) -> Callable[[F], F]:
    """Give a command a flag for every setting of the configuration class ``kind``.

    The command takes them as ``**flags``; a flag that was not given is None there, so that the TOML file and the
    environment have their say.
    """

    def give(command: F) -> F:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        sections = dict.fromkeys(each.section for each in settings(kind).values())
        groups = {name: Group(name.capitalize(), sort_key=k + 1) for k, name in enumerate(sections)}
        flags = [
            inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=_annotation(each, groups[each.section]),
            )
            for each in settings(kind).values()
        ]
        # inspect reads this attribute of any function, though the type of functions does not have it.
        command.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
        command.__annotations__ = {
            **{name: hint for name, hint in command.__annotations__.items() if name != "flags"},
            **{flag.name: flag.annotation for flag in flags},
        }
        return command

    return give


def _annotation(setting: Setting, group: Group) -> Any:
    hint: Any = setting.kind
    if setting.limits["choices"]:
        hint = Literal[setting.limits["choices"]]
    if setting.optional:
        hint = hint | Literal["none"]
    default = "none" if setting.default is None else str(setting.default).lower()
    return Annotated[hint | None, Parameter(help=setting.help, group=group, show_default=lambda _: default)]
