# SPDX-License-Identifier: Apache-2.0
"""The quickstart's problems, their checker, the tiny tokenizer, and the shortcuts that its training takes."""

import dataclasses
import io
import json
import random
import re

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from examples.quickstart import diagrams, pretrain, reward, tiny_vlm


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_vlm.build_tokenizer()


@pytest.fixture(scope="module")
def processor(tokenizer):
    return tiny_vlm.build_processor(tokenizer)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dice")
    diagrams.write_dataset(folder, train=40, test=24)
    return folder


def score(text, answer):
    return reward.compute_score(diagrams.DATA_SOURCE, text, answer)


def test_data_is_the_same_every_time(dataset, tmp_path):
    diagrams.write_dataset(tmp_path, train=40, test=24)
    for name in ("train.parquet", "test.parquet"):
        assert (tmp_path / name).read_bytes() == (dataset / name).read_bytes()
    assert diagrams.make_problems("train", 20, seed=0) != diagrams.make_problems("train", 20, seed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.parquet", "train.parquet"]


def test_no_board_is_in_two_splits_whatever_the_seed():
    boards = {
        split: {problem.pixels().tobytes() for seed in range(3) for problem in diagrams.make_problems(split, 300, seed)}
        for split in diagrams.SPLITS
    }
    assert not boards["train"] & boards["test"]
    assert not boards["train"] & boards["dev"]
    assert not boards["dev"] & boards["test"]


def test_split_depends_on_what_is_seen_and_not_on_where_the_dice_lie_in_their_cells():
    for problem in diagrams.make_problems("test", 50):
        board = tuple(die and dataclasses.replace(die, shift=(0, 0)) for die in problem.board)
        assert dataclasses.replace(problem, board=board).split == "test"


def test_no_problem_occurs_twice():
    problems = diagrams.make_problems("test", 448)
    assert len(set(problems)) == len(problems) == 448


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="no split 'valid'"):
        diagrams.make_problems("valid", 1)


def test_gold_answers_follow_from_the_picture():
    """The number of white pips in the drawn board is the number that the answer counts."""
    for problem in diagrams.make_problems("train", 60):
        pips = 0
        for index, die in enumerate(problem.board):
            row, column = divmod(index, diagrams.SIDE)
            cell = problem.pixels().reshape(3, 28, 3, 28, 3)[row, :, column]
            if die is None:
                assert (cell == 255).all()
            elif die.colour in problem.asked:
                x, y = (diagrams.CELL // 2 + shift for shift in die.shift)
                raster = cell[y - 7 : y + 8 : 7, x - 7 : x + 8 : 7]
                pips += int((raster > 240).all(axis=-1).sum())
        assert str(pips) == problem.answer


def test_gold_responses_are_rewarded_and_wrong_ones_are_not():
    for problem in diagrams.make_problems("train", 200):
        assert score(problem.response, problem.answer) == 1.0
        assert score(problem.response, str(int(problem.answer) + 1)) == 0.0
        assert score(problem.response[:-1], problem.answer) == 0.0


def test_carelessness_misreads_purple_dice_by_one_and_adds_them_up_consistently():
    rng = random.Random(0)
    for problem in diagrams.make_problems("train", 200):
        assert problem.careless_response(rng, 0.0) == problem.response
        misread = [
            pips - 1 if colour == "purple" and pips > 1 else pips
            for colour, pips in zip(problem.asked, problem.addends, strict=True)
        ]
        careless = problem.careless_response(rng, 1.0)
        assert careless == problem.reasoning(misread)
        assert score(careless, str(sum(misread))) == 1.0
        assert score(careless, problem.answer) == float(misread == list(problem.addends))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{12}", 1.0),
        (r"so \boxed{ 12 }.", 1.0),
        (r"\boxed{7} no, \boxed{12}", 1.0),
        (r"\boxed{12} no, \boxed{7}", 0.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{\boxed{3}", 0.0),
        ("12", 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_only_the_last_box_counts(text, expected):
    assert score(text, "12") == expected


@settings(deadline=None, max_examples=300)
@given(
    st.one_of(
        st.none(),
        st.binary(),
        st.text(),
        st.lists(st.sampled_from(["\\boxed", "{", "}", "12", " ", "\n", "\\", "total"]), max_size=30).map("".join),
    ),
    st.text(alphabet="0123456789", min_size=1, max_size=3),
)
def test_reward_never_raises(text, answer):
    value = score(text, answer)
    assert isinstance(value, float) and value in (0.0, 1.0)
    if value:
        assert re.search(r"\\boxed\{\s*" + answer, text)


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    text = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_tokenizer_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab=200"):
        tiny_vlm.build_tokenizer(vocab=200)


def test_model_sizes_that_vllm_cannot_serve_are_refused(tokenizer):
    with pytest.raises(ValueError, match="hidden_size=100 is not a multiple of 32"):
        tiny_vlm.build_model(tokenizer, seed=0, hidden_size=100)


def test_lengths_in_tokens(tokenizer):
    problems = diagrams.make_problems("train", 300)
    responses = {len(tokenizer.encode(problem.response)) + 1 for problem in problems}
    assert min(responses) >= 8 and max(responses) <= 24
    assert len({len(tokenizer.encode(problem.question)) for problem in problems}) == len(diagrams.QUESTIONS)


def test_rows_come_back_from_verls_dataset(dataset, processor, tokenizer):
    from verl.utils.dataset.rl_dataset import RLHFDataset

    config = OmegaConf.create(
        {
            "prompt_key": "prompt",
            "image_key": "images",
            "max_prompt_length": 64,
            "filter_overlong_prompts": True,
            "filter_overlong_prompts_workers": None,
            "cache_dir": str(dataset / "cache"),
        }
    )
    rows = RLHFDataset([str(dataset / "train.parquet")], tokenizer, config, processor=processor)
    problems = diagrams.make_problems("train", 40)
    assert len(rows) == len(problems)
    for index, problem in enumerate(problems):
        row = rows[index]
        assert row["data_source"] == diagrams.DATA_SOURCE
        assert row["reward_model"]["ground_truth"] == problem.answer
        image, text = row["raw_prompt"][0]["content"]
        assert text == {"type": "text", "text": problem.question}
        assert image["type"] == "image"


def test_parquet_holds_the_drawn_board(dataset):
    row = datasets.load_dataset("parquet", data_files=str(dataset / "test.parquet"), split="train")[0]
    problem = diagrams.make_problems("test", 24)[0]
    drawn = np.asarray(Image.open(io.BytesIO(row["images"][0]["bytes"])))
    assert np.array_equal(drawn, problem.pixels())
    assert row["extra_info"]["split"] == "test" and row["extra_info"]["response"] == problem.response


@pytest.fixture(scope="module")
def problems(processor):
    return pretrain.Problems(diagrams.make_problems("train", 12), processor)


def test_fast_images_equal_the_processors(problems, processor):
    boards = [Image.fromarray(problem.pixels()) for problem in diagrams.make_problems("train", 12)]
    expected = processor.image_processor(images=boards, return_tensors="pt")
    images = problems.images(range(12))
    torch.testing.assert_close(images["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)
    assert torch.equal(images["image_grid_thw"], expected["image_grid_thw"])


def test_prompts_equal_those_of_the_processor(problems, processor):
    for index, problem in enumerate(diagrams.make_problems("train", 12)):
        content = [{"type": "image"}, {"type": "text", "text": problem.question}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        expected = processor(text=[text], images=[Image.fromarray(problem.pixels())])["input_ids"][0]
        assert problems.prompts[index] == list(expected)


def test_logits_of_a_batch_equal_those_of_single_rows(problems, tokenizer):
    """Guards the shared positions and the padding of `response_logits`."""
    model = tiny_vlm.build_model(tokenizer, seed=0, hidden_size=64).eval()
    indices = range(6)
    responses = [problems.responses[index][: 3 + index] for index in indices]
    with torch.no_grad():
        together, targets = pretrain.response_logits(model, problems, indices, responses)
        single = []
        for index, response in zip(indices, responses, strict=True):
            input_ids = torch.tensor([problems.prompts[index] + response])
            types = (input_ids == problems.image_token).int()
            output = model(input_ids=input_ids, mm_token_type_ids=types, **problems.images([index]))
            single.append(output.logits[0, -len(response) - 1 : -1])
    assert targets.tolist() == [token for response in responses for token in response]
    torch.testing.assert_close(together, torch.cat(single), rtol=1e-4, atol=1e-4)


def test_accuracy_of_a_random_model_is_zero_and_leaves_the_random_state_alone(problems, tokenizer):
    model = tiny_vlm.build_model(tokenizer, seed=0, hidden_size=64)
    before = torch.random.get_rng_state()
    assert pretrain.greedy_accuracy(model, problems, max_new_tokens=4) == 0.0
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture
def fast_training(monkeypatch):
    """Training that takes no step: the cache and the checks around it are what is tested."""
    trained = []

    def train(recipe, name, train_set, dev_set):
        trained.append(name)
        model = tiny_vlm.build_model(train_set.tokenizer, seed=recipe.seed, hidden_size=32, layers=1, vision_layers=1)
        return model, {"steps": 1, "dev_accuracy": 0.5}

    for size in ("_TRAIN_PROBLEMS", "_DEV_PROBLEMS", "_TEST_PROBLEMS"):
        monkeypatch.setattr(pretrain, size, 4)
    accuracies = {"teacher": 0.95, "student": 0.5}
    monkeypatch.setattr(pretrain, "train", train)
    monkeypatch.setattr(pretrain, "greedy_accuracy", lambda model, problems: accuracies[trained[-1]])
    return trained, accuracies


def test_second_call_trains_nothing_and_changed_code_trains_again(fast_training, tmp_path, monkeypatch):
    trained, _ = fast_training
    first = pretrain.pretrain(tmp_path, side_by_side=False)
    assert trained == ["teacher", "student"]
    assert (
        pretrain.pretrain(tmp_path, side_by_side=False) == first == json.loads((tmp_path / pretrain.RESULT).read_text())
    )
    assert trained == ["teacher", "student"]
    monkeypatch.setattr(pretrain, "fingerprint", lambda: "other code")
    pretrain.pretrain(tmp_path, side_by_side=False)
    assert trained == ["teacher", "student"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [pretrain.RESULT, "student", "teacher"]


@pytest.mark.parametrize(("name", "accuracy"), [("teacher", 0.89), ("student", 0.29), ("student", 0.66)])
def test_models_outside_their_range_are_an_error_and_are_not_taken_from_the_cache(
    fast_training, tmp_path, name, accuracy
):
    _, accuracies = fast_training
    accuracies[name] = accuracy
    with pytest.raises(RuntimeError, match=f"{accuracy:.3f}"):
        pretrain.pretrain(tmp_path, side_by_side=False)
    assert not (tmp_path / pretrain.RESULT).exists()


def test_training_that_does_not_get_there_says_so(problems):
    recipe = dataclasses.replace(pretrain.RECIPES["student"], hidden_size=32, layers=1, batch_size=4, max_steps=2)
    with pytest.raises(RuntimeError, match=r"the student reached a dev accuracy of 0\.000 in 2 steps"):
        pretrain.train(recipe, "student", problems, problems)
