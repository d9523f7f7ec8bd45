# SPDX-License-Identifier: Apache-2.0
"""Has a guest booted? Judges over bytes and texts; no input or output in here."""
