# SPDX-License-Identifier: Apache-2.0
"""One parameter: its name, its type, and how the manual explains it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pveplug import values as v
from pveplug.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Parameter:
    """One key of the plug-in string, of the restore options, or of both."""

    name: str
    type: v.Type
    default: Any
    group: str
    summary: str
    detail: str = ""
    restore_option: bool = False
    """May be given at restore time: in bconsole's menu and in ``where=/@pve/…``."""
    secret: bool = False
    """The value itself is a secret: never shown, never in a message."""
    default_text: str = ""
    """What the manual says instead of a default that is found out at run time."""

    def parse(self, text: str) -> Any:
        """Return the value of ``text``.

        Raises:
            ConfigError: it has none; the text names the key, the value and the rule.
        """
        if not text:
            raise ConfigError(
                f"{self.name} has no value; leave the key out for its default",
                key=self.name,
            )
        try:
            return self.type.parse(text)
        except ValueError as error:
            shown = (
                "" if self.secret else f"={text if text.isprintable() else ascii(text)}"
            )
            raise ConfigError(f"{self.name}{shown}: {error}", key=self.name) from None


def secret_rows(
    name: str, what: str, group: str = "connection", *, restore: bool = True
) -> Iterator[Parameter]:
    """Yield the three ways of giving one secret."""
    yield Parameter(
        name,
        v.TEXT,
        None,
        group,
        f"{what}, in the plug-in string itself",
        "Works, and warns in each job: Bacula stores the plug-in string in the "
        f"catalogue and on the volumes. Use {name}_file.",
        secret=True,
    )
    yield Parameter(
        f"{name}_file",
        v.PATH,
        None,
        group,
        f"file on the node that holds the {what}",
        "One line; readable by its owner only (chmod 600), owned by root.",
        restore_option=restore,
    )
    yield Parameter(
        f"{name}_cmd",
        v.COMMAND,
        None,
        group,
        f"program that prints the {what}",
        "Run as root on the node without a shell, with LC_ALL=C, for at most 30 s. "
        "Not available at restore time: who may restore may not thereby run programs.",
    )
