# SPDX-License-Identifier: Apache-2.0
"""Let vLLM answer the problems of parquet files, with the prompts of verl's rollout. One process answers for one model.

python -m verl_gndpo.evaluation.generate JOB.json
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BLOCK = 256
"""Problems that are in memory, and asked, at a time."""
TAIL_TOKENS = 16
"""Enough of a prompt's end for a tag and the line breaks after it."""


@dataclass(frozen=True)
class Job:
    """What to ask one model. Answers belong to a job: another one starts a new file."""

    model: str
    files: list[str]
    contents: list[str]
    """Of the files, from `digest`: other problems in a file of the same name have no answers yet."""
    answers: int
    temperature: float
    seed: int
    limit: int | None
    """First problems of each file; None for all."""
    max_prompt: int
    max_response: int
    dtype: str
    memory: float
    """Share of a device's memory that vLLM takes."""
    trust_remote_code: bool


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def read_answers(path: Path) -> dict[int, dict[str, Any]]:
    """Return the answered problems by their row, and cut off a last line that a killed process left incomplete.

    Raises:
        ValueError: another line is damaged; the message names it. Nothing is cut off then.
    """
    if not path.exists():
        return {}
    found, end = {}, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                found[entry["row"]] = entry
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}: line {number} is damaged -> delete this line, and start again to ask its problem anew"
                ) from error
            end += len(line)
    if end < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(end)
    return found


def main(path: Path) -> None:
    """Answer the job in a file, and append each block of answers to `answers.jsonl` beside it."""
    # verl first: its plugin prepares processes without an accelerator.
    import verl  # noqa: F401
    from tqdm import tqdm
    from vllm import LLM, SamplingParams

    job = Job(**json.loads(path.read_text()))
    out = path.with_name("answers.jsonl")
    done = read_answers(out)
    prompts = Prompts(job)
    rows = [row for row in range(len(prompts)) if row not in done]
    if not rows:
        return
    model = LLM(
        job.model,
        dtype=job.dtype,
        max_model_len=job.max_prompt + job.max_response,
        gpu_memory_utilization=job.memory,
        trust_remote_code=job.trust_remote_code,
        enforce_eager=prompts.on_cpu,
        seed=job.seed,
    )
    with tqdm(total=len(prompts), initial=len(done), unit="problem", desc=job.model) as progress, out.open("a") as file:
        for start in range(0, len(rows), BLOCK):
            block = list(prompts.of(rows[start : start + BLOCK]))
            asked = [one for one in block if one["prompt"] is not None]
            settings = [
                SamplingParams(
                    n=job.answers,
                    temperature=job.temperature,
                    max_tokens=job.max_response,
                    # Of a row's own, so that answers do not depend on what was answered before a kill.
                    seed=job.seed + one["row"] if job.temperature > 0 else None,
                    # As verl's rollout, which never samples them.
                    logit_bias={token: -100.0 for token in prompts.placeholders} or None,
                )
                for one in asked
            ]
            outputs = model.generate([one["prompt"] for one in asked], settings, use_tqdm=False) if asked else []
            answers = {one["row"]: output.outputs for one, output in zip(asked, outputs, strict=True)}
            for one in block:
                given = answers.get(one["row"], ())
                entry = {
                    "row": one["row"],
                    "prefix": one["prefix"],
                    "prompt_tokens": one["tokens"],
                    "answers": [
                        {
                            # As verl decodes a response for its reward.
                            "text": prompts.tokenizer.decode(answer.token_ids, skip_special_tokens=True),
                            "tokens": len(answer.token_ids),
                            "truncated": answer.finish_reason == "length",
                        }
                        for answer in given
                    ],
                }
                file.write(json.dumps(entry) + "\n")
            file.flush()
            progress.update(len(block))


class Prompts:
    """The prompts of a job, made by verl's data set and by its agent loop's builder."""

    def __init__(self, job: Job):
        from omegaconf import OmegaConf
        from transformers import AutoConfig
        from verl.utils import hf_processor, hf_tokenizer
        from verl.utils.dataset.rl_dataset import RLHFDataset
        from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder
        from verl.workers.rollout.utils import get_vision_placeholder_token_ids

        from verl_gndpo.platforms import without_accelerator

        trust = job.trust_remote_code
        self.job, self.on_cpu = job, without_accelerator()
        self.tokenizer = hf_tokenizer(job.model, trust_remote_code=trust)
        self.processor = hf_processor(job.model, trust_remote_code=trust)
        self.settings = OmegaConf.create({"filter_overlong_prompts": False, "max_prompt_length": job.max_prompt})
        # One per file: files of different programs need not have one schema.
        self.datasets = [
            RLHFDataset([file], self.tokenizer, self.settings, self.processor, job.limit or -1) for file in job.files
        ]
        self.rows = [(dataset, row) for dataset in self.datasets for row in range(len(dataset))]
        self.builder = create_continuous_token_builder(
            self.tokenizer,
            hf_model_type=AutoConfig.from_pretrained(job.model, trust_remote_code=trust).model_type,
            processor=self.processor,
        )
        self.placeholders = get_vision_placeholder_token_ids(self.processor)

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, rows: list[int]) -> Iterator[dict[str, Any]]:
        """Yield {row, prompt, prefix, tokens} of rows. The prompt is None where it is longer than `max_prompt`."""
        from verl.workers.rollout.utils import qwen2_5_vl_dedup_image_tokens

        patch = getattr(getattr(self.processor, "image_processor", None), "patch_size", 14)
        for row in rows:
            dataset, place = self.rows[row]
            messages = list(dataset[place]["raw_prompt"])
            images = None
            if self.processor is not None:
                images, _, _ = dataset._process_multi_modal_info(messages, patch, self.settings)
            ids = self.builder.build_initial_tokens(
                messages, tools=None, images=images, videos=None, audios=None, mm_inputs_out={}
            )
            tail = self.tokenizer.decode(ids[-TAIL_TOKENS:], skip_special_tokens=False).rstrip()
            found: dict[str, Any] = {"row": row, "prompt": None, "tokens": len(ids)}
            found["prefix"] = "<think>" if tail.endswith("<think>") else ""
            if len(ids) <= self.job.max_prompt:
                found["prompt"] = {"prompt_token_ids": qwen2_5_vl_dedup_image_tokens(list(ids), self.processor)}
                if images:
                    found["prompt"]["multi_modal_data"] = {"image": images}
            yield found


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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
