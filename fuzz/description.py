# SPDX-License-Identifier: Apache-2.0
"""Fuzz the readers of foreign VMs' descriptions.

python -m fuzz.description -max_total_time=600
"""

from fuzz.descriptions import fuzz

if __name__ == "__main__":
    fuzz("description")
