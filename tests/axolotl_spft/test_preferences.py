"""`rl: dpo`, `ipo`, `kto`, `orpo` and `simpo` through Axolotl.

Invariants: the neurons are selected on the first preference batches before the first step; the
reference is the base model at every step, also once the adapter has moved (losses are computed
again from the files, by the formulas); precomputed reference log-probabilities give the same
losses; a resumed run ends with the same bits; what is saved is the adapter alone, which loads,
merges, and differs from the base in its rows only. Mistakes get one line.
"""

from __future__ import annotations

import sys

import pytest
import torch
from axolotl_runs import (
    adapter_tensors,
    call,
    layers_of,
    own_process_state,
    preference_yaml,
    same_batches,
    same_tensors,
    train,
    with_delta,
    write_rows,
    write_yaml,
)
from peft import PeftModel
from preferences import BETA, FIRST_LOSS, preference_loss
from safetensors.torch import load_file

from axolotl_spft.calibrate import calibrate_yaml
from trainer_ext import SpftError

LONG = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "rl_beta": BETA}


@pytest.fixture(scope="module")
def runs(assets, tmp_path_factory):
    """One run of each method, made when it is first asked for."""
    made = {}

    def run(rl: str):
        if rl not in made:
            with own_process_state():
                config = preference_yaml(assets, rl, **LONG)
                made[rl] = train(config, tmp_path_factory.mktemp(rl) / "out")
        return made[rl]

    return run


@pytest.mark.parametrize("rl", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_trains_and_saves_the_adapter_alone(assets, runs, rl):
    run = runs(rl)
    assert run.trainer.state.global_step == len(run.batches) == 4
    assert same_batches(run.calibration, run.batches[:2])
    layers = layers_of(run.tensors)
    assert len(layers) == 14
    assert all(layer["weight"].any() and layer["selected"].all() for layer in layers.values())
    if rl in FIRST_LOSS:  # rewards are zero where policy and reference are the same
        assert run.losses[0] == pytest.approx(FIRST_LOSS[rl], rel=1e-6)
    assert run.losses[1] != run.losses[0]

    assert not list(run.out.glob("model*")), "frozen weights were saved"
    assert (run.out / "spft_report.html").is_file()
    loaded = PeftModel.from_pretrained(assets.base_model(), run.out).merge_and_unload()
    expected = with_delta(assets, run.out)
    assert all(torch.equal(loaded.state_dict()[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rl", ["dpo", "ipo"])
def test_the_reference_is_the_base_model_once_the_adapter_has_moved(assets, runs, rl):
    run = runs(rl)
    policy = assets.base_model()
    policy.load_state_dict(with_delta(assets, run.out / "checkpoint-2"), strict=False)
    loss = preference_loss(rl, policy.eval(), run.batches[2], assets.base_model().eval()).item()
    assert abs(loss - FIRST_LOSS[rl]) > 1e-3
    assert run.step_losses[2] == pytest.approx(loss, rel=1e-5)


def test_precomputed_reference_gives_the_same_losses(assets, runs, tmp_path):
    config = preference_yaml(assets, "dpo", **LONG, precompute_ref_log_probs=True)
    run = train(config, tmp_path / "out")
    assert "ref_chosen_logps" in run.batches[0]
    assert run.losses == pytest.approx(runs("dpo").losses, rel=1e-6)


@pytest.mark.parametrize("rl", ["dpo", pytest.param("orpo", marks=pytest.mark.full)])
def test_resumed_run_ends_with_the_same_bits(assets, runs, tmp_path, rl):
    out = tmp_path / "out"
    train(preference_yaml(assets, rl, **{**LONG, "max_steps": 2}), out)
    config = preference_yaml(assets, rl, **LONG, auto_resume_from_checkpoints=True)
    resumed = train(config, out)
    assert resumed.calibration == []
    assert len(resumed.batches) == 2
    assert same_tensors(resumed.tensors, runs(rl).tensors)
    assert not same_tensors(resumed.tensors, adapter_tensors(out / "checkpoint-2"))


def test_merge_lora_changes_the_rows_alone(assets, runs):
    from axolotl.cli.merge_lora import do_cli

    out = runs("dpo").out
    with own_process_state():
        call(do_cli, preference_yaml(assets, "dpo", **LONG), out)
    merged, expected = load_file(out / "merged" / "model.safetensors"), with_delta(assets, out)
    assert same_tensors({name: merged[name] for name in expected}, expected)


def test_spft_calibrate_writes_the_scores_of_the_run(assets, runs, tmp_path):
    yaml = write_yaml(preference_yaml(assets, "dpo", **LONG), tmp_path / "never")
    calibrate_yaml(yaml, tmp_path / "scores")
    of_the_run = runs("dpo").out / "spft_importance.safetensors"
    assert same_tensors(load_file(tmp_path / "scores"), load_file(of_the_run))


_UNPAIRED = [{"prompt": "a", "chosen": "b", "refused": "c"}]
_MESSAGES = [{"messages": [{"role": "user", "content": "a"}], **_UNPAIRED[0]}]


@pytest.mark.parametrize(
    ("rl", "rows", "kind", "parts"),
    [
        ("dpo", _UNPAIRED, None, ["no column 'rejected'", "rl: dpo", "prompt, chosen, refused"]),
        ("ipo", _MESSAGES, "chat_template.default", ["no column 'rejected'", "chat_template"]),
        ("orpo", _UNPAIRED, None, ["no column 'rejected'", "rl: orpo"]),
        ("kto", _UNPAIRED, None, ["no column 'completion'", "rl: kto", "prompt, chosen"]),
        (
            "kto",
            [{"prompt": "a", "completion": "b"}],
            None,
            ["no column 'label'", "prompt, completion"],
        ),
    ],
)
def test_a_missing_column_is_named(assets, tmp_path, rl, rows, kind, parts):
    write_rows(tmp_path / "rows.jsonl", rows)
    dataset = {"path": str(tmp_path / "rows.jsonl"), "split": "train", "type": kind}
    with pytest.raises(SpftError) as caught:
        train(preference_yaml(assets, rl, datasets=[dataset]), tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    assert f"the dataset {dataset['path']} has" in message
    for part in parts:
        assert part in message


def test_a_mistake_that_trl_meets_is_told_in_the_yamls_words(assets, tmp_path, capsys):
    """TRL puts the adapter in, outside of the plugin's hooks."""
    config = preference_yaml(assets, "dpo", spft_r_pattern={"q_proj": 40})
    with pytest.raises(SpftError) as caught:
        train(config, tmp_path / "out")
    capsys.readouterr()
    sys.excepthook(SpftError, caught.value, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("axolotl-spft: spft_r_pattern gives layer model.layers.0")
