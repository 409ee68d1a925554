# SPDX-License-Identifier: Apache-2.0
"""Puts tests/ on the path: its case table and its checks are the bench's too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
