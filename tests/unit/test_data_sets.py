# SPDX-License-Identifier: Apache-2.0
"""The converters: rows with each trap of their sources, the real samples, and the facts that files state."""

import importlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from data_prep import mix
from tests.data_files import ROOT, picture, run_here, write_rows
from verl_gndpo import conversion
from verl_gndpo.conversion import SourceError
from verl_gndpo.conversion.report import UNLICENSED, Report
from verl_gndpo.data_facts import read_facts
from verl_gndpo.doctor.check import Check
from verl_gndpo.doctor.data import check_rewards
from verl_gndpo.doctor.inputs import Inputs
from verl_gndpo.rewards import compute_score
from verl_gndpo.rewards.answer_types import ANSWER_TYPE_OF_SOURCE

REAL = ROOT.parent / "shared" / "data"
SETS = (
    "clevr_count",
    "dynamath",
    "geo3k",
    "geoqa",
    "logicvista",
    "mathverse",
    "mathvision",
    "mathvista",
    "mmk12",
    "openr1_8k",
    "virl39k",
    "wemath",
)


def recipe(name: str) -> conversion.Recipe:
    return importlib.import_module(f"data_prep.{name}").RECIPE


def image(number: int = 0) -> dict:
    return {"bytes": picture(number), "path": None}


# A row of each set in its published form. For sets without a real sample here, the rows follow the sets' cards.
ROWS = {
    "clevr_count": {"images": [image()], "problem": "<image>How many items are there?", "answer": "3"},
    "dynamath": {
        "id": "7",
        "question": "Is the function even? choice: (A) Yes (B) No",
        "image": "image/image7.png",
        "decoded_image": image(),
        "ground_truth": "B",
        "answer_type": "multiple choice",
        "subject": "algebra",
        "knowledge_level": "high school",
    },
    "geo3k": {"images": [image()], "problem": "<image>Find $x$.", "answer": "4 \\frac { 4 } { 11 }"},
    "geoqa": {"image": image(), "problem": "What is angle B?", "solution": "<answer> 145° </answer>"},
    "logicvista": {
        "id": "v1_1",
        "question": "Which belong together? Select from A-D",
        "answer": "A, C",
        "reasoning": "...",
        "skill": ["inductive"],
        "image": image(),
        "liscenced": "true",
    },
    "mathverse": {
        "sample_index": "9",
        "problem_index": "3",
        "problem_version": "Text Dominant",
        "question": "What is angle CED?\nChoices:\nA:40°\nB:60°\nC:120°\nD:140°",
        "image": image(),
        "answer": "D",
        "question_type": "multi-choice",
        "metadata": {"subject": "Plane Geometry"},
        "query_wo": "...",
        "query_cot": "...",
    },
    "mathvision": {
        "id": "1050",
        "question": "Which one is it?\n<image1>",
        "options": ["I and III", "all", "none"],
        "image": "images/1050.jpg",
        "decoded_image": image(),
        "answer": "B",
        "solution": None,
        "level": 3,
        "subject": "topology",
    },
    "mathvista": {
        "pid": "3",
        "question": "How many degrees has the angle?",
        "image": "images/3.jpg",
        "decoded_image": image(),
        "choices": ["135°", "140°", "145°", "150°"],
        "unit": None,
        "precision": None,
        "answer": "145°",
        "question_type": "multi_choice",
        "answer_type": "text",
        "metadata": {"task": "geometry problem solving"},
    },
    "mmk12": {"id": "2a0d", "question": "How long is AB?", "answer": "$$6$$", "subject": "math", "image": image()},
    "openr1_8k": {
        "image": image(),
        "problem": "How long is AB?",
        "solution": "<think>3 + 4 <answer>?</answer></think><answer> 7 </answer>",
        "original_question": "...",
        "original_answer": "The answer is 7",
    },
    "virl39k": {
        "qid": "q-1",
        "question": "<image>What is the area?",
        "answer": "\\boxed{\\frac{1}{2}}",
        "image": ["images/a.png"],
        "category": "(GradeSchool) Geometric",
        "source": "Processed",
        "PassRate_32BTrained": 0.5,
        "PassRate_7BBase": -1.0,
    },
    "wemath": {
        "ID": "2steps_247",
        "split": "testmini",
        "knowledge concept": "Area of Rectangles",
        "question": "What is its area?",
        "option": "A. 80°;B. 100° ;C. a; b;D. 270°; E. No correct answer",
        "answer": "C",
        "key": "2steps_2",
        "image_path": image(),
    },
}


def source_file(name: str, folder: Path, rows: list[dict]) -> Path:
    path = write_rows(folder / f"{recipe(name).default_split}.parquet", rows)
    if name == "virl39k":
        with zipfile.ZipFile(folder / "images.zip", "w") as archive:
            for number, letter in enumerate("abc"):
                archive.writestr(f"images/{letter}.png", picture(number))
    return path


def convert(name: str, folder: Path, rows: list[dict], **options) -> tuple[list[dict], Report]:
    source = source_file(name, folder / "source", rows)
    options = {"skip_verify": True, "max_dropped": 1.0} | options
    (report,) = conversion.convert(str(source), folder / "out", recipe(name), **options)
    return pq.read_table(folder / "out" / f"{report.split}.parquet").to_pylist(), report


def one(name: str, folder: Path, **changes) -> dict:
    (row,), _ = convert(name, folder, [ROWS[name] | changes])
    info = row["extra_info"]
    return {
        "question": info["question"],
        "answer": row["reward_model"]["ground_truth"],
        "type": info["answer_type"],
        "choices": info["choices"],
        "tolerance": info["tolerance"],
        "id": info["id"],
        "meta": json.loads(info["meta"]),
        "images": len(row["images"]),
    }


def dropped(name: str, folder: Path, **changes) -> dict[str, int]:
    _, report = convert(name, folder, [ROWS[name], ROWS[name] | changes])
    return report.reasons


@pytest.mark.parametrize("name", SETS)
def test_a_row_of_each_set_comes_back_from_verl(name, tmp_path):
    rows, report = convert(name, tmp_path, [ROWS[name]], skip_verify=False)
    assert (report.read, report.written, report.reasons) == (1, 1, {})
    (row,) = rows
    assert row["data_source"] == recipe(name).hub_id
    assert row["prompt"][-1]["content"].count("<image>") == len(row["images"]) == 1
    assert row["extra_info"]["question"] in row["prompt"][-1]["content"]
    assert row["extra_info"]["id"].startswith(recipe(name).id_prefix or name)
    assert report.prompt_tokens[0] > report.image_tokens[0] > 0


@pytest.mark.parametrize("name", SETS)
def test_every_file_states_the_facts_of_its_set(name, tmp_path):
    convert(name, tmp_path, [ROWS[name]])
    (path,) = (tmp_path / "out").glob("*.parquet")
    metadata = pq.read_schema(path).metadata
    (facts,) = read_facts(metadata).sets
    declared = recipe(name)
    assert (facts.name, facts.hub_id, facts.license) == (name, declared.hub_id, declared.license)
    assert (facts.validation_only, facts.answer_types) == (declared.validation_only, declared.answer_types)
    assert (facts.split, facts.prompt_style) == (path.stem, "think_boxed")
    assert b"huggingface" in metadata


def test_every_set_has_a_grader():
    assert {recipe(name).hub_id for name in SETS} == set(ANSWER_TYPE_OF_SOURCE)
    assert sorted(SETS) == sorted(path.stem for path in (ROOT / "data_prep").glob("[a-z]*.py") if path.stem != "mix")


def test_all_sets_share_one_schema(tmp_path):
    """verl concatenates the files of data.train_files, and refuses when they differ."""
    schemas = set()
    for name in SETS:
        convert(name, tmp_path / name, [ROWS[name]])
        (path,) = (tmp_path / name / "out").glob("*.parquet")
        schemas.add(str(pq.read_schema(path).remove_metadata()))
    assert len(schemas) == 1


# Rewards


def scores(row: dict, response: str) -> dict[str, float]:
    return compute_score(row["data_source"], response, row["reward_model"]["ground_truth"], row["extra_info"])


@pytest.mark.parametrize("name", SETS)
def test_the_grader_of_a_set_accepts_what_the_converter_writes(name, tmp_path):
    (row,), _ = convert(name, tmp_path, [ROWS[name]])
    truth = row["reward_model"]["ground_truth"]
    assert scores(row, f"<think>So.</think> \\boxed{{{truth}}}") == {"score": 1.0, "acc": 1.0, "format": 1.0}
    assert scores(row, "<think>So.</think> \\boxed{-77}")["acc"] == 0.0
    assert scores(row, "")["score"] == 0.0
    if row["extra_info"]["choices"] and len(truth) == 1:
        text = row["extra_info"]["choices"][ord(truth) - ord("A")]
        assert scores(row, f"\\boxed{{{text}}}")["acc"] == 1.0


# geo3k


@pytest.mark.parametrize("answer", ["4 \\frac { 4 } { 11 }", "A D and B E", "10 \\pi", "18.8"])
def test_geo3k_keeps_its_answers_as_they_are(answer, tmp_path):
    assert one("geo3k", tmp_path, answer=answer)["answer"] == answer


# mmk12


@pytest.mark.parametrize(
    ("answer", "bare", "kind"),
    [
        ("$$6$$", "6", "math"),
        ("25°.", "25°", "math"),
        ("$\\frac{2}{5}$.", "\\frac{2}{5}", "math"),
        ("$$A$$", "A", "choice"),
        ("120\n70\n12\n6", "120\n70\n12\n6", "list"),
        ("1;10.5", "1;10.5", "list"),
        ("a proof that goes on for far longer than an answer would;\nand on", None, "math"),
        ("$a$ and $b$", "$a$ and $b$", "math"),
        ("2n+1.", "2n+1", "math"),
    ],
)
def test_mmk12_answers_are_unwrapped(answer, bare, kind, tmp_path):
    row = one("mmk12", tmp_path, answer=answer)
    assert (row["answer"], row["type"]) == (answer if bare is None else bare, kind)


def test_mmk12_test_split_is_multiple_choice(tmp_path):
    question = "How long is AB?\nA. $$10.5$$\nB.2.3.\nC. 5 cm\nD. none"
    row = one("mmk12", tmp_path, question=question, answer="B")
    assert (row["type"], row["choices"]) == ("choice", ["$$10.5$$", "2.3.", "5 cm", "none"])
    assert row["question"] == f"<image>{question}" and row["id"] == "mmk12-train-2a0d"


# virl39k


def test_virl39k_takes_its_images_from_the_zip_archive(tmp_path):
    rows, report = convert(
        "virl39k",
        tmp_path,
        [
            ROWS["virl39k"] | {"question": "Is <image> like <image>?", "image": ["images/b.png", "images/c.png"]},
            ROWS["virl39k"]
            | {"qid": "q-2", "question": "Is it like <image>?", "image": ["images/b.png", "images/c.png"]},
            ROWS["virl39k"] | {"qid": "q-3", "image": ["images/missing.png"]},
            ROWS["virl39k"] | {"qid": "q-4", "image": [], "question": "What is 2 + 2?"},
            ROWS["virl39k"] | {"qid": "q-5", "answer": "\\boxed{\\left\\{\\eqalign{x}\\right."},
        ],
    )
    assert [[entry["bytes"] for entry in row["images"]] for row in rows] == [[picture(1), picture(2)]] * 2
    assert rows[1]["extra_info"]["question"] == "<image>Is it like <image>?"
    assert report.repaired_by.rows == {"answer unwrapped": 2, "placeholder added": 1}
    assert report.dropped_by.first_ids == {
        "image file is missing": ["virl39k-train-q-3"],
        "no image": ["virl39k-train-q-4"],
        "box of the answer is not closed": ["virl39k-train-q-5"],
    }


def test_virl39k_boxes_are_opened(tmp_path):
    assert one("virl39k", tmp_path)["answer"] == "\\frac{1}{2}"
    assert one("virl39k", tmp_path)["meta"]["PassRate_32BTrained"] == 0.5


def test_virl39k_is_found_under_the_name_that_its_file_has(tmp_path):
    source_file("virl39k", tmp_path / "source", [ROWS["virl39k"]]).rename(tmp_path / "source" / "39Krelease.parquet")
    (report,) = conversion.convert(str(tmp_path / "source"), tmp_path / "out", recipe("virl39k"), skip_verify=True)
    assert (report.split, report.written) == ("train", 1)


def test_virl39k_is_fetched_file_by_file(tmp_path, monkeypatch):
    """datasets.load_dataset takes the archive for the data."""
    import huggingface_hub

    source_file("virl39k", tmp_path / "hub", [ROWS["virl39k"]]).rename(tmp_path / "hub" / "39Krelease.parquet")
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **_: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (report,) = conversion.convert(None, tmp_path / "out", recipe("virl39k"), skip_verify=True)
    assert report.written == 1
    assert (asked["name"], asked["repo_type"]) == ("TIGER-Lab/ViRL39K", "dataset")
    assert set(asked["allow_patterns"]) == {"39Krelease.parquet", "images.zip"}


# geoqa, openr1_8k


@pytest.mark.parametrize("name", ["geoqa", "openr1_8k"])
def test_the_answer_stands_in_the_last_tag_of_the_solution(name, tmp_path):
    assert one(name, tmp_path)["answer"] == {"geoqa": "145°", "openr1_8k": "7"}[name]
    assert dropped(name, tmp_path / "no", solution="The answer is 7.") == {"solution has no <answer>": 1}
    assert dropped(name, tmp_path / "open", solution="<answer> 7") == {"solution has no <answer>": 1}
    assert dropped(name, tmp_path / "none", solution=None) == {"no answer": 1}
    assert dropped(name, tmp_path / "empty", solution="<answer> </answer>") == {"no answer": 1}


# mathvision


def test_mathvision_several_placeholders_for_one_file(tmp_path):
    row = one("mathvision", tmp_path, question="A necklace:\n<image1>\nWhich is the same?\n<image2>")
    assert row["question"].startswith(
        "<image>A necklace:\n[image 1]\nWhich is the same?\n[image 2]\nChoices:\n(A) I and"
    )
    assert row["images"] == 1


def test_mathvision_a_question_that_names_no_image(tmp_path):
    rows, report = convert("mathvision", tmp_path, [ROWS["mathvision"] | {"question": "Which one is it?"}])
    assert rows[0]["extra_info"]["question"].startswith("<image>Which one is it?")
    assert report.repaired_by.rows == {"placeholder added": 1}


def test_mathvision_choices(tmp_path):
    row = one("mathvision", tmp_path)
    assert row["question"].endswith("Choices:\n(A) I and III\n(B) all\n(C) none")
    assert (row["answer"], row["type"], row["choices"]) == ("B", "choice", ["I and III", "all", "none"])
    for drawn in (["A", "B", "C", "D", "E"], ["(A)", "(B)", "(C)"]):
        row = one("mathvision", tmp_path / drawn[0], options=drawn)
        assert "Choices" not in row["question"] and (row["type"], row["choices"]) == ("choice", [])
    row = one("mathvision", tmp_path / "free", options=[], answer="12")
    assert (row["type"], row["choices"], row["id"]) == ("math", [], "mathvision-test-1050")


@pytest.mark.parametrize(
    "options",
    [[f"<image{n}>" for n in range(2, 7)], ["(A) <image2>", "(B) <image3>"], [""] * 5, ["<image>", "<image>"]],
)
def test_mathvision_options_that_are_parts_of_the_picture(options, tmp_path):
    row = one("mathvision", tmp_path, options=options)
    assert (row["answer"], row["type"], row["choices"], row["images"]) == ("B", "choice", [], 1)
    assert row["question"] == "<image>Which one is it?\n" or row["question"] == "Which one is it?\n<image>"


def test_mathvision_letters_that_are_no_labels_are_listed(tmp_path):
    row = one("mathvision", tmp_path, options=["K", "E", "N", "G", "U"], answer="C")
    assert row["choices"] == ["K", "E", "N", "G", "U"] and row["question"].endswith("(C) N\n(D) G\n(E) U")


def test_mathvision_a_picture_that_is_the_whole_question(tmp_path):
    row = one("mathvision", tmp_path, question="<image1>", options=[], answer="15")
    assert (row["question"], row["answer"]) == ("<image>The problem is written in the picture. Solve it.", "15")


# mathverse


def test_mathverse_vision_only_has_its_question_in_the_picture(tmp_path):
    row = one("mathverse", tmp_path, problem_version="Vision Only", question="")
    assert row["question"].startswith("<image>The problem is written in the picture")
    assert dropped("mathverse", tmp_path / "other", question="") == {"no question": 1}


def test_mathverse_choices_are_in_the_question(tmp_path):
    row = one("mathverse", tmp_path)
    assert row["question"].count("Choices") == 1
    assert (row["type"], row["choices"]) == ("choice", ["40°", "60°", "120°", "140°"])
    assert row["meta"] == {"problem_index": "3", "problem_version": "Text Dominant", "subject": "Plane Geometry"}
    row = one("mathverse", tmp_path / "free", question="Find d.", answer="$h=58$")
    assert (row["answer"], row["type"]) == ("h=58", "math")


def test_mathverse_choices_in_a_column_of_their_own(tmp_path):
    row = one("mathverse", tmp_path, question="Which?", choices=["A:$Q=1$", "B:$Q=2$"], answer="B")
    assert row["question"] == "<image>Which?\nChoices:\n(A) $Q=1$\n(B) $Q=2$"
    assert row["choices"] == ["$Q=1$", "$Q=2$"]


# mathvista


def test_mathvista_cannot_be_trained_on(tmp_path, capsys):
    source = source_file("mathvista", tmp_path, [ROWS["mathvista"]])
    out = tmp_path / "out"
    arguments = ["--local_dataset_path", str(source), "--local_save_dir", str(out), "--skip_verify"]
    assert conversion.main(recipe("mathvista"), "", [*arguments, "--split", "train"]) == 1
    assert "evaluation only" in capsys.readouterr().err
    source.rename(tmp_path / "train.parquet")
    assert conversion.main(recipe("mathvista"), "", ["--local_dataset_path", str(tmp_path), *arguments[2:]]) == 1
    assert "evaluation only" in capsys.readouterr().err
    assert not out.exists()


def test_mathvista_names_the_letter_of_a_choice(tmp_path):
    row = one("mathvista", tmp_path)
    assert (row["answer"], row["type"], row["choices"][2]) == ("C", "choice", "145°")
    assert row["question"].endswith("Choices:\n(A) 135°\n(B) 140°\n(C) 145°\n(D) 150°")
    assert dropped("mathvista", tmp_path / "none", answer="9") == {"answer names no choice": 1}


def test_mathvista_equal_choices_are_listed_once(tmp_path):
    """Whichever of the two the model names, it names the right one."""
    row = one("mathvista", tmp_path, choices=["9", "12", "18", "18"], answer="18")
    assert (row["answer"], row["choices"]) == ("C", ["9", "12", "18"])
    assert row["question"].endswith("Choices:\n(A) 9\n(B) 12\n(C) 18")
    row = one("mathvista", tmp_path / "other", choices=["9", "9", "18"], answer="18")
    assert (row["answer"], row["choices"]) == ("B", ["9", "18"])


@pytest.mark.parametrize(
    ("kind", "precision", "answer", "graded", "tolerance"),
    [
        ("float", 1.0, "1.2", "number", 0.05),
        ("integer", None, "1000", "number", 0.0),
        ("list", None, "[0, 1]", "list", 0.0),
    ],
)
def test_mathvista_free_answers(kind, precision, answer, graded, tolerance, tmp_path):
    row = one(
        "mathvista", tmp_path, choices=None, question_type="free_form", answer_type=kind, precision=precision,
        answer=answer, unit="g",
    )  # fmt: skip
    assert (row["answer"], row["type"], row["tolerance"]) == (answer, graded, tolerance)
    assert "(Unit: g)" in row["question"] and row["choices"] == []


@pytest.mark.parametrize("name", ["Train", "training", "train_v2"])
def test_mathvista_by_another_name_cannot_be_trained_on_either(name, tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([ROWS["mathvista"]])
    datasets.DatasetDict({name: rows}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(SourceError, match="evaluation only"):
        conversion.convert(str(tmp_path / "saved"), tmp_path / "out", recipe("mathvista"), skip_verify=True)


def test_mathvista_precision_may_be_nan_or_text(tmp_path):
    for precision, tolerance in ((float("nan"), 0.0), ("2.0", 0.005)):
        changes = {"precision": precision, "question_type": "free_form", "answer_type": "float", "choices": None}
        assert one("mathvista", tmp_path / str(precision), answer="1.25", **changes)["tolerance"] == tolerance


# wemath, logicvista, dynamath


def test_wemath_options_are_one_string(tmp_path):
    row = one("wemath", tmp_path)
    assert (row["answer"], row["choices"]) == ("C", ["80°", "100°", "a; b", "270°", "No correct answer"])
    assert row["id"] == "wemath-testmini-2steps_247-2steps_2"  # the steps of a problem share its ID


@pytest.mark.parametrize(
    "option", ["A.80°;B.100°;C.1/2", "A. 80°；B．100°;  C：x", "A. Angle A: 30; B. Angle B: 40;C. (A)"]
)
def test_wemath_options_without_blanks(option, tmp_path):
    assert len(one("wemath", tmp_path, option=option)["choices"]) == 3


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("A. Yes, around point ;O.;B. No, around ;P.;C. No.; F. No correct answer", 4 * [None]),
        ("A. It turns into shape ;C.; B. It stays ;C.; C. It is not ;C.; D. No correct answer", 4 * [None]),
        ("A. east to B, north to ;C.  ;B. west to ;C.  ;C. south ;D. No correct answer", 4 * [None]),
        ("A. 45° B. 60° ;C. 120°; D. No correct answer", ["45°", "60°", "120°", "No correct answer"]),
        ("A. 6cm, 2cm B. 1cm, 3cm ;C. 1cm, 4cm", ["6cm, 2cm", "1cm, 3cm", "1cm, 4cm"]),
        ("A. 4 B. 3 C. 2 ;D. 1", ["4", "3", "2", "1"]),
        ("A. angle ∠AB;E.; B. angle ∠AB;C.;C. none", ["angle ∠ABE.", "angle ∠ABC.", "none"]),
        ("A. 4\nB. 3\nC. 2", ["4", "3", "2"]),
    ],
)
def test_wemath_labels_are_found_by_the_next_letter(option, choices, tmp_path):
    """Its own text holds labels that are names of points, and lacks separators."""
    row = one("wemath", tmp_path, option=option, answer="B")
    assert len(row["choices"]) == len(choices) and not any(";" in choice for choice in row["choices"])
    assert choices in (row["choices"], 4 * [None])
    assert row["question"].count("\n(") == len(choices)


@pytest.mark.parametrize(
    "option",
    [
        "80;90",
        "A. 80",
        "A. 1; C. 2; D. 3",
        "A. 1; B. 2; D. 3",
        "B. 1; A. 2",
        "A. 1;B.;C. 3",
        "A. 1; B. 2; A. 3",
        "",
        None,
    ],
)
def test_wemath_options_that_cannot_be_separated(option, tmp_path):
    reason = "row is not as the set has it" if option is None else "options cannot be separated"
    assert dropped("wemath", tmp_path, option=option) == {reason: 1}
    assert dropped("wemath", tmp_path / "beyond", answer="F") == {"answer names no choice": 1}


def test_logicvista_licence_flags(tmp_path, capsys):
    flagged = [
        ROWS["logicvista"] | {"id": f"v1_{n}", "liscenced": flag} for n, flag in enumerate(("true", "false", ""))
    ]
    rows, report = convert("logicvista", tmp_path, flagged, max_dropped=0.0)
    assert [row["extra_info"]["id"] for row in rows] == ["logicvista-test-v1_0"]
    assert report.reasons == {UNLICENSED: 2}
    rows, report = convert("logicvista", tmp_path / "all", flagged, include_unlicensed=True)
    assert (len(rows), report.reasons) == (3, {})
    renamed = ROWS["logicvista"] | {"licensed": "true"}
    del renamed["liscenced"]
    assert len(convert("logicvista", tmp_path / "renamed", [renamed])[0]) == 1


@pytest.mark.parametrize(
    ("answer", "kind"), [("A, C", "multi_choice"), ("B;D", "multi_choice"), ("C", "choice"), ("3", "math")]
)
def test_logicvista_answers(answer, kind, tmp_path):
    assert one("logicvista", tmp_path, answer=answer)["type"] == kind


@pytest.mark.parametrize(
    ("kind", "answer", "graded", "tolerance"),
    [
        ("float", "24.9356", "number", 1e-3),
        ("multiple choice", "B", "choice", 0.0),
        *[("text", truth, "text", 0.0) for truth in ("5:0", "DE", "Fig 2", "even", "A, C")],
        *[("text", truth, "math", 0.0) for truth in ("y = 4", "(3.000, -1.000)", "x^2 + sin 2x", "-\\frac{1}{2}")],
    ],
)
def test_dynamath_answer_type_decides_the_grader(kind, answer, graded, tolerance, tmp_path):
    row = one("dynamath", tmp_path, answer_type=kind, ground_truth=answer)
    assert (row["type"], row["tolerance"]) == (graded, tolerance)
    assert row["choices"] == (["Yes", "No"] if graded == "choice" else [])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("logicvista", {"question": "Is it? Select from A, B and C. (A) True (B)False (C)Insufficient", "answer": "B"}),
        ("dynamath", {"question": "Is the function even? choice: (A) Yes (B) No ", "ground_truth": "B"}),
        ("dynamath", {"question": "Which? A) one B) two", "ground_truth": "B"}),
        ("mmk12", {"question": "Which?\nA.1\nB.2\nC.3 cm", "answer": "B"}),
        ("geo3k", {"problem": "<image>Find x"}),
    ],
)
@pytest.mark.parametrize("style", ["think_boxed", "boxed"])
def test_the_instruction_does_not_continue_the_question(name, changes, style, tmp_path):
    (row,), _ = convert(name, tmp_path, [ROWS[name] | changes], prompt_style=style)
    text, _, instruction = row["prompt"][0]["content"].rpartition("\n\n")
    assert text == row["extra_info"]["question"] == text.rstrip()
    assert "\\boxed" in instruction and "\n" not in instruction


ROUNDED = {"answer_type": "float", "ground_truth": "24.9356"}


def test_dynamath_asks_for_the_decimals_that_its_grader_wants(tmp_path):
    (row,), _ = convert("dynamath", tmp_path, [ROWS["dynamath"] | ROUNDED | {"question": "What is the volume?"}])
    assert (
        "What is the volume?\nIf the answer is not a whole number, give it to 3 decimal places.\n\n"
        in (row["prompt"][0]["content"])
    )
    assert scores(row, "\\boxed{24.94}")["acc"] == 0.0 and scores(row, "\\boxed{24.936}")["acc"] == 1.0
    choice = one("dynamath", tmp_path / "choice")
    assert "decimal" not in choice["question"]


@pytest.mark.parametrize(
    ("precision", "wanted"), [("1", "give it to 1 decimal place."), ("2", "give it to 2 decimal places."), (None, "")]
)
def test_mathvista_asks_for_the_stated_precision(precision, wanted, tmp_path):
    changes = {"question_type": "free_form", "answer_type": "float", "choices": None, "precision": precision}
    row = one("mathvista", tmp_path, answer="1.25", **changes)
    assert row["question"].endswith(wanted) and ("decimal" in row["question"]) == bool(wanted)


@pytest.mark.parametrize(
    ("question", "stated"),
    [
        ("Round your answer to two decimal places.", True),
        ("What is it, rounded to the nearest tenth?", True),
        ("Give three decimals.", True),
        ("What is the decimal value of 0011110?", False),
        ("How many seats has the round table?", False),
        ("Which town is nearest to A?", False),
    ],
)
def test_a_precision_that_the_question_states_is_not_contradicted(question, stated, tmp_path):
    row = one("dynamath", tmp_path, question=question, **ROUNDED)
    assert ("3 decimal places" in row["question"]) == (not stated)


def test_dynamath_files_of_the_hub(tmp_path):
    """sample3-00000-of-00003 is all of its split, not one file of three."""
    source = source_file("dynamath", tmp_path / "hub" / "data", [ROWS["dynamath"]])
    source.rename(source.with_name("sample3-00000-of-00003.parquet"))
    (report,) = conversion.convert(str(tmp_path / "hub"), tmp_path / "out", recipe("dynamath"), skip_verify=True)
    assert (report.split, report.written) == ("sample_variant3", 1)
    assert dropped("dynamath", tmp_path, answer_type="essay") == {"answer type is unknown": 1}


# The real samples

SAMPLES = {
    "dynamath": ("dynamath", 32),
    "logicvista": ("logicvista", 26),
    "mathverse": ("mathverse", 40),
    "mathvision": ("mathvision", 32),
    "mmk12": ("mmk12", 42),
    "wemath": ("wemath", 32),
}


@pytest.mark.skipif(not REAL.is_dir(), reason="the real samples lie outside the repository")
@pytest.mark.parametrize("name", SAMPLES)
def test_real_samples_lose_no_row(name, tmp_path):
    folder, size = SAMPLES[name]
    (report,) = conversion.convert(str(REAL / folder), tmp_path, recipe(name), max_dropped=0.0)
    assert (report.read, report.written) == (size, size)
    (path,) = tmp_path.glob("*.parquet")
    source = pq.read_table(next((REAL / folder).glob("*.parquet"))).to_pylist()
    column = "ground_truth" if name == "dynamath" else "answer"
    rows = pq.read_table(path).to_pylist()
    assert [row["extra_info"]["answer"] for row in rows] == [row[column].strip() for row in source]
    assert len({row["extra_info"]["id"] for row in rows}) == size
    for row in rows:
        info = row["extra_info"]
        assert row["prompt"][0]["content"].count("<image>") == 1
        if info["answer_type"] == "choice" and info["choices"]:
            assert ord(row["reward_model"]["ground_truth"]) - ord("A") < len(info["choices"])
        assert scores(row, f"\\boxed{{{row['reward_model']['ground_truth']}}}")["acc"] == 1.0, info
        # Of an explanation, the answer is what it ends with.
        if len(info["answer"]) < 200:
            assert scores(row, f"\\boxed{{{info['answer']}}}")["acc"] == 1.0, info
        wrong = "Z" if info["answer_type"] in ("choice", "multi_choice") else "-771.5"
        assert scores(row, f"\\boxed{{{wrong}}}")["acc"] == 0.0, info
    kinds = {info["answer_type"] for info in (row["extra_info"] for row in rows)}
    assert (
        kinds
        == {
            "dynamath": {"number", "choice", "text"},
            "logicvista": {"choice"},
            "mathverse": {"math", "choice"},
            "mathvision": {"math", "choice"},
            "mmk12": {"math", "choice", "list"},
            "wemath": {"choice"},
        }[name]
    )


# docs/extending/data_set.md


def run_my_set(folder: Path, code: str) -> subprocess.CompletedProcess:
    """Run the page's converter, or a changed one, as a plain script on a source of two rows."""
    (folder / "my_set.py").write_text(code)
    row = {"uid": "u1", "text": "Which?", "solution": "$B$", "figure": image(), "options": ["one", "two"], "level": "a"}
    write_rows(folder / "source.parquet", [row, row | {"level": "draft"}])
    command = [sys.executable, "my_set.py", "--local_dataset_path", "source.parquet", "--local_save_dir", "out"]
    return run_here([*command, "--max_dropped", "0.5", "--skip_verify"], folder)


@pytest.fixture(scope="session")
def page() -> list[str]:
    """The code blocks of the page: the converter, the line for validation only, and the reading of the facts."""
    text = (ROOT / "docs" / "extending" / "data_set.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for language, code in blocks if language != "bash"]


def refusals(train: Path, val: Path) -> list[Check]:
    """Return what the checks before a run have against a pair of files."""
    config = OmegaConf.create(
        {
            "algorithm": {"adv_estimator": "grpo"},
            "data": {"train_files": str(train), "val_files": str(val)},
            "reward": {"custom_reward_function": {"path": "pkg://verl_gndpo.rewards", "name": "compute_score"}},
        }
    )
    return [check for check in check_rewards(Inputs(config)) if check.status != "ok"]


def test_a_training_file_with_facts_of_another_version_is_refused(tmp_path):
    schema = pa.schema([("data_source", pa.string())], metadata={"verl_gndpo": '{"version": 2}'})
    path = write_rows(tmp_path / "train.parquet", [{"data_source": "hiyouga/geometry3k"}], schema)
    (refusal,) = refusals(train=path, val=path)
    assert refusal.status == "error" and "version 2, expected 1" in refusal.detail and str(path) in refusal.detail
    assert refusal.remedy == "convert the set again"


def test_the_converter_shown_in_the_docs_works(page, tmp_path, monkeypatch, capsys):
    converter, _, reading = page
    assert len(converter.splitlines()) <= 45
    run = run_my_set(tmp_path, converter)
    assert run.returncode == 0, run.stderr
    assert "dropped 1 x problem is a draft: my_set-train-u1.2" in run.stdout
    (written,) = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert written["extra_info"]["id"] == "my_set-train-u1" and scores(written, "\\boxed{(B)}")["acc"] == 1.0
    assert written["prompt"][0]["content"].startswith("<image>Which?\nChoices:\n(A) one\n(B) two")
    monkeypatch.chdir(tmp_path / "out")
    exec(reading, {})
    assert capsys.readouterr().out == "me/my_set CC BY 4.0 training allowed\n"


def test_a_new_set_for_validation_only_is_refused_for_training_by_its_own_declaration(page, tmp_path, monkeypatch):
    """Nothing but the converter mentions the set: mix and the checks before a run read the reason from its file."""
    converter, line, _ = page
    first = "RECIPE = Recipe(\n"
    refused = run_my_set(tmp_path, converter.replace(first, first + line))
    assert refused.returncode == 1 and "its authors allow it for evaluation only" in refused.stderr
    run = run_my_set(tmp_path, converter.replace(first, f'{first}{line}    default_split="test",\n'))
    assert run.returncode == 0, run.stderr
    test = tmp_path / "out" / "test.parquet"
    with pytest.raises(SourceError, match="must not be trained on: its authors allow it for evaluation only"):
        mix.mix([test], tmp_path / "mixed")
    convert("geo3k", tmp_path / "geo3k", [ROWS["geo3k"]])
    geo3k = tmp_path / "geo3k" / "out" / "train.parquet"
    mix.mix([geo3k], tmp_path / "mixed", val=[test])
    assert refusals(train=geo3k, val=test) == []
    for name in (test, tmp_path / "mixed" / "val.parquet"):
        (refusal,) = refusals(train=name, val=test)
        assert "me/my_set" in refusal.detail and "its authors allow it for evaluation only" in refusal.detail
        assert "data.val_files" in refusal.remedy
