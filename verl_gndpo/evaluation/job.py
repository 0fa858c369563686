# SPDX-License-Identifier: Apache-2.0
"""What to ask one model, and the file of its answers."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What to ask one model. Answers belong to a job: another one starts a new file."""

    model: str
    """Folder or hub id; with `server`, the name by which the server has it."""
    files: list[str]
    contents: list[str]
    """Of the files, from `digest`: other problems in a file of the same name have no answers yet."""
    answers: int = 1
    """Per problem."""
    temperature: float = 0.0
    seed: int = 0
    limit: int | None = None
    """First problems of each file; None for all."""
    max_prompt: int = 8192
    max_response: int = 16384
    dtype: str = "auto"
    chat_template: dict[str, Any] = field(default_factory=dict)
    """As data.apply_chat_template_kwargs."""
    mm_processor: dict[str, Any] = field(default_factory=dict)
    """As data.mm_processor_kwargs."""
    server: str | None = None
    """URL up to /v1; None: vLLM runs here."""
    tokenizer: str | None = None
    """With `server`: folder or hub id whose tokenizer and processor the server's prompts are compared with."""


@dataclass(frozen=True)
class Means:
    """With what a job is done. Answers stay valid with other means."""

    data_parallel: int | None = None
    """Engines; None: as many as there are devices for."""
    tensor_parallel: int = 1
    """Devices per engine."""
    memory: float = 0.9
    """Share of a device's memory that vLLM takes."""
    trust_remote_code: bool = False
    concurrency: int = 32
    """Requests to a server at a time."""
    key_from: str | None = None
    """Environment variable with the server's key. The key itself is in no file and no message."""


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def seed_of(seed: int, row: int) -> int:
    """Return the seed of a problem's answers. vLLM adds 1 for each further answer.

    Runs with different seeds share no answers: the sums of seed and row would, and so would those of seed and answer.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:4], "big") >> 1


def key_of(variable: str | None) -> str | None:
    """Return the key in an environment variable; None if none is named.

    Raises:
        ValueError: there is none, or none that a header can have.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(
            f"--api-key-env {variable}: this environment variable is not set -> set it to the server's key"
        )
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"--api-key-env {variable}: the key has characters that no header can have -> set it again")
    return key


def write_job(path: Path, job: Job) -> bool:
    """Write a job, unless the file has it already. Return False if the file has another one, which then stays.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    if path.exists():
        try:
            return json.loads(path.read_text()) == asdict(job)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error} -> give another --out") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(job), indent=1) + "\n")
    temporary.replace(path)
    return True


class Answers:
    """The answers of one model, of which only their places in the file are in memory.

    Each is {row, prefix, prompt_tokens, answers: [{text, tokens, truncated}]}, in any order. A problem that was not
    asked, because its prompt is too long, has no answers.
    """

    def __init__(self, path: Path):
        """Read the file, and cut off a last line that a killed process left incomplete.

        Raises:
            ValueError: another line is damaged; the message names it. Nothing is cut off then.
        """
        self._path = path
        self._places: dict[int, int] = {}
        if not path.exists():
            return
        end = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    if not all(isinstance(one["text"], str) for one in entry["answers"]):
                        raise TypeError("an answer is no text")
                    self._places[int(entry["row"])] = end
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(
                        f"{path}: line {number} is damaged -> delete this line, and start again to ask its problem anew"
                    ) from error
                end += len(line)
        if end < path.stat().st_size:
            with path.open("r+b") as file:
                file.truncate(end)

    def __getitem__(self, row: int) -> dict[str, Any]:
        with self._path.open("rb") as file:
            file.seek(self._places[row])
            return json.loads(file.readline())

    def lacking(self, rows: Iterable[int]) -> list[int]:
        """Return the rows that have no answer yet."""
        return [row for row in rows if row not in self._places]
