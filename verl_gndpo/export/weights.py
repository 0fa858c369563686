# SPDX-License-Identifier: Apache-2.0
"""Make a model of a checkpoint's weights, and write it as a Hugging Face folder or as a LoRA adapter."""

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model
from verl.model_merger.base_model_merger import ModelMergerConfig
from verl.model_merger.fsdp_model_merger import FSDPModelMerger
from verl.utils import hf_processor, hf_tokenizer

from verl_gndpo.export.folders import Checkpoint, ExportError, read_json

PREFIX = "base_model.model."
"""peft puts it in front of every name."""
ADAPTER = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_[AB]\.default\.weight")
META = "lora_train_meta.json"
"""verl writes rank and alpha of the adapters into it."""
SCALING = ("use_rslora", "rank_pattern", "alpha_pattern")
"""Settings of peft that change the scale of an adapter. verl notes none of them; one may add them to META."""


def make_merger(checkpoint: Checkpoint, out: Path, trust_remote_code: bool) -> FSDPModelMerger:
    """Return verl's own merger for a checkpoint, whose config it reads.

    Args:
        out: the folder that it writes.

    Raises:
        ExportError: transformers can't read the config, or the checkpoint is not one of a language model.
    """
    config = ModelMergerConfig(
        operation="merge",
        backend="fsdp",
        local_dir=str(checkpoint.actor),
        target_dir=str(out),
        hf_model_config_path=str(checkpoint.hugging_face),
        trust_remote_code=trust_remote_code,
    )
    try:
        merger = FSDPModelMerger(config)
    # transformers raises whatever a malformed config leads to.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"transformers can't read the config in {checkpoint.hugging_face}: {reason}") from error
    kind = (merger.model_config.architectures or ["no architecture"])[0]
    if not kind.endswith(("ForCausalLM", "ForConditionalGeneration")):
        raise ExportError(
            f"{checkpoint.actor} holds a {kind}, which writes no text -> give the folder actor of the same step"
        )
    return merger


def build(
    merger: FSDPModelMerger,
    checkpoint: Checkpoint,
    weights: dict[str, torch.Tensor],
    base: str | None,
    continued: str | None = None,
) -> Any:
    """Return the model that was trained, in float32: one of transformers or, with adapters, one of peft.

    Args:
        merger: verl's, which knows the class of the model.
        weights: from `read_weights`. The model takes them over.
        base: folder or hub id of the model that training started from. Only needed where the checkpoint holds adapters
            alone (`save_lora_only`).
        continued: the run's `lora_adapter_path`, if it had one.

    Raises:
        ExportError: weights and config do not fit each other, or something that the adapters need is not known.
    """
    model_class, remote = merger.get_transformers_auto_model_class(), merger.config.trust_remote_code
    adapters = {name for name in weights if ".lora_" in name}
    alone = bool(adapters) and len(adapters) == len(weights)
    if alone:
        if base is None:
            raise ExportError(f"{checkpoint.actor} holds LoRA adapters alone -> give their model with --base")
        try:
            model = model_class.from_pretrained(
                base, dtype=torch.float32, attn_implementation="eager", trust_remote_code=remote
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ExportError(f"the base model {base} can't be loaded: {reason} -> correct --base") from error
    else:
        # Buffers that are not saved (rotary frequencies) are computed, so they may not be empty.
        with init_empty_weights(include_buffers=False):
            model = model_class.from_config(merger.model_config, attn_implementation="eager", trust_remote_code=remote)
    if adapters:
        with init_empty_weights(include_buffers=False):
            model = get_peft_model(model, _lora_config(model, checkpoint, adapters, continued))
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        if adapters and "lora_" in reason:
            reason += f" -> write rank_pattern and alpha_pattern of the adapters into {checkpoint.actor / META}"
        raise ExportError(f"the weights in {checkpoint.actor} do not fit its config: {reason}") from error
    if alone:
        missing = [name for name in missing if ".lora_" in name]
    if missing and getattr(merger.model_config, "tie_word_embeddings", False):
        model.tie_weights()
        missing = [name for name in missing if model.get_parameter(name).is_meta]
    if missing or unexpected:
        name, what = (missing[0], "lacks") if missing else (unexpected[0], "has, and the model lacks,")
        version = getattr(merger.model_config, "transformers_version", None)
        raise ExportError(
            f"{checkpoint.actor} {what} {name} (and {len(missing) + len(unexpected) - 1} more) -> export in the "
            f"environment of the training{f', with transformers {version}' if version else ''}"
        )
    return model.float().eval()


def _lora_config(model: Any, checkpoint: Checkpoint, names: set[str], continued: str | None) -> LoraConfig:
    """Return the settings of the adapters with these names.

    Raises:
        ExportError: verl's note on the adapters is missing, the adapter that the run continued can't be read, or the
            adapters are not those of Linear modules.
    """
    path = checkpoint.actor / META
    meta = read_json(path) if path.is_file() else {}
    if not all(isinstance(meta.get(name), int) for name in ("r", "lora_alpha")):
        raise ExportError(
            f'{path} does not say the scale of the adapters -> write {{"r": RANK, "lora_alpha": ALPHA}} into it, with '
            "the run's lora_rank and lora_alpha"
        )
    scaling = {name: meta[name] for name in SCALING if name in meta}
    if continued and not scaling:
        config = Path(continued).expanduser() / "adapter_config.json"
        if not config.is_file():
            raise ExportError(
                f"the run continued the adapter {continued}, and {config} is not there to say how it is scaled -> "
                f"write its {', '.join(SCALING)} into {path}, at least "
                '"use_rslora": true or false'
            )
        settings = read_json(config)
        scaling = {name: settings[name] for name in SCALING if settings.get(name)}
    modules = set()
    for name in names:
        found = ADAPTER.fullmatch(name)
        if found is None or not isinstance(model.get_submodule(found["module"]), torch.nn.Linear):
            raise ExportError(f"{name} of {checkpoint.actor} is no adapter of a Linear module, and export merges these")
        modules.add(found["module"])
    # The last parts of the names, as vLLM expects them, if these select the same modules.
    short = {module.rpartition(".")[2] for module in modules}
    chosen = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return LoraConfig(
        r=meta["r"],
        lora_alpha=meta["lora_alpha"],
        target_modules=sorted(short if chosen == modules else modules),
        task_type="CAUSAL_LM",
        **scaling,
    )


def round_weights(model: Any, dtype: torch.dtype) -> None:
    """Give each weight the value that it has in `dtype`; of a model with adapters, only those. All stay in float32."""
    with_adapters = isinstance(model, PeftModel)
    for name, weight in model.named_parameters():
        if not with_adapters or ".lora_" in name:
            weight.data = weight.data.to(dtype).float()


def write_model(merger: FSDPModelMerger, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Write weights, config, generation config, tokenizer and processor with verl's merger.

    Args:
        weights: whole, without adapters, in `dtype`. The dictionary is used up.
    """
    # The merger prints its progress with the name of the temporary folder.
    with contextlib.redirect_stdout(io.StringIO()):
        merger.save_hf_model_and_tokenizer(weights)
    path = Path(merger.config.target_dir) / "config.json"
    config = json.loads(path.read_text())
    for section in _sections(config):
        # The merger writes bfloat16, whatever it is given.
        if "dtype" in section:
            section["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")


def _sections(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _sections(value)


def write_adapter(
    model: PeftModel, merger: FSDPModelMerger, checkpoint: Checkpoint, base: str, dtype: torch.dtype
) -> None:
    """Write the adapters as peft does, with tokenizer and processor.

    Args:
        base: folder or hub id of the model that they belong to.
    """
    out = merger.config.target_dir
    model.peft_config["default"].base_model_name_or_path = base
    kept = {name: weight.to(dtype) for name, weight in model.state_dict().items() if ".lora_" in name}
    model.save_pretrained(out, state_dict=kept)
    for read in (hf_processor, hf_tokenizer):
        part = read(str(checkpoint.hugging_face), trust_remote_code=merger.config.trust_remote_code)
        if part is not None:
            part.save_pretrained(out)
