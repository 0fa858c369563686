# SPDX-License-Identifier: Apache-2.0
"""What is left to resume when a run ends while a checkpoint is written, and what a resumed run says of its data."""

import json
import logging
from pathlib import Path

import pytest
import torch
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tracking
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager, find_latest_ckpt_path

from verl_gndpo.checkpoint import CheckpointError, fingerprint, mend_tracker
from verl_gndpo.verl_patches.file_logger import MetricsError, go_on_with_log


def write_checkpoint(folder, step, whole=True):
    """Write what verl does before it writes the tracker; without `whole`, up to the middle of the last file."""
    (folder / f"global_step_{step}" / "actor").mkdir(parents=True)
    state = folder / f"global_step_{step}" / "data.pt"
    torch.save({"position": torch.zeros(100)}, state)
    if not whole:
        state.write_bytes(state.read_bytes()[:-100])


def test_an_empty_tracker_is_mended(tmp_path, caplog):
    for step in (2, 10, 8):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 12, whole=False)
    (tmp_path / "global_step_14" / "actor").mkdir(parents=True)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.touch()
    with pytest.raises(ValueError, match="invalid literal"):
        find_latest_ckpt_path(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        mend_tracker(tmp_path)
    assert find_latest_ckpt_path(str(tmp_path)) == str(tmp_path / "global_step_10")
    assert f"{tracker} is empty; the last complete checkpoint is global_step_10" in caplog.text


def test_a_tracker_that_names_what_is_gone_is_mended(tmp_path, caplog):
    write_checkpoint(tmp_path, 2)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    mend_tracker(tmp_path)
    assert find_latest_ckpt_path(str(tmp_path)) == str(tmp_path / "global_step_2")
    assert "names global_step_4, which is not there" in caplog.text


def test_a_good_tracker_is_left_alone_though_a_later_folder_is_there(tmp_path, caplog):
    write_checkpoint(tmp_path, 2)
    write_checkpoint(tmp_path, 4)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("2\n")
    mend_tracker(tmp_path)
    assert tracker.read_text() == "2\n" and not caplog.text


@pytest.mark.parametrize("content", [None, "", "x"])
def test_without_a_complete_checkpoint_nothing_is_mended(tmp_path, content):
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    if content is not None:
        tracker.write_text(content)
    mend_tracker(tmp_path)
    assert tracker.exists() == (content is not None)


class Saving(PPOTrainerSync):
    """verl's trainer with verl's own rotation of checkpoints, whose run may end before the tracker is written."""

    ends_at = None

    def __init__(self, config):
        super().__init__(config)
        self.rotation = object.__new__(BaseCheckpointManager)
        self.rotation.previous_saved_paths = []

    def _save_checkpoint(self):
        folder, keep = self.config.trainer.default_local_dir, self.config.trainer.max_actor_ckpt_to_keep
        actor = f"{folder}/global_step_{self.global_steps}/actor"
        self.rotation.ensure_checkpoint_capacity(keep)
        Path(actor).mkdir(parents=True)
        torch.save({}, f"{actor}/model_world_size_1_rank_0.pt")
        self.rotation.register_checkpoint(actor, keep)
        if self.global_steps == self.ends_at:
            raise OSError(28, "No space left on device")
        torch.save({}, f"{folder}/global_step_{self.global_steps}/data.pt")
        with open(f"{folder}/latest_checkpointed_iteration.txt", "w") as file:
            file.write(str(self.global_steps))

    def _load_checkpoint(self):
        self.global_steps = self.config.trainer.get("resumed_step", 4)


@pytest.fixture
def make_saving(tmp_path, make_trainer):
    base = ("algorithm.adv_estimator=gndpo", "+teacher.model.path=T", f"trainer.default_local_dir={tmp_path}")
    return lambda *overrides: make_trainer(*base, *overrides, base=Saving)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_previous_checkpoint_is_kept_until_the_next_one_is_complete(make_saving, tmp_path, keep):
    trainer = make_saving(f"trainer.max_actor_ckpt_to_keep={keep}")
    trainer.ends_at = 10
    for step in (2, 4, 6, 8):
        trainer.global_steps = step
        trainer._save_checkpoint()
    assert trainer.config.trainer.max_actor_ckpt_to_keep == keep

    def with_weights():
        return sorted(int(path.parent.parent.name[12:]) for path in tmp_path.glob("global_step_*/actor/model*"))

    assert with_weights() == [2, 4, 6, 8][-keep:]
    trainer.global_steps = 10
    with pytest.raises(CheckpointError, match="complete checkpoint: global_step_8"):
        trainer._save_checkpoint()
    assert find_latest_ckpt_path(str(tmp_path)) == str(tmp_path / "global_step_8") and 8 in with_weights()


def test_a_run_that_reads_other_data_than_the_one_that_it_resumes_says_so(make_saving, tmp_path, caplog):
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    first.write_bytes(b"one" * 50_000)
    second.write_bytes(b"two")
    files = f"data.train_files=[{first},{second}]"
    trainer = make_saving(files)
    # Replaced during the run: the checkpoint names what the run has read.
    first.write_bytes(b"one" * 49_999 + b"two")
    trainer.global_steps = 4
    trainer._save_checkpoint()
    with caplog.at_level(logging.WARNING):
        make_saving(files)._load_checkpoint()
    assert f"global_step_4 was made with other training data: {first} has changed since" in caplog.text
    caplog.clear()
    first.write_bytes(b"one" * 50_000)
    make_saving(files)._load_checkpoint()
    assert not caplog.text
    make_saving(f"data.train_files={first}")._load_checkpoint()
    assert f"{second} has changed since or is not read now" in caplog.text


def test_data_that_is_elsewhere_has_no_fingerprint(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"x")
    assert list(fingerprint([f"{tmp_path}/a.parquet", "hdfs://a/b.parquet"])) == [f"{tmp_path}/a.parquet"]


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Path of the file logger of this process; verl's class is restored afterwards."""
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(path))
    monkeypatch.setattr(tracking, "FileLogger", tracking.FileLogger)
    return path


def log_steps(*steps):
    logger = tracking.Tracking("project", "run", default_backend=["file"], config={})
    for step in steps:
        logger.log({"training/global_step": step}, step)
    logger.finish()


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_keeps_the_metrics_of_the_steps_before(log):
    log_steps(0, 1, 2, 3, 4, 5)
    # The run was killed in the middle of a line.
    log.write_bytes(log.read_bytes() + b'{"step": 2, "da')
    go_on_with_log(tracking, str(log), 4)
    log_steps(5, 6)
    assert steps_of(log) == [0, 1, 2, 3, 4, 5, 6]
    assert [path.name for path in log.parent.iterdir()] == [log.name]


def test_a_run_that_resumes_nothing_begins_a_new_log(log):
    log_steps(1, 2)
    go_on_with_log(tracking, str(log), 0)
    log_steps(1)
    assert steps_of(log) == [1]


def test_metrics_that_can_not_be_written_name_their_file(log):
    log.symlink_to("/dev/full")
    go_on_with_log(tracking, str(log), 0)
    with pytest.raises(MetricsError, match=r"step 3 .*metrics\.jsonl: .*No space left on device.*resume_mode=auto"):
        log_steps(3)
