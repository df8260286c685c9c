"""The `spft` command: help and version come without torch, and merging works without Axolotl."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny_models
from adapters import fill_deltas

from trainer_ext import SpftConfig, select_neurons


def run(code: str, *arguments: str, tmp_path):
    command = [sys.executable, "-c", f"import sys; {code}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(tmp_path, option):
    code = (
        "from axolotl_spft.cli import main; main(standalone_mode=False); "
        "assert not {'torch', 'transformers', 'axolotl', 'trainer_ext'} & sys.modules.keys()"
    )
    done = run(code, option, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert ("calibrate" in done.stdout) == (option == "--help")


def test_merging_needs_no_axolotl(tmp_path):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    tiny_models.tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, SpftConfig(r=4, importance="magnitude"))
    select_neurons(model)
    fill_deltas(model)
    model.save_pretrained(tmp_path / "adapter")
    code = "sys.modules['axolotl'] = None; from axolotl_spft.cli import main; main()"
    done = run(code, "merge", "adapter", "-o", "merged", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_packages_list_their_names():
    import axolotl_spft
    import trainer_ext

    assert {"SPFTPlugin", "SPFTArgs"} <= set(dir(axolotl_spft))
    assert {"SpftDPOTrainer", "SpftSFTTrainer", "SpftConfig"} <= set(dir(trainer_ext))
    assert trainer_ext.__version__
