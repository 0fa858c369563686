# SPDX-License-Identifier: Apache-2.0
"""Prompts of rows that are unusual or can't be asked, with and without a tokenizer."""

import base64
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.tiny_models import build_tiny
from verl_gndpo.evaluation.job import Job, digest
from verl_gndpo.evaluation.prompts import Prompts, for_chat


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: build_tiny(family, root / family, seed=0) for family in ("qwen2_5_vl", "qwen2")}


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (56, 84), colour).save(file, "PNG")
    return {"bytes": file.getvalue()}


def prompts(tmp_path, *rows, model=None, **settings):
    made = [
        {
            "data_source": "mine",
            "prompt": [{"role": "user", "content": content}],
            "images": images,
            "reward_model": {"ground_truth": "1"},
        }
        for content, images in rows
    ]
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "rows.parquet")
    file = str(tmp_path / "rows.parquet")
    served = {} if model else {"server": "http://host/v1"}
    return Prompts(Job(str(model), [file], [digest(tmp_path / "rows.parquet")], **served, **settings), False)


THREE = ("Ünï <image> 码 <image>\n<image>?", [png("red"), png("green"), png("blue")])


def test_three_images_in_one_row(models, tmp_path):
    found = prompts(tmp_path, THREE, model=models["qwen2_5_vl"], max_prompt=40)
    made = found[0]
    assert [image.getpixel((0, 0)) for image in made.images] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    handed = found.for_vllm(made)
    (placeholder,) = {token for token in made.ids if made.ids.count(token) == 3 * 6}
    assert handed["prompt_token_ids"].count(placeholder) == 3 and len(handed["multi_modal_data"]["image"]) == 3
    assert "Ünï" in found.decode(made.ids) and "码" in found.decode(made.ids)
    assert found.too_long(made) == (len(made.ids) > 40)


def test_a_server_gets_text_and_images_in_their_order(tmp_path):
    made = prompts(tmp_path, THREE)[0]
    assert made.ids is None
    (message,) = for_chat(made)
    assert [part["type"] for part in message["content"]] == ["text", "image_url"] * 2 + ["text", "image_url", "text"]
    assert [part["text"] for part in message["content"] if part["type"] == "text"] == ["Ünï ", " 码 ", "\n", "?"]
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    assert [image.size for image in images] == [(56, 84)] * 3
    assert [image.getpixel((0, 0)) for image in images] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]


def test_a_row_without_images_stays_text(models, tmp_path):
    made = prompts(tmp_path, ("Which?", []), ("<image>Which?", [png("red")]))
    assert for_chat(made[0]) == [{"role": "user", "content": "Which?"}]
    found = prompts(tmp_path, ("Which?", None), model=models["qwen2"])
    assert "multi_modal_data" not in found.for_vllm(found[0])


def test_rows_that_cannot_be_asked_are_named(models, tmp_path):
    def refused(row, family="qwen2_5_vl"):
        found = prompts(tmp_path, ("<image>Which?", [png("red")]), row, model=models[family])
        with pytest.raises(ValueError, match="-> mend or remove the row") as caught:
            found[1]
        assert str(caught.value).startswith(f"row 1 of {tmp_path / 'rows.parquet'} can't be asked: ")
        return str(caught.value)

    assert "UnidentifiedImageError" in refused(("<image>Which?", [{"bytes": b"no image"}]))
    assert "image_offset 1 != len(images) 2" in refused(("<image>Which?", [png("red"), png("red")]))
    assert "has no processor to read them with" in refused(("<image>Which?", [png("red")]), "qwen2")


def test_the_template_gets_its_settings(models, tmp_path):
    model = models["qwen2"]
    template = model / "chat_template.jinja"
    before = template.read_text()
    template.write_text(before + "{{ ending }}")
    try:
        made = prompts(tmp_path, ("Which?", None), model=model, chat_template={"ending": "<think>\n"})[0]
    finally:
        template.write_text(before)
    assert made.prefix == "<think>"
