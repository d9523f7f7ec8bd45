# SPDX-License-Identifier: Apache-2.0
"""Fuzz the reader of block-delta.

python -m fuzz.image_block_delta -max_total_time=600
"""

from fuzz.images import fuzz

if __name__ == "__main__":
    fuzz("block-delta")
