# SPDX-License-Identifier: Apache-2.0
"""What the trainer hands from one part of a step to another, and from step to step."""

import logging
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.tracking import FileLogger

from verl_gndpo import trainer as trainer_module
from verl_gndpo.advantage import SignalState
from verl_gndpo.checkpoint import FILE, RUN_FILE, CheckpointError, load_run, load_state, save_state
from verl_gndpo.kl import IDS, LOG_PROBS, REQUEST
from verl_gndpo.trainer import GNDPOTrainerMixin, step_order

KL = ("algorithm.adv_estimator=v_opd",)
EMA = ("algorithm.adv_estimator=gndpo", "+algorithm.gndpo.scale=ema")


def test_the_kl_baseline_is_the_teachers_and_only_where_it_is_asked_for(gndpo_step):
    store, written, _, saw = gndpo_step(overrides=KL)
    padded = {k: store[k].to_padded_tensor(0.0) for k in ("teacher_log_probs", "old_log_probs", "teacher_kl")}
    expected = padded["teacher_log_probs"] - padded["old_log_probs"] + padded["teacher_kl"]
    torch.testing.assert_close(written["advantages"], expected)
    saw.clear()
    gndpo_step()
    assert "kl" not in saw and "state" not in saw


def test_the_update_is_not_handed_the_students_distributions(queue, gndpo_step, monkeypatch):
    store, *_ = queue
    for name in (IDS, LOG_PROBS):
        store[name] = torch.zeros(4, 1)
    fields = []
    compute = GNDPOTrainerMixin._compute_advantage

    def watched(self, batch, metrics):
        result = compute(self, batch, metrics)
        fields.append(result.fields)
        return result

    monkeypatch.setattr(GNDPOTrainerMixin, "_compute_advantage", watched)
    gndpo_step(overrides=KL)
    assert {"advantages", "old_log_probs", "response_mask"} <= set(fields[0])
    assert not {IDS, LOG_PROBS} & set(fields[0])


class Recording(PPOTrainerSync):
    """verl's trainer, with a note instead of what needs Ray."""

    def __init__(self, config):
        super().__init__(config)
        self.calls = []
        self.tokenizer = self.processor = None
        self.actor_rollout_wg = SimpleNamespace(update_actor=None)

    def _setup(self):
        self._init_resource_pool_mgr()

    def _balance_batch(self, batch, metrics, **kwargs):
        return batch

    def _compute_old_log_prob(self, batch, metrics):
        self.calls.append(("student", batch.extra_info.get(REQUEST)))
        return batch


class RecordingTeacher:
    """Notes what it is asked."""

    restarts = 0

    def __init__(self, trainer):
        self._calls = trainer.calls

    def load(self):
        self._calls.append("load")

    def score(self, batch):
        self._calls.append("teacher")
        return {"ahead": 0.0}


@pytest.mark.parametrize("placement", ["colocated", "dedicated"])
@pytest.mark.parametrize("overrides", [KL, ("algorithm.adv_estimator=gndpo",)])
def test_the_teacher_comes_after_the_student_for_the_kl_baseline_and_before_it_otherwise(
    overrides, placement, monkeypatch, make_trainer
):
    monkeypatch.setattr(trainer_module, "SignalMonitor", lambda *_: None)
    gpus = ("+teacher.placement=dedicated", "+teacher.n_gpus_per_node=1") if placement == "dedicated" else ()
    trainer = make_trainer("+teacher.model.path=T", *gpus, *overrides, base=Recording)
    calls = trainer.calls
    ahead = lambda replay_buffer, teacher: lambda: calls.append("ahead")  # noqa: E731
    monkeypatch.setattr(trainer_module, "score_while_generating", ahead)
    trainer.teacher, metrics = RecordingTeacher(trainer), {}
    trainer._setup()
    batch = trainer._balance_batch(KVBatchMeta(keys=["a"], tags=[{}]), metrics)
    trainer._compute_old_log_prob(batch, metrics)
    if overrides == KL:
        # Without the student's tokens there is nothing that a teacher could begin with.
        assert calls == ["load", ("student", 64), "teacher"]
    else:
        assert calls == ["load", "teacher", *(["ahead"] if placement == "dedicated" else []), ("student", None)]
    faults = {"gndpo/lost_prompts": 0.0, "gndpo/lost_share": 0.0, "gndpo/teacher_restarts": 0.0}
    assert metrics == faults | ({"ahead": 0.0} if placement == "dedicated" else {})
    names = [call if isinstance(call, str) else call[0] for call in calls]
    assert (
        tuple(name for name in names if name in step_order(trainer._gndpo.signal))
        == step_order(trainer._gndpo.signal)[:2]
    )


def test_ema_carries_the_variance_from_step_to_step(gndpo_step):
    state = SignalState()
    _, first, _, saw = gndpo_step(overrides=EMA, state=state)
    assert saw["state"] is state and state.ema_weight == pytest.approx(0.1)
    # A first step is its own average.
    _, plain, _, _ = gndpo_step()
    torch.testing.assert_close(first["advantages"], plain["advantages"])
    state.ema_variance *= 4
    _, second, _, _ = gndpo_step(overrides=EMA, state=state)
    assert second["advantages"].abs().max() < first["advantages"].abs().max()


class Checkpointing(PPOTrainerSync):
    """verl's trainer, without the weights in its checkpoints."""

    def __init__(self, config):
        super().__init__(config)
        self.saved = []

    def _save_checkpoint(self):
        self.saved.append(load_state(f"{self.config.trainer.default_local_dir}/global_step_{self.global_steps}"))

    def _load_checkpoint(self):
        self.global_steps = 0 if self.config.trainer.resume_mode == "disable" else 7


@pytest.fixture
def make_checkpointing(tmp_path, make_trainer):
    """A function that builds a trainer whose checkpoints lie in `tmp_path`: (overrides) -> trainer."""
    folder = f"trainer.default_local_dir={tmp_path}"
    return lambda *overrides: make_trainer(folder, "+teacher.model.path=T", *overrides, base=Checkpointing)


def test_the_average_survives_a_resume(make_checkpointing, tmp_path):
    trainer = make_checkpointing(*EMA)
    trainer.signal_state.update(2.5, 0.9)
    trainer.global_steps = 7
    trainer._save_checkpoint()
    # It was there before verl said that the checkpoint was complete.
    assert trainer.saved == [trainer.signal_state]
    assert sorted(path.name for path in (tmp_path / "global_step_7").iterdir()) == sorted([FILE, RUN_FILE])

    resumed = make_checkpointing(*EMA)
    assert resumed.signal_state == SignalState()
    resumed._load_checkpoint()
    assert resumed.signal_state == trainer.signal_state and asdict(trainer.signal_state)["ema_weight"] > 0

    moved = tmp_path / "elsewhere" / "global_step_7"
    (tmp_path / "global_step_7").rename(moved.parent.mkdir() or moved)
    elsewhere = make_checkpointing(*EMA, "trainer.resume_mode=resume_path", f"trainer.resume_from_path={moved}")
    elsewhere._load_checkpoint()
    assert elsewhere.signal_state == trainer.signal_state


def test_without_a_saved_average_it_starts_anew_and_says_so(make_checkpointing, caplog):
    trainer = make_checkpointing(*EMA)
    with caplog.at_level(logging.WARNING):
        trainer._load_checkpoint()
    assert trainer.signal_state == SignalState()
    assert "global_step_7 holds no state of scale=ema, whose average starts anew" in caplog.text
    caplog.clear()
    make_checkpointing(*EMA, "trainer.resume_mode=disable")._load_checkpoint()
    assert not caplog.text


def test_other_scales_leave_no_state_and_read_none(make_checkpointing, tmp_path, caplog):
    trainer = make_checkpointing("algorithm.adv_estimator=gndpo")
    trainer.global_steps = 7
    trainer._save_checkpoint()
    trainer._load_checkpoint()
    assert trainer.signal_state is None and not caplog.text
    assert [path.name for path in tmp_path.rglob("*.*")] == [RUN_FILE]


def test_a_checkpoint_says_of_which_run_it_is(make_checkpointing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # verl's own logger makes the file that has to be found.
    monkeypatch.setenv("VERL_FILE_LOGGER_ROOT", "logs")
    FileLogger("project", "one").finish()
    (log,) = tmp_path.rglob("*.jsonl")
    several = ("teacher.model.path=null", "+teacher.models.a.path=A", "+teacher.models.b.path=B")
    files = ("data.train_files=[x.parquet,y.parquet]", "data.val_files=z.parquet", "actor_rollout_ref.model.path=S")
    (tmp_path / "lora").mkdir()
    files += ("actor_rollout_ref.model.lora_adapter_path=lora",)
    files += ("trainer.logger=[console,file]", "trainer.project_name=project", "trainer.experiment_name=one")
    trainer = make_checkpointing("algorithm.adv_estimator=log_odds_opd", *several, *files)
    trainer.global_steps = 7
    trainer._save_checkpoint()
    run = load_run(tmp_path / "global_step_7")
    assert (run["base"], run["teachers"], run["estimator"]) == ("S", ["A", "B"], "log_odds_opd")
    assert run["lora_adapter"] == str(tmp_path / "lora")
    assert (run["train_files"], run["val_files"]) == (["x.parquet", "y.parquet"], ["z.parquet"])
    assert run["log"] == str(log) and run["signal"]["bound"] and run["versions"]["verl"]


@pytest.mark.parametrize("content", ["", "[]", '{"ema_variance": "a"}', '{"mean": 1.0}'])
def test_a_file_that_is_no_state_is_named(tmp_path, content):
    save_state(tmp_path, SignalState(1.0, 0.5))
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=FILE):
        load_state(tmp_path)


def test_the_actor_returns_its_tokens_only_for_the_kl_baseline(make_trainer):
    library = "actor_rollout_ref.model.external_lib=[mine]"
    top_k = "verl_gndpo.verl_patches.student_top_k"
    for overrides, expected in ((KL, True), (EMA, False)):
        trainer = make_trainer("+teacher.model.path=T", *overrides, library)
        libraries = list(trainer.config.actor_rollout_ref.model.external_lib)
        assert libraries[:2] == ["mine", "verl_gndpo.verl_patches.images_once"]
        assert (top_k in libraries) == expected


def test_separate_async_can_say_that_it_has_no_replicas_of_its_own(caplog):
    """Its line of that, which stock verl logs with an argument of `print`."""
    from verl.trainer.ppo.v1 import trainer_separate_async

    with caplog.at_level(logging.INFO):
        trainer_separate_async.logger.info("hybrid replicas disabled", flush=True)
    assert "hybrid replicas disabled" in caplog.text


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("opened", [False, True])
def test_a_checkpoint_that_does_not_fit_on_the_disk_says_so(make_checkpointing, tmp_path, monkeypatch, opened):
    """torch's own errors; the first one is "unexpected pos 704 vs 598"."""
    weights = torch.zeros(10_000_000)

    def save(self):
        if not opened:
            torch.save(weights, FULL)
        with FULL.open("wb") as file:
            torch.save(weights, file)

    monkeypatch.setattr(Checkpointing, "_save_checkpoint", save)
    trainer = make_checkpointing("algorithm.adv_estimator=gndpo")
    trainer.global_steps = 7
    (tmp_path / "global_step_6" / "actor").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("6")
    with pytest.raises(CheckpointError, match=r"global_step_7 could not be written.*GB free.*global_step_6$"):
        trainer._save_checkpoint()


def test_another_problem_of_a_checkpoint_is_raised_as_it_is(make_checkpointing, monkeypatch):
    def save(self):
        raise PermissionError("not yours")

    monkeypatch.setattr(Checkpointing, "_save_checkpoint", save)
    trainer = make_checkpointing("algorithm.adv_estimator=gndpo")
    trainer.global_steps = 7
    with pytest.raises(PermissionError, match="not yours"):
        trainer._save_checkpoint()
