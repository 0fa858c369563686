# SPDX-License-Identifier: Apache-2.0
"""A whole run: a good one passes, a bad one is an error before training that lists everything."""

import logging
from collections import Counter

import pytest
from verl.trainer.ppo import v1

from verl_gndpo.doctor import inputs, parquet
from verl_gndpo.doctor.check import DoctorError
from verl_gndpo.doctor.run import raise_on_errors, run_checks


def test_a_good_run_passes(make_config, on_cpu):
    config = make_config()
    assert {check.status for check in run_checks(config)} == {"ok"}
    raise_on_errors(config)


def test_without_a_config_only_the_environment_is_checked():
    assert {check.name for check in run_checks()} <= {"verl", "plugin", "versions", "accelerator"}


def test_all_errors_come_in_one_message(make_config, on_cpu, tmp_path):
    config = make_config(
        "algorithm.gndpo.limt=1", "trainer.use_v1=False", f"data.val_files={tmp_path}/no.parquet", teacher="/no/where"
    )
    with pytest.raises(DoctorError) as error:
        raise_on_errors(config)
    lines = str(error.value).splitlines()
    assert lines[0] == "verl-gndpo: 4 error(s), nothing was started"
    assert len(lines) == 5
    for words in ("algorithm.gndpo.limit?", "trainer.use_v1=True", "/no/where", "no.parquet"):
        assert words in str(error.value)


def test_warnings_are_logged_and_don_t_stop_a_run(make_config, on_cpu, teacher, caplog):
    (teacher / "chat_template.jinja").write_text("{{ messages }}")
    with caplog.at_level(logging.WARNING):
        raise_on_errors(make_config(teacher=teacher))
    assert "the chat templates differ" in caplog.text


def test_the_trainer_asks_before_it_builds_anything(make_config, on_cpu):
    with pytest.raises(DoctorError, match=r"teacher folder /no/where does not exist -> correct teacher\.model\.path"):
        v1.get_trainer_cls("sync")(make_config(teacher="/no/where"))


def test_each_file_and_each_section_is_read_once(make_config, on_cpu, monkeypatch):
    config = make_config("teacher.routing_key=data_source")
    reads = Counter()

    def count(owner, name, of):
        function = getattr(owner, name)

        def counted(*arguments, **options):
            reads[of(arguments)] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    count(parquet.pq, "ParquetFile", lambda arguments: f"open {arguments[0].name}")
    count(parquet.pq, "read_schema", lambda arguments: f"schema of {arguments[0].name}")
    count(inputs, "read_teacher_config", lambda _: "teacher")
    count(inputs, "read_signal_config", lambda _: "signal")
    assert not [check for check in run_checks(config) if check.status == "error"]
    # A file is opened for its numbers of rows and images, and to decode it. These have no columns with labels.
    assert reads == {
        **{f"open {name}.parquet": 2 for name in ("train", "test")},
        **{f"schema of {name}.parquet": 1 for name in ("train", "test")},
        "teacher": 1,
        "signal": 1,
    }
