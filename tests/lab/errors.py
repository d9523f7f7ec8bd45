# SPDX-License-Identifier: Apache-2.0
"""How the simulated PVE says no."""

from __future__ import annotations


class ApiError(Exception):
    """An answer other than 200: status, one line, and per-parameter texts."""

    def __init__(
        self, status: int, message: str, errors: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message.rstrip("\n")
        self.errors = errors


def die(message: str) -> ApiError:
    """A plain Perl ``die``: HTTP 500 with its text."""
    return ApiError(500, message)


def bad_params(**errors: str) -> ApiError:
    """``raise_param_exc``: HTTP 400 with a text per parameter."""
    return ApiError(
        400,
        "Parameter verification failed.",
        {k.replace("_", "-"): v for k, v in errors.items()},
    )


def forbidden(path: str, privilege: str) -> ApiError:
    return ApiError(403, f"Permission check failed ({path}, {privilege})")
