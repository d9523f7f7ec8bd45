# SPDX-License-Identifier: Apache-2.0
"""Protect Proxmox VE virtual machines; see docs/library.md for use as a library."""

__version__ = "0.1.0"
