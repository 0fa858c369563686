# SPDX-License-Identifier: Apache-2.0
"""Several teachers on two gloo ranks, asked through verl's TransferQueue, against plain Hugging Face forwards."""

import inspect
import os
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace

import numpy as np
import psutil
import pytest
import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from transfer_queue import KVBatchMeta
from verl.single_controller.ray import RayResourcePool
from verl.utils import tensordict_utils as tu
from verl.utils import transferqueue_utils as bridge

from examples.quickstart.tiny_vlm import build_tiny_vlm
from tests import settings
from tests.integration.helpers import as_batch, hugging_face_log_probs, make_rows
from verl_gndpo.teacher import group
from verl_gndpo.teacher.client import TeacherClient, prompt_of
from verl_gndpo.teacher.group import TeacherLostError
from verl_gndpo.teacher.packing import equal_inputs
from verl_gndpo.teacher.waiting import Patience
from verl_gndpo.verl_patches.images_once import fetch_images_once

OPTIONS = {"override_config": {"attn_implementation": "sdpa"}}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return {name: build_tiny_vlm(tmp_path_factory.mktemp(name), seed=seed) for name, seed in (("one", 3), ("other", 4))}


@pytest.fixture(scope="module")
def rows(paths):
    """Make three responses to each of four prompts: two prompts of source "a", one of "b", one of "c"."""
    rows = make_rows(paths["one"], [1, 0, 2, 1], [[5, 2, 7], [4, 3, 1], [6, 2, 2], [3, 3, 5]])
    prompts: dict[tuple, list[dict]] = {}
    for row in rows:
        prompts.setdefault(tuple(row["ids"][: -len(row["response"])].tolist()), []).append(row)
    assert len(prompts) == 4
    return [
        row | {"source": source, "key": f"prompt_{prompt}_{session}_0"}
        for prompt, (source, group) in enumerate(zip("aabc", prompts.values(), strict=True))
        for session, row in enumerate(group)
    ]


@pytest.fixture(scope="module")
def expected(paths, rows):
    """Return the log-probs under each row's teachers: "a" has one, "b" the other, "c" both with weights 3 and 1."""
    one, other = (hugging_face_log_probs(paths[name], rows, 1.0) for name in ("one", "other"))
    shares = {"a": (1, 0), "b": (0, 1), "c": (0.75, 0.25)}
    return {
        row["key"]: sum(share * x for share, x in zip(shares[row["source"]], pair, strict=True))
        for row, *pair in zip(rows, one, other, strict=True)
    }


@pytest.fixture(scope="module")
def client(queue, paths):
    models = {
        "first": {"path": str(paths["one"]), "keys": ["a", "c"], "weight": 3, **OPTIONS},
        "second": {"path": str(paths["other"]), "keys": ["b", "c"], **OPTIONS},
        "again": {"path": str(paths["one"]), "keys": ["unused"], **OPTIONS},
    }
    config = settings.teacher_config(models=models)
    client = TeacherClient(config, RayResourcePool([2], use_gpu=True, max_colocate_count=3), "cpu")
    client.load()
    return client


def put(rows: list[dict]) -> KVBatchMeta:
    """Put rows into the queue as verl's agent loop does, without a score."""
    batch = as_batch(rows)
    batch["data_source"] = NonTensorStack(*[row["source"] for row in rows])
    batch["uid"] = NonTensorStack(*[prompt_of(row["key"]) for row in rows])
    keys = [row["key"] for row in rows]
    tags = [{"seq_len": len(row["ids"])} for row in rows]
    tq.kv_clear(keys=keys, partition_id="train")
    tq.kv_batch_put(keys=keys, partition_id="train", fields=batch, tags=tags)
    return KVBatchMeta(keys=keys, tags=tags, partition_id="train")


def assert_scored(batch: KVBatchMeta, expected: dict) -> None:
    data: TensorDict = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["teacher_log_probs"])
    for key, scores in zip(batch.keys, data["teacher_log_probs"].unbind(), strict=True):
        np.testing.assert_allclose(scores.double().numpy(), expected[key].numpy(), atol=1e-4, rtol=0, err_msg=key)


def finish(client: TeacherClient, timeout_s: float = 60) -> None:
    """Wait until the rows that were sent ahead are scored."""
    ray.wait(client._group._futures, num_returns=len(client._group._futures), timeout=timeout_s)


def test_each_sample_gets_the_scores_of_its_teachers(client, rows, expected):
    batch = put(rows)
    assert client.score(batch)["gndpo/teacher_ahead_share"] == 0
    assert_scored(batch, expected)


def test_a_rank_without_samples_for_a_teacher_takes_part_all_the_same(client, rows, expected):
    """In at least one of these calls a rank has no sample of some teacher, whatever the order of the rows."""
    for sources in ("a", "b", "ab"):
        batch = put([row for row in rows if row["source"] in sources][-3:])
        client.score(batch)
        assert_scored(batch, expected)


def test_fewer_rows_than_ranks_are_filled_up_with_rows_that_were_scored_before(client, rows, expected):
    batch = put(rows)
    ahead = range(len(rows) - 1)
    client.score_ahead([batch.keys[i] for i in ahead], [batch.tags[i] for i in ahead], "train")
    overlap = client.score(batch)
    assert overlap["gndpo/teacher_ahead_share"] == pytest.approx(11 / 12)
    assert_scored(batch, expected)


def test_a_batch_may_have_fewer_rows_than_there_are_ranks(client, rows, expected):
    batch = put(rows[:1])
    assert client._group.ranks == 2
    client.score(batch)
    assert_scored(batch, expected)


def test_finished_rows_are_sent_once_and_while_the_workers_are_idle(client, rows, expected, monkeypatch):
    batch = put(rows)
    first, second = slice(0, 6), slice(0, 12)
    client.score_ahead(batch.keys[:3], batch.tags[:3], "train")
    assert not client._group.is_busy, "one prompt would be cut in two for two ranks"
    client.score_ahead(batch.keys[first], batch.tags[first], "train")
    running = client._group._futures
    finish(client)
    client.score_ahead(batch.keys[second], batch.tags[second], "train")
    assert client._group._futures is not running
    finish(client)
    client.score_ahead(batch.keys, batch.tags, "train")
    assert not client._group.is_busy, "all rows were sent"
    # Sending rows once more would raise.
    monkeypatch.setattr(client, "_send", None)
    overlap = client.score(batch)
    assert overlap["gndpo/teacher_ahead_share"] == 1 and overlap["timing_s/teacher_ahead"] > 0
    assert_scored(batch, expected)


def test_prompts_that_are_thrown_away_are_forgotten(client, rows):
    batch = put(rows)
    client.score_ahead(batch.keys[:6], batch.tags[:6], "train")
    client.forget({"of another step"})
    assert client._group.is_busy, "nothing to wait for"
    client.forget({prompt_of(batch.keys[0])})
    assert not client._group.is_busy
    assert client.score(batch)["gndpo/teacher_ahead_share"] == pytest.approx(3 / 12)


def fetch(batch: KVBatchMeta, function) -> tuple[list[dict], int]:
    """Return each row's images as a worker fetches them, and the bytes that passed through the loopback device."""
    before = psutil.net_io_counters(pernic=True)["lo"].bytes_recv
    data = bridge._run_async_in_temp_loop(function, batch)
    received = psutil.net_io_counters(pernic=True)["lo"].bytes_recv - before
    return tu.get(data, "multi_modal_inputs"), received


@pytest.fixture
def once(queue):
    """Return verl's function that fetches a batch, and the same one with the patch."""
    bridge.TQ_INITIALIZED = True
    # Importing the patch has applied it in this process.
    stock = inspect.unwrap(bridge._async_meta_to_realdata)
    copy = types.ModuleType(bridge.__name__)
    vars(copy).update(vars(bridge), _async_meta_to_realdata=stock)
    assert fetch_images_once(copy)
    return stock, copy._async_meta_to_realdata


def with_large_images(rows: list[dict]) -> list[dict]:
    """Give each prompt's rows the same random image of 1.6 MB, if they have images."""
    images = {prompt_of(row["key"]): torch.randn(340, 1176) for row in rows}
    return [
        row | {"inputs": dict(row["inputs"]) and {"pixel_values": images[prompt_of(row["key"])].clone()}}
        for row in rows
    ]


def test_the_images_of_a_prompt_are_fetched_once(once, rows):
    stock, patched = once
    batch = put(with_large_images(rows))
    fetch(batch, patched)  # The first batch is fetched whole, and compared.
    (expected, bytes_of_stock), (images, received) = fetch(batch, stock), fetch(batch, patched)
    assert all(map(equal_inputs, images, expected)) and sum(map(len, images)) == 9
    assert len({id(image) for image in images}) == 4, "the rows of a prompt share what was fetched"
    assert bytes_of_stock > 9 * 1.5e6 and received < 0.4 * bytes_of_stock


def test_a_row_with_tokens_of_a_tool_has_images_of_its_own(once, rows):
    _, patched = once
    rows = with_large_images(rows)
    fetch(put(rows), patched)
    position = next(i for i, row in enumerate(rows) if row["inputs"]) + 1
    rows[position] = rows[position] | {"inputs": {"pixel_values": torch.randn(2, 1176)}}
    batch = put(rows)
    masks = as_batch(rows)["response_mask"]
    masks.values()[masks.offsets()[position]] = 0
    tq.kv_batch_put(
        keys=batch.keys, partition_id="train", fields=TensorDict({"response_mask": masks}, batch_size=len(rows))
    )
    images, _ = fetch(batch, patched)
    assert torch.equal(images[position]["pixel_values"], rows[position]["inputs"]["pixel_values"])
    assert images[position + 1] is images[position - 1] is not images[position]


def test_images_that_differ_within_a_prompt_are_each_fetched(once, rows, caplog):
    _, patched = once
    rows = with_large_images(rows)
    position = next(i for i, row in enumerate(rows) if row["inputs"]) + 1
    rows[position] = rows[position] | {"inputs": {"pixel_values": torch.randn(340, 1176)}}
    batch = put(rows)
    for _ in range(2):
        images, _ = fetch(batch, patched)
        assert all(equal_inputs(image, row["inputs"]) for image, row in zip(images, rows, strict=True))
    assert caplog.text.count("have different images") == 1


def score_without_rank_1(client: TeacherClient, batch: KVBatchMeta, then: signal.Signals | None) -> dict[str, float]:
    """Score a batch while rank 1 is stopped, so that rank 0 waits for it; send it `then` after a second."""
    _, process = client._group._processes[1]
    os.kill(process, signal.SIGSTOP)
    if then is not None:
        threading.Timer(1.0, os.kill, (process, then)).start()
    return client.score(batch)


def test_a_teacher_of_which_a_rank_is_killed_is_replaced_and_scores_the_same(client, rows, expected, caplog):
    """One of two ranks is killed while the other waits for it, and then one that is idle."""
    batch = put(rows)
    score_without_rank_1(client, batch, signal.SIGKILL)
    assert client.restarts == 1 and "replaced (1 of 3 times)" in caplog.text
    assert_scored(batch, expected)
    batch = put(rows)
    os.kill(client._group._processes[0][1], signal.SIGKILL)
    client.score_ahead(batch.keys, batch.tags, "train")
    client.score(batch)
    assert client.restarts == 2
    assert_scored(batch, expected)


def test_a_teacher_that_does_not_answer_is_told_of_and_replaced(client, rows, expected, caplog, monkeypatch):
    monkeypatch.setattr(group, "FIRST_LINE_S", 1.0)
    monkeypatch.setattr(client._group, "_patience", Patience(5.0))
    stopped = [process for _, process in client._group._processes]
    batch = put(rows)
    score_without_rank_1(client, batch, None)
    for told in (
        "have not scored its rows after 1 s",
        "after 2 s",
        "2 of its ranks had not scored its rows within the limit",
    ):
        assert told in caplog.text
    assert_scored(batch, expected)
    assert not any(psutil.pid_exists(process) for process in stopped)


@ray.remote(num_cpus=0)
def _sleep() -> None:
    time.sleep(600)


READS_A_PART = """
import mmap, sys, time
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
mapped[0]
print("mapped", flush=True)
time.sleep(600)
"""


def test_a_load_that_stands_still_names_the_rank_and_the_file(client, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(group, "FIRST_LINE_S", 1.0)
    # Ray may have to start a process that looks.
    monkeypatch.setattr(group, "GRACE_S", 120.0)
    file = tmp_path / "model-00002-of-00004.safetensors"
    file.write_bytes(bytes(2**24))
    with subprocess.Popen([sys.executable, "-c", READS_A_PART, str(file)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"mapped\n"
        node, other = client._group._processes[0]
        monkeypatch.setattr(client._group, "_processes", [(node, other), (node, process.pid)])
        never = [_sleep.remote() for _ in range(2)]
        try:
            with pytest.raises(group._LostError, match=rf"rank 1 reads {file} \(\d+% so far\)"):
                client._group._wait(never, time.monotonic(), 3.0, "loaded it", loads=True)
        finally:
            process.kill()
            for task in never:
                ray.cancel(task, force=True)
    assert "ranks 0, 1 of 2 have not loaded it after 1 s" in caplog.text
    assert "rank 0 reads" not in caplog.text


def test_what_one_rank_raises_is_not_waited_for(client, rows):
    """Afterwards the other rank waits for the failed one until the process ends."""
    broken = [dict(row) for row in rows]
    position = next(i for i, row in enumerate(broken) if len(row["inputs"]))
    broken[position]["inputs"] = {}
    batch = put(broken)
    deadline = time.monotonic() + 60
    with pytest.raises(Exception, match=rf"prompt {prompt_of(batch.keys[position])}.*image tokens.*images"):
        while time.monotonic() < deadline:
            client.score_ahead(batch.keys, batch.tags, "train")
            time.sleep(0.2)


def test_a_teacher_that_is_lost_too_often_ends_the_run(client, rows, monkeypatch):
    """This has to be the last test."""
    monkeypatch.setattr(client._group, "_teacher", replace(client._group._teacher, max_restarts=client.restarts))
    client._sent.clear()
    batch = put(rows)
    os.kill(client._group._processes[0][1], signal.SIGKILL)
    with pytest.raises(TeacherLostError, match=r"teacher was lost: ActorDiedError.*teacher\.max_restarts=3 allows"):
        client.score(batch)
