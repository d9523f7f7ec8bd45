# SPDX-License-Identifier: Apache-2.0
"""Fuzz the reader of vmdk sparse.

python -m fuzz.image_vmdk_sparse -max_total_time=600
"""

from fuzz.images import fuzz

if __name__ == "__main__":
    fuzz("vmdk sparse")
