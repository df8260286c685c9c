"""trainer_ext imports with torch, transformers, accelerate, peft and safetensors alone, and every
name that it promises is there. Imports go downwards only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import trainer_ext

PACKAGE = Path(trainer_ext.__file__).parent
OPTIONAL = ("axolotl", "deepspeed", "trl", "bitsandbytes", "datasets")
# Rooms and single modules, lower ones first: each may import from itself and from those before it.
LAYERS = [
    {"errors", "seeding"},
    {"versions", "distributed"},
    {"config"},
    {"files"},
    {"ranking"},
    {"tuner"},
    {"importance", "optim", "export"},
    {"calibration", "checkpoints", "report", "run_guard"},
    {"training"},
    {"cli"},
    {"__init__"},
]


def test_imports_and_trains_without_the_optional_packages():
    hidden = "".join(f"sys.modules[{name!r}] = None; " for name in OPTIONAL)
    code = (
        f"import sys; {hidden}"
        "import trainer_ext, peft, transformers; "
        "config = transformers.LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8,"
        " num_hidden_layers=1, num_attention_heads=2); "
        "model = peft.get_peft_model(transformers.LlamaForCausalLM(config), "
        "trainer_ext.SpftConfig(r=2, importance='magnitude')); "
        "trainer_ext.select_neurons(model); "
        "import torch; model(input_ids=torch.ones(1, 4, dtype=torch.long),"
        " labels=torch.ones(1, 4, dtype=torch.long)).loss.backward(); "
        "print('trained'); "
        "trainer_ext.SpftDPOTrainer"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("trained"), done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: SpftDPOTrainer needs TRL, which is not installed: pip install trl"
    )


def test_promised_names_exist():
    for name in (*trainer_ext.__all__, "SpftSFTTrainer", "SpftDPOTrainer"):
        assert hasattr(trainer_ext, name), name


def test_trainer_ext_never_names_axolotl_in_an_import():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            assert not any(name.split(".")[0].startswith("axolotl") for name in names), path


def test_imports_go_downwards():
    level = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE).with_suffix("").parts
        own = inside[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            # `from .x` in a package's own module, `from ..x` in a sub-package's
            target = node.module.split(".")[0] if node.level == len(inside) else own
            assert level[target] <= level[own], f"{path}: {own} imports {target}"
