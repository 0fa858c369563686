# SPDX-License-Identifier: Apache-2.0
"""Make rows as verl's agent loop does, score them with plain Hugging Face, and start workers in this process."""

import os
import socket
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from verl.trainer.config import CheckpointConfig
from verl.utils.model import get_hf_auto_model_class
from verl.utils.tensordict_utils import nested_tensor_from_tensor_list
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from tests import settings
from verl_gndpo.config import TeacherConfig
from verl_gndpo.families import QWEN_VL
from verl_gndpo.student.engine import StudentEngineConfig
from verl_gndpo.student.run import MODEL_TYPE
from verl_gndpo.teacher.architecture import stock_classes
from verl_gndpo.teacher.worker import TeacherWorker


def load(path, **options) -> torch.nn.Module:
    """Load a checkpoint into transformers' own class, in float32, with eager attention."""
    from transformers import AutoConfig

    model_class = get_hf_auto_model_class(AutoConfig.from_pretrained(path))
    return model_class.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", **options).eval()


def make_rows(path, images_per_prompt: list[int], response_lengths: list[list[int]]) -> list[dict]:
    """Make responses to prompts with images of different sizes, in mixed order.

    Args:
        path: a checkpoint with its processor, or with only its tokenizer.
        images_per_prompt: number of images of each prompt.
        response_lengths: for each prompt, the lengths of its responses in tokens.

    Returns:
        Rows {ids, positions, inputs, response}. `ids` has shape (length,). `positions` has shape (length,) or, for
        models with rotary positions of their own, (4, length), as verl's agent loop computes it. `inputs` are the
        model's further inputs. `response` has shape (response length,).
    """
    from transformers import AutoProcessor

    processor, model = AutoProcessor.from_pretrained(path), load(path)
    rng = np.random.default_rng(0)
    rows = []
    for n_images, lengths in zip(images_per_prompt, response_lengths, strict=True):
        images = [
            Image.fromarray(rng.integers(0, 255, (28 * rng.integers(1, 4), 28 * rng.integers(1, 4), 3), np.uint8))
            for _ in range(n_images)
        ]
        words = "how many? " * int(rng.integers(1, 6))
        content = [{"type": "image"}] * n_images + [{"type": "text", "text": words}] if n_images else words
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        pictures = {"images": images} if images else {}
        inputs = dict(processor(text=[text], return_tensors="pt", **pictures))
        prompt = inputs.pop("input_ids")[0]
        inputs = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
        for length in lengths:
            # Ordinary text tokens, because the special ones are at the end of the vocabulary.
            response = torch.from_numpy(rng.integers(0, 200, length))
            ids = torch.cat([prompt, response])
            # Each row has its own copy of the images, as in verl.
            copies = {name: value.clone() for name, value in inputs.items()}
            rows.append(
                {"ids": ids, "positions": positions(model, ids, inputs), "inputs": copies, "response": response}
            )
    return [rows[i] for i in rng.permutation(len(rows))]


def _kinds(model, ids: torch.Tensor) -> torch.Tensor:
    """Return 1 for image placeholders and 0 for text, as the Qwen-VL models of transformers 5 require."""
    return (ids == model.config.image_token_id).int()


def positions(model, ids: torch.Tensor, inputs: dict) -> torch.Tensor:
    """Return one sequence's positions: plain and rotary ones (4, length) if the model has its own, else (length,)."""
    plain = torch.arange(len(ids))
    if not hasattr(model.base_model, "get_rope_index"):
        return plain
    grid = inputs.get("image_grid_thw")
    rotary, _ = model.base_model.get_rope_index(
        ids[None], mm_token_type_ids=_kinds(model, ids[None]), image_grid_thw=grid
    )
    return torch.cat([plain[None], rotary[:, 0]])


def hugging_face_log_probs(
    path, rows: list[dict], temperature: float, without_placeholders: bool = False
) -> list[torch.Tensor]:
    """Return each row's log-probs of its response tokens, in float64, from a forward pass of that row alone.

    The model computes its own positions. `without_placeholders` excludes the placeholders of images and videos from the
    distribution, as verl's inference servers do.
    """
    whole = hugging_face_distributions(path, rows, temperature, without_placeholders)
    return [x.gather(-1, row["ids"][-len(x) :, None])[:, 0] for x, row in zip(whole, rows, strict=True)]


def hugging_face_distributions(
    path, rows: list[dict], temperature: float, without_placeholders: bool = False
) -> list[torch.Tensor]:
    """Return the same for all ids: per row, log-probs of shape (response length, vocabulary)."""
    model = load(path)
    log_probs = []
    for row in rows:
        ids = row["ids"][None]
        inputs = dict(row["inputs"])
        if hasattr(model.base_model, "get_rope_index"):
            inputs["mm_token_type_ids"] = _kinds(model, ids)
        with torch.no_grad():
            logits = model(input_ids=ids, **inputs).logits[0].double() / temperature
        if without_placeholders:
            logits[:, [model.config.image_token_id, model.config.video_token_id]] = -torch.inf
        log_probs.append(logits[:-1].log_softmax(-1)[-len(row["response"]) :])
    return log_probs


def start_actor(
    path,
    packed: bool,
    max_tokens: int = 4096,
    attention: str = "sdpa",
    strategy: str = "fsdp2",
    sharing=None,
    optimizer=None,
    **model,
) -> TrainingWorker:
    """Start verl's FSDP engine, as the actor that computes `old_log_probs`.

    Args:
        sharing: settings of `student`, for this project's engine; None for verl's own.
        optimizer: its config; None for one that is not used.
        model: settings of the model.
    """
    engine_config = FSDPEngineConfig if sharing is None else partial(StudentEngineConfig, **sharing)
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model" if sharing is None else MODEL_TYPE,
            model_config=HFModelConfig(
                path=str(path),
                use_remove_padding=packed,
                override_config={"attn_implementation": attention},
                **({"load_tokenizer": False, "enable_gradient_checkpointing": False} | model),
            ),
            engine_config=engine_config(
                strategy=strategy,
                model_dtype="float32",
                mixed_precision={"param_dtype": "float32", "reduce_dtype": "float32", "buffer_dtype": "float32"},
                use_torch_compile=False,
                use_dynamic_bsz=True,
                infer_max_token_len_per_gpu=max_tokens,
            ),
            optimizer_config=optimizer or FSDPOptimizerConfig(lr=1e-6, total_training_steps=1),
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    return worker


def teacher_config(path, attention_of_model: str = "sdpa", **section) -> TeacherConfig:
    """Return the settings of a teacher that runs on the CPU; `section` holds keys of `teacher`."""
    override = {"attn_implementation": attention_of_model}
    return settings.teacher_config(path, model={"override_config": override}, **section)


def start_teacher(config: TeacherConfig) -> TeacherWorker:
    """Start a teacher worker on this process's rank."""
    worker = TeacherWorker(config)
    worker.reset()
    return worker


def nested(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(tensors), layout=torch.jagged)


def as_batch(rows: list[dict]) -> TensorDict:
    """Return rows as the batch that verl passes to a worker."""
    places = [row["positions"] for row in rows]
    fields = {
        "input_ids": nested(row["ids"] for row in rows),
        "position_ids": nested(places)
        if places[0].dim() == 1
        else nested_tensor_from_tensor_list(places, ragged_idx=2),
        "response_mask": nested(torch.ones_like(row["response"]) for row in rows),
        "multi_modal_inputs": NonTensorStack(*[row["inputs"] for row in rows]),
    }
    return TensorDict(fields, batch_size=len(rows))


def assert_equal_to(expected: list[torch.Tensor], scored: TensorDict) -> None:
    """Compare each row's teacher log-probs to 1e-4 nats.

    Rounding was measured at up to 4e-5 (ATEN_CPU_CAPABILITY default and avx512). A wrong position, temperature or image
    moves log-probs by nats.
    """
    scored = scored["teacher_log_probs"]
    assert scored.values().dtype == torch.float32
    for row, (ours, reference) in enumerate(zip(scored.unbind(), expected, strict=True)):
        torch.testing.assert_close(
            ours.double(), reference, atol=1e-4, rtol=0, msg=lambda m, row=row: f"row {row}: {m}"
        )


@contextmanager
def stock_transformers():
    """Restore transformers' classes at the end, because verl changes them in the process that all tests share."""
    from transformers.integrations import flash_attention

    flash = flash_attention._flash_attention_forward
    try:
        with stock_classes(replace(QWEN_VL, model_types=(*QWEN_VL.model_types, "glm4v"))):
            yield
    finally:
        flash_attention._flash_attention_forward = flash


def free_port() -> int:
    """Return a port of this machine that no process listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def set_rank(rank: int, ranks: int, port: int) -> None:
    """Set the environment variables that Ray would set for one rank of a gloo group."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "RAY_LOCAL_WORLD_SIZE": "1"}


@contextmanager
def one_rank():
    """Make this process the only rank of a gloo group, as Ray would. Restore transformers' classes at the end."""
    before = dict(os.environ)
    set_rank(0, 1, free_port())
    try:
        with stock_transformers():
            yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)
