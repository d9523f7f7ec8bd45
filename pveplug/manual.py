# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 - the manual's own lines
"""The manual of the parameters, made from their table.

``python -m pveplug.manual`` prints ``docs/parameters.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Final

from pveplug.parameter import Parameter
from pveplug.parameters import GROUPS, PARAMETERS, default_shown


def explain(parameter: Parameter) -> str:
    """Return the help text of one parameter, for the terminal."""
    lines = [
        f"{parameter.name}: {parameter.summary}",
        f"  value:    {parameter.type.explain}",
        f"  default:  {default_shown(parameter)}",
        f"  given in: {_given_in(parameter)}",
    ]
    if parameter.detail:
        lines.append(f"  {parameter.detail}")
    return "\n".join(lines) + "\n"


def _given_in(parameter: Parameter) -> str:
    if not parameter.restore_option:
        return "the plug-in string"
    return "the plug-in string, bconsole's Plugin Options, where=/@pve/…"


def manual() -> str:
    """Return docs/parameters.md."""
    lines = [_HEAD]
    for group, title in GROUPS.items():
        rows = [row for row in PARAMETERS.values() if row.group == group]
        lines += [f"## {title}\n", *_table(rows)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _table(rows: Iterable[Parameter]) -> Iterator[str]:
    yield "| Parameter | Value | Default | At restore | Meaning |"
    yield "| --- | --- | --- | --- | --- |"
    for row in rows:
        meaning = row.summary[0].upper() + row.summary[1:] + "."
        if row.detail:
            meaning += f" {row.detail}"
        cells = [
            f"`{row.name}`",
            row.type.explain,
            default_shown(row),
            "yes" if row.restore_option else "no",
            meaning,
        ]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_HEAD: Final = """\
<!-- Made by `python -m pveplug.manual`; edit pveplug/parameters.py instead. -->
# Parameters

## The plug-in string

In the FileSet, inside Include:

```
Plugin = "podheitor-proxmox: vmid=100,103-105 pve_token_id=bacula@pve!backup pve_token_secret_file=/etc/podheitor-proxmox/token pve_fingerprint=AA:BB:…"
```

- Words `key=value`, separated by white space; no space around `=`. A yes/no key alone means yes.
- A value with spaces stands in quotes: `key='two words'` or `key="two words"`. Between `'…'` every character stands for itself.
  Elsewhere a backslash before a space, a quote or a backslash makes that character ordinary; before anything else it stands for itself.
- Bacula reads the line first: inside its own `"…"` each `"` and each backslash of ours needs a backslash before it. Single quotes and `%` need none.
- Unknown keys, keys given twice and empty values are errors. Lists are separated by `,` or `;`.
- Keep the string below about 1,000 characters: Bacula refuses much longer ones when it loads its configuration.
- Bacula stores the string in its catalogue and with each file on the volumes: name secrets by `…_file` or `…_cmd`.

## Where a restore goes

1. `where=/@pve/key=value,key=value` — a VM, with these options. Characters other than `A-Z a-z 0-9 . _ : ; + @ / -` are written `%XX`
   (two hex digits, a UTF-8 byte each), a list inside a value uses `;`, the whole is at most 900 bytes. An unknown or repeated key fails the restore before anything is touched.
   `where=/@pve/` alone restores to a new VM with all defaults.
2. `where=/some/directory` — plain qcow2 files, written by Bacula itself, unless an option of the group "Where a restore goes" was set in bconsole's Plugin Options.
3. `where=/` or empty — a new VM.

An option in `where=` wins over bconsole's Plugin Options (item "Plugin Options" of the restore's `mod` menu), and these over the plug-in string of the backup, whose
restore options are thus defaults. The first line of the job log says what was decided and why.
A restore runs with the plug-in string as it was at the time of the backup; the parameters marked "At restore" can replace what is outdated in it.
"""


if __name__ == "__main__":
    sys.stdout.write(manual())
