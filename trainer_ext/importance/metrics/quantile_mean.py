"""Quantile-mean Taylor: group Taylor of each class, averaged over quantiles of the classes.

QMTaylor of arXiv 2502.11439: with s_ci = |sum_j w_ij gbar^c_ij| and gbar^c the gradient of the
mean loss of class c, the score of neuron i is the mean over the quantiles 0, 0.1, ..., 1 of its
s_ci, c over the classes.
A neuron that matters to some class is not outvoted by the classes that have more data.

Shapes: B rows of a batch, S positions, O = d_out, C classes.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch

from ...config.registry import register
from ...distributed.processes import sum_over_processes, world_size
from ...errors import SpftError
from ..class_column import CLASS_KEY
from .group_taylor import OutputProduct, OutputProductMetric, add_products

_QUANTILES = torch.linspace(0, 1, 11, dtype=torch.float64)


@register("quantile_mean")
class QuantileMean(OutputProductMetric):
    """Mean over quantiles of the classes' group Taylor scores.

    A class's products are summed over all positions of its rows and divided by the class's share of
    the target tokens (of the rows, where labels are one a row), which makes them those of the mean
    loss of that class.
    """

    needs_classes = True

    def __init__(self, layers, config, model=None) -> None:
        self._rows = _Rows()
        super().__init__(layers, config, model)
        self._targets: list[tuple[int, torch.Tensor]] = []  # part, (C,) targets of each class

    def _new_product(self, layer):
        return _SumOverTokensOfClasses(layer, self._rows, self.parts)

    @contextmanager
    def attached(self, names):
        with super().attached(names):
            hook = self.model.register_forward_pre_hook(self._note_rows, with_kwargs=True)
            try:
                yield
            finally:
                hook.remove()

    def _note_rows(self, module, args, kwargs) -> None:
        if torch.is_grad_enabled():  # a reference model's forward must not count
            self._rows.note(self.row_classes.current, kwargs.get("labels"))

    def _run(self, batch) -> None:
        self._rows.targets = torch.zeros(0, dtype=torch.float64)  # counted anew in each run
        super()._run(batch)

    def _observe(self, batch, part):
        super()._observe(batch, part)
        # From the data where it can be had: some losses (label smoothing) keep the labels to
        # themselves, so that the model never gets them.
        targets = self._rows.targets
        for number, inputs in enumerate(batch.micro_batches):
            before = torch.zeros(0, dtype=torch.float64) if number == 0 else targets
            targets = _with_targets(before, inputs[CLASS_KEY].cpu(), inputs.get("labels"))
        self._targets.append((part, targets))

    def _scores(self, parts):
        classes = self._number_of_classes()
        targets = {str(i): _padded(counts, classes) for i, (_, counts) in enumerate(self._targets)}
        targets = sum_over_processes(targets)
        shares = sum(
            targets[str(i)] / targets[str(i)].sum().clamp_min(1)
            for i, (part, _) in enumerate(self._targets)
            if part in parts
        )
        seen = (shares > 0).nonzero()[:, 0]
        if len(seen) < 2 and len(parts) == self.parts:
            raise SpftError(
                f"`importance` quantile_mean: the calibration data holds {len(seen)} class; "
                "it compares classes, so use more `calibration_batches` or shuffled data"
            )
        totals = sum_over_processes(
            {
                name: _padded(product.totals[list(parts)].sum(dim=0).cpu(), classes)
                for name, product in self._products.items()
            }
        )
        return {name: self._layer_scores(total, shares, seen) for name, total in totals.items()}

    def _layer_scores(self, total_CO, shares_C, seen) -> torch.Tensor:
        if not len(seen):
            return torch.zeros(total_CO.shape[1], dtype=torch.float64)
        scores_CO = total_CO[seen].double().abs() / (shares_C[seen, None] * world_size())
        return torch.quantile(scores_CO, _QUANTILES, dim=0).mean(dim=0)

    def _number_of_classes(self) -> int:
        here = max((len(counts) for _, counts in self._targets), default=0)
        flags = torch.zeros(_MOST_CLASSES + 1)
        flags[here] = 1
        return int(sum_over_processes({"most": flags})["most"].nonzero().max())


# Scores of every class are kept: (classes, d_out) for each layer.
_MOST_CLASSES = 10_000


class _Rows:
    """Classes of the rows that are running through the model, and how many targets they have.

    Attributes:
        classes: int64 (B,) of the last forward with gradients.
        targets: float64 (C,), targets of each class in the current batch so far.
    """

    def __init__(self) -> None:
        self.classes: torch.Tensor | None = None
        self.targets = torch.zeros(0, dtype=torch.float64)

    def note(self, classes: torch.Tensor | None, labels: torch.Tensor | None) -> None:
        """A forward with gradients begins."""
        if classes is None:
            raise SpftError(
                f"`importance` quantile_mean needs the class of every row: a calibration batch has "
                f"no {CLASS_KEY!r}; name a dataset column in `class_field`, or put int64 class "
                f"numbers under {CLASS_KEY!r} into each batch"
            )
        self.classes = classes.cpu()
        outside = self.classes[(self.classes < 0) | (self.classes >= _MOST_CLASSES)]
        if len(outside):
            raise SpftError(
                f"`class_field`: class numbers must lie in 0 to {_MOST_CLASSES - 1}, but there is "
                f"{int(outside[0])}; group the classes into fewer"
            )
        self.targets = _with_targets(self.targets, self.classes, labels)


class _SumOverTokensOfClasses(OutputProduct):
    """Running sums (parts, C, O); C grows with the classes that come."""

    def __init__(self, layer, rows: _Rows, parts: int) -> None:
        super().__init__(layer, (parts, 1, layer.out_features))
        self._rows = rows

    def start_over(self) -> None:
        # classes that came after the batch began have no sums to go back to
        self._before = _padded(self._before, self.totals.shape[1])
        super().start_over()

    def add(self, grad, z) -> None:
        classes = self._rows.classes
        if len(grad) != len(classes):
            raise SpftError(
                f"`importance` quantile_mean: a layer's output of shape {tuple(grad.shape)} does "
                f"not hold the {len(classes)} rows of its batch one by one (experts get single "
                "tokens); list such layers in `exclude_modules`, or use group_taylor"
            )
        most = int(classes.max()) + 1
        if most > self.totals.shape[1]:
            grown = self.totals.new_zeros(self.totals.shape[0], most, self.totals.shape[2])
            grown[:, : self.totals.shape[1]] = self.totals
            self.totals = grown
        for row, number in enumerate(classes.tolist()):
            add_products(self.totals[self.part, number], grad[row], z[row])


def _with_targets(
    targets_C: torch.Tensor, classes_B: torch.Tensor, labels: torch.Tensor | None
) -> torch.Tensor:
    """The targets of each class, with those of some more rows."""
    counts = torch.ones(len(classes_B), dtype=torch.float64)
    if isinstance(labels, torch.Tensor) and labels.dim() == 2:
        counts = (labels[:, 1:] != -100).sum(dim=1).double().cpu()
    return _padded(targets_C, int(classes_B.max()) + 1).index_add(0, classes_B, counts)


def _padded(values: torch.Tensor, length: int) -> torch.Tensor:
    """The values with zeros appended along the first dimension up to `length`."""
    missing = max(0, length - len(values))
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
