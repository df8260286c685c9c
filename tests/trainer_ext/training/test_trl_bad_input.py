"""A mistake in what TRL's trainers are given is an SpftError of one line that says what was seen
and how to mend it, before anything is trained."""

from __future__ import annotations

import pytest
from adapters import wrapped
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from transformers import TrainingArguments
from trl import DPOConfig, KTOConfig, KTOTrainer, SFTConfig
from trl_runs import arguments, completions, pairs, tokenizer

from trainer_ext import (
    SpftConfig,
    SpftDPOTrainer,
    SpftError,
    SpftSFTTrainer,
    SpftTrainerMixin,
)


class SpftKTOTrainer(SpftTrainerMixin, KTOTrainer):
    pass


def config() -> SpftConfig:
    return SpftConfig(r=4)


def make(kind, args, data, **more):
    settings = {
        "model": tiny_model(),
        "args": args,
        "train_dataset": data,
        "processing_class": tokenizer,
        "spft_config": config(),
    }
    return kind(**{**settings, **more})


def sft(folder, data=None, **more):
    return make(SpftSFTTrainer, arguments(SFTConfig, folder), data or completions(4), **more)


def dpo(folder, data=None, **more):
    return make(
        SpftDPOTrainer,
        more.pop("args", None) or arguments(DPOConfig, folder),
        data or pairs(4),
        **more,
    )


def kto(folder, **more):
    return make(SpftKTOTrainer, arguments(KTOConfig, folder), completions(4), **more)


def without(*columns: str) -> Dataset:
    return pairs(4).remove_columns(columns)


class TwoProcesses(DPOConfig):
    world_size = 2


CASES = {
    "no rejected": (lambda p: dpo(p, without("rejected")), ["train", "no column rejected"]),
    "no chosen": (lambda p: dpo(p, without("chosen")), ["train", "no column chosen"]),
    "neither": (
        lambda p: dpo(p, without("chosen", "rejected")),
        ["no column chosen and no rejected", "only prompt"],
    ),
    "held-out pairs without rejected": (
        lambda p: dpo(p, eval_dataset={"held": without("rejected")}),
        ["held dataset", "no column rejected"],
    ),
    "SFT on pairs": (lambda p: sft(p, pairs(4)), ["chosen, prompt, rejected", "SFT needs text"]),
    "a list": (lambda p: dpo(p, list(pairs(4))), ["train_dataset is a list", "from_list"]),
    "no rows": (
        lambda p: sft(p, eval_dataset=Dataset.from_list([])),
        ["eval_dataset has no rows"],
    ),
    "spft_config and peft_config": (
        lambda p: sft(p, peft_config=config()),
        ["spft_config and peft_config", "leave one out"],
    ),
    "spft_config and a PEFT model": (
        lambda p: dpo(p, model=wrapped()),
        ["PEFT model already", "leave spft_config out"],
    ),
    "another method's config": (
        lambda p: sft(p, spft_config=LoraConfig()),
        ["LoraConfig", "trainer_ext.SpftConfig"],
    ),
    "no model": (lambda p: sft(p, model=None), ["model = None", "pass the loaded model"]),
    "ref_model": (
        lambda p: dpo(p, ref_model=tiny_model()),
        ["ref_model is given", "delta off", "leave it out"],
    ),
    "ref_model for another kind": (
        lambda p: kto(p, ref_model=tiny_model()),
        ["reference model of its own", "leave ref_model out"],
    ),
    "arguments by position": (
        lambda p: SpftDPOTrainer(tiny_model(), arguments(DPOConfig, p)),
        ["second argument is ref_model", "args="],
    ),
    "other arguments": (
        lambda p: dpo(p, args=TrainingArguments(str(p), use_cpu=True)),
        ["TrainingArguments", "trl.DPOConfig"],
    ),
    "no adapter": (
        lambda p: dpo(p, spft_config=None),
        ["LlamaForCausalLM without an SPFT adapter", "pass spft_config"],
    ),
    "an adapter of another name": (
        lambda p: dpo(p, model=get_peft_model(tiny_model(), config(), "sft"), spft_config=None),
        ["named sft", "named default"],
    ),
    "precomputing apart": (
        lambda p: dpo(p, args=arguments(TwoProcesses, p, precompute_ref_log_probs=True)),
        ["2 processes", "train dataset on disk", "load_from_disk"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line(tmp_path, case):
    mistake, said = CASES[case]
    with pytest.raises(SpftError) as caught:
        mistake(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(words in message for words in said), message
