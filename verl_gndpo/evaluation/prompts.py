# SPDX-License-Identifier: Apache-2.0
"""Make the prompts of verl's rollout from the rows of parquet files, for vLLM here and for a server."""

import base64
import io
from dataclasses import dataclass
from typing import Any

# verl first: its plugin prepares processes without an accelerator.
import verl  # noqa: F401  isort: skip
from omegaconf import OmegaConf
from transformers import AutoConfig
from verl.utils import hf_processor, hf_tokenizer
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder
from verl.workers.rollout.utils import get_vision_placeholder_token_ids, qwen2_5_vl_dedup_image_tokens

from verl_gndpo.evaluation.job import Job

TAIL_TOKENS = 16
"""Enough of a prompt's end for a tag and the line breaks after it."""


@dataclass(frozen=True)
class Prompt:
    """One row's messages and images as training has them."""

    row: int
    messages: list[dict[str, Any]]
    images: list[Any]
    """PIL images, in the size that verl's data set gives them."""
    ids: list[int] | None
    """Tokens, with one placeholder per image patch; None where no tokenizer is known."""
    prefix: str
    """What the template begins the response with: "<think>" or nothing."""


class Prompts:
    """The prompts of a job, made by verl's data set and by its agent loop's builder."""

    def __init__(self, job: Job, trust_remote_code: bool):
        self.job = job
        described = job.tokenizer if job.server else job.model
        self.tokenizer = self.processor = self._builder = None
        if described is not None:
            self.tokenizer = hf_tokenizer(described, trust_remote_code=trust_remote_code)
            self.processor = hf_processor(described, trust_remote_code=trust_remote_code)
            self._builder = create_continuous_token_builder(
                self.tokenizer,
                hf_model_type=AutoConfig.from_pretrained(described, trust_remote_code=trust_remote_code).model_type,
                chat_template_kwargs=job.chat_template,
                mm_processor_kwargs=job.mm_processor,
                processor=self.processor,
            )
        self.placeholders = get_vision_placeholder_token_ids(self.processor) if self.processor else []
        """Tokens that stand for images, which verl's rollout never samples."""
        self._settings = OmegaConf.create({"filter_overlong_prompts": False, "max_prompt_length": job.max_prompt})
        # Without a tokenizer, the data set only has to know that rows may have images.
        processor = self.processor if described else object()
        # One per file: files of different programs need not have one schema.
        self._rows = []
        for file in job.files:
            dataset = RLHFDataset([file], self.tokenizer, self._settings, processor, job.limit or -1)
            self._rows += [(file, dataset, row) for row in range(len(dataset))]
        self._patch = getattr(getattr(self.processor, "image_processor", None), "patch_size", 14)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Prompt:
        """Return the prompt of a row, counted over all files.

        Raises:
            ValueError: the row has something that can't be asked; the message names the file and the row.
        """
        file, dataset, place = self._rows[row]
        try:
            return self._make(row, dataset, place)
        # Images and templates raise whatever is wrong with them.
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if isinstance(error, AssertionError) and self.processor is None:
                reason = f"it has images, and {self.job.model} has no processor to read them with"
            raise ValueError(f"row {place} of {file} can't be asked: {reason} -> mend or remove the row") from error

    def _make(self, row: int, dataset: RLHFDataset, place: int) -> Prompt:
        found = dataset[place]
        messages = list(found["raw_prompt"])
        kinds = {part.get("type") for message in messages for part in parts_of(message)}
        if kinds - {"text", "image"}:
            raise ValueError(
                f"it has {', '.join(sorted(map(str, kinds - {'text', 'image'})))}; evaluate asks with images"
            )
        images, _, _ = dataset._process_multi_modal_info(messages, self._patch, self._settings)
        ids, prefix = None, ""
        if self._builder is not None and self.tokenizer is not None:
            ids = self._builder.build_initial_tokens(
                messages, tools=None, images=images, videos=None, audios=None, mm_inputs_out={}
            )
            tail = self.tokenizer.decode(ids[-TAIL_TOKENS:], skip_special_tokens=False).rstrip()
            prefix = "<think>" if tail.endswith("<think>") else ""
        return Prompt(row, messages, images or [], ids, prefix)

    def for_vllm(self, prompt: Prompt) -> dict[str, Any]:
        """Return a prompt with tokens as verl's rollout hands it to vLLM."""
        assert prompt.ids is not None
        made: dict[str, Any] = {"prompt_token_ids": qwen2_5_vl_dedup_image_tokens(list(prompt.ids), self.processor)}
        if prompt.images:
            made["multi_modal_data"] = {"image": prompt.images}
        if self.job.mm_processor:
            made["mm_processor_kwargs"] = self.job.mm_processor
        return made

    def too_long(self, prompt: Prompt) -> bool:
        return prompt.ids is not None and len(prompt.ids) > self.job.max_prompt

    def decode(self, ids: list[int]) -> str:
        """Return a response as verl decodes it for its reward."""
        assert self.tokenizer is not None
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a message; none where it is plain text."""
    content = message.get("content")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def for_chat(prompt: Prompt) -> list[dict[str, Any]]:
    """Return the messages as OpenAI's chat takes them. Images are data URLs of PNG, which loses nothing."""
    images = iter(prompt.images)

    def part(one: dict[str, Any]) -> dict[str, Any]:
        if one.get("type") != "image":
            return {"type": "text", "text": one["text"]}
        file = io.BytesIO()
        next(images).save(file, "PNG")
        return {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
        }

    messages = []
    for message in prompt.messages:
        content = [part(one) for one in parts_of(message)] or message["content"]
        messages.append({"role": message["role"], "content": content})
    return messages
