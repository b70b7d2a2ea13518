"""What does harm when it is unpickled the ordinary way."""

from __future__ import annotations

import os
from pathlib import Path


class Malicious:
    """Unpickled the ordinary way, this makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)
