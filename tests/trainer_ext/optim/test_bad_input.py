"""Every mistake is an SpftError of one line that names what was seen and the mend."""

from __future__ import annotations

import sys

import pytest
import torch
from adapters import selected
from optimizers import compact, set_gradients
from torch import nn

from trainer_ext import SelectedNeuronAdamW, SpftError, trained_parameters

VALUES = {
    "lr": [-1.0, float("nan"), float("inf"), "1e-3", True, torch.ones(2)],
    "eps": [-1e-8, None, torch.tensor(1e-8)],
    "weight_decay": [-0.1, "0"],
    "betas": [(0.9,), (1.0, 0.999), (0.9, -0.1), 0.9, ("0.9", 0.99)],
    "state_bits": [16, "8", 8.0, None],
    "foreach": ["yes"],
    "fused": [1.5],
    "stochastic_rounding": [None, "true"],
    "seed": [1.5, None],
}
CASES = [(name, value) for name, values in VALUES.items() for value in values]


def one_line(caught, *words: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("name", "value"), CASES, ids=str)
@pytest.mark.parametrize("in_group", [True, False])
def test_bad_hyperparameters(name, value, in_group):
    params, options = compact(), {name: value}
    if in_group:
        params, options = [{"params": params, **options}], {}
    with pytest.raises(SpftError) as caught:
        SelectedNeuronAdamW(params, **options)
    one_line(caught, name)


def test_two_kernels_at_once():
    with pytest.raises(SpftError, match="foreach and fused"):
        SelectedNeuronAdamW(compact(), foreach=True, fused=True)
    with pytest.raises(SpftError, match="lr is a tensor"):
        SelectedNeuronAdamW(compact(), lr=torch.tensor(0.1), foreach=True)


def test_parameters_that_spft_does_not_train():
    model = selected()
    with pytest.raises(SpftError) as caught:
        SelectedNeuronAdamW(model.parameters())
    one_line(caught, "parameter 0 of group 0", "(260, 32)", "trained_parameters(model)")
    optimizer = SelectedNeuronAdamW(trained_parameters(model))
    with pytest.raises(SpftError) as caught:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 5))]})
    one_line(caught, "parameter 0 of group 1", "(3, 5)", "trained_parameters(model)")
    assert len(optimizer.param_groups) == 1


def test_no_parameter_at_all():
    with pytest.raises(SpftError, match="no parameter"):
        SelectedNeuronAdamW([])


def test_parameters_of_another_kind():
    with pytest.raises(SpftError, match="complex64; it must be"):
        SelectedNeuronAdamW(compact(torch.complex64))


def test_8bit_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    with pytest.raises(SpftError) as caught:
        SelectedNeuronAdamW(compact(), state_bits=8)
    one_line(caught, "pip install bitsandbytes", "state_bits=32")
    SelectedNeuronAdamW(compact())


def test_8bit_of_fp64():
    parameters = compact(torch.float64)
    optimizer = SelectedNeuronAdamW(parameters, state_bits=8)
    set_gradients(parameters, 0)
    with pytest.raises(SpftError, match=r"\(64, 96\) is fp64; use state_bits=32"):
        optimizer.step()


def test_sparse_gradients():
    embedding = nn.Embedding(8, 4, sparse=True)
    embedding.weight._spft_trained = True
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(SpftError, match=r"\(8, 4\) has a sparse gradient"):
        SelectedNeuronAdamW([embedding.weight]).step()
