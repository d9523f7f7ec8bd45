# SPDX-License-Identifier: Apache-2.0
"""Fuzz the reader of vhd.

python -m fuzz.image_vhd -max_total_time=600
"""

from fuzz.images import fuzz

if __name__ == "__main__":
    fuzz("vhd")
