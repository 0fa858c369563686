# SPDX-License-Identifier: Apache-2.0
"""The steps of `verl-gndpo export`."""

import gc
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError

from verl_gndpo.export.card import collect_facts, write_card
from verl_gndpo.export.comparison import ask, check_answers, check_weights, largest_difference
from verl_gndpo.export.folders import ExportError, find_checkpoint
from verl_gndpo.export.shards import read_weights
from verl_gndpo.export.weights import build, make_merger, round_weights, write_adapter, write_model
from verl_gndpo.families import family_of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export(
    path: Path,
    out: Path,
    *,
    adapter: bool = False,
    base: str | None = None,
    dtype: str = "bfloat16",
    log: Path | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write a checkpoint as a Hugging Face folder, load it again, and compare it with the checkpoint.

    Args:
        path: the folder global_step_N, its actor, actor/huggingface, or the run's folder.
        out: the new folder. It appears when everything in it is written and compared.
        adapter: write LoRA adapters instead of merging them.
        base: folder or hub id of the model that training started from, where the checkpoint does not say it.
        dtype: a key of DTYPES.
        log: of verl's file logger, as for `collect_facts`.
        trust_remote_code: run code that comes with the checkpoint.
        say: takes lines for the user.

    Raises:
        ExportError: the checkpoint can't be exported, or what was written is not what was trained.
    """
    out = out.absolute()
    if out.exists() or out.is_symlink():
        raise ExportError(f"{out} exists already -> remove it, or give another folder with --out")
    checkpoint = find_checkpoint(path)
    facts = collect_facts(checkpoint, base, log)
    # Beside `out`, so that it can be renamed.
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    merger = make_merger(checkpoint, temporary, trust_remote_code)
    say(f"reading    {checkpoint.world_size} rank(s) of {checkpoint.actor}")
    model = build(merger, checkpoint, read_weights(checkpoint), facts.base, facts.run.get("lora_adapter"))
    with_adapters = isinstance(model, PeftModel)
    if adapter and not with_adapters:
        raise ExportError(f"{checkpoint.actor} holds no LoRA adapters -> leave out --adapter")
    if adapter and facts.base is None:
        raise ExportError(f"{checkpoint.actor} does not say which model its adapters belong to -> give it with --base")

    trained = ask(model, checkpoint.hugging_face, trust_remote_code)
    if with_adapters and not adapter:
        model = model.merge_and_unload()
        check_answers(trained, ask(model, checkpoint.hugging_face, trust_remote_code), "the model with merged adapters")
    round_weights(model, DTYPES[dtype])
    rounded = ask(model, checkpoint.hugging_face, trust_remote_code)
    sees = family_of(model.config).vision_config_of(model.config) is not None
    try:
        temporary.mkdir(parents=True)
        if adapter:
            write_adapter(model, merger, checkpoint, str(facts.base), DTYPES[dtype])
            count = sum(weight.numel() for name, weight in model.named_parameters() if ".lora_" in name)
            model = PeftModel.from_pretrained(model.unload(), str(temporary)).float().eval()
        else:
            weights = {name: weight.to(DTYPES[dtype]) for name, weight in model.state_dict().items()}
            del model
            gc.collect()
            write_model(merger, dict(weights), DTYPES[dtype])
            model_class = merger.get_transformers_auto_model_class()
            model = model_class.from_pretrained(
                temporary, dtype="auto", attn_implementation="eager", trust_remote_code=trust_remote_code
            )
            count = check_weights(weights, model)
            del weights
            model = model.float().eval()
        difference = check_answers(rounded, ask(model, temporary, trust_remote_code), "what was written")
        moved = largest_difference(trained, rounded)
        weights_are = f"{dtype}, as trained"
        if dtype != "float32":
            weights_are = f"{dtype}, rounded from float32: log-probs of greedy tokens move by up to {moved:.1e} nats"
        write_card(temporary, out.name, checkpoint, facts, adapter, weights_are, sees)
        os.rename(temporary, out)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{out} can't be written: {' '.join(str(error).split())}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"compared   {count:,} values; log-probs of greedy tokens differ by {difference:.1e} nats")
    if dtype != "float32":
        say(f"rounding   to {dtype} moves them by up to {moved:.1e} nats; --dtype float32 keeps what was trained")
    if not facts.run:
        say("model card without teacher, data and signal, which this checkpoint does not name")
    if not facts.metrics:
        say("model card without metrics: no log of verl's file logger was found; --log FILE gives one")
    say(f"exported   {out}")
