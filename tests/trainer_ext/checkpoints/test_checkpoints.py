"""A checkpoint counts only if its mark says that it is complete and every file that the mark lists
is there with its size: whatever is missing or torn, the search returns the last one that counts,
and a damaged folder that is named explicitly is refused in one line that says which to use."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_ext import SpftError
from trainer_ext.checkpoints.folders import (
    MARK_FILE,
    CheckpointMark,
    begin_checkpoint,
    check_given_checkpoint,
    finish_checkpoint,
    last_complete,
    what_is_missing,
)


def mark(step: int) -> CheckpointMark:
    return CheckpointMark(False, step, "ZeRO-3", 2, 16)


def write(output_dir, step: int, complete: bool = True):
    folder = output_dir / f"checkpoint-{step}"
    begin_checkpoint(folder, mark(step))
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
    (folder / "deeper").mkdir()
    (folder / "deeper" / "state.pt").write_bytes(b"y" * step)
    if complete:
        finish_checkpoint(folder, mark(step))
    return folder


def tear(folder) -> None:
    (folder / "deeper" / "state.pt").write_bytes(b"")


def lose(folder) -> None:
    (folder / "adapter_model.safetensors").unlink()


def unmark(folder) -> None:
    (folder / MARK_FILE).unlink()


def garble(folder) -> None:
    (folder / MARK_FILE).write_text("{")


def interrupt(folder) -> None:
    content = json.loads((folder / MARK_FILE).read_text())
    (folder / MARK_FILE).write_text(json.dumps({**content, "complete": False}))


DAMAGES = {
    None: None,
    tear: "its file deeper/state.pt has 0 bytes instead of",
    lose: "its file adapter_model.safetensors is missing",
    unmark: f"it has no readable {MARK_FILE}",
    garble: f"it has no readable {MARK_FILE}",
    interrupt: "its run ended while it was being written",
}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(list(DAMAGES)), max_size=4))
def test_the_last_whole_one_is_found(tmp_path_factory, damages):
    output_dir = tmp_path_factory.mktemp("run")
    whole = None
    for step, damage in enumerate(damages, 9):  # 9, 10: by number, not by name
        folder = write(output_dir, step)
        if damage is None:
            whole = str(folder)
            continue
        damage(folder)
        assert what_is_missing(folder).startswith(DAMAGES[damage])
    assert last_complete(output_dir) == whole


def test_where_there_is_none(tmp_path):
    assert last_complete(tmp_path) is None
    assert last_complete(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert last_complete(tmp_path) is None


def test_additional_files_are_no_harm(tmp_path):
    folder = write(tmp_path, 3)
    (folder / "notes.txt").write_text("mine")
    assert what_is_missing(folder) is None


def test_a_folder_that_is_written_again_is_emptied_and_incomplete_meanwhile(tmp_path):
    folder = write(tmp_path, 5)
    (folder / "of_another_engine.pt").write_bytes(b"z")
    begin_checkpoint(folder, mark(5))
    assert [path.name for path in folder.iterdir()] == [MARK_FILE]
    assert last_complete(tmp_path) is None


def test_the_mark_says_what_made_it(tmp_path):
    read = CheckpointMark.read(write(tmp_path, 4))
    assert (read.complete, read.step, read.engine, read.world_size) == (True, 4, "ZeRO-3", 2)
    assert read.files == {"adapter_model.safetensors": 100, "deeper/state.pt": 4}


@pytest.mark.parametrize("damage", [tear, lose, interrupt])
def test_a_given_one_that_is_damaged_is_refused_with_the_mend(tmp_path, damage):
    older, newer = write(tmp_path, 3), write(tmp_path, 6)
    damage(newer)
    with pytest.raises(SpftError) as error:
        check_given_checkpoint(newer)
    message = str(error.value)
    assert "\n" not in message
    assert DAMAGES[damage] in message
    assert message.endswith(f"use {older}")
    shutil.rmtree(older)
    with pytest.raises(SpftError, match="start anew, there is no complete one beside it"):
        check_given_checkpoint(newer)


def test_a_given_one_without_a_mark_is_taken_at_the_users_word(tmp_path, caplog):
    folder = write(tmp_path, 3)
    unmark(folder)
    assert check_given_checkpoint(folder) == str(folder)
    assert "taken to be complete" in caplog.text


def test_a_given_one_that_does_not_exist(tmp_path):
    with pytest.raises(SpftError, match="there is no such folder"):
        check_given_checkpoint(tmp_path / "checkpoint-1")
