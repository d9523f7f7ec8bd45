# SPDX-License-Identifier: Apache-2.0
"""``python -m pveplug`` is ``pveplug``."""

import sys

from pveplug.cli import main

sys.exit(main())
