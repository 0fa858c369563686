# SPDX-License-Identifier: Apache-2.0
"""Files, placeholders, rewards and routing: each problem names what, where and what to do."""

import shlex

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data_files import picture
from tests.unit.doctor.helpers import IMAGES, OURS, PROMPT, SERVER, errors, expect, write, write_sources
from verl_gndpo.doctor.data import check_data, check_rewards, check_routing
from verl_gndpo.doctor.inputs import Inputs


def data_errors(make_config, *overrides):
    return errors(check_data(Inputs(make_config(*overrides))))


def test_good_files_are_counted(make_config, tmp_path):
    write(tmp_path / "more.parquet", [("<image> or <image>?", 2), ("no picture", 0)])
    config = make_config(f"data.train_files=[{tmp_path}/train.parquet,{tmp_path}/more.parquet]")
    checks = check_data(Inputs(config))
    expect(checks, "ok", "train.parquet: 4 rows, 4 images")
    expect(checks, "ok", "more.parquet: 2 rows, 2 images")
    assert len(checks) == 3


def test_images_given_by_path_are_counted_too(make_config, tmp_path):
    write(tmp_path / "train.parquet", [("<image><image>", 2)] * 4, image_type=pa.list_(pa.string()))
    expect(check_data(Inputs(make_config())), "ok", "train.parquet: 4 rows, 8 images")


@pytest.mark.parametrize("key", ["train_files", "val_files"])
def test_a_missing_file(make_config, tmp_path, key):
    (error,) = data_errors(make_config, f"data.{key}={tmp_path}/gone.parquet")
    assert f"data.{key}: {tmp_path}/gone.parquet does not exist" in error.detail
    assert f"verl-gndpo data geo3k --local_save_dir {tmp_path}" in error.remedy


def test_no_file_at_all(make_config):
    (error,) = data_errors(make_config, "data.val_files=null")
    assert "data.val_files is empty" in error.detail


def test_a_file_that_is_no_parquet(make_config, tmp_path):
    (tmp_path / "train.parquet").write_text("PAR1 it is not")
    expect(check_data(Inputs(make_config())), "error", "train.parquet can't be read as parquet")


def test_a_parquet_file_that_was_cut_off(make_config, tmp_path):
    path = write(tmp_path / "train.parquet", [("<image>", 1)] * 100)
    path.write_bytes(path.read_bytes()[:-200])
    expect(check_data(Inputs(make_config())), "error", "train.parquet can't be read as parquet")


def test_a_folder_or_another_format(make_config, tmp_path):
    (tmp_path / "notes.txt").touch()
    expect(check_data(Inputs(make_config(f"data.val_files={tmp_path}"))), "error", "is neither a .parquet nor")
    expect(
        check_data(Inputs(make_config(f"data.val_files={tmp_path}/notes.txt"))), "error", "is neither a .parquet nor"
    )


def test_files_that_are_not_looked_into(make_config, tmp_path):
    (tmp_path / "train.jsonl").touch()
    expect(check_data(Inputs(make_config(f"data.train_files={tmp_path}/train.jsonl"))), "ok", "train.jsonl: JSON")
    expect(
        check_data(Inputs(make_config("data.train_files=hdfs://host/train.parquet"))), "ok", "hdfs://host/train.parquet"
    )
    (check,) = check_data(Inputs(make_config("data.custom_cls.path=mine.py", "data.train_files=/any/thing")))
    assert "data.custom_cls.path=mine.py reads it" in check.detail


def test_more_images_and_fewer_images_than_placeholders(make_config, tmp_path):
    rows = [("<image>", 1)] * 40
    rows[3], rows[17], rows[30], rows[31] = ("<image><image>", 1), ("no placeholder", 1), ("<image>", 0), ("<image>", 0)
    write(tmp_path / "train.parquet", rows)
    check = expect(check_data(Inputs(make_config())), "error", "train.parquet: 4 of 40 rows have mismatched media")
    assert "row 3: 2 <image> in its prompt, 1 in column images" in check.detail
    assert "row 17: 0 <image> in its prompt, 1 in column images" in check.detail
    assert "row 30: 1 <image> in its prompt, 0 in column images" in check.detail
    assert "row 31" not in check.detail
    assert "repair these rows" in check.remedy


def test_rows_are_numbered_through_row_groups(make_config, tmp_path):
    rows = [("<image>", 1)] * 25
    rows[22] = ("<image><image>", 1)
    path = write(tmp_path / "train.parquet", rows)
    pq.write_table(pq.read_table(path), path, row_group_size=10)
    expect(check_data(Inputs(make_config())), "error", "row 22: 2 <image>")


def test_placeholders_without_any_image_column(make_config, tmp_path):
    write(tmp_path / "train.parquet", [("<image>", 1)] * 4, drop=["images"])
    words = ("4 of 4 rows", "row 0: 1 <image> in its prompt, 0 in column images, which the file lacks")
    expect(check_data(Inputs(make_config())), "error", *words)
    # The column is there, the setting names another.
    write(tmp_path / "train.parquet", [("<image>", 1)] * 4)
    expect(
        check_data(Inputs(make_config("data.image_key=pictures"))),
        "error",
        "train.parquet",
        "column pictures, which the",
    )


def test_text_only_rows_may_speak_of_videos(make_config, tmp_path):
    write(tmp_path / "train.parquet", [("What does <video> mean in HTML?", 0)] * 4, drop=["images"])
    assert not data_errors(make_config)
    # Beside an image verl takes it for a placeholder.
    write(tmp_path / "train.parquet", [("<image> and <video>", 1)] * 4)
    expect(check_data(Inputs(make_config())), "error", "row 0: 1 <video> in its prompt, 0 in column videos")


def test_rows_with_videos_are_refused_for_training_and_accepted_for_validation(make_config, tmp_path):
    prompts = [[{"role": "user", "content": text}] for text in ("<image>", "<video>What moves?", "<video>?", "text")]
    images, video = [[{"bytes": picture(), "path": None}], [], [], []], {"video": "file:///clip.mp4"}
    videos = pa.array([[], [video], [video], []], pa.list_(pa.struct([("video", pa.string())])))
    table = pa.table({"prompt": pa.array(prompts, PROMPT), "images": pa.array(images, IMAGES), "videos": videos})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=2)
    found = expect(check_data(Inputs(make_config())), "error", "train.parquet: 2 of 4 rows have videos, rows 1, 2.")
    assert "as images, with one <image> per frame" in found.remedy
    pq.write_table(table, tmp_path / "val.parquet")
    pq.write_table(table.slice(0, 1).drop_columns("videos"), tmp_path / "train.parquet")
    checks = check_data(Inputs(make_config(f"data.val_files={tmp_path / 'val.parquet'}", "data.train_batch_size=1")))
    assert not errors(checks)
    # The remedy as it stands: frames as images.
    frames = pa.table(
        {
            "prompt": pa.array([[{"role": "user", "content": "<image><image>What moves?"}]] * 4, PROMPT),
            "images": pa.array([images[0] * 2] * 4, IMAGES),
        }
    )
    pq.write_table(frames, tmp_path / "train.parquet")
    assert not errors(check_data(Inputs(make_config())))


def test_prompts_of_several_messages(make_config, tmp_path):
    messages = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": "<image>"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "and <image>?"},
    ]
    image = {"bytes": b"", "path": None}
    table = {"prompt": pa.array([messages] * 4, PROMPT), "images": pa.array([[image] * 2] * 4, IMAGES)}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    expect(check_data(Inputs(make_config())), "ok", "4 rows, 8 images")


def test_structured_content_is_left_to_verl(make_config, tmp_path):
    parts = [[{"role": "user", "content": [{"type": "text", "text": "<image>"}]}]] * 4
    pq.write_table(pa.table({"prompt": parts}), tmp_path / "train.parquet")
    assert not data_errors(make_config)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"question": ["a"]}, ["no column prompt (data.prompt_key)", "it has question"]),
        ({"prompt": ["a"]}, ["column prompt holds string", "list of messages"]),
        ({"prompt": pa.array([], PROMPT)}, ["no rows"]),
        (
            {"prompt": pa.array([[{"role": "user", "content": "<image>"}]], PROMPT), "images": ["a.png"]},
            ["column images (data.image_key) holds one string per row", "list"],
        ),
    ],
)
def test_columns_that_verl_can_t_use(make_config, tmp_path, table, words):
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    expect(check_data(Inputs(make_config())), "error", "train.parquet", *words)


def test_image_bytes_are_never_read(make_config, tmp_path):
    path = write(tmp_path / "train.parquet", [("<image>", 1)] * 4)
    with pq.ParquetFile(path) as file:
        names = [file.schema.column(i).path for i in range(len(file.schema.names))]
        chunk = file.metadata.row_group(0).column(names.index("images.list.element.bytes"))
    content = bytearray(path.read_bytes())
    end = chunk.data_page_offset + chunk.total_compressed_size
    content[chunk.data_page_offset : end] = bytes(end - chunk.data_page_offset)
    path.write_bytes(content)
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(path)
    expect(check_data(Inputs(make_config())), "ok", "train.parquet: 4 rows, 4 images")


def test_fewer_rows_than_a_batch(make_config):
    (error,) = data_errors(make_config, "data.train_batch_size=8")
    assert "4 rows" in error.detail and "data.train_batch_size=8" in error.detail
    (error,) = data_errors(make_config, "data.train_max_samples=3")
    assert "3 rows" in error.detail and "data.train_batch_size=4" in error.detail


def test_a_data_source_without_a_reward(make_config, tmp_path):
    config = make_config()
    write_sources(tmp_path / "train.parquet", ["hiyouga/geometry3k", "FanqingM/MMK12", "FanqingM/MMK12"])
    write_sources(tmp_path / "test.parquet", ["We-Math/We-Math"])
    words = ("data_source FanqingM/MMK12 (", "train.parquet, first in row 1), We-Math/We-Math (", "test.parquet, first")
    expect(check_rewards(Inputs(config)), "error", *words, *OURS)
    assert check_rewards(Inputs(make_config(*OURS))) == []
    assert check_rewards(Inputs(make_config("reward.custom_reward_function.path=mine.py"))) == []
    assert check_rewards(Inputs(make_config("reward.reward_manager.name=dapo"))) == []


def test_a_data_source_that_our_graders_do_not_know(make_config, tmp_path):
    config = make_config(*OURS)
    write_sources(tmp_path / "train.parquet", ["mine/own", "DynaMath/DynaMath_Sample"])
    expect(check_rewards(Inputs(config)), "error", "no answer type for data_source mine/own", "extra_info.answer_type")
    write_sources(tmp_path / "train.parquet", ["mine/own"], answer_type="number")
    assert not errors(check_rewards(Inputs(config)))


@pytest.mark.parametrize(("kind", "known"), [("", False), (None, False), ("mcq", False), ("choice", True)])
def test_an_answer_type_has_to_be_one_that_is_known(kind, known, make_config, tmp_path):
    config = make_config(*OURS)
    table = pa.table(
        {
            "data_source": ["mine/own"],
            "reward_model": [{"ground_truth": "1"}],
            "extra_info": pa.array([{"answer_type": kind}], pa.struct([("answer_type", "str")])),
        }
    )
    pq.write_table(table, tmp_path / "train.parquet")
    assert (not errors(check_rewards(Inputs(config)))) == known


def test_a_function_that_the_rewards_do_not_have(make_config, tmp_path):
    config = make_config(OURS[0], "reward.custom_reward_function.name=nope")
    expect(check_rewards(Inputs(config)), "error", "no function nope", OURS[1])


def test_a_template_that_begins_the_response_needs_a_setting_under_another_manager(make_config, teacher, tmp_path):
    """The folder of the teacher is a copy of the student's."""
    for split in ("train", "test"):
        write_sources(tmp_path / f"{split}.parquet", ["hiyouga/geometry3k"])
    dapo = [*OURS, "reward.reward_manager.name=dapo", f"actor_rollout_ref.model.path={teacher}"]
    assert check_rewards(Inputs(make_config(*dapo))) == []
    template = teacher / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}<think>\n{% endif %}")
    found = expect(check_rewards(Inputs(make_config(*dapo))), "warning", "ends the prompt with <think>", "name=dapo")
    override, naive = found.remedy.split(", or ")
    for remedy in (shlex.split(override)[0].lstrip("+").replace('"', ""), naive):
        assert check_rewards(Inputs(make_config(*dapo, remedy))) == []


def test_what_must_not_be_trained_on(make_config, tmp_path):
    config = make_config(*OURS)
    write_sources(tmp_path / "test.parquet", ["AI4Math/MathVista"])
    assert not errors(check_rewards(Inputs(config)))
    write_sources(tmp_path / "train.parquet", ["AI4Math/MathVista"])
    expect(check_rewards(Inputs(config)), "error", "AI4Math/MathVista", "evaluation only", "data.val_files")


def test_sources_that_verl_rewards_itself(make_config, tmp_path):
    config = make_config()
    for split in ("train", "test"):
        write_sources(tmp_path / f"{split}.parquet", ["hiyouga/geometry3k", "openai/gsm8k", "math_dapo"])
    assert check_rewards(Inputs(config)) == []


@pytest.mark.parametrize("overrides", [(), OURS])
def test_rows_without_answers_need_no_reward(overrides, make_config, tmp_path):
    """Neither a column of answers nor a data source that anything grades."""
    checks = check_rewards(Inputs(make_config(*overrides)))
    expect(checks, "ok", "no answers in rows without data_source", "reward is 0", "no accuracy")
    write_sources(tmp_path / "train.parquet", ["mine/own"], answer=" ")
    write_sources(tmp_path / "test.parquet", ["mine/two"], answer="5", answer_type="none")
    expect(check_rewards(Inputs(make_config(*overrides))), "ok", "no answers in mine/own, mine/two")
    write_sources(tmp_path / "test.parquet", ["mine/two"])
    assert len(errors(check_rewards(Inputs(make_config(*overrides))))) == 1
    naive = "reward.reward_manager.name"
    found = expect(check_rewards(Inputs(make_config(*overrides, f"{naive}=dapo"))), "error", "no answers in mine/own")
    assert found.remedy == f"{naive}=naive"


def two_teachers(even, odd="odd"):
    return (
        *("teacher.model.path=null", f"teacher.models.one.path={even}", "teacher.models.one.keys=[even]"),
        *(f"teacher.models.two.path={even}", f"teacher.models.two.keys=[{odd}]"),
    )


def test_every_sample_has_a_teacher_and_every_key_samples(make_config, student, tmp_path):
    write_sources(tmp_path / "train.parquet", ["even", "odd", "even", "odd"])
    expect(check_routing(Inputs(make_config(*two_teachers(student)))), "ok", "data_source: even, odd")
    checks = check_routing(Inputs(make_config(*two_teachers(student, odd="od"))))
    expect(checks, "error", "no teacher for data_source=odd", "even, od", "teacher.models.<name>.keys")
    expect(checks, "warning", "keys has values that no training row has: od", "even, odd")
    everything = check_routing(Inputs(make_config(*two_teachers(student, odd="'*'"))))
    assert not errors(everything)


def test_a_routing_key_that_no_file_has(make_config, student, tmp_path):
    write_sources(tmp_path / "train.parquet", ["even", "odd"] * 2)
    checks = check_routing(Inputs(make_config(*two_teachers(student), "teacher.routing_key=subject")))
    expect(checks, "error", "no column subject (teacher.routing_key)")


def test_files_that_can_t_be_read_here_are_not_taken_for_wrong(make_config, student, tmp_path):
    write_sources(tmp_path / "train.parquet", ["even", "odd"] * 2)
    (tmp_path / "more.jsonl").write_text("{}")
    files = f"data.train_files=[{tmp_path / 'train.parquet'},{tmp_path / 'more.jsonl'},hdfs://host/x.parquet]"
    checks = check_routing(Inputs(make_config(*two_teachers(student), files)))
    assert not errors(checks)
    expect(checks, "warning", "more.jsonl, hdfs://host/x.parquet: not checked")
    lacking = tmp_path / "lacking.parquet"
    write(lacking, [("<image>How many?", 1)] * 4, drop=["data_source"])
    files = f"data.train_files=[{tmp_path / 'train.parquet'},{lacking}]"
    expect(
        check_routing(Inputs(make_config(*two_teachers(student), files))),
        "error",
        "no column data_source",
        "lacking.parquet",
    )


def test_verls_servers_are_found_by_strings_only(make_config, student, tmp_path):
    write_sources(tmp_path / "train.parquet", [1, 2, 1, 2])
    numbers = (
        *("teacher.model.path=null", f"teacher.models.one.path={student}", "teacher.models.one.keys=['1']"),
        *(f"teacher.models.two.path={student}", "teacher.models.two.keys=['2']"),
    )
    assert not errors(check_routing(Inputs(make_config(*numbers))))
    checks = check_routing(Inputs(make_config(*numbers, *SERVER)))
    expect(checks, "error", "data_source holds int", "teacher.backend=worker")


def test_a_single_teacher_is_not_routed(make_config):
    assert check_routing(Inputs(make_config())) == []
