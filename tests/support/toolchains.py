"""What a machine must have besides torch for some of the tests."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from torch.utils._triton import has_triton


def missing_for_inductor(device: str) -> str | None:
    """What torch.compile would need to generate code for a device and has not; None: nothing."""
    if device == "cuda":
        if not has_triton():
            return "triton"
        # triton compiles a launcher against Python's headers
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            return "Python.h"
        compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    else:
        compilers = (os.environ.get("CXX"), "g++", "clang++")
    if not any(name and shutil.which(name) for name in compilers):
        return "a C compiler"
    return None
