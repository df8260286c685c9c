"""Preference training from an SFT adapter: `rl` with `lora_model_dir`.

Invariants: dpo, ipo and kto train the SFT adapter's neurons from its values on, and their reference
is the SFT model, at the first step (whose loss says that the rewards are zero) and once the adapter
has moved (losses are computed again from the files); what is saved needs the SFT folder no more,
resumes to the same bits and merges into the base. orpo, which has no reference, goes on with the
adapter as SFT does. Adapters that do not fit are refused in one line.
"""

from __future__ import annotations

import pytest
import torch
from axolotl_runs import (
    adapter_tensors,
    call,
    layers_of,
    lora_yaml,
    own_process_state,
    preference_yaml,
    same_tensors,
    spft_yaml,
    train,
    with_delta,
)
from peft import PeftModel
from preferences import BETA, FIRST_LOSS, dpo_loss
from safetensors.torch import load_file

from trainer_ext import SpftError

LONG = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "rl_beta": BETA}


@pytest.fixture(scope="module")
def sft(assets, tmp_path_factory):
    """Folder of an adapter that changed the model a lot."""
    with own_process_state():
        config = spft_yaml(assets, max_steps=4, learning_rate=0.1, spft_r=5)
        return train(config, tmp_path_factory.mktemp("sft") / "out").out


def _yaml(assets, sft, rl: str = "dpo", **changes) -> dict:
    return preference_yaml(
        assets, rl, **{**LONG, "spft_r": None, "lora_model_dir": str(sft), **changes}
    )


@pytest.fixture(scope="module")
def dpo(assets, sft, tmp_path_factory):
    with own_process_state():
        return train(_yaml(assets, sft), tmp_path_factory.mktemp("dpo") / "out")


def _model(assets, folder):
    model = assets.base_model()
    model.load_state_dict(with_delta(assets, folder), strict=False)
    return model.eval()


@pytest.mark.parametrize("rl", ["dpo", "ipo", "kto"])
def test_training_starts_at_the_sft_model(assets, sft, tmp_path, rl):
    run = train(_yaml(assets, sft, rl, max_steps=1), tmp_path / "out")
    assert run.calibration == []
    assert run.losses[0] == pytest.approx(FIRST_LOSS[rl], rel=1e-6)
    base, begun = load_file(assets.model / "model.safetensors"), layers_of(adapter_tensors(sft))
    for name, layer in layers_of(run.tensors).items():
        assert torch.equal(layer["index"], begun[name]["index"])
        rows = base[f"{name}.weight"][layer["index"]] + begun[name]["weight"]
        assert torch.equal(layer["anchor"], rows)
        assert layer["weight"].any()


def test_the_reference_is_the_sft_model_once_the_adapter_has_moved(assets, sft, dpo):
    policy, reference = _model(assets, dpo.out / "checkpoint-2"), _model(assets, sft)
    loss = dpo_loss(policy, dpo.batches[2], reference).item()
    from_base = dpo_loss(policy, dpo.batches[2], assets.base_model().eval()).item()
    assert min(abs(loss - FIRST_LOSS["dpo"]), abs(loss - from_base)) > 1e-3
    assert dpo.step_losses[2] == pytest.approx(loss, rel=1e-5)


def test_resumed_run_ends_with_the_same_bits(assets, sft, dpo, tmp_path):
    train(_yaml(assets, sft, max_steps=2), tmp_path / "out")
    config = _yaml(assets, sft, auto_resume_from_checkpoints=True)
    resumed = train(config, tmp_path / "out")
    assert len(resumed.batches) == 2
    assert same_tensors(resumed.tensors, dpo.tensors)


def test_what_is_saved_needs_the_sft_folder_no_more(assets, sft, dpo, tmp_path):
    expected = with_delta(assets, dpo.out)
    assert not list(dpo.out.glob("model*")), "frozen weights were saved"
    hidden = sft.rename(tmp_path / "elsewhere")
    try:
        model = PeftModel.from_pretrained(assets.base_model(), dpo.out).merge_and_unload()
    finally:
        hidden.rename(sft)
    state = model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_merge_lora_merges_what_was_trained_not_what_it_began_with(assets, sft, dpo):
    from axolotl.cli.merge_lora import do_cli

    expected = with_delta(assets, dpo.out)
    with own_process_state():
        call(do_cli, _yaml(assets, sft), dpo.out)
    merged = load_file(dpo.out / "merged" / "model.safetensors")
    assert same_tensors({name: merged[name] for name in expected}, expected)


def test_orpo_goes_on_with_the_adapter(assets, sft, tmp_path):
    run = train(_yaml(assets, sft, "orpo", max_steps=1, learning_rate=0.0), tmp_path / "out")
    assert run.calibration == []
    assert same_tensors(run.tensors, adapter_tensors(sft))


@pytest.fixture(scope="module")
def lora(assets, tmp_path_factory):
    with own_process_state():
        return train(lora_yaml(assets, max_steps=1), tmp_path_factory.mktemp("lora") / "out").out


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"spft_r": 6}, ["spft_r is 6", "spft_r = 5", "drop spft_r"]),
        ({"lora_model_dir": "{lora}"}, ["lora_model_dir is", "LORA", "SPFT"]),
        ({"lora_model_dir": "nowhere"}, ["lora_model_dir is 'nowhere'", "give the folder"]),
        (
            {"resume_from_checkpoint": "{other}"},
            ["resume_from_checkpoint is", "spft_r = 4", "spft_r = 5"],
        ),
    ],
)
def test_what_does_not_fit_is_refused(assets, sft, lora, tmp_path, changes, parts):
    if "{other}" in changes.values():
        train(preference_yaml(assets, "dpo", max_steps=1), tmp_path / "other")
    folders = {"lora": lora, "other": tmp_path / "other"}
    changes = {k: v.format(**folders) if isinstance(v, str) else v for k, v in changes.items()}
    with own_process_state(), pytest.raises(SpftError) as caught:
        train(_yaml(assets, sft, **changes), tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
