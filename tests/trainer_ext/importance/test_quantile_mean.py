"""quantile_mean equals the mean over quantiles of |sum_j w_ij gbar^c_ij|, each class's mean loss
differentiated by itself: error at most 1e-5 of the layer's largest score in fp32. Data without
classes, or with one class, is an error."""

from __future__ import annotations

import pytest
import torch
from adapters import wrapped
from calibrations import assert_close_to_oracle, measured
from oracles import group_taylor, quantile_mean
from tiny_models import CONFIGS, batch, packed_batch, tiny_model

from trainer_ext import SpftError, measure_importance
from trainer_ext.importance.class_column import CLASS_KEY

BATCHES = [batch(seed, rows=4) for seed in range(3)]
CLASSES = [[0, 2, 1, 0], [2, 2, 5, 1], [0, 1, 1, 1]]


def with_classes(batches, classes):
    return [{**b, CLASS_KEY: torch.tensor(c)} for b, c in zip(batches, classes, strict=True)]


def class_model(architecture="llama", **fields):
    return wrapped(architecture, importance="quantile_mean", class_field="topic", **fields)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["off", "reentrant", "not"])
@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_equals_the_formula(architecture, checkpointing):
    model = class_model(architecture)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    scores = measured(model, with_classes(BATCHES, CLASSES))
    expected = quantile_mean(tiny_model(architecture).eval(), BATCHES, CLASSES)
    assert_close_to_oracle(scores, expected)


def test_padded_rows_weigh_by_their_targets():
    padded = [batch(seed, rows=4, padding=True) for seed in range(3)]
    scores = measured(class_model(), with_classes(padded, CLASSES))
    assert_close_to_oracle(scores, quantile_mean(tiny_model(), padded, CLASSES))


def test_names_of_classes_do_not_matter():
    """Renaming the classes changes nothing; merging them does."""
    scores = measured(class_model(), with_classes(BATCHES, CLASSES))
    renamed = [[{0: 3, 1: 0, 2: 7, 5: 1}[c] for c in row] for row in CLASSES]
    assert_close_to_oracle(measured(class_model(), with_classes(BATCHES, renamed)), scores, 1e-6)
    merged = [[min(c, 1) for c in row] for row in CLASSES]
    name = "model.layers.0.mlp.gate_proj"
    other = measured(class_model(), with_classes(BATCHES, merged))[name]
    assert (other - scores[name]).abs().max() > 0.01 * scores[name].max()


def test_two_classes_with_the_same_rows_are_group_taylor():
    doubled = [{k: torch.cat([v, v]) for k, v in b.items()} for b in BATCHES]
    classes = [[0] * 4 + [1] * 4] * 3
    scores = measured(class_model(), with_classes(doubled, classes))
    assert_close_to_oracle(scores, group_taylor(tiny_model(), BATCHES))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (BATCHES, "needs the class of every row: a calibration batch has no 'spft_class'"),
        (with_classes(BATCHES, [[3] * 4] * 3), "the calibration data holds 1 class"),
        (with_classes(BATCHES, [[-1] * 4] * 3), "class numbers must lie in 0 to 9999"),
        (
            with_classes([packed_batch(seed, (7, 5, 9)) for seed in range(3)], [[0, 1]] * 3),
            "a calibration batch has 1 rows but 2 classes",
        ),
    ],
)
def test_unusable_classes_are_refused(batches, message):
    with pytest.raises(SpftError, match=message):
        measured(class_model(), batches)


def test_the_model_never_sees_the_classes():
    model = class_model()
    seen = []
    base = model.get_base_model()
    forward = base.forward
    base.forward = lambda *args, **kwargs: seen.append(set(kwargs)) or forward(*args, **kwargs)
    measured(model, with_classes(BATCHES, CLASSES))
    assert len(seen) == 3
    assert all(CLASS_KEY not in keys for keys in seen)
    assert len(model._forward_pre_hooks) == 0


def test_labels_that_the_loss_keeps_to_itself_count_all_the_same():
    """Label smoothing and losses of one's own take the labels out before the model is called."""
    padded = [batch(seed, rows=4, padding=True) for seed in range(3)]
    model = class_model()
    labelled = with_classes(padded, CLASSES)

    class KeepsLabels:
        def __init__(self, inputs):
            self.micro_batches = [inputs]

        def run(self, backward):
            inputs = dict(self.micro_batches[0])
            labels = inputs.pop("labels")
            logits = model(**inputs).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
            loss.backward()
            return loss.detach()

    scores = measure_importance(model, map(KeepsLabels, labelled)).scores
    assert_close_to_oracle(scores, quantile_mean(tiny_model(), padded, CLASSES))


def test_a_batch_is_run_again_although_it_brought_new_classes():
    """An output is first overwritten in the second batch, which has classes the first had not."""
    model, base = class_model(), tiny_model()
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    calls = []

    def overwrite_later(module, inputs, y):
        calls.append(1)
        return y.add_(0.0 if len(calls) == 1 else 0.1)

    layer.register_forward_hook(overwrite_later)
    adds = []
    base.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda module, inputs, y: y + (adds.pop() if adds else 0.0)
    )
    classes = [[0, 1, 0, 1], [1, 3, 2, 0]]
    scores = measured(model, with_classes(BATCHES[:2], classes))
    assert len(calls) == 3  # the second batch ran twice
    # the oracle makes the same additions: class by class the first batch, which has none, and the
    # second; classes 2 and 3 are in the second alone
    adds[:] = [0.0, 0.1, 0.0, 0.1, 0.1, 0.1][::-1]
    expected = quantile_mean(base, BATCHES[:2], classes)
    name = "model.layers.1.self_attn.o_proj"
    assert (scores[name] - expected[name]).abs().max() <= 1e-5 * expected[name].max()
