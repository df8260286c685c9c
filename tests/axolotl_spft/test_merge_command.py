"""`spft merge` writes the original checkpoint with the trained rows in it, whatever the base was
trained as, and what it cannot merge ends in one line with exit code 1."""

from __future__ import annotations

import pytest
from axolotl_runs import (
    own_process_state,
    quantised_yaml,
    same_tensors,
    spft_yaml,
    train,
    with_delta,
)
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_spft.cli import main

YAML = {"dense": spft_yaml, "4-bit": lambda assets: quantised_yaml(assets, 4)}


@pytest.fixture(scope="module", params=YAML)
def trained(assets, tmp_path_factory, request):
    """An adapter, and the folder of its original checkpoint."""
    config = YAML[request.param](assets)
    with own_process_state():
        out = train(config, tmp_path_factory.mktemp("trained") / "out").out
    return out, type(out)(config["base_model"])


def _merge(*arguments):
    return CliRunner().invoke(main, ["merge", *map(str, arguments)])


@pytest.mark.parametrize("named", [False, True])
def test_the_checkpoint_has_the_trained_rows(assets, tmp_path, trained, named):
    adapter, base = trained
    options = ["--base", base] if named else []
    done = _merge(adapter, "-o", tmp_path / "merged", *options)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"axolotl-spft: {tmp_path / 'merged'} has the merged model\n"
    expected = with_delta(assets, adapter, base)
    assert same_tensors(load_file(tmp_path / "merged" / "model.safetensors"), expected)
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["{folder}/nowhere", "-o", "{folder}/new"], ["'{folder}/nowhere'", "give the folder"]),
        (["{adapter}", "-o", "{adapter}"], ["the output '{adapter}' exists", "name a new folder"]),
        (["{adapter}", "-o", "{folder}/new", "--base", "{folder}"], ["'{folder}'", "not found"]),
    ],
)
def test_what_cannot_be_merged_is_told_in_one_line(tmp_path, trained, arguments, parts):
    words = {"folder": tmp_path, "adapter": trained[0]}
    done = _merge(*(text.format(**words) for text in arguments))
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("axolotl-spft: ")
    for part in parts:
        assert part.format(**words) in line
    assert not (tmp_path / "new").exists()
