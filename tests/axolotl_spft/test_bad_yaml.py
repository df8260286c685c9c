"""A mistake in the YAML ends in one line: the key, what was seen, and what to write instead.

Invariants: every row raises SpftError before anything is trained or written to the output_dir's
adapter file, from a message without line breaks. Real processes are in test_processes.py.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from axolotl_runs import lora_yaml, own_process_state, spft_yaml, train

from axolotl_spft import SPFTArgs
from trainer_ext import ImportanceScores, SpftConfig, SpftError

NO_SPFT = {"spft_r": None, "spft_calibration_batches": None}
NOT_BOTH = {"spft_r": None}

# what is changed in a good YAML -> what the message must hold, in this order
YAML_ROWS = [
    ({"spft_imporance": "random"}, ["spft_imporance", "did you mean spft_importance?"]),
    ({"spft_target_module": ["q_proj"]}, ["spft_target_module ", "spft_target_modules?"]),
    ({"spft_r": 4, "spft_density": 0.1}, ["spft_r is 4", "spft_density is 0.1", "keep one"]),
    ({"spft_r": 0}, ["spft_r is 0", "at least 1"]),
    ({"spft_r": -3}, ["spft_r is -3", "at least 1"]),
    ({"spft_r": "8"}, ["spft_r is '8'", "valid integer"]),
    ({"spft_r": True}, ["spft_r is True", "valid integer"]),
    ({"spft_r": 2.5}, ["spft_r is 2.5", "valid integer"]),
    ({"spft_density": 0, **NOT_BOTH}, ["spft_density is 0", "above 0"]),
    ({"spft_density": 1.5, **NOT_BOTH}, ["spft_density is 1.5", "above 0"]),
    ({"spft_density": "5%", **NOT_BOTH}, ["spft_density is '5%'", "valid number"]),
    (
        {"spft_importance": "taylor2"},
        ["spft_importance is 'taylor2'", "allowed: group_taylor"],
    ),
    ({"spft_axis": "columns"}, ["spft_axis is 'columns'", "allowed: rows"]),
    ({"spft_calibration_batches": 0}, ["spft_calibration_batches is 0", "at least 1"]),
    ({"spft_seed": "x"}, ["spft_seed is 'x'", "valid integer"]),
    ({"spft_target_modules": []}, ["spft_target_modules is []", "drop the key"]),
    ({"spft_allocation": "globl"}, ["spft_allocation is 'globl'", "allowed: uniform, global"]),
    (
        {"spft_allocation": "global"},
        ["spft_allocation is 'global'", "spft_importance_file is not set", "spft calibrate"],
    ),
    ({"spft_allocation_floor": 0}, ["spft_allocation_floor is 0", "above 0"]),
    ({"spft_allocation_floor": "low"}, ["spft_allocation_floor is 'low'", "valid number"]),
    ({"spft_allocation_ceiling": 0.5}, ["spft_allocation_ceiling is 0.5", "at least 1"]),
    (
        {"spft_importance": "quantile_mean", "spft_class_field": "labels"},
        ["spft_class_field is 'labels'", "rename the column"],
    ),
    ({"spft_r_pattern": ["q_proj"]}, ["spft_r_pattern is ['q_proj']", "valid dictionary"]),
    ({"spft_r_pattern": {"q_proj": 0.5}}, ["spft_r_pattern is 0.5", "valid integer"]),
    ({"spft_r_pattern": {"q_proj": 0}}, ["'q_proj'", "spft_r_pattern is 0", "at least 1"]),
    ({"spft_r_pattern": {"(": 3}}, ["spft_r_pattern has '('", "regular expression"]),
    ({"spft_density_pattern": {"q_proj": 2}}, ["spft_density_pattern is 2", "up to 1"]),
    ({"gptq": True}, ["gptq is True", "use the unquantised model"]),
    (
        {"load_in_4bit": True, "load_in_8bit": True},
        ["load_in_4bit and load_in_8bit are both True", "keep one"],
    ),
    (
        {"load_in_4bit": True, "spft_forward": "write_through"},
        ["spft_forward is 'write_through' with load_in_4bit", "drop spft_forward"],
    ),
    (
        {"load_in_4bit": True, "peft": {"loftq_config": {"loftq_bits": 4}}},
        ["peft.loftq_config is {'loftq_bits': 4}", "drop it"],
    ),
    (
        {
            "load_in_8bit": True,
            "fsdp_version": 2,
            "fsdp_config": {"cpu_ram_efficient_loading": True},
        },
        ["fsdp_config.cpu_ram_efficient_loading is True with load_in_8bit", "set it to false"],
    ),
    (
        {
            "load_in_4bit": True,
            "rl": "dpo",
            "fsdp_version": 2,
            "fsdp_config": {"reshard_after_forward": True},
        },
        ["load_in_4bit is True with rl: dpo and FSDP2", "use DeepSpeed"],
    ),
    ({"spft_quant_init": "exact"}, ["spft_quant_init is 'exact'", "drop it", "load_in_4bit"]),
    (
        {"load_in_8bit": True, "spft_quant_init": "loftq"},
        ["spft_quant_init is 'loftq'", "allowed: exact, none"],
    ),
    ({"loraplus_lr_ratio": 16}, ["loraplus_lr_ratio is 16", "drop it"]),
    ({"lora_mlp_kernel": True}, ["lora_mlp_kernel is True", "drop it"]),
    ({"lora_fp32_gradients": True}, ["lora_fp32_gradients is True", "drop it"]),
    (
        {"load_in_4bit": True, "nf4_backend": "torchao"},
        ["nf4_backend is 'torchao'", "bitsandbytes", "drop it"],
    ),
    ({"nvfp4_merge_aware": True}, ["nvfp4_merge_aware is True", "drop it"]),
    ({"peft_use_dora": True}, ["peft_use_dora is True", "drop it"]),
    ({"relora": True}, ["relora is True", "drop it"]),
    ({"fsdp_config": {"state_dict_type": "x"}}, ["fsdp_version is None", "fsdp_version: 2"]),
    ({"fsdp_config": {}, "fsdp": ["full_shard"]}, ["fsdp is ['full_shard']", "use fsdp_config"]),
    (
        {"fsdp_version": 2, "fsdp_config": {"offload_params": True}},
        ["fsdp_config.offload_params is True", "offload by DeepSpeed ZeRO-3"],
    ),
    ({"dp_replicate_size": 2}, ["dp_replicate_size is 2", "hybrid sharding", "set it to 1"]),
    ({"tensor_parallel_size": 2}, ["tensor_parallel_size is 2", "set it to 1"]),
    ({"context_parallel_size": 2}, ["context_parallel_size is 2", "set it to 1"]),
    (
        {"lr_groups": [{"name": "a", "modules": ["q_proj"], "lr": 0.1}]},
        ["lr_groups is [", "use learning_rate alone"],
    ),
    ({"rl": "grpo"}, ["rl is 'grpo'", "allowed: dpo, ipo, kto, orpo, simpo"]),
    ({"rl": "simpo"}, ["simpo_gamma is not set", "set simpo_gamma: 0.5"]),
    ({"rl": "dpo", "sample_packing": True}, ["sample_packing is True", "rl: dpo", "drop it"]),
    ({"rl": "dpo", "rl_adapter_ref_model": True}, ["rl_adapter_ref_model is True", "drop it"]),
    (
        {"rl": "ipo", "peft_autocast_adapter_dtype": False},
        ["peft_autocast_adapter_dtype is False", "rl: ipo", "drop it"],
    ),
    (
        {"rl": "dpo", "spft_importance": "quantile_mean", "spft_class_field": "topic"},
        ["rl is 'dpo' with spft_importance: quantile_mean", "drop it"],
    ),
    ({"merge_method": "memory_efficient"}, ["merge_method is", "drop merge_method"]),
    ({"adapter": None}, ["spft_", "adapter: None", "set adapter: prune_spft"]),
    ({"adapter": "lora", "lora_r": 4}, ["spft_", "adapter: lora", "set adapter: prune_spft"]),
    (
        {"adapter": None, **NO_SPFT, "lora_model_dir": "some/folder"},
        ["lora_model_dir is 'some/folder'", "set adapter: prune_spft"],
    ),
]
# the same for what only the model or a file can tell; {folder} is the fixture's
MODEL_ROWS = [
    ({"spft_target_modules": ["nope"]}, ["spft_target_modules is ['nope']", "q_proj"]),
    ({"spft_target_modules": "nope.*"}, ["spft_target_modules is 'nope.*'", "q_proj"]),
    ({"lora_target_modules": ["nope"]}, ["lora_target_modules is ['nope']", "q_proj"]),
    ({"spft_target_modules": "("}, ["spft_target_modules is '('", "regular expression", "names"]),
    ({"spft_exclude_modules": ".*"}, ["spft_exclude_modules is '.*'", "q_proj"]),
    ({"peft_layers_to_transform": [7]}, ["peft_layers_to_transform is [7]", "q_proj"]),
    ({"spft_target_modules": ["lm_head"]}, ["spft_target_modules", "lm_head", "tied", "leave it"]),
    ({"spft_target_modules": ["embed_tokens"]}, ["spft_target_modules", "Embedding", "narrow"]),
    ({"spft_r_pattern": {"nope": 3}}, ["spft_r_pattern has 'nope'", "no targeted layer", "q_proj"]),
    ({"spft_r_pattern": {"k_proj": 40}}, ["spft_r_pattern gives", "40", "spft_density_pattern"]),
    (
        {"spft_r_pattern": {"q_proj": 3}, "spft_density_pattern": {r".*\.q_proj": 0.5}},
        ["q_proj", "spft_r_pattern", "spft_density_pattern", "keep one"],
    ),
    (
        {"spft_allocation": "global", "spft_importance_file": "{folder}/of_other_model"},
        ["spft_importance_file is", "of_other_model", "31 neurons", "different models"],
    ),
    (
        {"spft_importance_file": "{folder}/nowhere"},
        ["spft_importance_file is", "nowhere", "does not exist"],
    ),
    (
        {"spft_importance_file": "{folder}/damaged"},
        ["spft_importance_file is", "damaged", "not a whole safetensors file", "make it anew"],
    ),
    (
        {"spft_importance_file": "{folder}/of_other_model"},
        ["spft_importance_file is", "of_other_model", "31 neurons", "32", "different models"],
    ),
    (
        {"spft_importance_file": "{folder}/out/adapter_model.safetensors"},
        ["spft_importance_file is", "spft_importance", "check the path"],
    ),
    (
        {"spft_r": 5, "lora_model_dir": "{folder}/out"},
        ["spft_r is 5", "/out", "spft_r = 4", "drop spft_r"],
    ),
    (
        {"spft_r": None, "spft_density": 0.5, "lora_model_dir": "{folder}/out"},
        ["spft_density is 0.5", "/out", "spft_r = 4", "drop spft_density"],
    ),
    (
        {"spft_r_pattern": {"q_proj": 3}, "lora_model_dir": "{folder}/out"},
        ["spft_r_pattern is {'q_proj': 3}", "/out", "no spft_r_pattern", "drop spft_r_pattern"],
    ),
    (
        {
            "spft_allocation": "global",
            "spft_importance_file": "{folder}/out/spft_importance.safetensors",
            "lora_model_dir": "{folder}/out",
        },
        ["spft_allocation is global", "spft_allocation = uniform", "drop spft_allocation"],
    ),
    ({"lora_model_dir": "{folder}/lora"}, ["lora_model_dir is", "/lora", "LORA", "SPFT"]),
    ({"lora_model_dir": "{folder}/empty"}, ["lora_model_dir is", "/empty", "give the folder"]),
    ({"lora_model_dir": "{folder}/nowhere"}, ["lora_model_dir is", "/nowhere", "give the folder"]),
    (
        {"resume_from_checkpoint": "{folder}/out", "spft_r": 5},
        ["resume_from_checkpoint is", "/out", "spft_r = 4", "spft_r = 5", "another output_dir"],
    ),
    (
        {"resume_from_checkpoint": "{folder}/out", "spft_density_pattern": {"q_proj": 0.5}},
        ["/out", "no spft_density_pattern", "spft_density_pattern = {'q_proj': 0.5}"],
    ),
    ({"resume_from_checkpoint": "{folder}/lora"}, ["resume_from_checkpoint is", "LORA", "SPFT"]),
    ({"resume_from_checkpoint": "{folder}/no"}, ["resume_from_checkpoint is", "give the folder"]),
]


def _check(error: SpftError, parts: list[str]) -> None:
    message, position = str(error), 0
    assert "\n" not in message
    for part in parts:
        found = message.find(part, position)
        assert found >= 0, f"{part!r} is missing, or out of order, in: {message}"
        position = found


def _name(value) -> str:
    return ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""


@pytest.mark.parametrize(("changes", "parts"), YAML_ROWS, ids=_name)
def test_bad_yaml_is_refused_before_anything_is_loaded(assets, tmp_path, changes, parts):
    with pytest.raises(SpftError) as caught:
        train(spft_yaml(assets, **{"base_model": str(tmp_path / "no model"), **changes}), tmp_path)
    _check(caught.value, parts)


@pytest.fixture(scope="module")
def folder(assets, tmp_path_factory):
    """An SPFT adapter, a LoRA adapter, and importance files that are no good."""
    folder = tmp_path_factory.mktemp("bad")
    with own_process_state():
        train(spft_yaml(assets, max_steps=1), folder / "out")
        train(lora_yaml(assets, max_steps=1), folder / "lora")
    (folder / "empty").mkdir()
    good = folder / "out" / "spft_importance.safetensors"
    (folder / "damaged").write_bytes(good.read_bytes()[:500])
    scores = ImportanceScores.load(good)
    scores.scores["model.layers.0.mlp.down_proj"] = torch.rand(31, dtype=torch.float64)
    scores.save(folder / "of_other_model")
    return folder


@pytest.mark.parametrize(("changes", "parts"), MODEL_ROWS, ids=_name)
def test_what_does_not_fit_the_model_is_refused(assets, tmp_path, folder, changes, parts):
    changes = {
        key: value.format(folder=folder) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    with pytest.raises(SpftError) as caught:
        train(spft_yaml(assets, **changes), tmp_path / "run")
    _check(caught.value, parts)
    assert not list((tmp_path / "run").glob("**/adapter_model*"))


def test_resuming_by_itself_refuses_another_number_of_neurons(assets, tmp_path):
    config = spft_yaml(assets, max_steps=1, save_strategy="steps", save_steps=1)
    train(config, tmp_path / "out")
    changes = {"auto_resume_from_checkpoints": True, "max_steps": 2, "spft_r": 6}
    with pytest.raises(SpftError) as caught:
        train({**config, **changes}, tmp_path / "out")
    _check(caught.value, ["auto_resume_from_checkpoints", "checkpoint-1", "spft_r = 4", "= 6"])


def test_good_importance_file_is_used(assets, tmp_path, folder):
    """Guards the rows above: the file that they damage is accepted whole."""
    path = shutil.copy(folder / "out" / "spft_importance.safetensors", tmp_path / "scores")
    run = train(spft_yaml(assets, spft_importance_file=str(path)), tmp_path / "run")
    assert run.calibration == []
    indices = {n: t for n, t in run.tensors.items() if n.endswith("index")}
    saved = ImportanceScores.load(path).scores
    for name, index in indices.items():
        scores = saved[name.removeprefix("base_model.model.").split(".spft_delta")[0]]
        assert torch.equal(index, scores.topk(4).indices.sort().values)


def test_every_key_is_a_field_of_the_config():
    """The YAML offers nothing that SpftConfig does not have; and all that a user needs of it."""
    keys = {key.removeprefix("spft_") for key in SPFTArgs.model_fields}
    assert all(key.startswith("spft_") for key in SPFTArgs.model_fields)
    fields = set(SpftConfig.__dataclass_fields__)
    assert keys <= fields
    # these have keys in Axolotl itself: peft_layers_*, lora_modules_to_save, lora_model_dir
    elsewhere = {"layers_to_transform", "layers_pattern", "modules_to_save", "start_adapter"}
    filled_in = {"allocated", "anchor"}
    own = fields - set(SpftConfig.__mro__[1].__dataclass_fields__) - elsewhere - filled_in
    assert keys == own
