"""Invariants of benchmarks/methods.py and benchmarks/workload.py:

- Every method starts from the same weights; a step moves exactly its trainable parameters, for
  write-through also the rows that they belong to, and leaves no gradients.
- Models that share their parameters share nothing else, and the steps of all methods together leave
  the shared ones as they are.
- All PEFT methods train SPFT's number of parameters, within what their rank allows.
- SPFT's AdamW state is 8 bytes per trainable parameter besides the step counters, also over bf16.
- The floor trains nothing and runs backward down to the embeddings' output.
- The named sizes are those models, of which SPFT trains about 5 %.
"""

from __future__ import annotations

import methods
import pytest
import torch
from tiny_benchmark import make_workload, workload_named
from workload import SIZES

from trainer_ext.report.figures import optimizer_state_bytes

TOTALS = {"50m": 51196416, "135m": 134515008, "1b": 1235814400, "3b": 3212749824}
TOTALS |= {"8b": 8030261248}
NAMES = list(methods.METHODS)


@pytest.fixture(params=["fp32", "bf16", "fp32-checkpointing"])
def work(request):
    return workload_named(request.param)


def build(name: str, work) -> methods.Method:
    try:
        return methods.METHODS[name](work)
    except methods.UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("size", TOTALS)
def test_the_named_sizes_are_those_models_and_train_five_percent(size):
    work = make_workload(size=SIZES[size], r=SIZES[size].r, device=torch.device("meta"))
    total = sum(p.numel() for p in work.base_model().parameters())
    assert total == TOTALS[size]
    assert work.budget / total == pytest.approx(0.05, abs=0.005)
    assert work.trained_share > work.budget / total  # embeddings are no linear layers


@pytest.mark.parametrize("name", NAMES)
def test_every_method_starts_from_the_same_weights_and_moves_its_own(work, name):
    base = work.base_model().state_dict()
    method = build(name, work)
    before = {n: p.detach().clone() for n, p in method.model.named_parameters()}
    for parameter_name, value in base.items():
        plain = [v for n, v in before.items() if same_parameter(n, parameter_name)]
        assert len(plain) == 1 or parameter_name == "lm_head.weight"  # tied
        assert all(torch.equal(value, v) for v in plain)
    trainable = {id(p) for p in method.trainable}
    if method.optimizer is not None:
        method.optimizer.param_groups[0]["lr"] = 0.1  # 1e-3 rounds away in bf16
    for _ in range(2):  # LoRA's A has no gradient until B has moved
        method.step()
    written = name in ("spft_write_through", "spft_8bit")
    for parameter_name, parameter in method.model.named_parameters():
        moved = not torch.equal(parameter, before[parameter_name])
        rows = written and parameter_name.endswith(".base_layer.weight")
        assert moved == (id(parameter) in trainable or rows), parameter_name
        assert parameter.grad is None


def same_parameter(name: str, base_name: str) -> bool:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".") == base_name


def test_shared_models_share_their_parameters_and_nothing_else():
    work = make_workload()
    first, second = work.shared_model(), work.shared_model()
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not {id(m) for m in first.modules()} & {id(m) for m in second.modules()}
    names = {n for n, _ in second.named_modules()}
    methods.METHODS["lora"](work)  # wraps a third one
    first.model.layers[0].mlp = torch.nn.Identity()
    assert {n for n, _ in second.named_modules()} == names
    own = work.base_model()
    shared = {p.data_ptr() for p in first.parameters()}
    assert not shared & {p.data_ptr() for p in own.parameters()}


def test_no_method_moves_the_weights_that_others_share(work):
    shared = work.shared_model()
    before = {n: p.detach().clone() for n, p in shared.named_parameters()}
    for name in NAMES:
        method = build(name, work)
        for _ in range(2):
            method.step()
    for name, parameter in shared.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None
        assert not parameter.requires_grad


@pytest.mark.parametrize("name", NAMES[1:-1])  # neither the floor nor full fine-tuning
@pytest.mark.parametrize("r", [4, 10, 32])
def test_equal_budgets_whatever_r(name, r):
    work = make_workload(r=r)
    trained = sum(p.numel() for p in build(name, work).trainable)
    # A rank of LoRA's is 2,048 parameters here, of the others at most that.
    assert abs(trained - work.budget) <= (0 if name.startswith("spft") else 1024)


@pytest.mark.parametrize("name", ["spft_write_through", "spft_delta"])
def test_adamw_holds_eight_bytes_per_trainable_and_step_counters(work, name):
    method = build(name, work)
    method.step()
    compact = sum(p.numel() for p in method.trainable)
    assert {p.dtype for p in method.trainable} == {torch.float32}
    counters = sum(s["step"].numel() * 4 for s in method.optimizer.state.values())
    assert counters == 4 * len(method.trainable)
    assert optimizer_state_bytes(method.optimizer) == 8 * compact + counters


def test_lora_fa_trains_and_holds_state_of_b_alone():
    method = methods.METHODS["lora_fa"](make_workload())
    method.step()
    names = [n for n, p in method.model.named_parameters() if p.requires_grad]
    trained = sum(p.numel() for p in method.trainable)
    assert all(".lora_B." in name for name in names)
    assert optimizer_state_bytes(method.optimizer) == 8 * trained


def test_the_floor_runs_backward_to_the_embeddings_and_trains_nothing(work):
    method = methods.METHODS["frozen"](work)
    assert not any(p.requires_grad for p in method.model.parameters())
    outputs = []
    method.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: outputs.append(output)
    )
    method.step()
    assert outputs[0].grad.abs().sum() > 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_models_use_the_attention_that_was_asked_for(attention):
    model = make_workload(attention=attention).shared_model()
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {
        attention
    }
