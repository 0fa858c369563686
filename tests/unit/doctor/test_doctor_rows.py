# SPDX-License-Identifier: Apache-2.0
"""Images that verl can't decode, and prompts that are too long for it, are named before a run."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from tests.data_files import picture
from tests.unit.doctor.helpers import IMAGES, PROMPT, errors, expect, write
from verl_gndpo.conversion.lengths import measure_of
from verl_gndpo.conversion.row import HF_METADATA
from verl_gndpo.doctor import media
from verl_gndpo.doctor.data import check_data, check_rows
from verl_gndpo.doctor.inputs import Inputs
from verl_gndpo.doctor.run import run_checks

GOOD = {"bytes": picture(), "path": None}


def write_images(path, images, *, declared=False, image_type=IMAGES, texts=None, group=None):
    """Write one row per image; `declared` is the metadata by which `datasets` decodes the column itself."""
    texts = texts or ["<image>How many?"] * len(images)
    prompts = pa.array([[{"role": "user", "content": text}] for text in texts], PROMPT)
    table = pa.table({"prompt": prompts, "images": pa.array([[image] for image in images], image_type)})
    if declared:
        table = table.replace_schema_metadata({"huggingface": json.dumps(HF_METADATA)})
    pq.write_table(table, path, row_group_size=group)
    return path


def verl_reads(config, path):
    """Return for each row whether verl's own dataset and its agent loop's preparation read it."""
    from verl.utils.dataset.rl_dataset import RLHFDataset

    measure = measure_of(config.actor_rollout_ref.model.path)
    data = OmegaConf.merge(config.data, {"cache_dir": str(path.parent), "filter_overlong_prompts": False})
    dataset = RLHFDataset(str(path), measure.tokenizer, data, measure.processor)

    def read(row):
        try:
            messages = dataset[row]["raw_prompt"]
            dataset._process_multi_modal_info(messages, 14, data)
        except Exception:
            return False
        return True

    return [read(row) for row in range(len(dataset))]


BAD = {
    "no bytes": {"bytes": None, "path": "/nowhere/a.png"},
    "nothing": {"bytes": None, "path": None},
    "empty": {"bytes": b"", "path": None},
    "no image": {"bytes": b"not an image", "path": None},
    "cut off": {"bytes": picture(size=(200, 200))[:-60], "path": None},
    "damaged": {"bytes": picture(kind="JPEG", size=(200, 200))[:300], "path": None},
    "a line": {"bytes": picture(size=(300, 1)), "path": None},
    "a column": {"bytes": picture(size=(2, 900)), "path": None},
}


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("kind", BAD)
def test_an_image_that_verl_can_t_read_is_named_by_file_and_row(kind, declared, make_config, tmp_path):
    config = make_config()
    path = write_images(tmp_path / "train.parquet", [GOOD, GOOD, BAD[kind], GOOD], declared=declared)
    found = expect(
        check_rows(Inputs(config)), "error", "train.parquet: 1 rows", "row 2: image 0: ", "the run would stop"
    )
    assert found.remedy == "repair these rows, or remove them from the file"
    assert verl_reads(config, path) == [True, True, False, True]
    assert not errors(check_data(Inputs(config)))


@pytest.mark.parametrize(
    ("image", "image_type"),
    [
        ({"bytes": picture(), "path": "/nowhere/a.png"}, IMAGES),
        ({"bytes": picture(mode="RGBA"), "path": None}, IMAGES),
        ({"bytes": picture(mode="L", kind="JPEG"), "path": None}, IMAGES),
        ({"bytes": picture(size=(150, 1)), "path": None}, IMAGES),
        ({"bytes": picture(kind="WEBP"), "path": None}, IMAGES),
        ("{folder}/a.png", pa.list_(pa.string())),
        ("file://{folder}/a.png", pa.list_(pa.string())),
        ({"image": "{folder}/a.png"}, pa.list_(pa.struct([("image", pa.string())]))),
    ],
)
def test_what_verl_reads_is_accepted(image, image_type, make_config, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    if isinstance(image, str):
        image = image.format(folder=tmp_path)
    elif "image" in image:
        image = {"image": image["image"].format(folder=tmp_path)}
    config = make_config()
    path = write_images(tmp_path / "train.parquet", [image] * 4, image_type=image_type)
    expect(check_rows(Inputs(config)), "ok", "train.parquet: the images of all 4 rows can be decoded")
    assert verl_reads(config, path) == [True] * 4


def test_a_path_is_read_where_verl_reads_it(make_config, tmp_path):
    """`datasets` opens the path of a column that is declared as images; otherwise verl opens no bytes at all."""
    (tmp_path / "a.png").write_bytes(picture())
    image = {"bytes": None, "path": str(tmp_path / "a.png")}
    for declared, name in ((True, "one"), (False, "two")):
        path = write_images(tmp_path / f"{name}.parquet", [image] * 4, declared=declared)
        config = make_config(f"data.train_files={path}")
        assert verl_reads(config, path) == [declared] * 4
        assert bool(errors(check_rows(Inputs(config)))) != declared


def test_images_by_paths_that_do_not_exist(make_config, tmp_path):
    write_images(tmp_path / "train.parquet", ["/nowhere/a.png"] * 4, image_type=pa.list_(pa.string()))
    words = ("4 rows", "row 0: image 0: ValueError: there is no file /nowhere/a.png")
    expect(check_rows(Inputs(make_config())), "error", *words)


def test_images_behind_urls_are_not_fetched(make_config, tmp_path):
    write_images(tmp_path / "train.parquet", ["https://nowhere.invalid/a.png"] * 4, image_type=pa.list_(pa.string()))
    checks = check_rows(Inputs(make_config()))
    assert not errors(checks)
    expect(checks, "ok", "train.parquet: not measured", "URLs")


def test_a_large_file_is_sampled_from_all_its_parts(make_config, tmp_path, monkeypatch):
    path = write_images(tmp_path / "train.parquet", [GOOD] * 3000, group=100)
    config = make_config()
    monkeypatch.setattr("verl_gndpo.doctor.data.READING_S", 0.0)
    expect(check_rows(Inputs(config)), "ok", "the images of 16 of 3000 rows, a sample")
    reading = media.read_rows(path, config.data, None, seconds=60)
    assert reading.rows == reading.total == 3000


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 100])
def test_any_beginning_of_the_order_is_spread(count):
    order = list(media.spread(count))
    assert sorted(order) == list(range(count))
    for length in range(2, count):
        gaps = np.diff([*sorted(order[:length]), count])
        assert gaps.max() <= 4 * count / length + 1


def test_progress_is_shown_when_it_takes_long(make_config, tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "train.parquet", [GOOD] * 40)
    check_rows(Inputs(make_config()))
    assert "decoding" not in capsys.readouterr().err
    monkeypatch.setattr(media, "PROGRESS_AFTER_S", 0)
    check_rows(Inputs(make_config()))
    assert "decoding train.parquet: 100%" in capsys.readouterr().err


def rows_that_verl_keeps(config, path, limit):
    """Return how many rows verl's own filter keeps."""
    from verl.utils.dataset.rl_dataset import RLHFDataset

    measure = measure_of(config.actor_rollout_ref.model.path)
    data = {"cache_dir": str(path.parent), "filter_overlong_prompts": True, "max_prompt_length": limit}
    data |= {"filter_overlong_prompts_workers": None}
    return len(RLHFDataset(str(path), measure.tokenizer, OmegaConf.merge(config.data, data), measure.processor))


def test_prompts_are_as_long_as_verl_finds_them(make_config, tmp_path):
    """The doctor says how many rows verl's own filter drops, at each limit and just below it."""
    sizes = [(40, 30), (200, 150), (60, 300), (28, 28), (90, 90)]
    images = [{"bytes": picture(size=size), "path": None} for size in sizes]
    texts = ["<image>How many?", "Look: <image>", "<image>" + "many " * 20, "<image>?", "<image>How long is it?"]
    path = write_images(tmp_path / "train.parquet", images, texts=texts)
    config = make_config()
    reading = media.read_rows(path, config.data, measure_of(config.actor_rollout_ref.model.path), seconds=60)
    lengths = sorted(reading.lengths.values())
    assert len(set(lengths)) == 5
    for limit in sorted({length - less for length in lengths for less in (0, 1)}):
        kept = rows_that_verl_keeps(config, path, limit)
        assert kept == sum(length <= limit for length in lengths)
        filtered = make_config(f"data.max_prompt_length={limit}", "data.filter_overlong_prompts=True")
        checks = [check for check in check_rows(Inputs(filtered)) if "train.parquet" in check.detail]
        if kept == 5:
            expect(checks, "ok", f"up to {limit} tokens", f"data.max_prompt_length={limit}")
        else:
            found = expect(
                checks, "warning" if kept else "error", f"{5 - kept} prompts have more", "verl will drop them"
            )
            assert f"data.max_prompt_length={limit} tokens, up to {lengths[-1]} tokens" in found.detail


def test_an_over_long_prompt_stops_a_run_unless_it_is_filtered(make_config, tmp_path):
    write_images(tmp_path / "train.parquet", [GOOD] * 4, texts=["<image>?"] * 3 + ["<image>" + "many " * 200])
    found = expect(
        check_rows(Inputs(make_config("data.max_prompt_length=100"))), "error", "1 prompts have more", "rows 3", "stops"
    )
    longest = int(found.remedy.partition("=")[2].partition(",")[0])
    assert longest > 100
    assert not errors(check_rows(Inputs(make_config(f"data.max_prompt_length={longest}"))))
    assert errors(check_rows(Inputs(make_config(f"data.max_prompt_length={longest - 1}"))))
    assert not errors(
        check_rows(Inputs(make_config("data.max_prompt_length=100", "data.filter_overlong_prompts=True")))
    )
    all_of_them = make_config("data.max_prompt_length=2", "data.filter_overlong_prompts=True")
    expect(
        check_rows(Inputs(all_of_them)), "error", "train.parquet: 4 prompts", "verl will drop them, 100.0% of the rows"
    )


def test_an_over_long_prompt_without_images_is_cut(make_config, tmp_path):
    write(tmp_path / "train.parquet", [("many " * 200, 0)] * 4)
    found = expect(check_rows(Inputs(make_config("data.max_prompt_length=100"))), "warning", "4 prompts", "cuts off")
    assert "train.parquet" in found.detail


def test_a_row_that_verl_would_drop_is_a_warning(make_config, tmp_path):
    write_images(tmp_path / "train.parquet", [GOOD, GOOD, BAD["no image"], GOOD])
    config = make_config("data.filter_overlong_prompts=True")
    expect(check_rows(Inputs(config)), "warning", "row 2", "verl will drop them")


def test_a_text_only_student_measures_too(make_config, text_model, tmp_path):
    write(tmp_path / "train.parquet", [("How many?", 0)] * 4)
    write(tmp_path / "test.parquet", [("How many?", 0)] * 4)
    checks = check_rows(Inputs(make_config(f"actor_rollout_ref.model.path={text_model}")))
    expect(checks, "ok", "train.parquet: up to", "data.max_prompt_length=")


def test_an_unknown_student_is_no_fault_of_the_data(make_config):
    checks = check_rows(Inputs(make_config("actor_rollout_ref.model.path=/nowhere")))
    assert not errors(checks)
    expect(checks, "ok", "lengths are not known", "/nowhere")
    config = make_config("data.mm_processor_kwargs.max_pixels=784")
    expect(check_rows(Inputs(config)), "ok", "lengths are not known", "data.mm_processor_kwargs")


def test_the_doctor_runs_the_check(make_config, on_cpu, tmp_path):
    config = make_config()
    write_images(tmp_path / "train.parquet", [GOOD, GOOD, BAD["no image"], GOOD])
    assert "row 2" in expect(run_checks(config), "error", "can't be read").detail


def test_what_another_class_reads_is_not_decoded(make_config, tmp_path):
    write_images(tmp_path / "train.parquet", [BAD["no image"]] * 4)
    assert check_rows(Inputs(make_config("data.custom_cls.path=mine.py"))) == []
