# SPDX-License-Identifier: Apache-2.0
"""Bytes of strangers into text: only by encodings that cost no more than their bytes.

Python knows codecs that are no encodings of files (punycode takes quadratic time,
others unpack): what a file names is looked up here and nowhere else.
"""

from __future__ import annotations

import codecs
import re
from typing import Final

_KNOWN: Final = re.compile(
    r"utf-?8|utf-?16(-?[lb]e)?|us-ascii|ascii|latin-?1|(windows|cp|ibm)-?\d{3,4}"
    r"|iso-?8859-\d{1,2}|shift-?jis|sjis|gbk|gb2312|gb18030|big5|euc-?(jp|kr|cn)|koi8-[ru]"
)


def known_encoding(name: str) -> str | None:
    """Return Python's name of an encoding; None where it isn't one of files."""
    plain = name.strip().lower().replace("_", "-")
    if not _KNOWN.fullmatch(plain):
        return None
    plain = re.sub(r"^(windows|ibm)-?", "cp", plain)
    try:
        return codecs.lookup(plain).name
    except LookupError:
        return None
