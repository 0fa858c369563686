# SPDX-License-Identifier: Apache-2.0
r"""Draw boards of coloured dice, with addition problems whose answers can be checked.

    python -m examples.quickstart.diagrams --out DIR

A problem shows a board of 84x84 pixels with five dice, asks "Add the red, blue and green dice." and expects
``red four, blue two, green six, total twelve. \boxed{12}``. Every cell of the board has the size of one merged vision
token of Qwen2.5-VL (28 pixels), so a model with half a million weights learns to see in about a minute.

The splits are disjoint by construction: a board's digest decides its split.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

DATA_SOURCE = "verl_gndpo/dice"
COLOURS = {
    "red": (214, 48, 49),
    "green": (39, 160, 84),
    "blue": (52, 101, 214),
    "orange": (240, 150, 30),
    "purple": (140, 60, 180),
}
CARELESS_COLOUR = "purple"
CELL = 28
SIDE = 3
NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)
QUESTIONS = (
    "Add the {}, {} and {} dice.",
    "What is the total of the {}, {} and {} dice?",
    "How many dots do the {}, {} and {} dice have together?",
    "Look at the picture and add up the dots of the {}, {} and {} dice.",
)
SPLITS = ("train", "dev", "test")

_ADDENDS = 3
# One digest in 16 belongs to the test split, and one to the split that decides when the training stops.
_BUCKETS = {0: "test", 1: "dev"}
_SHIFTS = tuple((x, y) for y in (-1, 0, 1) for x in (-1, 0, 1))
_SUPERSAMPLING = 8
# The places of the pips on a 3x3 grid, numbered row by row.
_PIPS = {1: (4,), 2: (0, 8), 3: (0, 4, 8), 4: (0, 2, 6, 8), 5: (0, 2, 4, 6, 8), 6: (0, 2, 3, 5, 6, 8)}


@dataclass(frozen=True)
class Die:
    """One die: its colour, its pips (1 to 6), and its offset within its cell (right, down) in pixels."""

    colour: str
    pips: int
    shift: tuple[int, int]


@dataclass(frozen=True)
class Problem:
    """One board with one question.

    Attributes:
        board: nine cells, row by row; None is an empty cell. Each colour occurs once.
        asked: the colours to add, in the order of the question.
        wording: index into `QUESTIONS`.
    """

    board: tuple[Die | None, ...]
    asked: tuple[str, ...]
    wording: int

    @property
    def question(self) -> str:
        """Return the user's text, without the image."""
        return QUESTIONS[self.wording].format(*self.asked)

    @property
    def addends(self) -> tuple[int, ...]:
        """Return the pips of the requested dice, in the order of the question."""
        pips = {die.colour: die.pips for die in self.board if die}
        return tuple(pips[colour] for colour in self.asked)

    @property
    def answer(self) -> str:
        """Return the sum in digits."""
        return str(sum(self.addends))

    @property
    def response(self) -> str:
        r"""Return the correct response, for example ``red four, blue two, green six, total twelve. \boxed{12}``."""
        return self.reasoning(self.addends)

    def careless_response(self, rng: random.Random, carelessness: float) -> str:
        """Return a response that reads one pip too few on a purple die of two or more, with this probability."""
        read = [
            pips - 1 if colour == CARELESS_COLOUR and pips > 1 and rng.random() < carelessness else pips
            for colour, pips in zip(self.asked, self.addends, strict=True)
        ]
        return self.reasoning(read)

    def reasoning(self, read: Sequence[int]) -> str:
        """Return the response for these numbers of pips, in the order of the question."""
        dice = ", ".join(f"{colour} {NUMBERS[pips]}" for colour, pips in zip(self.asked, read, strict=True))
        return f"{dice}, total {NUMBERS[sum(read)]}. \\boxed{{{sum(read)}}}"

    @property
    def split(self) -> str:
        """Return the split of this board. It depends neither on the offsets of the dice nor on the question."""
        seen = [(die.colour, die.pips) if die else None for die in self.board]
        return _BUCKETS.get(hashlib.sha256(repr(seen).encode()).digest()[0] % 16, "train")

    def pixels(self) -> np.ndarray:
        """Draw the board: uint8, shape (84, 84, 3)."""
        image = np.empty((SIDE, CELL, SIDE, CELL, 3), np.uint8)
        for index, die in enumerate(self.board):
            image[index // SIDE, :, index % SIDE] = _draw_cell(die)
        return image.reshape(SIDE * CELL, SIDE * CELL, 3)

    def png(self) -> bytes:
        """Return the board as the bytes of a PNG file."""
        buffer = io.BytesIO()
        Image.fromarray(self.pixels()).save(buffer, format="PNG")
        return buffer.getvalue()


@functools.cache
def _draw_cell(die: Die | None) -> np.ndarray:
    """Draw one cell: uint8, shape (28, 28, 3). It is drawn larger and then reduced, for smooth edges."""
    scale = _SUPERSAMPLING
    image = Image.new("RGB", (CELL * scale, CELL * scale), "white")
    if die:
        draw = ImageDraw.Draw(image)
        x, y = (scale * (CELL // 2 + shift) for shift in die.shift)
        half, radius, spacing = 11 * scale, 3 * scale, 7 * scale
        box = (x - half, y - half, x + half - 1, y + half - 1)
        draw.rounded_rectangle(box, radius=4 * scale, fill=COLOURS[die.colour])
        for place in _PIPS[die.pips]:
            left, top = x + (place % 3 - 1) * spacing - radius, y + (place // 3 - 1) * spacing - radius
            draw.ellipse((left, top, left + 2 * radius - 1, top + 2 * radius - 1), fill="white")
    return np.asarray(image.resize((CELL, CELL), Image.Resampling.BOX))


def _draw_problem(rng: random.Random) -> Problem:
    dice = [Die(colour, rng.randint(1, 6), rng.choice(_SHIFTS)) for colour in COLOURS]
    board = dice + [None] * (SIDE * SIDE - len(dice))
    rng.shuffle(board)
    return Problem(tuple(board), tuple(rng.sample(list(COLOURS), _ADDENDS)), rng.randrange(len(QUESTIONS)))


def make_problems(split: str, count: int, seed: int = 0) -> list[Problem]:
    """Draw `count` different problems of one split. The same arguments give the same list on every machine.

    Args:
        split: "train", "dev" or "test". No board is in two splits, for any seeds.
        count: number of problems. No two have the same board and question.
        seed: selects one of the split's lists.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: use one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split}/{seed}")
    found: dict[Problem, None] = {}
    while len(found) < count:
        problem = _draw_problem(rng)
        if problem.split == split:
            found[problem] = None
    return list(found)


def texts() -> list[str]:
    """Return sentences with every word of the questions and answers, to train a tokenizer on."""
    questions = [wording.format(*[colour] * _ADDENDS) for wording in QUESTIONS for colour in COLOURS]
    read = [f"{colour} {number}, {colour} {number}, " for colour in COLOURS for number in NUMBERS]
    return questions + read + [f"total {number}. \\boxed{{1}}" for number in NUMBERS]


def write_parquet(problems: list[Problem], path: Path) -> None:
    """Write problems in verl's format. The file gets its final name only when it is complete.

    Columns: data_source, prompt (one user message with one ``<image>``), images (one PNG), ability, reward_model
    (style and ground_truth) and extra_info (split, index, question, answer, response).
    """
    rows = [
        {
            "data_source": DATA_SOURCE,
            "prompt": [{"role": "user", "content": f"<image>{problem.question}"}],
            "images": [{"bytes": problem.png(), "path": None}],
            "ability": "adding",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {
                "split": problem.split,
                "index": index,
                "question": problem.question,
                "answer": problem.answer,
                "response": problem.response,
            },
        }
        for index, problem in enumerate(problems)
    ]
    text = pa.string()
    schema = pa.schema(
        {
            "data_source": text,
            "prompt": pa.list_(pa.struct({"role": text, "content": text})),
            "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": text})),
            "ability": text,
            "reward_model": pa.struct({"style": text, "ground_truth": text}),
            "extra_info": pa.struct(
                {"split": text, "index": pa.int64(), "question": text, "answer": text, "response": text}
            ),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.Table.from_pylist(rows, schema), partial)
    os.replace(partial, path)


def write_dataset(folder: Path, *, train: int = 1024, test: int = 448, seed: int = 0) -> None:
    """Write ``train.parquet`` and ``test.parquet`` with `train` and `test` problems into `folder`."""
    write_parquet(make_problems("train", train, seed), folder / "train.parquet")
    write_parquet(make_problems("test", test, seed), folder / "test.parquet")


def main() -> None:
    """Run the command line: write the two files."""
    parser = argparse.ArgumentParser(description="Write the quickstart's problems as verl parquet files.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.parquet and test.parquet")
    parser.add_argument("--train", type=int, default=1024, help="training problems (default %(default)s)")
    parser.add_argument("--test", type=int, default=448, help="held-out problems (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_dataset(arguments.out, train=arguments.train, test=arguments.test, seed=arguments.seed)
    print(f"wrote {arguments.train} training and {arguments.test} held-out problems to {arguments.out}")


if __name__ == "__main__":
    main()
