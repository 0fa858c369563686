# SPDX-License-Identifier: Apache-2.0
"""Let vLLM answer in this process, with rows that come and go while it generates."""

import math
from typing import Any

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from verl_gndpo.evaluation.job import Job, Means, seed_of
from verl_gndpo.evaluation.prompts import Prompts
from verl_gndpo.platforms import without_accelerator

IMAGE_CACHE_GB = 0.5
"""vLLM keeps images that it has prepared, by default 4 GB of them in each process, for which one run has no use."""


class Engine:
    """An `Answerer`."""

    def __init__(self, job: Job, means: Means, prompts: Prompts):
        self._job, self._prompts = job, prompts
        self._engine = LLM(
            job.model,
            dtype=job.dtype,
            max_model_len=job.max_prompt + job.max_response,
            gpu_memory_utilization=means.memory,
            trust_remote_code=means.trust_remote_code,
            tensor_parallel_size=means.tensor_parallel,
            enforce_eager=without_accelerator(),
            mm_processor_cache_gb=IMAGE_CACHE_GB,
            seed=job.seed,
        ).llm_engine
        # A few more than vLLM runs at a time, so that some wait with their images prepared.
        running = self._engine.vllm_config.scheduler_config.max_num_seqs
        self.capacity = math.ceil(running / job.answers) + 8
        self._asked: dict[str, dict[str, Any]] = {}
        self._not_asked: list[dict[str, Any]] = []

    def add(self, row: int) -> None:
        prompt = self._prompts[row]
        assert prompt.ids is not None
        entry: dict[str, Any] = {"row": row, "prefix": prompt.prefix, "prompt_tokens": len(prompt.ids), "answers": []}
        if self._prompts.too_long(prompt):
            self._not_asked.append(entry)
            return
        job = self._job
        settings = SamplingParams(
            n=job.answers,
            temperature=job.temperature,
            max_tokens=job.max_response,
            # Of a row's own, so that answers do not depend on what was answered before a kill.
            seed=seed_of(job.seed, row) if job.temperature > 0 else None,
            # As verl's rollout, which never samples them.
            logit_bias={token: -100.0 for token in self._prompts.placeholders} or None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._asked[str(row)] = entry
        self._engine.add_request(str(row), self._prompts.for_vllm(prompt), settings)

    def finished(self) -> list[dict[str, Any]]:
        found, self._not_asked = self._not_asked, []
        if self._asked:
            for output in self._engine.step():
                if output.finished:
                    found.append(self._asked.pop(output.request_id))
                    found[-1]["answers"] = [
                        {
                            "text": self._prompts.decode(list(answer.token_ids)),
                            "tokens": len(answer.token_ids),
                            "truncated": answer.finish_reason == "length",
                        }
                        for answer in sorted(output.outputs, key=lambda one: one.index)
                    ]
        return found
