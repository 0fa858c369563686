# SPDX-License-Identifier: Apache-2.0
"""The teacher's engine on four gloo ranks, against plain Hugging Face forwards: ranks that share a row, shardings,
the self-check, sampled placeholders, a tool's images, and errors that name their row. And on two and three, weights
that they share unevenly.

The ranks are processes that live as long as this module's tests: importing verl takes longer than all scoring here.
"""

import contextlib
import hashlib
import io
import multiprocessing
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensordict.tensorclass import NonTensorStack

from tests.integration import helpers
from tests.tiny_models import build_tiny
from verl_gndpo.kl import IDS, LOG_PROBS, top_log_probs

RANKS = 4
TEMPERATURE = 0.7
# Of each prompt its images and its responses' lengths: eight rows, which 1, 2 and 4 data-parallel ranks can divide.
PROMPTS = [(1, [5, 2]), (0, [9]), (2, [12, 3, 4]), (1, [7, 1])]
FAMILIES = ["qwen2_5_vl", "qwen3_vl", "internvl", "qwen3"]


def serve(rank, ranks, port, pipe):
    """Run commands of `Rank` by name in a rank's process, as they come through the pipe."""
    helpers.set_rank(rank, ranks, port)
    torch.set_num_threads(1)
    rank = Rank()
    while True:
        name, arguments = pickle.loads(pipe.recv_bytes())
        try:
            answer = getattr(rank, name)(*arguments), None
        except Exception as error:
            answer = None, f"{type(error).__name__}: {error}"
        pipe.send_bytes(pickle.dumps(answer))


class Rank:
    """One rank of the teacher, in its own process."""

    def start(self, path, settings):
        """Load a teacher, which replaces the last one."""
        settings = {"temperature": TEMPERATURE, "max_token_len_per_gpu": 150} | settings
        self.worker = helpers.start_teacher(helpers.teacher_config(path, **settings))

    @property
    def engine(self):
        (model,) = self.worker.models.values()
        return model.engine

    def score(self, rows, name="teacher_log_probs"):
        """Score this rank's part of all rows; return the row numbers, the output of this name, and what was printed."""
        size, rank = self.engine.get_data_parallel_size(), self.engine.get_data_parallel_rank()
        own = range(rank * len(rows) // size, (rank + 1) * len(rows) // size)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            scored = self.worker.compute_teacher_log_prob(as_batch([rows[row] for row in own]))
        return list(own), [x.numpy() for x in scored[name].unbind()], printed.getvalue()

    def watch(self):
        """Start to count the tokens that the decoder's layers run, and the times that the weights move."""
        from verl.utils.fsdp_utils import offload_fsdp_model_to_cpu

        self.tokens, self.moves, engine = [], [], self.engine
        decoder = engine.module.get_decoder()
        decoder.layers[0].register_forward_hook(lambda module, args, out: self.tokens.append(out.shape[1]))

        def to(device, model=True, **_):
            if model:
                self.moves.append(device)
                # All there is to move between is the host, which verl can only offload to.
                if len(self.moves) % 2 == 0:
                    offload_fsdp_model_to_cpu(engine.module)

        engine.to = to

    def watched(self):
        """Return the tokens of each forward pass and how often the weights moved, and restart both counts."""
        seen = self.tokens, len(self.moves)
        self.tokens, self.moves = [], []
        return seen

    def offload(self):
        """Turn on `param_offload`, which the worker ignores without an accelerator."""
        self.engine._is_offload_param = True

    def round_trip(self, poisoned=None):
        """Move the weights to the host and back, and on one rank change a value on the way."""
        from verl.utils import fsdp_utils

        module = self.engine.module
        fsdp_utils.offload_fsdp_model_to_cpu(module)
        if torch.distributed.get_rank() == poisoned:
            local = next(x for p in module.parameters() if (x := getattr(p, "_local_tensor", p)).numel())
            local.detach().view(-1)[0] += 1
        fsdp_utils.load_fsdp_model_to_gpu(module)

    def weights(self):
        """Return a digest of each whole parameter by its name, as it would be sent to a rollout engine."""
        parameters, _ = self.engine.get_per_tensor_param()
        return {name: digest(value) for name, value in parameters}

    def shapes(self):
        """Return the number of elements of each parameter that this rank holds."""
        return [getattr(p, "_local_tensor", p).numel() for p in self.engine.module.parameters()]

    def save(self, path):
        self.engine.save_checkpoint(path)

    def restore(self, path):
        """Forget the weights, and load a checkpoint."""
        with torch.no_grad():
            for parameter in self.engine.module.parameters():
                getattr(parameter, "_local_tensor", parameter).zero_()
        self.engine.load_checkpoint(path, del_local_after_load=False)

    def gathered(self):
        """Return the bytes of weights that this rank holds beyond its shards."""
        module = self.engine.module
        if hasattr(module, "_all_handles"):
            return sum(h.flat_param._full_param_padded.untyped_storage().nbytes() for h in module._all_handles)
        return sum(p.nbytes for p in module.parameters() if not hasattr(p, "to_local"))

    def spoil(self, what):
        """Break this project's attention but no other, or the places from which responses are predicted."""
        from verl_gndpo.teacher import attention, scorer

        self.intact = attention._causal, scorer.Layout
        if what == "scaling":
            attention._causal = lambda q, k, v, scaling, window: self.intact[0](q * 1.5, k, v, scaling, window)
        else:

            class Shifted(scorer.Layout):
                def predicted_here(self):
                    tokens, places = super().predicted_here()
                    return tokens, (places - 1).clamp(min=0)

            scorer.Layout = Shifted

    def repair(self):
        from verl_gndpo.teacher import attention, scorer

        attention._causal, scorer.Layout = self.intact


def digest(tensor):
    """Return a digest of a float32 tensor's bits and shape."""
    assert tensor.dtype == torch.float32
    return hashlib.sha256(repr(tuple(tensor.shape)).encode() + tensor.detach().cpu().numpy().tobytes()).hexdigest()


class Ranks:
    """All ranks, as the tests see them."""

    def __init__(self, count=RANKS):
        port = helpers.free_port()
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, count, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, name, *arguments):
        """Run a command in all ranks, and return each rank's answer.

        Raises:
            RuntimeError: what the ranks raised, in the order of the ranks.
        """
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((name, arguments)))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(180), f"rank {rank} does not answer"
            answers.append(pickle.loads(pipe.recv_bytes()))
        errors = [error for _, error in answers if error]
        if errors:
            raise RuntimeError("\n".join(errors))
        return [answer for answer, _ in answers]

    def score(self, rows, name="teacher_log_probs"):
        """Return the output of this name for all rows; ranks that share rows must agree."""
        scores = [None] * len(rows)
        self.printed = ""
        for numbers, log_probs, printed in self("score", rows, name):
            self.printed += printed
            for number, scored in zip(numbers, log_probs, strict=True):
                assert scores[number] is None or np.array_equal(scores[number], scored)
                scores[number] = scored
        return scores

    @contextlib.contextmanager
    def spoiled(self, what):
        """Break something of this project's within this context."""
        self("spoil", what)
        try:
            yield
        finally:
            self("repair")

    def stop(self):
        for process in self._processes:
            process.kill()


def as_batch(rows):
    """Return rows {ids, positions, inputs, response, mask, names} as the batch that verl hands to a worker."""
    data = helpers.as_batch(rows)
    data["response_mask"] = helpers.nested(row["mask"] for row in rows)
    for name in (IDS, LOG_PROBS) if IDS in rows[0] else ():
        data[name] = helpers.nested(row[name] for row in rows)
    for name in rows[0]["names"]:
        data[name] = NonTensorStack(*[row["names"][name] for row in rows])
    return data


class Family:
    """A tiny checkpoint of a model family, its processor, and Hugging Face's own forward pass."""

    def __init__(self, name, path):
        from transformers import AutoProcessor

        self.path = build_tiny(name, path, seed=3)
        self.sees = name not in ("qwen3", "uneven")
        self.processor = AutoProcessor.from_pretrained(self.path)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        # Its attention is not the one of the engine's own plain forward pass.
        self.model = helpers.load(self.path)
        self.mrope = hasattr(self.model, "model") and hasattr(self.model.model, "get_rope_index")
        self.rng = np.random.default_rng(0)

    def token_id(self, token):
        return self.tokenizer.convert_tokens_to_ids(token)

    def encode(self, n_images, question="how many?", role="user"):
        """Return the ids and the model's further inputs of one turn with images."""
        n_images = n_images if self.sees else 0
        images = [
            Image.fromarray(self.rng.integers(0, 255, (*(32 * self.rng.integers(2, 5, 2)), 3), np.uint8))
            for _ in range(n_images)
        ]
        content = [{"type": "image"}] * n_images + [{"type": "text", "text": question}] if n_images else question
        text = self.processor.apply_chat_template(
            [{"role": role, "content": content}], add_generation_prompt=True, tokenize=False
        )
        encoded = self.processor(text=[text], return_tensors="pt", **{"images": images} if images else {})
        inputs = {name: encoded[name] for name in ("pixel_values", "image_grid_thw") if name in encoded}
        return encoded["input_ids"][0], inputs

    def row(self, prompt, response, inputs, mask=None, **names):
        """Make a row, in which sampled tokens stand for no image, whatever their ids."""
        ids = torch.cat([prompt, response])
        mask = torch.ones_like(response) if mask is None else mask
        positions = torch.arange(len(ids))
        kinds = torch.zeros_like(ids)
        if self.mrope:
            sampled = torch.cat([torch.zeros_like(prompt), mask]).bool()
            kinds = ((ids == self.model.config.image_token_id) & ~sampled).int()
            rope, _ = self.model.model.get_rope_index(
                ids[None], mm_token_type_ids=kinds[None], image_grid_thw=inputs.get("image_grid_thw")
            )
            positions = torch.cat([positions[None], rope[:, 0]])
        row = {"ids": ids, "response": response, "mask": mask, "positions": positions, "kinds": kinds, "names": names}
        # Each row brings a copy of its images, as verl's rows do.
        return row | {"inputs": {name: value.clone() for name, value in inputs.items()}}

    def rows(self):
        rows = []
        for number, (n_images, lengths) in enumerate(PROMPTS):
            prompt, inputs = self.encode(n_images, "how many? " * (number + 1))
            for session, length in enumerate(lengths):
                # Ordinary text: the special tokens stand at the end of the vocabulary.
                response = torch.from_numpy(self.rng.integers(0, 200, length))
                names = {"uid": f"p{number}", "session_id": session, "index": 10 + number}
                rows.append(self.row(prompt, response, inputs, **names))
        return [rows[i] for i in self.rng.permutation(len(rows))]

    def log_probs(self, row, ids=None):
        """Score the response tokens of a row alone, from all its logits.

        Args:
            ids: shown to the model instead of the row's own, which are scored.
        """
        seen = (row["ids"] if ids is None else ids)[None]
        inputs = row["inputs"] | ({"mm_token_type_ids": row["kinds"][None]} if self.mrope else {})
        with torch.no_grad():
            logits = self.model(input_ids=seen, **inputs).logits[0].double() / TEMPERATURE
        return logits[:-1].log_softmax(-1).gather(-1, row["ids"][1:, None])[-len(row["mask"]) :, 0].numpy()


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            made[name] = Family(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks()
    yield ranks
    ranks.stop()


def assert_equal(ours, expected):
    for row, (a, b) in enumerate(zip(ours, expected, strict=True)):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=0, err_msg=f"row {row}")


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_that_share_a_row_score_as_one_does_alone(family, ranks, name, shared):
    """Covers odd lengths, more ranks than key heads, several micro-batches, images in one or several ranks' parts."""
    model = family(name)
    rows = model.rows()
    ranks("start", model.path, {"ulysses_sequence_parallel_size": shared, "max_token_len_per_gpu": 60})
    assert_equal(ranks.score(rows), [model.log_probs(row) for row in rows])
    assert "log-probs of the first batch differ by at most" in ranks.printed

    # It checks itself on the first batch only. Each rank runs its part of the tokens, which ends with padding.
    ranks("watch")
    ranks.score(rows)
    assert ranks.printed == ""
    limit = max(60 * shared, *(len(row["ids"]) for row in rows))
    per_rank = [tokens for tokens, _ in ranks("watched")]
    assert all(per_rank[rank] == per_rank[rank - rank % shared] for rank in range(RANKS))
    assert max(map(max, per_rank)) <= -(-limit // shared)


@pytest.mark.parametrize("shared", [1, 2])
def test_ranks_that_share_a_row_agree_on_the_divergence(family, ranks, shared):
    """A student with one distribution for all tokens is compared with the teacher's whole distributions."""
    model = family("qwen3")
    rows = model.rows()
    student = torch.randn(model.model.config.vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    ids, log_probs = top_log_probs(student[None], len(student))
    expected = []
    for row in rows:
        length = len(row["mask"])
        row |= {IDS: ids.expand(length, -1).int().clone(), LOG_PROBS: log_probs.expand(length, -1).clone()}
        with torch.no_grad():
            logits = model.model(input_ids=row["ids"][None]).logits[0, -length - 1 : -1].double() / TEMPERATURE
        p = student.double().log_softmax(-1)
        expected.append((p.exp() * (p - logits.log_softmax(-1))).sum(-1).numpy())
    ranks("start", model.path, {"ulysses_sequence_parallel_size": shared, "max_token_len_per_gpu": 60})
    assert_equal(ranks.score(rows, "teacher_kl"), expected)
    assert_equal(ranks.score(rows), [model.log_probs(row) for row in rows])


SHARDINGS = [
    {"strategy": "fsdp2"},
    {"strategy": "fsdp2", "fsdp_size": 2},
    {"strategy": "fsdp2", "reshard_after_forward": False},
    {"strategy": "fsdp"},
    {"strategy": "fsdp", "fsdp_size": 2},
    {"strategy": "fsdp", "reshard_after_forward": False},
]


@pytest.mark.parametrize("settings", SHARDINGS, ids=str)
def test_however_the_weights_are_sharded(family, ranks, settings):
    model = family("qwen2_5_vl")
    rows = model.rows()
    expected = [model.log_probs(row) for row in rows]
    sizes = {"ulysses_sequence_parallel_size": 2, "max_token_len_per_gpu": 40}
    ranks("start", model.path, {"fsdp": settings} | sizes)
    ranks("watch")
    assert_equal(ranks.score(rows), expected)
    assert [moves for _, moves in ranks("watched")] == [0] * RANKS
    if settings.get("reshard_after_forward", True):
        assert ranks("gathered") == [0] * RANKS

    # Offloaded, the weights come and go once a call, whatever the number of micro-batches, and none stay behind.
    ranks("offload")
    assert_equal(ranks.score(rows), expected)
    for tokens, moves in ranks("watched"):
        assert moves == 2 and len(tokens) > 1
    assert ranks("gathered") == [0] * RANKS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["scaling", "places"])
def test_the_self_check_finds_what_is_broken_here_only(family, ranks, what, dtype):
    model = family("qwen2_5_vl")
    rows = model.rows()
    ranks("start", model.path, {"dtype": dtype, "ulysses_sequence_parallel_size": 2})
    with ranks.spoiled(what), pytest.raises(RuntimeError) as failed:
        ranks.score(rows)
    # Each data-parallel rank names its row with the shortest prompt: by all names, with both log-probs.
    errors = str(failed.value).splitlines()
    for error, part in zip(errors, (rows[:4], rows[:4], rows[4:], rows[4:]), strict=True):
        row = min(range(4), key=lambda row: len(part[row]["ids"]) - len(part[row]["mask"]))
        names = "(prompt {uid}, response {session_id}, sample {index})".format(**part[row]["names"])
        assert f"ValueError: row {row} {names}: the teacher's self-check failed. Token " in error
        numbers = [float(x) for x in re.findall(r"-\d+\.\d{6}", error)]
        # Measured 1.3 to 14 nats.
        assert len(numbers) == 2 and abs(numbers[0] - numbers[1]) > (1e-3 if dtype == "float32" else 0.25)
        assert f"may differ by {1e-3 if dtype == 'float32' else 0.25} nats" in error

    # Nothing has been scored, so the next batch is checked.
    ranks.score(rows)
    assert "differ by at most" in ranks.printed


def test_without_the_self_check_nothing_else_runs(family, ranks):
    model = family("qwen2_5_vl")
    rows = model.rows()
    ranks("start", model.path, {"self_check": False})
    with ranks.spoiled("scaling"):
        scored = ranks.score(rows)
    assert ranks.printed == ""
    assert max(abs(a - model.log_probs(row)).max() for a, row in zip(scored, rows, strict=True)) > 1e-3


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_a_sampled_placeholder_is_a_token_like_any_other(family, ranks, name, shared):
    """It is scored by its id and embedded as its own row of the embedding, and no image moves."""
    model = family(name)
    # Of each family two at which the model may put features, and one that frames an image.
    qwen, internvl = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>"), ("<IMG_CONTEXT>", "<IMG_CONTEXT>", "<img>")
    placeholders = [model.token_id(token) for token in (internvl if name == "internvl" else qwen)]
    rows = model.rows()
    hit = [row for row in rows if row["names"]["uid"] in ("p1", "p2") and len(row["mask"]) > 3]
    assert len(hit) == 3 and any(row["inputs"] for row in hit) and not all(row["inputs"] for row in hit)
    ordinary = [x["ids"].clone() for x in hit]
    for row in hit:
        row["ids"][-4:-1] = torch.tensor(placeholders)
    ranks("start", model.path, {"ulysses_sequence_parallel_size": shared, "max_token_len_per_gpu": 1000})
    scored = ranks.score(rows)

    # Hugging Face's model finds images by the id, so the same embedding is put under two other ids for it.
    embedding = model.model.get_input_embeddings().weight
    unused = [i for i in range(200, 300) if not any((row["ids"] == i).any() for row in rows)][:2]
    intact = embedding[unused].detach().clone()
    expected = []
    with torch.no_grad():
        embedding[unused] = embedding[placeholders[:2]]
        for row in rows:
            seen = row["ids"].clone()
            if any(row is one for one in hit):
                seen[-4:-2] = torch.tensor(unused)
            expected.append(model.log_probs(row, seen))
        embedding[unused] = intact
    assert_equal(scored, expected)

    # To the rows beside it, which share its micro-batch and some its prompt, it is nothing: not one bit changes.
    for row, ids in zip(hit, ordinary, strict=True):
        row["ids"] = ids
    for row, before, after in zip(rows, ranks.score(rows), scored, strict=True):
        same = np.array_equal(before, after)
        assert same != any(row is one for one in hit)


def test_images_of_tools_stand_in_responses(family, ranks):
    """Two equal rollouts of two turns have second images with a mask of 0, beside other rollouts of their prompt."""
    model = family("qwen2_5_vl")
    prompt, inputs = model.encode(1)
    rows = []
    turn, seen = model.encode(1, "now this one", role="tool")
    both = {name: torch.cat([inputs[name], seen[name]]) for name in inputs}
    words = torch.from_numpy(model.rng.integers(0, 200, 14))
    for number, sampled in enumerate((words[:5], words[:5], words[5:10], None)):
        names = {"uid": "p", "session_id": number}
        if sampled is None:
            rows.append(model.row(prompt, words, inputs, **names))
            continue
        response = torch.cat([sampled, turn, words[-2:]])
        mask = torch.cat([torch.ones_like(sampled), torch.zeros_like(turn), torch.ones(2, dtype=torch.long)])
        rows.append(model.row(prompt, response, both, mask, **names))
    ranks("start", model.path, {"ulysses_sequence_parallel_size": 4})
    assert_equal(ranks.score(rows), [model.log_probs(row) for row in rows])


def test_a_row_that_cannot_be_scored_is_named_before_anything_runs(family, ranks):
    model = family("qwen2_5_vl")
    rows = model.rows()
    ranks("start", model.path, {"ulysses_sequence_parallel_size": 4})
    ranks("watch")
    row = next(number for number, row in enumerate(rows) if row["inputs"])
    names = "(prompt {uid}, response {session_id}, sample {index})".format(**rows[row]["names"])
    vocabulary = model.model.config.get_text_config().vocab_size
    for token_id in (-1, vocabulary):
        spoiled = rows[row] | {"ids": rows[row]["ids"].clone()}
        spoiled["ids"][-1] = token_id
        last = len(rows[row]["mask"]) - 1
        message = f"row {row} {names}: token {last} of the response has the id {token_id}, but the teacher's vocabulary"
        with pytest.raises(RuntimeError, match=re.escape(message) + f" has {vocabulary} ids"):
            ranks.score([*rows[:row], spoiled, *rows[row + 1 :]])
    with pytest.raises(
        RuntimeError, match=re.escape(f"row {row} {names}: ") + r"\d+ image tokens in its ids but images"
    ):
        ranks.score([*rows[:row], rows[row] | {"inputs": {}}, *rows[row + 1 :]])
    assert ranks("watched") == [([], 0)] * RANKS


def test_heads_that_cannot_be_dealt_out_are_refused(family, ranks):
    with pytest.raises(RuntimeError, match=r"parallel_size=3 does not fit a model with 4 attention heads and 1 of"):
        ranks("start", family("qwen2_5_vl").path, {"ulysses_sequence_parallel_size": 3})


# --- two and three ranks, which share the weights unevenly ------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 3])
def few_ranks(request):
    ranks = Ranks(request.param)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_uneven_shards_keep_every_bit(family, few_ranks, strategy, tmp_path):
    """On their way to the host and back, between scores, into a checkpoint and out of it."""
    model = family("uneven")
    rows = [row for _ in range(3) for row in model.rows()][: 6 * 2]
    expected = {name: digest(value) for name, value in load_file(model.path / "model.safetensors").items()}
    few_ranks("start", model.path, {"fsdp": {"strategy": strategy}})
    shapes = few_ranks("shapes")
    # FSDP1 flattens the parameters of a layer and pads them, so that its shards cut through parameters instead.
    assert (shapes[0] != shapes[-1]) == (strategy == "fsdp2")
    resident = few_ranks.score(rows)
    assert_equal(resident, [model.log_probs(row) for row in rows])
    assert all(weights == expected for weights in few_ranks("weights"))
    for _ in range(2):
        few_ranks("round_trip")
        assert all(weights == expected for weights in few_ranks("weights"))
        assert all(map(np.array_equal, few_ranks.score(rows), resident))

    few_ranks("save", str(tmp_path))
    few_ranks("restore", str(tmp_path))
    assert all(weights == expected for weights in few_ranks("weights"))


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_a_weight_that_changes_on_its_way_ends_the_run(family, few_ranks, strategy):
    few_ranks("start", family("uneven").path, {"fsdp": {"strategy": strategy}})
    with pytest.raises(RuntimeError) as failed:
        few_ranks("round_trip", 1)
    (error,) = str(failed.value).splitlines()
    assert "1 of " in error and "on rank 1 are not what they were before they were offloaded to the host" in error
