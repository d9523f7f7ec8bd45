# SPDX-License-Identifier: Apache-2.0
"""What a foreign VM is, read from its description, and the PVE VM made of it.

::

    OVF, VMX, Hyper-V XML, PowerShell, JSON ─ reading ─► GuestDescription ─┐
    first and last bytes of its boot disk ── bootability ─► Bootability ───┤
                                        wishes, target ─ plan.to_pve() ─► PvePlan

Nothing here does input or output, and nothing that was read is believed: sizes, depths
and numbers are bounded. docs/descriptions.md has the tables.
"""
