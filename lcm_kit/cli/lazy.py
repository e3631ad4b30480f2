"""Verbs whose options are read when one is run: a list of verbs shows none, and reading them takes time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import CommandInfo


class _Commands(Mapping[str, Any]):
    """Commands by name, each built from its function at the first use."""

    def __init__(self, apps: Sequence[typer.Typer]) -> None:
        infos = [info for app in apps for info in app.registered_commands]
        self._infos = {info.name or _function(info).__name__: info for info in infos}
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            alone = typer.Typer(add_completion=False)
            alone.registered_commands.append(self._infos[name])
            self._built[name] = typer.main.get_command(alone)
        return self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def outlines(self) -> dict[str, Any]:
        """What a list of commands shows: each without its options."""
        return {
            name: TyperCommand(
                name, help=inspect.getdoc(_function(info)), rich_help_panel=info.rich_help_panel
            )
            for name, info in self._infos.items()
        }


class LazyVerbs(TyperGroup):
    """A group of the commands that are registered with `apps`."""

    apps: ClassVar[Sequence[typer.Typer]] = ()

    def __init__(self, **settings: Any) -> None:  # noqa: D107
        super().__init__(**settings)
        self.commands: Any = _Commands(self.apps)

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of their apps."""
        return list(self.commands)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the list of commands, of which none is built for it."""
        built, self.commands = self.commands, self.commands.outlines()
        try:
            super().format_help(ctx, formatter)
        finally:
            self.commands = built


def _function(info: CommandInfo) -> Any:
    assert info.callback is not None  # as the decorator registers it
    return info.callback
