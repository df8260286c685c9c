"""A metric is one class. Registered under a name, it is a value of `importance`, and the neurons
are those with its highest scores."""

from __future__ import annotations

import pytest
import torch
from adapters import wrapped
from tiny_models import batch

from trainer_ext import SpftConfig, SpftError, measure_importance, select_neurons
from trainer_ext.config.registry import METRICS, register
from trainer_ext.importance.base import CalibrationBatch, ImportanceMetric


@pytest.fixture
def ascending():
    @register("ascending")
    class Ascending(ImportanceMetric):
        """The last neurons are the most important; it notes the loss of every batch."""

        losses: list = []

        def _observe(self, batch, part):
            self.losses.append(batch.run(False).item())

        def _scores(self, parts):
            return {
                name: torch.arange(layer.out_features, dtype=torch.float64)
                for name, layer in self.layers.items()
            }

    yield Ascending
    del METRICS["ascending"]


def test_a_registered_class_is_a_metric(ascending):
    model = wrapped(importance="ascending")
    selection = select_neurons(model, [batch(0), batch(1)])
    for name, index in selection.index.items():
        out = selection.out_features[name]
        assert index.tolist() == list(range(out - 4, out))
    assert len(ascending.losses) == 2


def test_a_name_that_nobody_registered_is_refused():
    with pytest.raises(SpftError, match="importance is 'ascending'; allowed: group_taylor, "):
        SpftConfig(importance="ascending")


def test_all_kinds_of_batches_are_the_same():
    """Dicts of model inputs, callables, and objects that have the micro batches as well."""
    model = wrapped(importance="group_taylor")

    def run_of(inputs):
        def run(backward):
            loss = model(**inputs).loss
            if backward:
                loss.backward()
            return loss.detach()

        return run

    data = [batch(0), batch(1)]
    by_dicts = measure_importance(model, data).scores
    for other in (map(run_of, data), (CalibrationBatch(run_of(d), [d]) for d in data)):
        scores = measure_importance(model, other).scores
        assert all(torch.equal(scores[name], by_dicts[name]) for name in by_dicts)
    halved = measure_importance(model, data, loss=lambda model, d: model(**d).loss / 2).scores
    assert all(torch.allclose(2 * halved[n], by_dicts[n], rtol=1e-5) for n in by_dicts)
