"""How Axolotl finds the plugin: by the YAML, and since 0.21 by what is installed as well.

Invariants: both ways and both together train the same adapter, bit for bit, with one callback;
where the plugin is installed, a run that does not ask for it is what it is without; where the
plugin cannot be imported, a run that asks for it ends by one line.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from axolotl.integrations import base
from axolotl_runs import lora_yaml, own_process_state, same_tensors, spft_yaml, train, write_yaml

from axolotl_spft import SPFTPlugin
from axolotl_spft.plugin import NAME, YamlCallback
from axolotl_spft.stand_in import refusing_plugin
from trainer_ext import SpftError

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
GROUP = "axolotl.plugins"
finds_installed = pytest.mark.skipif(
    not hasattr(base, "PLUGIN_ENTRY_POINT_GROUP"), reason="Axolotl before 0.21 looks at the YAML"
)


@pytest.fixture
def install(monkeypatch):
    """Let Axolotl find these plugins, whatever is really installed."""

    def only(*values: str) -> None:
        points = [importlib.metadata.EntryPoint("spft", value, GROUP) for value in values]
        monkeypatch.setattr(base, "entry_points", lambda group: points)
        base.reset_plugin_entry_points_cache()

    yield only
    monkeypatch.undo()
    if hasattr(base, "reset_plugin_entry_points_cache"):
        base.reset_plugin_entry_points_cache()


def _promised() -> str:
    (value,) = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"][GROUP].values()
    return value


def test_the_entry_point_is_the_plugin_under_its_name():
    assert importlib.metadata.EntryPoint("spft", _promised(), GROUP).load() is SPFTPlugin
    assert _promised().replace(":", ".") == NAME


@finds_installed
def test_every_way_trains_the_same_adapter(assets, tmp_path, install):
    install()
    named = train(spft_yaml(assets), tmp_path / "named")
    install(_promised())
    for way, plugins in {"found": None, "both": [NAME], "as in metadata": [_promised()]}.items():
        with own_process_state():
            run = train(spft_yaml(assets, plugins=plugins), tmp_path / way)
        assert same_tensors(run.tensors, named.tensors), way
        callbacks = run.trainer.callback_handler.callbacks
        assert sum(isinstance(callback, YamlCallback) for callback in callbacks) == 1, way


@finds_installed
def test_other_runs_are_left_alone(assets, tmp_path, install):
    install()
    alone = train(lora_yaml(assets), tmp_path / "alone")
    install(_promised())
    with own_process_state():
        beside = train(lora_yaml(assets), tmp_path / "beside")
    assert same_tensors(beside.tensors, alone.tensors)
    assert beside.losses == alone.losses


def test_a_yaml_that_never_names_the_plugin_is_not_judged(assets):
    """Axolotl trains the whole model there; we say so to those who mean to use SPFT alone."""
    yaml = {"lora_model_dir": "a folder"}
    SPFTPlugin().register(dict(yaml))
    with pytest.raises(SpftError, match="lora_model_dir is 'a folder' but adapter is not set"):
        SPFTPlugin().register({**yaml, "plugins": [NAME]})


@pytest.mark.parametrize("other", ["axolotl_spft.plugin.SPFTPlugin", "axolotl_spft:Other"])
def test_under_another_name_it_would_be_taken_for_two(assets, other):
    with pytest.raises(SpftError) as raised:
        SPFTPlugin().register(spft_yaml(assets, plugins=[NAME, other]))
    line = f"plugins names {other.replace(':', '.')}, the plugin is {NAME}; write that"
    assert str(raised.value) == line


def test_a_version_that_the_plugin_cannot_be_imported_with(assets, tmp_path):
    """A real `axolotl train`, under a PEFT that pretends to be newer and lacks a name."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "real = m.version\n"
        "m.version = lambda name: '0.99.0' if name == 'peft' else real(name)\n"
        "m.requires = lambda name: ['peft>=0.20,<0.22'] if name == 'axolotl-spft' else []\n"
        "import peft\n"
        "del peft.PeftType\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.train", str(write_yaml(spft_yaml(assets), tmp_path))],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    line = "peft is 0.99.0, newer than axolotl-spft was tested with: pip install 'peft>=0.20,<0.22'"
    assert done.stderr.strip().splitlines()[-1].startswith(f"axolotl-spft: {line} (")


def test_the_stand_in_leaves_other_runs_alone():
    plugin = refusing_plugin(ImportError("peft is too new"))()
    plugin.register({"adapter": "lora"})
    plugin.register({})
    with pytest.raises(SystemExit, match=r"^axolotl-spft: peft is too new$"):
        plugin.register({"adapter": "prune_spft"})
