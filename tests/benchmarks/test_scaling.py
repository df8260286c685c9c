"""Invariants of benchmarks/scaling.py:

- docs/scaling.md holds exactly what its commands print, and a command for each table.
- By the formulas SPFT under DDP sends r d_in numbers a layer, whatever the rest of the model; one
  process sends nothing; sharding divides the memory; a model's shapes are those of the real one.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import scaling
from scaling_bytes import METRICS, calibration_payload, step_payload
from scaling_memory import memory
from scaling_model import SHAPES, STAGES, TINY, Model, Run, numel
from transformers import LlamaConfig, LlamaForCausalLM

from trainer_ext import SpftConfig

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"
COMMANDS = re.findall(r"^`python benchmarks/scaling\.py (.*)`:$", DOCUMENT.read_text(), re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_document_holds_what_its_commands_print(command, capsys):
    scaling.main(command.split())
    printed = capsys.readouterr().out.strip()
    block = f"`python benchmarks/scaling.py {command}`:\n\n{printed}\n"
    assert block in DOCUMENT.read_text()


def test_every_kind_of_table_is_in_the_document():
    assert {command.split()[0] for command in COMMANDS} == {*scaling.TABLES, "counted"}


def test_shapes_are_those_of_the_model():
    config = LlamaConfig(
        vocab_size=TINY.vocab,
        hidden_size=TINY.hidden,
        intermediate_size=TINY.intermediate,
        num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads,
        num_key_value_heads=TINY.kv_heads,
        tie_word_embeddings=TINY.tied,
    )
    real = [tuple(p.shape) for p in LlamaForCausalLM(config).parameters()]
    assert sorted(real) == sorted(Model(TINY, 5).base)


def test_a_density_takes_the_neurons_that_the_configuration_takes():
    for density in (0.01, 0.05, 0.3, 1.0):
        config = SpftConfig(density=density)
        for d_out in (1, 16, 48, 333):
            assert Model(TINY, None, density).rows(d_out) == config.neurons_of("x", d_out)


def test_ddp_sends_the_compact_rows_and_one_process_nothing():
    model = Model(SHAPES["8b"], 64)
    compact = 4 * sum(64 * d_in for d_in, _ in model.linears)
    for world in (2, 512):
        assert step_payload(model, Run("ddp", world)) == {"all_reduce": compact}
    for stage in STAGES:
        assert step_payload(model, Run(stage, 1)) == {}
        for metric in METRICS:
            assert calibration_payload(model, Run(stage, 1), metric) == {}


def test_sharding_divides_memory():
    model = Model(SHAPES["70b"], 64)
    one = memory(model, Run("ddp", 1))
    assert one["base"] == 2 * numel(model.base)
    assert one["values"] + one["gradients"] + one["moments"] == 16 * numel(model.compact)
    assert one["master"] == 0
    assert one["kept"] == 2 * numel(model.compact)
    assert memory(model, Run("ddp", 64)) == one
    for stage in ("zero3", "fsdp2"):
        parts = memory(model, Run(stage, 64))
        assert parts["base"] == one["base"] / 64
        assert parts["kept"] == 0
