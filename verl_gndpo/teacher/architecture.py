# SPDX-License-Identifier: Apache-2.0
"""Try a teacher's architecture as verl builds it: verl's choice of a class, and verl's changes to its forward."""

import contextlib
import copy
import importlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from verl_gndpo.config import Teacher
from verl_gndpo.families import ModelFamily, family_of
from verl_gndpo.teacher.trial import ImagePrompt, NotTriedError, TrialError, Verdict, choose_sharing, make_image_prompt

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def stock_classes(family: ModelFamily) -> Iterator[None]:
    """Undo what happens to the classes of transformers' models within this context.

    verl replaces forwards of classes, and whoever asks the doctor may use the classes for something else.

    Args:
        family: whose modules verl imports, and changes, together with that of one of its models.
    """
    for name in family.model_types:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    modules = [module for name, module in sys.modules.items() if name.startswith("transformers.models.")]
    classes = {c for m in modules for c in vars(m).values() if isinstance(c, type) and issubclass(c, torch.nn.Module)}
    before = [(model_class, dict(vars(model_class))) for model_class in classes]
    try:
        yield
    finally:
        for model_class, attributes in before:
            for name in vars(model_class).keys() - attributes.keys():
                delattr(model_class, name)
            for name, value in attributes.items():
                if vars(model_class).get(name) is not value:
                    setattr(model_class, name, value)


def model_config(teacher: Teacher) -> Any:
    """Return verl's description of a teacher's model, an `HFModelConfig`; reads the model's config.

    A model that does not support verl's default attention gets transformers' eager one, unless the settings name one.

    Raises:
        Whatever verl and transformers raise for a path or a config that they can't use.
    """
    from verl.workers.config import HFModelConfig

    def with_overrides(**overrides: Any) -> Any:
        return HFModelConfig(
            path=teacher.path,
            trust_remote_code=teacher.trust_remote_code,
            external_lib=teacher.external_lib,
            override_config=overrides,
            # The ids come from the student; the two tokenizers were compared before the run.
            load_tokenizer=False,
            enable_gradient_checkpointing=False,
            # verl packs by patching the attention; here `teacher.attention` is the attention, without padding.
            use_remove_padding=False,
        )

    given = _dequantized(with_overrides(**teacher.override_config))
    if "attn_implementation" in teacher.override_config or not why_attention_is_refused(
        given.hf_config, teacher.trust_remote_code
    ):
        return given
    return _dequantized(with_overrides(**teacher.override_config, attn_implementation="eager"))


DEQUANTIZED = ("fp8", "mxfp4")
"""Quantization methods whose weights transformers can turn into ordinary ones when it loads them."""


def _dequantized(verl_config: Any) -> Any:
    """Have transformers load ordinary weights from a quantized checkpoint where it can."""
    quantization = getattr(verl_config.hf_config, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") in DEQUANTIZED:
        quantization["dequantize"] = True
    return verl_config


def why_weights_are_refused(config: Any) -> str | None:
    """Return why a quantized checkpoint can't be a teacher; None for all others."""
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return None
    given = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = given.get("quant_method")
    if method in DEQUANTIZED:
        return None
    return (
        f"its weights are quantized ({method}); FSDP shards ordinary weights only, and transformers can turn those of "
        f"{' and '.join(DEQUANTIZED)} into such, but no others"
    )


def try_teacher(config: Any, path: str, *, sharing: str, trust_remote_code: bool, images: bool = True) -> Verdict:
    """Return how to score a teacher, from its config and its processor alone; takes a few seconds.

    Args:
        config: of the teacher.
        path: local folder or hub id, where its processor is.
        sharing: `teacher.sharing`.
        images: try prompts with images, too, if the teacher sees images and its processor can be loaded.

    Raises:
        NotTriedError: no small model of the architecture can be built.
        TrialError: the teacher can't be scored.
    """
    # Imports many models.
    from verl.utils.model import extract_multi_modal_inputs

    prompt = _image_prompt(config, path, trust_remote_code) if images else None

    def attempt(device: str) -> Verdict:
        return choose_sharing(
            config,
            build=lambda small, attention: build_as_verl(small, attention, trust_remote_code),
            attention=str(config.get_text_config()._attn_implementation),
            sharing=sharing,
            image_prompt=prompt,
            device=device,
            concatenate_inputs=extract_multi_modal_inputs,
        )

    with _quiet(), stock_classes(family_of(config)):
        try:
            return attempt("cpu")
        except NotTriedError:
            raise
        except TrialError:
            # Kernels of linear attention, where they are installed, need the accelerator.
            if not torch.cuda.is_available():
                raise
            return attempt("cuda")


def why_attention_is_refused(config: Any, trust_remote_code: bool = False) -> str | None:
    """Return why transformers refuses the attention that a config asks for; None if it accepts it.

    Kernels that are not installed here may be installed where the teacher runs, so they are no reason.
    """
    from verl.utils.model import get_hf_auto_model_class

    options = {"attn_implementation": config._attn_implementation, "trust_remote_code": trust_remote_code}
    try:
        with _quiet(), torch.device("meta"):
            get_hf_auto_model_class(config).from_config(copy.deepcopy(config), **options)
    except ImportError:
        return None
    except ValueError as error:
        return str(error).strip().splitlines()[0]
    return None


def build_as_verl(config: Any, attention: str, trust_remote_code: bool = False) -> Any:
    """Return a float32 model with random weights, as verl's FSDP engine builds it without padding removal."""
    from verl.models.transformers.monkey_patch import apply_monkey_patch
    from verl.utils.model import get_hf_auto_model_class

    model = get_hf_auto_model_class(config).from_config(
        config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    apply_monkey_patch(model, use_remove_padding=False, ulysses_sp_size=1)
    return model


def _image_prompt(config: Any, path: str, trust_remote_code: bool) -> ImagePrompt | None:
    if family_of(config).vision_config_of(config) is None:
        return None
    from transformers import AutoProcessor

    try:
        return make_image_prompt(AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code), config)
    # A processor may raise anything; the trial then says less, and the run's self-check remains.
    except Exception as error:
        logger.warning("%s: its processor makes no prompt with images, so only text is tried: %s", path, error)
        return None


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep what verl prints about its changes, and warnings about small models, out of the log."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
