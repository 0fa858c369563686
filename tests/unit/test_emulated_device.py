# SPDX-License-Identifier: Apache-2.0
"""Teacher and student on an emulated accelerator: no tensor of the host meets one of the device, log-probs are those of
the CPU, and the host waits for the device equally often however many layers, images, prompts and chunks there are.

A wait inside a layer or a loop costs more than its own time: the device runs out of work that the host has prepared.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers as hf

from tests.emulated_device import DeviceMismatchError, EmulatedDevice
from tests.integration.helpers import as_batch, make_rows, one_rank, stock_transformers
from tests.tiny_models import build_tiny
from tests.unit.packed import groups_of
from verl_gndpo.kl import top_log_probs
from verl_gndpo.student import projection
from verl_gndpo.student.projection import Request, ResponseHead
from verl_gndpo.teacher import attention, scoring, self_check
from verl_gndpo.teacher.architecture import build_as_verl
from verl_gndpo.teacher.attention import SharedPromptAttention
from verl_gndpo.teacher.packing import Layout, concatenate, group_by_prompt, plan
from verl_gndpo.teacher.scorer import Rows, Scorer

VOCABULARY = 50
SHORT = [(7, [3, 9])]
# Prompts with one and several responses, of lengths that attend in one batch and in several.
LONG = [(7, [3, 9, 40, 3, 9]), (4, [5]), (12, [2, 2, 30])]


def text_model(layers=2, window=None):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    if window is not None:
        sizes |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(hf.Qwen2Config(**sizes), attn_implementation="sdpa").eval()


def text_rows(shapes, student_top_k=None):
    groups, generator = groups_of(shapes), torch.Generator().manual_seed(1)
    ids, lengths = [], []
    for prompt, responses in shapes:
        start = torch.randint(0, VOCABULARY, (prompt,), generator=generator)
        ids += [torch.cat([start, torch.randint(0, VOCABULARY, (n,), generator=generator)]) for n in responses]
        lengths += responses
    student = None
    if student_top_k:
        tops = [top_log_probs(torch.randn(n, VOCABULARY, generator=generator), student_top_k) for n in lengths]
        student = [top[0].int() for top in tops], [top[1] for top in tops]
    rows = Rows(
        ids=ids,
        positions=[torch.arange(len(x)) for x in ids],
        lengths=lengths,
        images=[{}] * len(ids),
        sampled=[torch.zeros(len(x), dtype=torch.bool) for x in ids],
        student=student,
    )
    return groups, rows


def score(scorer, steps, rows, device):
    options = {"device": device, "dtype": torch.float32}
    scored = [scorer.score(scorer.model, step, rows, **options) for step in steps]
    plain = scorer.score_plainly(scorer.model, 0, rows, min(rows.lengths[0], 8), whole=False, **options)
    scorer.forget()
    return [x for x, step in zip(scored, steps, strict=True) if step.rows] + [plain]


def on_host_and_device(scorer, steps, rows):
    """Score on the host and on the device; return the waits of this project's own lines."""
    expected = score(scorer, steps, rows, "cpu")
    device = EmulatedDevice()
    device.move(scorer.model)
    with device:
        scored = score(scorer, steps, rows, "cuda")
    for ours, theirs in zip(scored, expected, strict=True):
        torch.testing.assert_close(ours.inner, theirs, atol=1e-5, rtol=1e-5)
    return by_line(device)


def by_line(device):
    return Counter((wait.what, wait.file, wait.line) for wait in device.waits if wait.ours)


def text_waits(sharing, shapes, layers, chunk, *, top_k=None, window=None):
    scorer = Scorer(text_model(layers, window), chunk_tokens=chunk, temperature=0.7, sharing=sharing)
    groups, rows = text_rows(shapes, top_k)
    steps = plan(groups, sharing, 10_000)
    waits = on_host_and_device(scorer, steps, rows)
    return waits, len(steps)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("top_k", [None, 5])
def test_waits_of_a_packed_pass_do_not_grow(top_k, window):
    few, _ = text_waits("attention", SHORT, 1, 1000, top_k=top_k, window=window)
    many, _ = text_waits("attention", LONG, 3, 7, top_k=top_k, window=window)
    assert few == many
    # Uploads of what a pass begins with: the layout, the ids, their positions and the tokens to score.
    assert {what for what, _, _ in few} == {"upload"} and sum(few.values()) <= 9


@pytest.mark.parametrize("sharing", ["cache", "none"])
def test_waits_of_other_passes_do_not_grow(sharing):
    few, few_steps = text_waits(sharing, [(7, [3, 9])], 1, 1000, top_k=5)
    many, many_steps = text_waits(sharing, [(7, [9, 9, 9, 9, 9])], 3, 7, top_k=5)
    assert few_steps >= many_steps
    assert sum(many.values()) <= sum(few.values()) and {what for what, _, _ in many} == {"upload"}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_waits_for_images_do_not_grow(family, tmp_path):
    """The towers are transformers', which wait in lines of their own; those around them are this project's."""
    counts = []
    for layers, images, lengths in ((1, [1, 1], [[3, 9], [4]]), (3, [2, 1, 3, 0], [[3, 9, 40], [4], [5, 5], [7]])):
        path = build_tiny(family, tmp_path / str(layers), seed=0, layers=layers)
        with stock_transformers():
            made = make_rows(path, images, lengths)
            made += [row | {"ids": row["ids"].clone()} for row in made if row["inputs"]]
            for number, row in enumerate(made):
                # Other words about the same pictures, so that images are found again.
                row["ids"][0] = number
            torch.manual_seed(0)
            model = build_as_verl(hf.AutoConfig.from_pretrained(path), "eager").eval()
            scorer = Scorer(model, chunk_tokens=1000 if layers == 1 else 7, temperature=0.7)
            rows = Rows(
                ids=[row["ids"] for row in made],
                positions=[row["positions"] for row in made],
                lengths=[len(row["response"]) for row in made],
                images=[row["inputs"] for row in made],
                sampled=[torch.zeros(len(row["ids"]), dtype=torch.bool) for row in made],
            )
            groups = group_by_prompt(rows.ids, rows.positions, rows.lengths, rows.images)
            assert len(groups) == len(made)
            counts.append(on_host_and_device(scorer, plan(groups, "attention", 100_000), rows))
    few, many = counts
    # Those of the packed pass and of the plain one.
    assert few == many and sum(few.values()) <= 17


def test_the_self_check_works_on_the_device(capsys):
    groups, rows = text_rows(SHORT)
    batch = as_batch(
        [
            {"ids": ids, "positions": torch.arange(len(ids)), "response": ids[-n:], "inputs": {}}
            for ids, n in zip(rows.ids, rows.lengths, strict=True)
        ]
    )
    scorer = Scorer(text_model(), chunk_tokens=100, temperature=0.7)
    device = EmulatedDevice()
    device.move(scorer.model)
    with one_rank():
        torch.distributed.init_process_group("gloo")
        with device:
            scored, plain = score(scorer, plan(groups, "attention", 100), rows, "cuda")
            options = {"dtype": torch.float32, "model": "M", "attention": "sdpa"}
            count = len(plain)
            self_check.compare(batch, 0, scored[:count, 0], plain, **options)
            assert "3 log-probs of the first batch differ by at most" in capsys.readouterr().out
            with pytest.raises(ValueError, match="row 0: the teacher's self-check failed"):
                self_check.compare(batch, 0, scored[:count, 0] + 0.1, plain, **options)


def update(shapes, layers, chunk, device):
    """Run the student's passes over a row; return scores and gradients."""
    model = text_model(layers)
    groups, rows = text_rows(shapes)
    head = ResponseHead(model.get_output_embeddings(), chunk)
    shared = SharedPromptAttention(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if device is not None:
        device.move(model)
    where = "cpu" if device is None else "cuda"
    layout = Layout(groups, where)
    ids = torch.cat([x[len(x) - n :] for x, n in zip(rows.ids, rows.lengths, strict=True)]).to(where)
    # As in a batch, some tokens have no gradient.
    slope = torch.linspace(-1, 1, len(ids)).to(where) * (torch.arange(len(ids)) % 3 > 0).to(where)
    inputs = {
        "input_ids": concatenate(groups, rows.ids)[None],
        "position_ids": concatenate(groups, rows.positions)[None],
    }
    inputs = {name: value.to(where) for name, value in inputs.items()}
    request = Request(layout.predicting, ids, 0.7, entropy=True, sum_pi_squared=True, top_k=3)
    before = 0 if device is None else len(device.waits)
    with shared.attending(layout), head.answering(request):
        scores = model(**inputs, use_cache=False).logits
        top = head.take_top()
        (scores[:, 0] * slope + 0.1 * scores[:, 1] * slope).sum().backward()
    waits = [] if device is None else device.waits[before:]
    return [scores.detach(), *top, *(p.grad for p in model.parameters())], waits


def student_waits(shapes, layers, chunk):
    expected, _ = update(shapes, layers, chunk, None)
    device = EmulatedDevice()
    with device:
        found, waits = update(shapes, layers, chunk, device)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.inner, theirs, atol=1e-5, rtol=1e-4)
    return Counter((wait.what, wait.file, wait.line) for wait in waits if wait.ours)


def test_waits_of_an_update_do_not_grow():
    few, many = student_waits(SHORT, 1, 1000), student_waits(LONG, 3, 7)
    assert few == many
    # The tokens that have a gradient are found once, before the blocks of the backward pass.
    assert sum(few.values()) <= 4


# --- the emulation itself ---------------------------------------------------------------------------------------------

POISON = {
    "in a layer": (
        attention,
        "_causal",
        "    length, reach = query.shape[2], key.shape[2]\n",
        "    length, reach = query.shape[2], key.shape[2] + 0 * int(query.sum())\n",
    ),
    "an upload in a layer": (
        attention,
        "_causal",
        "    length, reach = query.shape[2], key.shape[2]\n",
        "    length, reach = query.shape[2], key.shape[2]\n    torch.tensor([length, reach], device=query.device)\n",
    ),
    "in a chunk": (
        scoring,
        "token_log_probs",
        "        new_peak = torch.maximum(peak, logits.amax(-1))\n",
        "        new_peak = torch.maximum(peak, logits.amax(-1))\n        peak[(peak > 0).nonzero()] += 0\n",
    ),
    "by a mask in a chunk": (
        scoring,
        "token_log_probs",
        "        new_peak = torch.maximum(peak, logits.amax(-1))\n",
        "        new_peak = torch.maximum(peak, logits.amax(-1))\n        peak[peak > 0]\n",
    ),
}


def poison(monkeypatch, module, name, line, instead):
    """Replace a line of a module's function."""
    source = Path(module.__file__).read_text()
    assert source.count(line) == 1
    spoiled = dict(vars(module))
    exec(compile(source.replace(line, instead), module.__file__, "exec"), spoiled)
    monkeypatch.setattr(module, name, spoiled[name])


@pytest.mark.parametrize("what", POISON)
def test_a_planted_wait_is_seen(monkeypatch, what):
    poison(monkeypatch, *POISON[what])
    few, _ = text_waits("attention", SHORT, 1, 1000)
    many, _ = text_waits("attention", LONG, 3, 7)
    module, *_ = POISON[what]
    grown = many - few
    assert grown and {file for _, file, _ in grown} == {module.__file__}


def test_a_wait_in_each_block_of_the_backward_pass_is_seen(monkeypatch):
    line = "            if inverse is not None:\n                slope.mul_(inverse[tokens].unsqueeze(1))\n"
    poison(monkeypatch, projection, "_TokenScores", line, line + "            bool((slope > 0).any())\n")
    assert student_waits(SHORT, 1, 1000) != student_waits(LONG, 3, 7)


def test_a_tensor_of_the_host_in_a_layer_is_seen(monkeypatch):
    line, instead = (
        "    length, reach = query.shape[2], key.shape[2]\n",
        "    length, reach = query.shape[2], key.shape[2]\n    query = query + torch.zeros(length, 1)\n",
    )
    poison(monkeypatch, attention, "_causal", line, instead)
    with pytest.raises(DeviceMismatchError, match=r"aten\.add.* got tensors on cuda and on the host: .*attention.py"):
        text_waits("attention", SHORT, 1, 1000)


def test_what_a_gpu_would_refuse_is_refused():
    with EmulatedDevice() as device:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert there.device.type == "cuda" and (there + 1).device.type == "cuda" and there.cpu().device.type == "cpu"
        assert (there * torch.tensor(2.0)).tolist() == [2.0] * 3
        assert [wait.what for wait in device.waits] == ["download", "tolist"]
        for mix in (lambda: here + there, lambda: torch.cat([here, there]), lambda: torch.where(there > 0, here, here)):
            with pytest.raises(DeviceMismatchError):
                mix()
        with pytest.raises(TypeError, match="can't convert cuda"):
            there.numpy()
