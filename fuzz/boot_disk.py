# SPDX-License-Identifier: Apache-2.0
"""Fuzz the readers of boot disks.

python -m fuzz.boot_disk -max_total_time=600
"""

from fuzz.descriptions import fuzz

if __name__ == "__main__":
    fuzz("boot-disk")
