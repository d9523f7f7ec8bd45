# SPDX-License-Identifier: Apache-2.0
"""Fuzz the reader of qcow2.

python -m fuzz.image_qcow2 -max_total_time=600
"""

from fuzz.images import fuzz

if __name__ == "__main__":
    fuzz("qcow2")
