"""Gradient checkpointing in either variant trains as without it under every engine (losses to
1e-5): where the variant that is asked for does not work, the other one is used, as a line says."""

from __future__ import annotations

import pytest
from engine_runs import finish, start

# engine, use_reentrant as asked for, whether that is changed
CASES = [
    ("ddp", True, True),
    ("ddp", False, False),
    ("zero2", True, False),
    ("zero3", False, True),
    ("zero3", None, True),
    ("fsdp2", False, False),
    ("fsdp2", True, False),
]
STEPS = 3


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    return finish("none", 1, base, tmp_path_factory.mktemp("one") / "out", steps=STEPS)


@pytest.mark.parametrize(("engine", "reentrant", "changed"), CASES)
def test_the_variant_that_works_is_used(base, plain, tmp_path, engine, reentrant, changed):
    arguments: dict = {"gradient_checkpointing": True}
    if reentrant is not None:
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    ended = start(engine, 2, base, tmp_path / "out", steps=STEPS, arguments=arguments)
    for rank in ended:
        assert rank.code == 0, rank.stderr[-3000:]
        assert rank.result["losses"] == pytest.approx(plain.losses, rel=1e-5)
        assert ("does not work under" in rank.stderr) == changed
        assert rank.result["checkpointed"]
