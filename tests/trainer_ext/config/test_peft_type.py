"""The SPFT member of PEFT's enum is a real one: found by name, by value, by iteration and by
pickle, one object however often it is added, and the other members are untouched."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

import trainer_ext
from trainer_ext.config.peft_type import add_peft_type
from trainer_ext.tuner.registration import register_spft

MEMBER = add_peft_type("SPFT")


def test_lookups_agree():
    assert PeftType.SPFT is MEMBER
    assert PeftType["SPFT"] is MEMBER
    assert PeftType("SPFT") is MEMBER
    assert list(PeftType).count(MEMBER) == 1
    assert "SPFT" in list(PeftType)
    assert (MEMBER.name, MEMBER.value) == ("SPFT", "SPFT")
    assert isinstance(MEMBER, PeftType)


@pytest.mark.parametrize("how", [pickle.loads, copy.deepcopy, copy.copy])
def test_copies_are_the_same_object(how):
    assert (how(pickle.dumps(MEMBER)) if how is pickle.loads else how(MEMBER)) is MEMBER


def test_json_is_its_value():
    assert json.dumps({"peft_type": MEMBER}) == '{"peft_type": "SPFT"}'


def test_adding_twice_changes_nothing():
    before = list(PeftType)
    assert add_peft_type("SPFT") is MEMBER
    register_spft()
    assert list(PeftType) == before


def test_an_existing_member_is_returned_as_it_is():
    assert add_peft_type("LORA") is PeftType.LORA


def test_peft_knows_config_model_and_prefix():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[MEMBER] is trainer_ext.SpftConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[MEMBER] is trainer_ext.SpftModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[MEMBER] == "spft_"


def test_a_pickle_is_read_by_a_process_that_imports_the_package():
    code = (
        "import sys, pickle, trainer_ext; from peft import PeftType; "
        f"assert pickle.loads({pickle.dumps(MEMBER)!r}) is PeftType.SPFT"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
