"""Facts: processes that hold the same pass, and where one differs, all of them raise the same line
with its rank, host, the fact and both values; the majority is right, rank 0 where there is none.

Values: the checksum of a tensor changes with any single element and with any swap of two, and does
not depend on strides or on the size of the chunks that it is computed in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import dataset, tiny_model
from transformers import TrainingArguments

from trainer_ext import SpftConfig, SpftError, SpftTrainer
from trainer_ext.run_guard import agreement
from trainer_ext.run_guard.agreement import (
    check_agreement,
    check_same_values,
    checksums,
    name_ranks,
)
from trainer_ext.run_guard.settings import run_facts


def gathers(monkeypatch, rows: list) -> None:
    """Let all_gather_object give these (host, content) of the ranks."""
    monkeypatch.setattr(agreement, "world_size", lambda: len(rows))
    monkeypatch.setattr(
        agreement.dist, "all_gather_object", lambda out, own: out.__setitem__(slice(None), rows)
    )


def facts(monkeypatch, *values, name="learning_rate") -> str:
    gathers(monkeypatch, [("abcdef"[i], {"seed": 1, name: v}) for i, v in enumerate(values)])
    with pytest.raises(SpftError) as raised:
        check_agreement({})
    return str(raised.value)


def test_a_rank_that_differs_is_named_with_both_values(monkeypatch):
    assert facts(monkeypatch, 0.5, 0.5, 0.5, 0.1) == (
        "rank 3 (d) disagrees: learning_rate is 0.1 there and 0.5 on the others; start all "
        "processes with the same files and versions"
    )


def test_the_majority_is_right_even_against_rank_0(monkeypatch):
    assert facts(monkeypatch, 2, 1, 1).startswith("rank 0 (a) disagrees: learning_rate is 2 there")


def test_where_there_is_no_majority_rank_0_is_right(monkeypatch):
    assert facts(monkeypatch, 2, 1).startswith("rank 1 (b) disagrees: learning_rate is 1 there")
    assert facts(monkeypatch, 3, 1, 1, 3).startswith("ranks 1 (b) and 2 (c) disagree")


def test_a_missing_fact_and_further_differences_are_told(monkeypatch):
    gathers(monkeypatch, [("a", {"x": 1, "y": None}), ("b", {"y": 2})])
    with pytest.raises(SpftError, match=r"x is missing there and 1 on the others \(and y\)"):
        check_agreement({})


def test_fields_of_the_configuration_can_be_renamed(monkeypatch):
    gathers(monkeypatch, [("a", {"`r`": 4}), ("b", {"`r`": 8})])
    with pytest.raises(SpftError) as raised:
        check_agreement({})
    assert " r is 8 there" in str(raised.value)
    assert " spft_r is 8 there" in str(raised.value.renamed({"r": "spft_r"}))


def test_equal_facts_and_one_process_pass(monkeypatch):
    check_agreement({"x": 1})
    check_same_values({"x": torch.ones(2)}, 1)
    gathers(monkeypatch, [("a", {"x": 1})] * 3)
    check_agreement({"x": 1})


def test_other_values_are_named_by_rank_and_layer(monkeypatch):
    gathers(monkeypatch, [("a", [1, 2]), ("b", [1, 3]), ("c", [1, 2])])
    tensors = {"layers.0.q_proj": torch.ones(1), "layers.1.q_proj": torch.ones(1)}
    with pytest.raises(SpftError, match=r"rank 1 \(b\) holds other values of layers.1.q_proj .*7"):
        check_same_values(tensors, 7)


def test_many_ranks_are_counted():
    assert name_ranks({5: "x"}) == "rank 5 (x)"
    assert name_ranks(dict.fromkeys(range(9), "")) == "ranks 0, 1, 2, 3 and 5 more"


@settings(deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8]),
    st.integers(2, 40),
    st.data(),
)
def test_any_change_and_any_swap_changes_the_checksum(dtype, numel, data):
    tensor = torch.arange(numel).to(dtype)
    changed, swapped = tensor.clone(), tensor.clone()
    place = data.draw(st.integers(0, numel - 1))
    bits = changed.view(torch.uint8)
    bits[data.draw(st.integers(0, bits.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    other = (place + data.draw(st.integers(1, numel - 1))) % numel
    swapped[[place, other]] = tensor[[other, place]]
    before, *after = checksums([tensor, changed, swapped])
    assert before == checksums([tensor.clone()])[0]
    assert before not in after


def test_the_checksum_depends_on_neither_strides_nor_chunks(monkeypatch):
    tensor = torch.randn(31, 17)
    whole = checksums([tensor, tensor.t().contiguous().t(), torch.empty(0), tensor[0, 0]])
    assert whole[0] == whole[1]
    assert whole[2] == 0
    monkeypatch.setattr(agreement, "_CHUNK", 13)
    assert checksums([tensor])[0] == whole[0]


def test_facts_hold_what_changes_the_numbers_and_not_where_files_lie(tmp_path):
    def of(folder, **more):
        arguments = TrainingArguments(
            str(tmp_path / folder), report_to=[], use_cpu=True, **{"max_steps": 2, **more}
        )
        config = SpftConfig(r=4, target_modules=["q_proj", "v_proj"])
        trainer = SpftTrainer(tiny_model(), arguments, train_dataset=dataset(), spft_config=config)
        return run_facts(trainer, trainer.model, "default")

    here, there = of("a"), of("b")
    assert here == there
    assert all(isinstance(v, (str, int, float, bool, type(None))) for v in here.values())
    assert not any(str(tmp_path) in str(value) for value in here.values())
    changes = {"learning_rate": 0.1, "optim": "sgd", "seed": 5, "lr_scheduler_type": "cosine"}
    changes |= {"gradient_accumulation_steps": 3, "max_grad_norm": 0.5, "bf16": True}
    other = of("a", **changes)
    assert {name for name in here if here[name] != other[name]} == set(changes)
