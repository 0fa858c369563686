# SPDX-License-Identifier: Apache-2.0
"""Find out on a small model how a teacher of an architecture can be scored, before the real one is loaded.

The small model has the architecture's code and settings, few layers, narrow ones, and random weights. It scores a
handful of rows in each way that the scorer has, and each is compared with plain forward passes of the same model. That
decides better than a list of architectures could: transformers adds some with every release, and changes others.
"""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from verl_gndpo.families import family_of
from verl_gndpo.teacher.packing import PromptGroup, plan
from verl_gndpo.teacher.scorer import SHARING, Rows, Scorer, concatenate_inputs
from verl_gndpo.teacher.scoring import LogitsChange

TOLERANCE = 1e-4
"""Nats by which a log-prob may differ from that of a plain forward pass, in float32."""

PROMPTS = (71, 6)
"""Lengths of the prompts. Linear attention works in chunks of 64 tokens."""

RESPONSES = ((9, 3, 9, 1), (4,))
"""Lengths of the responses to each prompt. Two are alike, so that they run side by side."""

WIDEST = 30_000_000
"""Parameters of a model that runs as it is. A larger one is made smaller first."""

LARGEST = 300_000_000
"""Parameters of a small model that can still be tried in a few seconds."""

WAYS = (*((way, True) for way in SHARING), ("none", False))
"""Ways to score, the fastest first, each with whether several sequences run at once."""

SEED = 0


class TrialError(ValueError):
    """An architecture can't be scored, or can't be tried; the message says why."""


class NotTriedError(TrialError):
    """No small model of the architecture can be built, so that nothing is known about it."""


@dataclass(frozen=True)
class Verdict:
    """How to score a teacher."""

    sharing: str
    """The fastest of `SHARING` that is exact."""

    side_by_side: bool
    """False: rows run one by one, because the model mixes rows that run side by side."""

    change: LogitsChange
    """What the model does with its logits."""

    tower_always_runs: bool = True
    """False: without images the vision tower does not run, so ranks without them would not gather its weights."""

    reasons: Mapping[str, str] = field(default_factory=dict)
    """For each faster way, as "sharing=..." or "running rows side by side", why it is not exact."""

    def __str__(self) -> str:
        """Return the way and the reasons in one line."""
        how = {
            "attention": "responses share their prompt through attention",
            "cache": "responses continue from a cache of their prompt",
            "none": "each response runs with its own prompt",
        }[self.sharing]
        if not self.side_by_side:
            how += ", one by one"
        return "; ".join([how, *(f"{way} is not exact: {reason}" for way, reason in self.reasons.items())])


@dataclass(frozen=True)
class ImagePrompt:
    """A prompt with images, as a processor makes it."""

    ids: torch.Tensor
    """(length,)"""

    inputs: dict[str, Any]
    """The model's further inputs by name."""


def choose_sharing(
    config: Any,
    *,
    build: Callable[[Any, str], Any],
    attention: str = "eager",
    sharing: str = "auto",
    image_prompt: ImagePrompt | None = None,
    device: torch.device | int | str = "cpu",
    concatenate_inputs: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] = concatenate_inputs,
) -> Verdict:
    """Return the fastest exact way to score a teacher.

    Args:
        config: of the teacher.
        build: makes a float32 model with random weights from a config and the name of an attention implementation, as
            the real one will be made from its own.
        attention: of the real model; anything but "sdpa" is tried as "eager", which every architecture defines.
        sharing: auto, or the only way to try.
        image_prompt: a prompt that the teacher's processor has made; None to try text only.
        device: of the trial.
        concatenate_inputs: as for `Scorer`.

    Raises:
        NotTriedError: no small model can be built.
        TrialError: the model itself fails, or no way is exact.
    """
    run: dict[str, Any] = {"device": device, "dtype": torch.float32}
    plain: dict[str, Any] = {"chunk_tokens": 256, "temperature": 1.0, "concatenate_inputs": concatenate_inputs}
    problems: list[Exception] = []
    for attempt in ATTEMPTS:
        try:
            oracle = _small_model(config, attempt, lambda small: build(small, "eager")).to(device)
            model = oracle
            if attention == "sdpa":
                model = _small_model(config, attempt, lambda small: build(small, "sdpa")).to(device)
            rows, groups = _rows(model.config, image_prompt)
            change = logits_change(copy.deepcopy(oracle), rows, device)
            # One row after the other, through nothing but the model's own code and full logits.
            scorer = Scorer(copy.deepcopy(oracle), sharing="none", **plain)
            tower_always_runs = _tower_runs(scorer, rows, run)
            expected = [
                scorer.score_plainly(scorer.model, row, rows, length, whole=True, **run)
                for row, length in enumerate(rows.lengths)
            ]
        except _TooLargeError:
            continue
        # The code of an architecture may raise anything.
        except Exception as error:
            # The first problem counts: a smaller model may fail for being small.
            known = isinstance(error, TrialError)
            problems.append(error if known else TrialError(f"its forward pass fails: {_first_line(error)}"))
            continue
        break
    else:
        problems.append(NotTriedError(f"every small model of {config.model_type} is too large"))
        raise problems[0]
    reasons: dict[str, str] = {}
    for way, at_once in WAYS:
        if sharing not in ("auto", way):
            continue
        name = f"sharing={way}" if way != "none" else "running rows side by side" if at_once else "running rows alone"
        try:
            scorer = Scorer(copy.deepcopy(model), sharing=way, change=change, **plain)
            largest = 0.0
            for step in plan(groups, way, 10_000 if at_once else 1):
                scored = scorer.score(scorer.model, step, rows, **run)[:, 0]
                for row, of_row in zip(step.rows, scored.split([rows.lengths[r] for r in step.rows]), strict=True):
                    largest = max(largest, float((of_row - expected[row]).abs().nan_to_num(math.inf).max()))
        except Exception as error:
            reasons[name] = _first_line(error)
            continue
        if largest <= TOLERANCE:
            return Verdict(way, at_once, change, tower_always_runs, reasons)
        reasons[name] = f"log-probs differ by {largest:.2g} nats from a plain forward pass"
    raise TrialError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def _tower_runs(scorer: Scorer, rows: Rows, run: dict[str, Any]) -> bool:
    """Return whether each vision tower runs for the first row, which has no images."""
    towers = family_of(scorer.model).find_towers(scorer.model)
    ran = set()
    hooks = [
        tower.register_forward_pre_hook(lambda *_, name=name: ran.add(name), with_kwargs=True)
        for name, tower in towers.items()
    ]
    scorer.score_plainly(scorer.model, 0, rows, 1, whole=True, **run)
    for hook in hooks:
        hook.remove()
    return ran == set(towers)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def logits_change(model: Any, rows: Rows, device: torch.device | int | str = "cpu") -> LogitsChange:
    """Find out what a model does with the logits that its output projection returns.

    The projection is made to return known values, and what the model makes of them is compared with the changes that
    `LogitsChange` can describe.

    Args:
        rows: to run; the first one is.

    Raises:
        TrialError: the model changes its logits in another way.
    """
    sizes = torch.tensor([1e-3, 1e-2, 0.1, 0.5, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3], device=device)
    far = 1e7
    given = torch.cat([-sizes, sizes, sizes.new_tensor([0.0, far])])
    projection = model.get_output_embeddings()
    vocabulary = projection.weight.shape[0]
    filled = given.new_zeros(max(vocabulary, len(given)))
    filled[: len(given)] = given
    projection.register_forward_hook(lambda _, hidden, __: filled.expand(*hidden[0].shape[:-1], -1))
    scorer = Scorer(model, chunk_tokens=256, temperature=1.0, sharing="none")
    logits = scorer.logits(model, 0, rows, 1, whole=True, device=device, dtype=torch.float32)
    got = logits[0, : len(given)].float()
    scale = float(got[len(sizes)] / given[len(sizes)])
    if not scale > 0:
        raise TrialError("it changes its logits by more than a positive factor and a bound")
    end = float(got[-1])
    cap = None if math.isclose(end, scale * far, rel_tol=1e-3) else end
    if math.isclose(scale, 1.0, rel_tol=1e-6):
        # A bound has rounded the value.
        scale = 1.0
    expected = LogitsChange(scale, cap).apply_(given.clone())
    if not torch.allclose(got, expected, rtol=1e-4, atol=1e-5):
        raise TrialError("it changes its logits by more than a positive factor and a bound")
    return LogitsChange(scale, cap)


# --- a small model ----------------------------------------------------------------------------------------------------


class _TooLargeError(Exception):
    """A model is too large to be tried."""


ATTEMPTS = ("as it is", "narrow", "narrow, with heads that divide the width", "as wide as it is")
"""Ways to get a small model, which are tried in this order."""


def _small_model(config: Any, attempt: str, build: Callable[[Any], Any]) -> Any:
    """Return a model of the same architecture that can be tried in seconds, with random weights.

    Raises:
        _TooLargeError: the attempt does not make it small.
        Whatever the architecture's own code raises.
    """
    small = copy.deepcopy(config) if attempt == "as it is" else shrink(config, attempt)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build(copy.deepcopy(small)).parameters())
    if size > (WIDEST if attempt == "as it is" else LARGEST):
        raise _TooLargeError
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = build(small)
    _randomize(model)
    return model.eval()


LAYERS = ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "n_layer", "n_layers")
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")
"""Lists with one entry per layer."""

HEADS = ("num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads", "n_head")
WIDTHS = ("hidden_size", "embed_dim", "d_model", "n_embd")
SMALLER = {
    "intermediate_size": 96,
    "ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "sliding_window": 6,
    "attention_chunk_size": 8,
    "ssm_state_size": 16,
    "chunk_size": 16,
    "index_topk": 8,
}
"""Sizes on which nothing else depends. Windows become smaller than the rows of the trial, so that they show."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def shrink(config: Any, attempt: str) -> Any:
    """Return a copy of a config with a few layers of each kind, few experts, and narrow layers.

    Args:
        attempt: one of `ATTEMPTS`. Head sizes stay in each, because rotary sections depend on them.
    """
    narrow = attempt.startswith("narrow")
    small = copy.deepcopy(config)
    for part in _parts(small):
        _shrink_layers(part)
        for name in EXPERTS:
            if isinstance(getattr(part, name, None), int):
                per_token = max(getattr(part, "num_experts_per_tok", 1) or 1, 1)
                groups = getattr(part, "n_group", None) or 1
                setattr(part, name, min(getattr(part, name), max(8, 2 * per_token, 2 * groups)))
        for name, size in SMALLER.items():
            value = getattr(part, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > size:
                setattr(part, name, size)
        rates = getattr(part, "compress_rates", None)
        if isinstance(rates, dict):
            part.compress_rates = {kind: min(rate, 8) for kind, rate in rates.items()}
        if narrow:
            _shrink_width(part, divides="divide" in attempt)
    if narrow:
        _reconnect(small)
    return small


def _parts(config: Any) -> list[Any]:
    """Return a config and all configs within it, outermost first."""
    parts = [config]
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "model_type"):
            parts += _parts(part)
    return parts


def _shrink_layers(part: Any) -> None:
    kinds = {name: list(value) for name in KINDS if isinstance(value := getattr(part, name, None), list | tuple)}
    first_dense = getattr(part, "first_k_dense_replace", None)
    if isinstance(first_dense, int) and first_dense > 1:
        part.first_k_dense_replace = 1
    layers = next((name for name in LAYERS if isinstance(getattr(part, name, None), int)), None)
    if layers is None:
        return
    number = getattr(part, layers)
    few = min(number, 3)
    if kinds:
        combined = list(zip(*kinds.values(), strict=True))
        # The shortest run from the start that has each kind of layer, and one layer more.
        seen = [len(set(combined[:end])) for end in range(len(combined) + 1)]
        run = seen.index(seen[-1])
        shared = getattr(part, "num_kv_shared_layers", 0)
        few = min(number, 2 * run if shared else max(3, run + 1))
        if shared:
            # Layers that use the keys and values of others need one of their kind before them.
            part.num_kv_shared_layers = few - run
        for name, value in kinds.items():
            setattr(part, name, value[:few])
    setattr(part, layers, few)
    window_layers = getattr(part, "max_window_layers", None)
    if isinstance(window_layers, int):
        part.max_window_layers = min(window_layers, few - 1)
    deep = getattr(part, "deepstack_visual_indexes", None)
    if deep:
        part.deepstack_visual_indexes = list(range(min(len(deep), few)))
    full = getattr(part, "fullatt_block_indexes", None)
    if full:
        part.fullatt_block_indexes = [few - 1]


def _shrink_width(part: Any, divides: bool) -> None:
    """Leave at most four heads, and as much width.

    Args:
        divides: the width is that of the heads, also where the config has a head size of its own.
    """
    heads = next((name for name in HEADS if isinstance(getattr(part, name, None), int)), None)
    width = next((name for name in WIDTHS if isinstance(getattr(part, name, None), int)), None)
    if heads is None or width is None:
        return
    number, size = getattr(part, heads), getattr(part, width)
    shared = getattr(part, "num_key_value_heads", None)
    few = min(number, 4)
    if isinstance(shared, int) and 0 < shared <= number:
        # Several heads share keys and values if they did.
        few_shared = min(shared, 2)
        few = few_shared * min(number // shared, 2)
        part.num_key_value_heads = few_shared
    setattr(part, heads, few)
    head_size = getattr(part, "head_dim", None)
    if isinstance(head_size, int) and not divides:
        setattr(part, width, min(size, 128))
    else:
        setattr(part, width, few * (head_size if isinstance(head_size, int) else size // number))
    linear = getattr(part, "linear_num_key_heads", None)
    if isinstance(linear, int):
        ratio = part.linear_num_value_heads // linear
        part.linear_num_key_heads = min(linear, 2)
        part.linear_num_value_heads = min(linear, 2) * ratio
    states = getattr(part, "mamba_num_heads", None)
    if isinstance(states, int):
        part.mamba_num_heads = min(states, 2 * (getattr(part, "n_groups", None) or 1))


def _reconnect(config: Any) -> None:
    """Give towers that map to the language model's width its new width."""
    width = getattr(config.get_text_config(), "hidden_size", None)
    for part in _parts(config):
        if part is config.get_text_config():
            continue
        for name in ("out_hidden_size", "output_dim", "projection_dim", "text_hidden_size"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, width)
        # Qwen2-VL's tower calls the language model's width its hidden size.
        if hasattr(part, "embed_dim") and hasattr(part, "spatial_merge_size") and hasattr(part, "hidden_size"):
            part.hidden_size = width


def _randomize(model: Any) -> None:
    """Draw weights with which everything that a model computes shows in its log-probs."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.dim() >= 2:
                parameter.copy_(noise * 1.5 / math.sqrt(parameter[0].numel() if parameter.dim() < 4 else 100.0))
            else:
                # Norms, biases and sinks begin as ones or zeros.
                parameter.add_(0.1 * noise)


# --- its rows ---------------------------------------------------------------------------------------------------------


def _special_ids(config: Any) -> list[int]:
    """Return the ids that any part of a config names."""
    found = []
    for part in _parts(config):
        for name, value in part.to_dict().items():
            if name.endswith(("token_id", "token_index", "_token_ids")):
                found += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
    return found


def _rows(config: Any, image_prompt: ImagePrompt | None) -> tuple[Rows, list[PromptGroup]]:
    """Return rows to score: prompts of text, and one with images if there is one."""
    generator = torch.Generator().manual_seed(SEED)
    text = config.get_text_config()
    special = set(_special_ids(config))
    ordinary = torch.tensor(
        list(itertools.islice((i for i in range(text.vocab_size) if i not in special), 10_000)), dtype=torch.long
    )

    def draw(count: int) -> torch.Tensor:
        return ordinary[torch.randint(len(ordinary), (count,), generator=generator)]

    prompts: list[tuple[torch.Tensor, dict[str, Any]]] = [(draw(length), {}) for length in PROMPTS]
    lengths = list(RESPONSES)
    if image_prompt is not None:
        # The last token of a prompt continues from the cache, so it must not be an image.
        prompts.append((torch.cat([image_prompt.ids, draw(3)]), image_prompt.inputs))
        lengths.append((5, 5, 2))
    axes = "mrope_section" in (getattr(text, "rope_parameters", None) or {})
    ids: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    inputs: list[dict[str, Any]] = []
    responses: list[int] = []
    groups: list[PromptGroup] = []
    for (prompt, images), of_prompt in zip(prompts, lengths, strict=True):
        first = len(ids)
        for length in of_prompt:
            row = torch.cat([prompt, draw(length)])
            place = torch.arange(len(row))
            ids.append(row)
            # Axes of images that differ from that of text, as they do in real rows.
            positions.append(torch.stack([place, place // 2, place % 7, place]) if axes else place)
            inputs.append(images)
            responses.append(length)
        groups.append(PromptGroup(tuple(range(first, len(ids))), len(prompt), tuple(of_prompt)))
    sampled = [torch.zeros_like(row, dtype=torch.bool) for row in ids]
    return Rows(ids, positions, responses, inputs, sampled), groups


def make_image_prompt(processor: Any, config: Any) -> ImagePrompt:
    """Have a processor make a prompt with two images of different sizes, as verl's agent loop does.

    A chat template that shows no images, which belongs to a model whose prompts come in another one's template, is not
    used.

    Args:
        config: of the model.

    Raises:
        NotTriedError: no prompt of the processor shows images.
        Whatever the processor raises.
    """
    from PIL import Image

    noise = torch.Generator().manual_seed(SEED)
    images = [
        Image.fromarray(torch.randint(0, 256, (*size, 3), generator=noise, dtype=torch.uint8).numpy())
        for size in ((64, 64), (96, 64))
    ]
    words = "What is this?"
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": words}]
    chat = [{"role": "user", "content": content}]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)]
    marks = (getattr(processor, name, None) for name in ("image_token", "boi_token"))
    texts += [mark * len(images) + words for mark in marks if mark is not None]
    placeholders = set(family_of(config).placeholder_ids(config).values())
    problem: Exception = NotTriedError("no prompt of its processor shows images")
    for text in texts:
        try:
            inputs = dict(processor(text=[text], images=images, return_tensors="pt"))
        # A processor refuses other numbers of marks and images in its own way.
        except Exception as error:
            problem = error
            continue
        ids = inputs.pop("input_ids")[0]
        if placeholders.isdisjoint(ids.tolist()):
            continue
        for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
            inputs.pop(name, None)
        return ImagePrompt(ids, inputs)
    raise problem
