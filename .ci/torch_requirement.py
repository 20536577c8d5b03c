# SPDX-License-Identifier: Apache-2.0
"""Prints which torch pip should install: a CPU build where there is no NVIDIA driver and pip can
see one (its version ends in +cpu), else whatever the version range allows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

RANGE, OLDEST = "torch>=2.6", (2, 6)


def has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def newest_cpu_build() -> str | None:
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "torch"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    found = re.findall(r"\b((\d+)\.(\d+)\.\d+\+cpu)\b", listed)
    usable = [(int(a), int(b), text) for text, a, b in found if (int(a), int(b)) >= OLDEST]
    return max(usable)[2] if usable else None


if __name__ == "__main__":
    cpu = None if has_nvidia_driver() else newest_cpu_build()
    print(f"torch=={cpu}" if cpu else RANGE)
