# SPDX-License-Identifier: Apache-2.0
"""What `verl-gndpo evaluate --server` does with servers that fail, refuse, or answer oddly; a real one is in
tests/integration/test_evaluation.py."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from verl_gndpo.evaluation import command, server
from verl_gndpo.evaluation.job import Job, Means
from verl_gndpo.evaluation.prompts import Prompt

KEY = "sk-secret"
ANSWER = {"index": 0, "message": {"content": "B"}, "finish_reason": "stop"}
COMPLETION = {"usage": {"prompt_tokens": 9, "completion_tokens": 4}, "choices": [ANSWER]}


class Prompts:
    """Prompts without a tokenizer, or with the tokens `ids`."""

    tokenizer = None
    placeholders = ()

    def __init__(self, ids=None):
        self.ids = ids

    def __getitem__(self, row):
        picture = {"type": "image", "image": None}
        messages = [{"role": "user", "content": [picture, {"type": "text", "text": "Ünï 码?"}]}]
        return Prompt(row, messages, [Image.new("RGB", (28, 28), "red")], self.ids, "")

    def too_long(self, prompt):
        return False


@pytest.fixture
def served(monkeypatch):
    """Return the replies of a server, which a test sets, and the requests that it got.

    A reply is a status with headers and a body, or None for a lost connection.
    """
    replies: list = []
    requests: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply((200, {}, {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 100}]}))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers, body))
            reply = replies.pop(0)
            if reply is None:
                self.close_connection = True
                return
            self.reply(reply)

        def reply(self, reply):
            status, headers, body = reply
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("OUR_KEY", KEY)
    waits: list[float] = []
    monkeypatch.setattr(server.time, "sleep", waits.append)
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()

    def ask(ids=None, **settings):
        job = Job("m", [], [], server=f"http://127.0.0.1:{listening.server_port}/v1", **settings)
        return asked(server.Server(job, Means(concurrency=2, key_from="OUR_KEY"), Prompts(ids)))

    yield ask, replies, requests, waits
    listening.shutdown()
    listening.server_close()


LENGTHS = {"max_prompt": 60, "max_response": 40}


def asked(one: server.Server) -> dict:
    one.add(7)
    while not (found := one.finished()):
        pass
    return found[0]


def test_an_answer_and_what_was_asked(served):
    ask, replies, requests, _ = served
    replies.append((200, {}, COMPLETION))
    entry = ask(**LENGTHS, temperature=1.0, chat_template={"enable_thinking": False}, mm_processor={"max_pixels": 784})
    answers = [{"text": "B", "tokens": 4, "truncated": False}]
    assert entry == {"row": 7, "prefix": "", "answers": answers, "prompt_tokens": 9}
    ((path, headers, body),) = requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    picture, text = body["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,") and text["text"] == "Ünï 码?"
    assert (body["top_k"], body["repetition_penalty"], body["max_tokens"]) == (-1, 1.0, 40)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["mm_processor_kwargs"] == {"max_pixels": 784} and body["seed"] > 0


def test_what_passes_is_tried_again(served):
    ask, replies, requests, waits = served
    replies += [None, (503, {}, "starting"), (429, {"Retry-After": "30"}, "busy"), (200, {}, COMPLETION)]
    assert ask(**LENGTHS)["answers"][0]["text"] == "B"
    assert len(requests) == 4
    assert 0.75 <= waits[0] <= 1 and 1.5 <= waits[1] <= 2 and waits[2] == 30


def refused(ask: Callable, **settings) -> str:
    with pytest.raises(server.ServerError) as caught:
        ask(**{**LENGTHS, **settings})
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_server_that_stays_away(served):
    ask, replies, requests, waits = served
    replies += [(500, {}, f"oh no\n{KEY}")] * server.TRIES
    assert f"failed {server.TRIES} times, at last with status 500: oh no (key)" in refused(ask)
    assert len(requests) == server.TRIES and 60 < sum(waits) < 130


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((400, {}, {"error": {"message": "no images"}}), "problem 7: "),
        ((400, {}, {"error": {"message": "no images"}}), "refuses: status 400: no images"),
        (
            (401, {}, {"message": f"bad {KEY}"}),
            "refuses the key in OUR_KEY: status 401: bad (key) -> name the variable",
        ),
        ((302, {"Location": "http://127.0.0.1:1/"}, ""), "refuses: status 302"),
        ((200, {}, "<html>"), "answers with no JSON"),
        ((200, {}, []), "something else than a JSON object"),
        ((200, {}, {"choices": []}), "something else than a chat completion"),
        ((200, {}, COMPLETION | {"choices": []}), "gave 0 of 1 answers -> it does not know n: use --n 1"),
    ],
)
def test_what_is_refused_is_not_tried_again(served, reply, words):
    ask, replies, requests, _ = served
    replies.append(reply)
    assert words in refused(ask)
    assert len(requests) == 1


def test_prompts_that_are_too_long_have_no_answers(served):
    ask, replies, _, _ = served
    replies.append((200, {}, COMPLETION))
    assert ask(max_prompt=8, max_response=40)["answers"] == []
    replies.append((400, {}, {"error": {"message": "This model's maximum context length is 100 tokens"}}))
    assert ask(**LENGTHS)["answers"] == []


def test_prompts_are_compared(served):
    ask, replies, _, _ = served
    replies.append((200, {}, COMPLETION | {"prompt_token_ids": list(range(9))}))
    assert ask(list(range(9)), **LENGTHS)["answers"]
    replies.append((200, {}, COMPLETION | {"prompt_token_ids": [0, 1, 3]}))
    assert "makes another prompt of it than training: 9 tokens instead of 3" in refused(ask, ids=[0, 1, 2])
    replies.append((200, {}, COMPLETION))
    assert "9 tokens instead of 8" in refused(ask, ids=list(range(8)))


def test_reasoning_that_a_server_takes_apart_is_put_together(served):
    ask, replies, _, _ = served
    message = {"content": "B", "reasoning_content": "because"}
    replies.append((200, {}, COMPLETION | {"choices": [ANSWER | {"message": message, "finish_reason": "length"}]}))
    assert ask(**LENGTHS)["answers"] == [{"text": "<think>because</think>B", "tokens": 4, "truncated": True}]


@pytest.mark.parametrize("key", ["", "two\nlines", "schlüssel"])
def test_a_key_that_no_header_can_have(served, monkeypatch, key):
    ask, *_ = served
    monkeypatch.setenv("OUR_KEY", key)
    with pytest.raises(ValueError, match="--api-key-env OUR_KEY: ") as caught:
        ask(**LENGTHS)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("b=http://other/openai/v2", None),
        ("a=http://other/openai/v2", "http://other/openai/v2"),
    ],
)
def test_the_server_of_a_model(given, found):
    assert command.server_of("a", ["a", "b"], [given], None) == (found, None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["ftp://host"], "has no URL of a server"),
        (["host:8000"], "has no URL of a server"),
        (["http://host:port"], "has no URL of a server"),
        (["http://me:secret@host/v1"], "http://host has more than a host and a path -> name the variable"),
        (["http://host/v1?key=secret"], "http://host has more than"),
        (["c=http://host"], "there is no model c"),
        (["http://host", "a=http://other"], "a has 2 servers"),
    ],
)
def test_servers_that_cannot_be_meant(given, words):
    with pytest.raises(command.EvaluationError) as caught:
        command.server_of("a", ["a", "b"], given, None)
    assert words in str(caught.value) and "secret" not in str(caught.value)
