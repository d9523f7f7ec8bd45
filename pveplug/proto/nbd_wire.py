# SPDX-License-Identifier: Apache-2.0
"""Constants and layouts of the NBD protocol, under the names of its specification.

https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, sections "Values"
and "Extended headers". ``NBD_CMD_READ`` is :attr:`Command.READ`, and so on.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

INIT_PASSWD: Final = b"NBDMAGIC"
IHAVEOPT: Final = b"IHAVEOPT"
OLDSTYLE_MAGIC: Final = 0x00420281861253
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

MAX_STRING: Final = 4096
"""Longest string either side may send ("Terminology")."""
DEFAULT_MAXIMUM_BLOCK: Final = 32 * 1024 * 1024
"""What every server takes in one READ or WRITE ("Block size constraints")."""
UINT32_MAX: Final = 0xFFFF_FFFF


class HandshakeFlag(enum.IntFlag):
    """Server's and client's handshake flags share their numbers."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(enum.IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


REPLY_ERROR: Final = 1 << 31


class Reply(enum.IntEnum):
    """Answers to options (NBD_REP_*)."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = REPLY_ERROR + 1
    ERR_POLICY = REPLY_ERROR + 2
    ERR_INVALID = REPLY_ERROR + 3
    ERR_PLATFORM = REPLY_ERROR + 4
    ERR_TLS_REQD = REPLY_ERROR + 5
    ERR_UNKNOWN = REPLY_ERROR + 6
    ERR_SHUTDOWN = REPLY_ERROR + 7
    ERR_BLOCK_SIZE_REQD = REPLY_ERROR + 8
    ERR_TOO_BIG = REPLY_ERROR + 9
    ERR_EXT_HEADER_REQD = REPLY_ERROR + 10


class Info(enum.IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(enum.IntFlag):
    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command(enum.IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(enum.IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


REPLY_FLAG_DONE: Final = 1 << 0
CHUNK_ERROR: Final = 1 << 15


class Chunk(enum.IntEnum):
    """Structured and extended reply types (NBD_REPLY_TYPE_*)."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = CHUNK_ERROR + 1
    ERROR_OFFSET = CHUNK_ERROR + 2


class Error(enum.IntEnum):
    """Error values a reply may carry; the numbers are Linux's."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


BASE_ALLOCATION: Final = "base:allocation"
STATE_HOLE: Final = 1 << 0
STATE_ZERO: Final = 1 << 1
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
STATE_DIRTY: Final = 1 << 0

GREETING: Final = struct.Struct(">8s8sH")
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION_HEADER: Final = struct.Struct(">8sII")  # IHAVEOPT, option, length
OPTION_REPLY: Final = struct.Struct(">QIII")  # magic, option, reply, length
EXPORT_NAME_REPLY: Final = struct.Struct(">QH")  # size, transmission flags
INFO_EXPORT: Final = struct.Struct(">HQH")  # type, size, transmission flags
INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")  # type, minimum, preferred, maximum
REQUEST: Final = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, len
STATUS_PAYLOAD: Final = struct.Struct(">QI")
"""How long a range, and the id of the one context that is asked for."""
EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")
SIMPLE_REPLY: Final = struct.Struct(">IIQ")  # magic, error, cookie
STRUCTURED_REPLY: Final = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length
EXTENDED_REPLY: Final = struct.Struct(">IHHQQQ")  # …, cookie, offset, length
CHUNK_OFFSET: Final = struct.Struct(">Q")
CHUNK_HOLE: Final = struct.Struct(">QI")  # offset, length
CHUNK_ERROR_HEAD: Final = struct.Struct(">IH")  # error, length of the message


def option(number: Option, data: bytes = b"") -> bytes:
    """Build one option request of the handshake."""
    return OPTION_HEADER.pack(IHAVEOPT, number, len(data)) + data


def named(name: str) -> bytes:
    """Build a string with its 32-bit length before it."""
    raw = name.encode()
    return struct.pack(">I", len(raw)) + raw


def error_name(number: int) -> str:
    """Return the specification's name of an error value, or the number."""
    try:
        return Error(number).name
    except ValueError:
        return f"error {number}"


def reply_name(number: int) -> str:
    """Return the specification's name of an option reply, or the number."""
    try:
        return Reply(number).name
    except ValueError:
        return f"reply {number:#x}"
