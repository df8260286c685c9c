"""The classes of rows under DDP, 2 real processes: each gets those of its own rows, and the model
below DDP never gets any.

They are started by torchrun, as users do; the other tests' processes are forked."""

from __future__ import annotations

import torch
from processes import launch


def test_classes_reach_the_calibration_of_every_process(tmp_path):
    ranks = launch("class_worker.py", tmp_path, 2)
    rows = set()
    for rank in ranks:
        assert len(rank["calibration"]) == len(rank["training"]) == 2
        for calibrated, (first_tokens, classes) in zip(
            rank["calibration"], rank["training"], strict=True
        ):
            assert torch.equal(calibrated, classes)
            assert torch.equal(classes, first_tokens % 3)
            rows.update(first_tokens.tolist())
        assert "input_ids" in rank["model"]
        assert not set(rank["model"]) & {"spft_class", "kind"}
    assert len(rows) == 16
