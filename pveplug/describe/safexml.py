# SPDX-License-Identifier: Apache-2.0
"""XML of unknown origin into a small tree: no DTD, no entities, nothing from outside.

A document type declaration is refused where it begins, so there are no entities to grow
(billion laughs, quadratic blow-up) and none that name files or addresses; expat itself
opens nothing. Depth, elements, attributes and text are bounded, and the whole document
is handed over in one piece: expat's cost of big tokens in many pieces doesn't arise.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final
from xml.parsers import expat

from pveplug.errors import DescriptionError
from pveplug.texts import known_encoding
from pveplug.units import MiB

MAX_BYTES: Final = 4 * MiB
MAX_DEPTH: Final = 64
MAX_ELEMENTS: Final = 100_000
MAX_ATTRIBUTES: Final = 128
"""Of one element; they count like elements in all."""
MAX_TEXT: Final = 1 * MiB
"""Characters of one element's own text."""
_SEPARATOR: Final = "\n"  # can't be in a namespace's name: attributes are normalised
_DECLARED: Final = re.compile(
    rb"""\A(\xef\xbb\xbf)?<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w.-]{1,40})"""
)
_EXPATS: Final = ("utf-8", "ascii", "iso8859-1")
"""Encodings that expat reads by itself; what is one more, Python reads for it."""


@dataclass(slots=True)
class Element:
    """An element: ``name`` without its namespace, which is ``space``."""

    name: str
    space: str
    line: int
    attributes: dict[str, str] = field(default_factory=dict)
    """By name without namespace; the first of those that are alike then."""
    children: list[Element] = field(default_factory=list)
    text: str = ""
    """Its own, without that of its children, stripped."""

    def get(self, name: str, default: str = "") -> str:
        """Return an attribute."""
        return self.attributes.get(name, default)

    def child(self, name: str) -> Element | None:
        """Return the first child of that name."""
        return next((c for c in self.children if c.name == name), None)

    def all(self, *names: str) -> Iterator[Element]:
        """Iterate over the children of these names."""
        return (c for c in self.children if c.name in names)

    def walk(self) -> Iterator[Element]:
        """Iterate over it and everything in it, in the order of the document."""
        waiting = [self]
        while waiting:
            here = waiting.pop()
            yield here
            waiting += reversed(here.children)

    def path(self, *names: str) -> Element | None:
        """Return what stands below, child by child."""
        here: Element | None = self
        for name in names:
            here = here.child(name) if here is not None else None
        return here

    def said(self, *names: str) -> str:
        """Return the text of what stands below; empty where it doesn't."""
        found = self.path(*names)
        return found.text if found is not None else ""


def parse(data: bytes, file: str) -> Element:
    """Read a document.

    Raises:
        DescriptionError: it is none, is cut, or asks for what isn't given to strangers.
    """
    if len(data) > MAX_BYTES:
        raise DescriptionError(
            f"{len(data)} bytes of XML; more than {MAX_BYTES} aren't read", file=file
        )
    return _Builder(file).run(data)


class _Builder:
    def __init__(self, file: str) -> None:
        self.file = file
        self.open: list[Element] = []
        self.texts: list[list[str]] = []
        self.lengths: list[int] = []
        self.elements = 0
        self.root: Element | None = None

    def run(self, data: bytes) -> Element:
        self.parser = parser = expat.ParserCreate(None, _SEPARATOR)
        parser.buffer_text = True
        parser.SetParamEntityParsing(expat.XML_PARAM_ENTITY_PARSING_NEVER)
        parser.StartDoctypeDeclHandler = self.doctype
        parser.EntityDeclHandler = self.entity
        parser.ExternalEntityRefHandler = self.external
        parser.StartElementHandler = self.start
        parser.EndElementHandler = self.end
        parser.CharacterDataHandler = self.characters
        try:
            parser.Parse(self.readable(data), True)
        except expat.ExpatError as error:
            why = expat.ErrorString(error.code)
            raise DescriptionError(
                f"not well-formed XML: {why} (column {error.offset})",
                file=self.file,
                line=error.lineno,
            ) from None
        assert self.root is not None  # noqa: S101 - expat wants one element
        return self.root

    def readable(self, data: bytes) -> bytes:
        """Mend what tools get wrong that is no matter of content.

        Hyper-V's files say UTF-16; copied as text they are often UTF-8 that still says
        so, which expat refuses. What the bytes are outranks what they say.
        """
        utf16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"<\0?\0", b"\0<\0?")
        found = _DECLARED.match(data)
        if data.startswith(utf16) or not found:
            return data
        name = found[2].decode("ascii", "replace")
        encoding = known_encoding(name)
        if encoding is None:
            raise DescriptionError(
                f"its encoding {name} isn't known", file=self.file, line=1
            )
        if encoding in _EXPATS:
            return data
        if encoding.startswith("utf-16"):
            text = data  # which it isn't: there was no second byte of 0
        else:
            try:
                text = data.decode(encoding).encode()
            except ValueError as error:
                raise DescriptionError(
                    f"it isn't {name}, which it says it is: {error}", file=self.file
                ) from None
        return text.replace(found[2], b"UTF-8", 1)

    def refuse(self, why: str) -> DescriptionError:
        line = self.parser.CurrentLineNumber
        return DescriptionError(why, file=self.file, line=line)

    def doctype(self, *_: object) -> None:
        raise self.refuse("a document type declaration (DTD) isn't read from strangers")

    def entity(self, *_: object) -> None:
        raise self.refuse("an entity declaration isn't read from strangers")

    def external(self, *_: object) -> int:
        raise self.refuse("an external entity isn't read")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.elements += 1 + len(attributes)
        if self.elements > MAX_ELEMENTS:
            raise self.refuse(f"more than {MAX_ELEMENTS} elements and attributes")
        if len(self.open) >= MAX_DEPTH:
            raise self.refuse(f"elements nested deeper than {MAX_DEPTH}")
        if len(attributes) > MAX_ATTRIBUTES:
            raise self.refuse(f"an element of {len(attributes)} attributes")
        space, _, name = tag.rpartition(_SEPARATOR)
        element = Element(name, space, self.parser.CurrentLineNumber)
        for key, value in attributes.items():
            element.attributes.setdefault(key.rpartition(_SEPARATOR)[2], value)
        if self.open:
            self.open[-1].children.append(element)
        else:
            self.root = element
        self.open.append(element)
        self.texts.append([])
        self.lengths.append(0)

    def end(self, _: str) -> None:
        self.open.pop().text = "".join(self.texts.pop()).strip()
        self.lengths.pop()

    def characters(self, text: str) -> None:
        self.lengths[-1] += len(text)
        if self.lengths[-1] > MAX_TEXT:
            raise self.refuse(f"an element with more than {MAX_TEXT} characters")
        self.texts[-1].append(text)
