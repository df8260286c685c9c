"""On the device, gradients of the deltas are the dense layer's for the selected rows also where
others compute: under autocast, in torch's attention kernels, compiled by inductor.

Tolerances are shares of a gradient's norm. In low precision both sides round every product, by up
to u = 2^-9 of its size for bf16 and 2^-12 for fp16. Roundings differ where sums have other orders,
and inside an attention kernel. Some ten of them lie behind a gradient, and the softmax's
gradient is a difference, which makes them larger: on the CPU it comes to 16 u at most; 64 u are
allowed. An attention kernel in fp32 may put products together of TF32's ten bits: 8 * 2^-11.
Compiled code sums and rounds in another order in fp32: 1e-5, some 100 u. A row that is not the
right one makes a share of 1."""

from __future__ import annotations

import pytest
import torch
from adapters import trained
from devices import DEVICE, OperatorNames, far
from layer_stacks import batch_of, loss_of, stack
from short_runs import trained_rows
from tiny_models import batch
from toolchains import missing_for_inductor
from torch.nn.attention import SDPBackend, sdpa_kernel
from written import is_base, step_once, training, without_dropout

from trainer_ext import SelectedNeuronAdamW, restore_base, trained_parameters
from trainer_ext.tuner.model import deltas, spft_layers

pytestmark = pytest.mark.cuda

UNITS = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
both_forwards = pytest.mark.parametrize("forward", ["auto", "delta"])
both_halves = pytest.mark.parametrize("dtype", list(UNITS), ids=["bf16", "fp16"])
SCALE = 2.0**10  # of losses in fp16, whose gradients would underflow


def adapter(architecture, forward, dtype=torch.float32):
    if forward == "auto":
        return training(architecture, dtype, device=DEVICE)
    model = trained(architecture, dtype, device=DEVICE, forward=forward)
    return without_dropout(model.train())


def merged(architecture, dtype=torch.float32):
    """The plain model that an adapter stands for, all of whose weights require a gradient."""
    model = trained(architecture, dtype, device=DEVICE).merge_and_unload()
    return without_dropout(model.train().requires_grad_(True))


def tokens() -> dict[str, torch.Tensor]:
    """Without a mask, which flash attention does not take."""
    data = batch(device=DEVICE)
    del data["attention_mask"]
    return data


def scaled_gradients(model) -> None:
    (model(**tokens()).loss * SCALE).backward()


def gradients_of(model, index=None) -> dict[str, torch.Tensor]:
    """Of the deltas, or of the rows `index` of a plain model."""
    if index is not None:
        return trained_rows(model, index, gradients=True)
    return {name: delta.weight.grad for name, delta in deltas(model).items()}


def assert_near(got, expected, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert gradient.device.type == DEVICE
        assert far(gradient, expected[name]) <= tolerance, name


def largest_distance(got, expected) -> float:
    return max(far(gradient, expected[name]) for name, gradient in got.items())


# Autocast


@both_halves
@both_forwards
@pytest.mark.parametrize("architecture", ["llama_bias", "gpt2"])
def test_autocast(architecture, forward, dtype):
    ours, dense, exact = adapter(architecture, forward), merged(architecture), merged(architecture)
    index = {name: delta.index for name, delta in deltas(ours).items()}
    scaled_gradients(exact)
    with torch.autocast(DEVICE, dtype=dtype):
        assert ours(**tokens()).logits.dtype == dtype
        scaled_gradients(ours)
        scaled_gradients(dense)
    got = gradients_of(ours)
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}
    assert_near(got, gradients_of(dense, index), 64 * UNITS[dtype])
    in_fp32 = gradients_of(exact, index)
    assert_near(got, in_fp32, 64 * UNITS[dtype])
    assert largest_distance(got, in_fp32) > UNITS[dtype] / 16  # it has computed in `dtype`


def test_fp16_autocast_with_a_grad_scaler_trains_and_skips_an_overflow():
    """Against fp32: ten steps' losses differ by the rounding of fp16, and a step whose gradients
    overflow leaves deltas and written rows as they are."""
    ours, exact = training(device=DEVICE), training(device=DEVICE)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=SCALE)
    optimizers = [
        SelectedNeuronAdamW(trained_parameters(m), lr=1e-2, eps=1e-3) for m in (ours, exact)
    ]
    for step in range(10):
        data = batch(step % 3, device=DEVICE)
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = ours(**data).loss
        if step == 5:
            before = [d.weight.detach().clone() for d in deltas(ours).values()]
            seen = {layer.written.seen for layer in spft_layers(ours).values()}
            scaler.scale(loss * torch.inf).backward()
            scaler.step(optimizers[0])
            scaler.update()
            assert all(map(torch.equal, before, (d.weight for d in deltas(ours).values())))
            assert {layer.written.seen for layer in spft_layers(ours).values()} == seen
            optimizers[0].zero_grad()
            with torch.autocast(DEVICE, dtype=torch.float16):
                loss = ours(**data).loss
        expected = exact(**data).loss
        assert abs(loss.item() - expected.item()) <= 16 * UNITS[torch.float16] * expected.item()
        scaler.scale(loss).backward()
        scaler.step(optimizers[0])
        scaler.update()
        expected.backward()
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert scaler.get_scale() == SCALE / 2
    for model in (ours, exact):
        restore_base(model)
        assert is_base(model)


# Attention kernels

FLASH, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
OPERATORS = {
    FLASH: "_scaled_dot_product_flash_attention",
    EFFICIENT: "_scaled_dot_product_efficient_attention",
}
# Llama's grouped queries are for flash attention alone; GPT-2 has none.
ATTENTION = [
    ("llama_bias", FLASH, torch.bfloat16),
    ("llama_bias", FLASH, torch.float16),
    ("gpt2", FLASH, torch.bfloat16),
    ("gpt2", EFFICIENT, torch.float32),
    ("gpt2", EFFICIENT, torch.bfloat16),
]


@both_forwards
@pytest.mark.parametrize(("architecture", "kernel", "dtype"), ATTENTION)
def test_attention_kernels(architecture, kernel, dtype, forward):
    """`sdpa_kernel` raises where the one kernel that it allows cannot do the work."""
    if kernel == EFFICIENT and DEVICE == "cpu":
        pytest.skip("memory-efficient attention needs CUDA")
    ours, dense = adapter(architecture, forward, dtype), merged(architecture, dtype)
    index = {name: delta.index for name, delta in deltas(ours).items()}
    with sdpa_kernel([kernel]), OperatorNames() as seen:
        scaled_gradients(ours)
    used = [name for name in seen.names if name.startswith(OPERATORS[kernel])]
    assert len([name for name in used if "backward" in name]) == 2  # layers
    assert len(used) == 4
    with sdpa_kernel([SDPBackend.MATH]):
        scaled_gradients(dense)
    tolerance = 8 * 2.0**-11 if dtype == torch.float32 else 64 * UNITS[dtype]
    assert_near(gradients_of(ours), gradients_of(dense, index), tolerance)


# Compiled

MISSING = missing_for_inductor(DEVICE)


@both_forwards
@pytest.mark.skipif(MISSING is not None, reason=f"inductor lacks {MISSING}")
def test_compiled_by_inductor(forward):
    """Both forwards, whose graphs must use the deltas and rows that a step has changed since."""
    torch._dynamo.reset()
    compiled, eager = (stack(DEVICE, forward=forward).train() for _ in range(2))
    for model in (compiled, eager):
        step_once(model)
        model(batch_of(DEVICE))  # writes the rows, where the forward does
        written = {layer.written is not None for layer in spft_layers(model).values()}
        assert written == {forward == "auto"}
    inductor, graphs = torch._dynamo.lookup_backend("inductor"), []

    def counting(graph, inputs):
        graphs.append(graph)
        return inductor(graph, inputs)

    loss = torch.compile(loss_of, backend=counting, fullgraph=True)
    optimizers = [torch.optim.SGD(trained_parameters(m), lr=0.5) for m in (compiled, eager)]
    for step in range(3):
        data = batch_of(DEVICE, seed=step)
        got, expected = loss(compiled, data), loss_of(eager, data)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
        got.backward()
        expected.backward()
        assert_near(gradients_of(compiled), gradients_of(eager), 1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert len(graphs) == 1
    assert far(got, loss_of(compiled, data)) > 1e-3  # the last step has changed the loss
