"""A step (forward, backward, optimizer, gradients dropped) never makes the host wait for the
device, in either forward, with fp32 and with bf16 deltas.

Two watches, after two steps of warming up: operators that read a value of the device are refused
everywhere, and on CUDA its runtime refuses every call that waits
(`torch.cuda.set_sync_debug_mode`). The counters of 16-bit deltas are kept on the host and may be
read. A test of each watch shows that it does see a read."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from adapters import selected
from devices import DEVICE, HostWaitsError, NoHostReads
from layer_stacks import batch_of, loss_of, stack
from optimizers import state_of
from tiny_models import batch

from trainer_ext import SelectedNeuronAdamW, trained_parameters, write_through
from trainer_ext.tuner.model import deltas, spft_layers

pytestmark = pytest.mark.cuda


@contextmanager
def cuda_refuses_to_wait():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def stepper(model, loss):
    """One call a step, and the optimizer; the rows are written from the second step on."""
    optimizer = SelectedNeuronAdamW(trained_parameters(model))

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    return step, optimizer


def stack_stepper(forward, dtype):
    model = stack(DEVICE, dtype, forward=forward).train()
    for delta in deltas(model).values():
        delta.weight.data = delta.weight.data.to(dtype)
    data = batch_of(DEVICE, dtype)
    step, optimizer = stepper(model, lambda: loss_of(model, data))
    written = {layer.written is not None for layer in spft_layers(model).values()}
    assert written == {forward == "auto"}
    return model, step, optimizer


def counters(optimizer) -> list[torch.Tensor]:
    return [s["step"] for s in state_of(optimizer) if s["step"].device.type == "cpu"]


every_step = pytest.mark.parametrize(
    ("forward", "dtype"),
    [
        ("auto", torch.float32),
        ("auto", torch.bfloat16),
        ("delta", torch.float32),
        ("delta", torch.bfloat16),
    ],
    ids=["written", "written_bf16", "delta", "delta_bf16"],
)


@every_step
def test_no_operator_of_a_step_reads_a_value(forward, dtype):
    model, step, optimizer = stack_stepper(forward, dtype)
    before = [delta.weight.detach().clone() for delta in deltas(model).values()]
    with NoHostReads(counters(optimizer)):
        for _ in range(3):
            step()
    after = [delta.weight for delta in deltas(model).values()]
    assert not any(map(torch.equal, before, after))


@pytest.mark.parametrize("forward", ["auto", "delta"])
def test_no_operator_of_a_language_models_step_reads_a_value(forward):
    model = selected("llama_bias", device=DEVICE, forward=forward).train()
    tokens = batch(device=DEVICE)["input_ids"]

    def loss():
        logits = model(input_ids=tokens).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    step, optimizer = stepper(model, loss)
    with NoHostReads(counters(optimizer)):
        step()


def test_the_watch_over_operators_sees_reads():
    values = torch.ones(3, device=DEVICE)
    counter = torch.tensor(2.0)
    for read in (
        lambda: values.sum().item(),
        lambda: bool((values > 0).any()),
        lambda: values[values > 0],
        lambda: torch.equal(values, values),
    ):
        with pytest.raises(HostWaitsError), NoHostReads():
            read()
    with NoHostReads([counter]):
        assert int(counter) == 2
    # where the rows are looked at anew, a layer asks the device
    model, step, _ = stack_stepper("delta", torch.float32)
    next(iter(deltas(model).values())).selected.fill_(True)
    with pytest.raises(HostWaitsError), NoHostReads():
        step()


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA's own watch needs CUDA")
@every_step
def test_cuda_never_waits_in_a_step(forward, dtype):
    model, step, _ = stack_stepper(forward, dtype)
    with cuda_refuses_to_wait():
        for _ in range(3):
            step()
    assert all(delta.weight.isfinite().all() for delta in deltas(model).values())


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA's own watch needs CUDA")
def test_cuda_watch_sees_reads():
    values = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="synchronizing"), cuda_refuses_to_wait():
        values.sum().item()
    assert torch.cuda.get_sync_debug_mode() == 0


def test_writing_by_hand_waits_for_nothing():
    """`write_through` on a model whose rows are written, as an engine's loop calls it."""
    model, _, _ = stack_stepper("auto", torch.float32)
    with NoHostReads():
        assert write_through(model) == len(spft_layers(model))
