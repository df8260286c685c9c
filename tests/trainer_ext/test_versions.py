"""A library outside of the range in pyproject.toml is met by one line: an old one is refused, a new
one gets one warning, and an import that fails under one names it. Inside there is not a word."""

from __future__ import annotations

import importlib.metadata
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from peft import get_peft_model
from tiny_models import tiny_model

from trainer_ext import SpftConfig, SpftError, versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest has it

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
NEWER = "peft is {}, newer than axolotl-spft was tested with: pip install 'peft>=0.20,<0.22'"
OLDER = "peft is {}, older than axolotl-spft was tested with: pip install 'peft>=0.20,<0.22'"


@pytest.fixture(autouse=True)
def metadata(monkeypatch):
    """The metadata that an installation writes; the tests may run from the sources."""
    lines = list(PROJECT["dependencies"])
    for extra, needs in PROJECT["optional-dependencies"].items():
        lines += [f'{need} ; extra == "{extra}"' for need in needs]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    versions._warn_once.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    """Pretend that a library has a version."""
    real = importlib.metadata.version

    def pretend(library: str, version: str) -> None:
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: version if name == library else real(name)
        )

    return pretend


def _warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("extra", [None, "trl", "axolotl"])
def test_what_is_installed_here_is_supported(extra, caplog):
    versions.check_versions(extra)
    assert _warnings(caplog) == []


@pytest.mark.parametrize(
    "version",
    ["0.20.0", "0.21.2", "0.21.5.dev0", "0.20.0+local", "0.20.0a0+c1.nv26", "0.20-our-own-build"],
)
def test_inside_the_range(installed, caplog, version):
    installed("peft", version)
    versions.check_versions()
    assert _warnings(caplog) == []


@pytest.mark.parametrize("version", ["0.22.0", "0.22.0.dev0", "0.22.0a0+c1", "1.0"])
def test_newer_is_said_once(installed, caplog, version):
    installed("peft", version)
    versions.check_versions()
    versions.check_versions()
    assert _warnings(caplog) == [NEWER.format(version)]


def test_older_is_refused(installed):
    installed("peft", "0.19.1")
    with pytest.raises(SpftError) as raised:
        versions.check_versions()
    assert str(raised.value) == OLDER.format("0.19.1")


@pytest.mark.parametrize(
    ("extra", "version"), [("trl", "2.0.0"), ("axolotl", "0.22.0"), ("axolotl", "1.0.0")]
)
def test_extras_are_looked_at_where_they_are_used(installed, caplog, extra, version):
    installed(extra, version)
    versions.check_versions()
    assert _warnings(caplog) == []
    versions.check_versions(extra)
    (line,) = _warnings(caplog)
    assert line.startswith(f"{extra} is {version}, newer than axolotl-spft was tested with: ")


def test_every_adapter_is_looked_at_and_all_together_warn_once(installed, caplog):
    installed("peft", "0.22.0")
    for _ in range(2):
        get_peft_model(tiny_model(), SpftConfig(r=2))
    assert [w for w in _warnings(caplog) if w.startswith("peft")] == [NEWER.format("0.22.0")]
    installed("peft", "0.19.1")
    with pytest.raises(SpftError, match="older"):
        get_peft_model(tiny_model(), SpftConfig(r=2))


@pytest.mark.parametrize("version", ["0.22.0", "0.21.2"])
def test_a_name_that_is_gone(version):
    """Of a version outside of the range the last line names it; else it is the import's own."""
    code = (
        "import importlib.metadata as m; real = m.version; "
        f"m.version = lambda name: {version!r} if name == 'peft' else real(name); "
        f"m.requires = lambda name: {PROJECT['dependencies']!r}; "
        "import peft; del peft.PeftType; "
        "import trainer_ext"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    cause = "cannot import name 'PeftType' from 'peft'"
    if version == "0.22.0":
        assert last.startswith(f"ImportError: {NEWER.format(version)} ({cause}")
    else:
        assert last.startswith(f"ImportError: {cause}")


def test_a_library_that_is_missing_is_not_another_ones_fault(installed):
    installed("peft", "0.22.0")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named .no_such_library.$"):
        with versions.imports_explained():
            import no_such_library  # noqa: F401
