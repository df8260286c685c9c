"""Which versions of the libraries this package supports, and what a user is told of others.

The ranges stand in pyproject.toml alone; the installed package's metadata has them.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from .errors import SpftError

DISTRIBUTION = "axolotl-spft"
_PACKAGES = (
    "axolotl-spft",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "axolotl",
)
logger = logging.getLogger(__name__)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run stands on."""
    found = {package: _version_of(package) for package in _PACKAGES}
    versions = {package: version for package, version in found.items() if version is not None}
    return {"python": platform.python_version(), **versions}


def installed_version() -> str:
    """This package's version; "0" where it is imported from its sources without being installed."""
    return _version_of(DISTRIBUTION) or "0"


def check_versions(extra: str | None = None) -> None:
    """Refuse versions of libraries that are too old, and warn once of those that are too new.

    An old one lacks what is used here; one that is newer than all that were tested may well work.

    Args:
        extra: look at what this extra of pyproject.toml needs, and not at what the package needs.

    Raises:
        SpftError: a version is below its range.
    """
    for is_too_old, line in _outside(extra):
        if is_too_old:
            raise SpftError(line)
        _warn_once(line)


@contextmanager
def imports_explained(extra: str | None = None) -> Iterator[None]:
    """While inside, an import that fails tells which library's version is to blame.

    Raises:
        ImportError: of one line, if the version of a library is outside of its range.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        lines = [line for _, line in [*_outside(None), *(_outside(extra) if extra else ())]]
        not_there = isinstance(error, ModuleNotFoundError) and "." not in (error.name or "")
        if not lines or not_there:  # no version is to blame for a library that is not installed
            raise
        raise ImportError(f"{'; '.join(lines)} ({error})") from error


@cache
def _warn_once(line: str) -> None:
    logger.warning("%s", line)


def _outside(extra: str | None) -> list[tuple[bool, str]]:
    """Of each library outside of its range: whether it is too old, and a line that says so."""
    found = []
    for requirement in _requirements(extra):
        version = _installed(requirement.name)
        if version is None or requirement.specifier.contains(version, prereleases=True):
            continue
        lower = [s for s in requirement.specifier if s.operator in (">=", ">", "==", "~=")]
        # builds from source call themselves 2.11.0a0+commit
        release = Version(version.base_version)
        if all(s.contains(release) for s in requirement.specifier):
            continue
        is_too_old = not all(s.contains(release) for s in lower)
        # ">" sorts after "<": lower bounds first
        wanted = ",".join(sorted(map(str, requirement.specifier), reverse=True))
        found.append(
            (
                is_too_old,
                f"{requirement.name} is {version}, {'older' if is_too_old else 'newer'} than "
                f"{DISTRIBUTION} was tested with: pip install '{requirement.name}{wanted}'",
            )
        )
    return found


def _requirements(extra: str | None) -> list[Requirement]:
    """None where the package is not installed but imported from its sources."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    requirements = [Requirement(line) for line in lines]
    if extra is None:
        return [r for r in requirements if r.marker is None]
    return [r for r in requirements if r.marker and r.marker.evaluate({"extra": extra})]


def _installed(name: str) -> Version | None:
    """None where a library is not installed, or has a version of its own kind."""
    version = _version_of(name)
    try:
        return None if version is None else Version(version)
    except InvalidVersion:
        return None


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
