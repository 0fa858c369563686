# SPDX-License-Identifier: Apache-2.0
"""Let an OpenAI-compatible server answer. What it can be asked about itself is checked, the rest is the caller's."""

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from verl_gndpo.evaluation.job import Job, Means, key_of, seed_of
from verl_gndpo.evaluation.prompts import Prompt, Prompts, for_chat

TRIES = 8
"""Of one request. The waits between them add up to two minutes, enough for a server to start again."""
LONGEST_WAIT_S = 60.0
TIMEOUT_S = 3600.0
"""For a whole answer, which comes at once."""
AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Statuses of a server that is busy or starting."""
VLLM = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
"""What only vLLM knows. Its defaults come from the model's generation_config.json, which verl's rollout ignores."""


class ServerError(ValueError):
    """A server can't be used or has refused a request. The message is one line without the key."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects would take the key to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


class Server:
    """An `Answerer`. Threads make prompts and wait for the server."""

    def __init__(self, job: Job, means: Means, prompts: Prompts):
        """Check the key and what the server says about the model.

        Raises:
            ServerError: the key is missing, the server can't be reached, or does not have the model or its length.
        """
        assert job.server is not None
        self._job, self._prompts, self._url = job, prompts, job.server
        self._key = key_of(means.key_from)
        self._key_from = means.key_from
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._is_vllm, self._length = self._check_model()
        self.capacity = means.concurrency
        self._threads = ThreadPoolExecutor(means.concurrency)
        self._asked: set[Future] = set()
        # Tokenizers are not made for several threads.
        self._making = threading.Lock()

    def add(self, row: int) -> None:
        self._asked.add(self._threads.submit(self._answer, row))

    def finished(self) -> list[dict[str, Any]]:
        done, self._asked = wait(self._asked, return_when=FIRST_COMPLETED, timeout=1)
        return [future.result() for future in done]

    def _check_model(self) -> tuple[bool, int | None]:
        """Return whether the server is a vLLM, and the length of its context if it says that."""
        listed = self._request("models").get("data")
        served = {one.get("id"): one for one in listed if isinstance(one, dict)} if isinstance(listed, list) else {}
        found = served.get(self._job.model)
        if found is None:
            names = ", ".join(sorted(map(str, served))[:8]) or "nothing"
            raise ServerError(
                f"{self._url} serves {names} and not {self._job.model} -> give MODEL as the server has it"
            )
        length, wanted = found.get("max_model_len"), self._job.max_prompt + self._job.max_response
        if isinstance(length, int) and length < wanted:
            raise ServerError(
                f"{self._url} has a context of {length} tokens, and --max-prompt and --max-response add up to {wanted} "
                f"-> start it with --max-model-len {wanted}, or lower them"
            )
        return found.get("owned_by") == "vllm", length if isinstance(length, int) else None

    def _answer(self, row: int) -> dict[str, Any]:
        with self._making:
            prompt = self._prompts[row]
            entry: dict[str, Any] = {"row": row, "prefix": prompt.prefix, "answers": []}
            if self._prompts.too_long(prompt):
                return entry | {"prompt_tokens": len(prompt.ids or [])}
            body = self._body(prompt)
        try:
            found = self._request("chat/completions", body)
        except ServerError as error:
            # Such a prompt alone is longer than --max-prompt.
            if self._length is not None and "maximum context length" in str(error):
                return entry | {"prompt_tokens": self._length}
            raise ServerError(f"problem {row}: {error}") from error
        try:
            counted = int(found["usage"]["prompt_tokens"])
            choices, generated = found["choices"], found["usage"]["completion_tokens"]
            if len(choices) != self._job.answers:
                raise ServerError(
                    f"{self._url} gave {len(choices)} of {self._job.answers} answers -> it does not know n: use --n 1"
                )
            self._compare(prompt, found.get("prompt_token_ids"), counted)
            if counted <= self._job.max_prompt:
                ordered = sorted(choices, key=lambda choice: choice["index"])
                entry["answers"] = [self._read(choice, generated / len(choices)) for choice in ordered]
        except (KeyError, TypeError, AttributeError) as error:
            raise ServerError(
                f"{self._url} answers with something else than a chat completion: "
                f"{self._clean(json.dumps(found))[:200]}"
            ) from error
        return entry | {"prompt_tokens": counted}

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        job = self._job
        body: dict[str, Any] = {"model": job.model, "messages": for_chat(prompt), "n": job.answers, "top_p": 1.0}
        body |= {"temperature": job.temperature, "max_tokens": job.max_response}
        body |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
        if job.temperature > 0:
            body["seed"] = seed_of(job.seed, prompt.row)
        if self._is_vllm:
            body |= VLLM
            if self._prompts.placeholders:
                body["logit_bias"] = {str(token): -100.0 for token in self._prompts.placeholders}
        if job.chat_template:
            body["chat_template_kwargs"] = job.chat_template
        if job.mm_processor:
            body["mm_processor_kwargs"] = job.mm_processor
        return body

    def _compare(self, prompt: Prompt, ids: list[int] | None, counted: int) -> None:
        """Compare the server's prompt with the one of training, if that is known.

        Raises:
            ServerError: they differ.
        """
        if prompt.ids is None or (ids == prompt.ids if ids is not None else counted == len(prompt.ids)):
            return
        where = f"{counted} tokens instead of {len(prompt.ids)}"
        if ids is not None and self._prompts.tokenizer is not None:
            place = next((i for i, pair in enumerate(zip(ids, prompt.ids, strict=False)) if pair[0] != pair[1]), -1)
            theirs, ours = (self._prompts.tokenizer.decode(found[place : place + 8]) for found in (ids, prompt.ids))
            where += f", and from token {place} on {theirs!r} instead of {ours!r}"
        raise ServerError(
            f"problem {prompt.row}: {self._url} makes another prompt of it than training: {where} -> start the server "
            f"with the template and pixel limits of {self._job.tokenizer}, or give another --tokenizer; without one, "
            "prompts are not compared"
        )

    def _read(self, choice: dict[str, Any], tokens: float) -> dict[str, Any]:
        ids, message = choice.get("token_ids"), choice["message"]
        if ids is not None and self._prompts.tokenizer is not None:
            text = self._prompts.decode(ids)
        else:
            text = message.get("content") or ""
            # A server with a parser of reasoning takes it out of the text.
            reasoning = message.get("reasoning") or message.get("reasoning_content")
            text = f"<think>{reasoning}</think>{text}" if reasoning else text
        count = len(ids) if ids is not None else tokens
        return {"text": text, "tokens": count, "truncated": choice["finish_reason"] == "length"}

    def _request(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return what the server answers. What may pass is tried again, with growing waits.

        Raises:
            ServerError: it refuses, or can't be reached any more.
        """
        headers = {"Content-Type": "application/json", "User-Agent": "verl-gndpo"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        for tried in range(1, TRIES + 1):
            request = urllib.request.Request(f"{self._url}/{path}", data, headers)
            waiting = min(LONGEST_WAIT_S, 2.0 ** (tried - 1)) * random.uniform(0.75, 1.0)
            try:
                with self._opener.open(request, timeout=TIMEOUT_S) as response:
                    found = json.loads(response.read())
                if not isinstance(found, dict):
                    raise ServerError(f"{self._url}/{path} answers with something else than a JSON object")
                return found
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"status {error.code}: {self._clean(_message_of(error))}"
                if error.code in (401, 403):
                    named = f"the key in {self._key_from}" if self._key_from else "a request without a key"
                    raise ServerError(
                        f"{self._url} refuses {named}: {reason} -> name the variable that holds the key with "
                        "--api-key-env"
                    ) from None
                if error.code not in AGAIN:
                    raise ServerError(f"{self._url}/{path} refuses: {reason} -> correct the settings") from None
                asked = error.headers.get("Retry-After", "")
                waiting = min(LONGEST_WAIT_S, max(waiting, float(asked) if asked.isdecimal() else 0.0))
            except json.JSONDecodeError as error:
                raise ServerError(f"{self._url}/{path} answers with no JSON -> is this the URL up to /v1?") from error
            except (OSError, http.client.HTTPException) as error:
                reason = self._clean(str(getattr(error, "reason", error)) or type(error).__name__)
            if tried < TRIES:
                time.sleep(waiting)
        raise ServerError(
            f"{self._url} failed {TRIES} times, at last with {reason} -> see whether it runs, then start again"
        )

    def _clean(self, text: str) -> str:
        """Return one line of a text that came from the server, without the key that it may repeat."""
        return " ".join((text.replace(self._key, "(key)") if self._key else text).split())[:300]


def _message_of(error: urllib.error.HTTPError) -> str:
    """Return the message of an error, as OpenAI and vLLM write it, or the beginning of what was sent instead."""
    try:
        text = error.read(10_000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        found = json.loads(text)
        inner = found.get("error", found)
        return str(inner["message"] if isinstance(inner, dict) else inner)
    except (ValueError, KeyError, AttributeError):
        return text or str(error.reason)
