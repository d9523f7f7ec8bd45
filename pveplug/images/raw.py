# SPDX-License-Identifier: Apache-2.0
"""Raw images, and fixed VHDs, which are raw images with a footer.

A fixed VHD can't be told from a raw image before its last 512 bytes: these, and where
the file's length isn't known the last 512 of each piece, are held back until more comes
or the file ends.
"""

from __future__ import annotations

from pveplug.images import vhd_wire
from pveplug.images.stream import Flow, ImageInfo, StreamReader
from pveplug.images.vhd_wire import Footer
from pveplug.units import SECTOR, round_up


class RawReader(StreamReader):
    """Tells a file as it is, but for the footer of a fixed VHD."""

    format = "raw"

    def _run(self) -> Flow[None]:
        self._what = "data"
        self._size = 1 << 62
        self._out.append(ImageInfo("raw", "flat", None))
        footer = (self._file_size or 0) - vhd_wire.FOOTER.size
        if footer > 0:
            yield from self._pass(footer, 0)
        held = b""
        while not (yield from self._ended()):
            view = yield from self._some(1 << 30)
            if len(view) < vhd_wire.FOOTER.size:
                # Small pieces are joined, or each would be held and moved again.
                held += bytes(view)
                self._release(held[: -vhd_wire.FOOTER.size])
                held = held[-vhd_wire.FOOTER.size :]
            else:
                self._release(held)
                self._tell_data(self._told, view[: -vhd_wire.FOOTER.size], made=False)
                held = bytes(view[-vhd_wire.FOOTER.size :])
        yield from self._judge_end(held)

    def _release(self, data: bytes) -> None:
        self._tell_data(self._told, memoryview(data), made=True)

    def _judge_end(self, held: bytes) -> Flow[None]:
        at = self.position - len(held)
        footer = vhd_wire.parse_footer(held)
        if isinstance(footer, Footer):
            info = self._fixed(footer, at)
        else:
            # Also a footer whose sum is wrong: then it is data, and that is said.
            if held.startswith(vhd_wire.COOKIE):
                self._note(f"the last sector looks like a VHD footer, but {footer}")
            self._release(held)
            if rest := -self._told % SECTOR:
                self._note(f"ends in the middle of a sector; {rest} zeroes follow")
                self._tell_data(self._told, memoryview(bytes(rest)), made=True)
            info = ImageInfo("raw", "flat", self._told)
        if not self._told:
            raise self._error(0, "the file is empty")
        self._size = self._told
        yield from self._finish(info)

    def _fixed(self, footer: Footer, at: int) -> ImageInfo:
        if footer.kind != vhd_wire.FIXED:
            raise self._error(
                at, f"is the end of a {footer.kind_name} VHD, its beginning is missing"
            )
        if round_up(footer.size, SECTOR) != at:
            raise self._error(
                at, f"a fixed VHD of {footer.size} bytes has its footer here: truncated"
            )
        return ImageInfo("vhd", "fixed", at, identity=footer.identity)
