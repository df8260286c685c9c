"""A saved adapter, loaded by any of PEFT's and transformers' ways and in a new process, computes
bit-identical logits; its file holds delta, index and the selected flag by PEFT's names and nothing
of the base model; an adapter saved before selection loads as not selected."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from adapters import trained, wrapped
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from tiny_models import batch, tiny_model

from trainer_ext.tuner.model import deltas, is_selected


@pytest.fixture
def folders(tmp_path):
    """A base model and an adapter trained on it, saved side by side; and the adapter's logits."""
    base = tmp_path / "base"
    tiny_model("qwen2").save_pretrained(base)
    model = trained("qwen2").eval()
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return base, tmp_path / "adapter", model(**batch()).logits


def test_the_file_holds_the_compact_tensors_alone(folders):
    tensors = load_file(folders[1] / "adapter_model.safetensors")
    kinds = {name.rsplit(".", 1)[1] for name in tensors}
    assert kinds == {"weight", "index", "selected"}
    assert all(".spft_delta." in name and ".default" not in name for name in tensors)
    assert all(t.dtype == torch.int64 for n, t in tensors.items() if n.endswith(".index"))


def test_every_way_of_loading_gives_the_same_logits(folders):
    base, adapter, expected = folders
    from_peft = PeftModel.from_pretrained(tiny_model("qwen2"), adapter)
    automatic = AutoPeftModelForCausalLM.from_pretrained(adapter)
    second = trained("qwen2")
    second.load_adapter(adapter, "loaded")
    second.set_adapter("loaded")
    lean = PeftModel.from_pretrained(tiny_model("qwen2"), adapter, low_cpu_mem_usage=True)
    by_transformers = type(tiny_model("qwen2")).from_pretrained(base)
    by_transformers.load_adapter(str(adapter))
    for model in (from_peft, automatic, second, lean, by_transformers):
        with torch.no_grad():
            assert torch.equal(model.eval()(**batch()).logits, expected)


def test_a_new_process_computes_the_same_bits(folders, tmp_path):
    _, adapter, expected = folders
    torch.save({"batch": batch(), "logits": expected}, tmp_path / "expected.pt")
    code = (
        "import torch, trainer_ext; from peft import AutoPeftModelForCausalLM; "
        f"saved = torch.load({str(tmp_path / 'expected.pt')!r}); "
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(adapter)!r}).eval(); "
        "ctx = torch.no_grad(); ctx.__enter__(); "
        "assert torch.equal(model(**saved['batch']).logits, saved['logits'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_fp32_deltas_survive_a_bf16_base(tmp_path):
    model = trained(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(dtype=torch.bfloat16), tmp_path)
    theirs, ours = deltas(loaded), deltas(model)
    assert all(torch.equal(theirs[name].weight, ours[name].weight) for name in ours)


def test_not_selected_survives_saving(tmp_path):
    wrapped().save_pretrained(tmp_path)
    assert not is_selected(PeftModel.from_pretrained(tiny_model(), tmp_path))


def test_continued_training_keeps_the_neurons(folders):
    model = PeftModel.from_pretrained(tiny_model("qwen2"), folders[1], is_trainable=True)
    assert is_selected(model)
    assert all(d.weight.requires_grad for d in deltas(model).values())
