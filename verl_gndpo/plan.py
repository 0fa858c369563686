# SPDX-License-Identifier: Apache-2.0
"""Plan the memory of a run from the configs of student and teacher, before anything is downloaded or started.

Weights, states and pinned host memory follow exactly from the shapes of all parameters, which a model without storage
has. Activations follow from the decoder's widths by the formulas of `scoring_bytes_per_token` and
`update_bytes_per_token`; tests compare them with the tensors of a real forward and backward pass. Everything is in
bytes. A card of "80 GB" has about 6 % more than 80e9 bytes, which stay free for the allocator's fragmentation.
"""

import contextlib
import copy
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl_gndpo.model_files import check_descriptions

GB = 10**9

CONTEXT = 1.5 * 2**30
"""Bytes that the CUDA context of a process takes on a GPU, with its libraries: 1 to 1.5 GiB."""

FLOAT32, BFLOAT16 = 4, 2

PREFILL_TOKENS = 8192
"""Tokens that vLLM runs at the same time: verl's `rollout.max_num_batched_tokens`."""

SAMPLED_ROWS = 256
"""Rows of logits that vLLM samples from at the same time: verl's `rollout.max_num_seqs`."""

LARGEST_SHARE = 0.9
"""Largest value that is proposed for `rollout.gpu_memory_utilization`."""


class PlanError(ValueError):
    """A model can't be planned for; the message says why."""


@dataclass(frozen=True)
class ModelSize:
    """What the memory of a model depends on."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    """Of all parameters. Tied weights count once."""

    tower: tuple[tuple[int, ...], ...]
    """Of the parameters of the vision tower, which are among `shapes`."""

    layer: int
    """Parameters of the largest layer, which FSDP gathers by itself."""

    projection: int
    """Parameters of the output projection, which FSDP gathers by itself; 0 if it is tied to the input embeddings."""

    root: int
    """Parameters that FSDP gathers with the root of the model and keeps gathered, such as tied embeddings."""

    layers: int
    hidden: int
    inner: int
    """Width of a feed-forward layer."""

    key_value: int
    """Width of the keys of all heads, which is that of the values."""

    vocabulary: int
    tied: bool
    heads: int
    experts: bool
    """Its feed-forward layers are mixtures of experts."""

    @property
    def parameters(self) -> int:
        """Return the number of all parameters."""
        return sum(map(math.prod, self.shapes))

    def trained(self, freeze_vision: bool) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the parameters that are trained, with or without the vision tower."""
        trained = list(self.shapes)
        for shape in self.tower if freeze_vision else ():
            trained.remove(shape)
        return tuple(trained)


def read_model(path: str, trust_remote_code: bool = False) -> ModelSize:
    """Measure a model.

    Args:
        path: folder or hub id. Only its config is read.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        PlanError: there is no config, or no model can be built from it.
    """
    with _quiet():
        # Before transformers, because the plugin makes torchvision importable on machines without an accelerator.
        import verl  # noqa: F401
        from transformers import AutoConfig

        try:
            check_descriptions(Path(path))
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        # transformers raises OSError or ValueError, huggingface_hub its own errors, and a checkpoint's code anything.
        except Exception as error:
            raise PlanError(f"{path}: its config can't be read: {_first_line(error)}") from error
    try:
        return measure(config, path, trust_remote_code)
    except PlanError:
        raise
    # Sizes that are missing, or of a type that transformers does not check.
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise PlanError(f"{path}: nothing can be planned from its config: {reason}") from error


def measure(config: Any, name: str, trust_remote_code: bool = False) -> ModelSize:
    """Measure the model that verl would build from a config, without memory for its weights.

    Raises:
        PlanError: transformers or verl can't build it.
    """
    import torch

    with _quiet(), torch.device("meta"):
        from verl.utils.fsdp_utils import _select_fsdp2_wrap_targets
        from verl.utils.model import get_hf_auto_model_class

        from verl_gndpo.families import family_of

        try:
            model = get_hf_auto_model_class(config).from_config(
                copy.deepcopy(config), attn_implementation="eager", trust_remote_code=trust_remote_code
            )
        # A checkpoint's own code may raise anything.
        except Exception as error:
            raise PlanError(f"{name}: no model can be built from its config: {_first_line(error)}") from error
        alone = _select_fsdp2_wrap_targets(model, list(model._no_split_modules or ()))
    text = config.get_text_config()
    gathered = {id(parameter) for module in alone for parameter in module.parameters()}
    projection = model.get_output_embeddings()
    ends = (model.get_input_embeddings(), projection)
    towers = family_of(model).find_towers(model).values()
    experts = getattr(text, "num_experts_per_tok", None)
    inner = text.intermediate_size
    if experts:
        # A token goes through several experts, and some models also have a shared one.
        inner = experts * (getattr(text, "moe_intermediate_size", None) or inner)
        inner += getattr(text, "shared_expert_intermediate_size", None) or 0
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSize(
        name=name,
        shapes=tuple(tuple(parameter.shape) for parameter in model.parameters()),
        tower=tuple(tuple(parameter.shape) for tower in towers for parameter in tower.parameters()),
        layer=max((sum(p.numel() for p in module.parameters()) for module in alone if module not in ends), default=0),
        projection=sum(p.numel() for p in projection.parameters()) if projection in alone else 0,
        root=sum(p.numel() for p in model.parameters() if id(p) not in gathered),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        inner=inner,
        key_value=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head,
        vocabulary=projection.weight.shape[0],
        tied=bool(config.tie_word_embeddings),
        heads=text.num_attention_heads,
        experts=bool(experts),
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings and what verl prints about its changes out of the output."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- activations ------------------------------------------------------------------------------------------------------


def scoring_bytes_per_token(model: ModelSize) -> float:
    """Return the peak of a pass without gradients per token of the micro-batch, weights and logits apart.

    The peak is in a feed-forward layer, where its gate, its other half and their product exist beside the layer's
    input, the residual and the embeddings. In models with narrow ones it is in the attention.
    """
    return BFLOAT16 * max(3 * model.inner + 4 * model.hidden, 8 * model.hidden) + _POSITIONS


def update_bytes_per_token(model: ModelSize, logits: int = 1) -> float:
    """Return the peak of a forward and backward pass with gradient checkpointing per token of the micro-run.

    The input of each layer is kept. Beside these stand either all logits, or what one layer keeps for its backward
    pass, with the gradients that flow through it.

    Args:
        logits: how many tensors of all logits exist at the same time: 1 with flash-attn, whose cross-entropy works in
            place; 3 without it and with padding, because verl then removes the padding from the logits and keeps their
            log-softmax.
    """
    kept = model.layers * model.hidden
    head = logits * model.vocabulary + 5 * model.hidden
    layer = max(6 * model.inner + 11 * model.hidden, 16.5 * model.hidden) + 2 * model.key_value
    return BFLOAT16 * (kept + max(head, layer)) + _POSITIONS


def shared_update_bytes(model: ModelSize, tokens: int, responses: int, chunk_tokens: int) -> float:
    """Return the peak of an update with `student.share_prompts=True`, whose logits are made block by block.

    The inputs of the layers are kept, as in `update_bytes_per_token`. Beside these stand either what a layer keeps, or
    the hidden states of the response tokens with their gradients, and a block of logits with what its gradient takes.

    Args:
        tokens: of the micro-batch, in which a prompt counts once.
        responses: tokens of these that belong to responses.
        chunk_tokens: `student.logits_chunk_tokens`.
    """
    kept = model.layers * model.hidden
    layer = max(6 * model.inner + 11 * model.hidden, 16.5 * model.hidden) + 2 * model.key_value
    # The final norm's two tensors and their gradients; of responses a copy, its gradient in float32, and that again.
    head = 5 * model.hidden * tokens + 4 * model.hidden * responses
    blocks = (2 * FLOAT32 + BFLOAT16) * chunk_tokens * model.vocabulary
    return (BFLOAT16 * kept + _POSITIONS) * tokens + max(BFLOAT16 * layer * tokens, BFLOAT16 * head + blocks)


_POSITIONS = 2000
"""Bytes per token of positions and of their rotary embeddings, in float32."""


# --- weights ----------------------------------------------------------------------------------------------------------


def pinned_bytes(shapes: tuple[tuple[int, ...], ...], ranks: int, size: int) -> int:
    """Return the pinned host memory of one rank's shards, each of which torch rounds up to a power of two.

    Args:
        shapes: of the parameters. FSDP2 shards the first dimension.
        ranks: that share the parameters.
        size: bytes of an element.
    """
    total = 0
    for shape in shapes:
        first, *others = shape or (1,)
        count = -(-first // ranks) * math.prod(others) * size
        total += 1 << (count - 1).bit_length()
    return total


def _gathered(model: ModelSize) -> int:
    """Return the bytes of the weights that a pass gathers: the root's, a layer, and what comes next."""
    return BFLOAT16 * (model.root + model.layer + max(model.layer, model.projection))


def _gathered_gradients(model: ModelSize) -> int:
    """Return the bytes of gradients before they are sharded: the root's, and a layer's with its copy in float32."""
    return BFLOAT16 * model.root + (BFLOAT16 + FLOAT32) * max(model.layer, model.projection)


# --- placements -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What a run may use."""

    gpus: int
    """Per node."""

    nodes: int
    memory: float
    """Bytes per GPU."""

    host_memory: float | None = None
    """Bytes per node; None: not checked."""


@dataclass(frozen=True)
class Run:
    """What the memory of a run depends on beside models and machine. Lengths are in tokens."""

    max_prompt: int = 8192
    max_response: int = 16384
    tokens: int | None = None
    """Of a micro-batch; None: of one sequence of the largest length."""

    freeze_vision: bool = False
    """The student's vision tower is not trained."""

    logits_chunk_tokens: int = 256
    padding_removed: bool = True
    """The actor runs flash-attn without padding."""

    share_prompts: bool = False
    """The actor makes logits of response tokens only, some at a time (`student.share_prompts`)."""

    @property
    def per_gpu(self) -> int:
        """Return the tokens of a micro-run."""
        return self.tokens or self.max_prompt + self.max_response


@dataclass(frozen=True)
class Choice:
    """A way to place student and teacher."""

    placement: str
    """colocated or dedicated."""

    actor_gpus: int
    actor_nodes: int
    teacher_gpus: int
    """Per node. Those of the actor, if the teacher is colocated."""

    teacher_nodes: int
    teacher_shards: int
    """Number of ranks that share one copy of the teacher."""

    offload: bool
    """The actor's weights and optimizer states are on the host while it does not use them."""


@dataclass(frozen=True)
class Placement:
    """A way to place student and teacher, and what it takes."""

    settings: dict[str, str]
    """Overrides of the command."""

    phases: dict[str, dict[str, float]]
    """By phase the bytes per GPU of each thing that it holds. A dedicated teacher's `score` is on its own GPUs."""

    host: dict[str, float]
    """Bytes per node of each thing that is kept on the host between phases."""

    host_start: dict[str, float]
    """Bytes per node while the weights are loaded."""

    short: dict[str, float]
    """Bytes that are missing, by phase. Empty: it fits."""

    cached_tokens: int
    """Tokens per GPU for which vLLM has keys and values at the same time."""

    @property
    def fits(self) -> bool:
        """Return whether every phase fits."""
        return not self.short


def place(student: ModelSize, teacher: ModelSize, machine: Machine, run: Run, choice: Choice) -> Placement:
    """Reckon what each phase holds under one choice."""
    ranks = choice.actor_gpus * choice.actor_nodes
    colocated = choice.placement == "colocated"
    # Everything in float32; Adam has two states.
    weights = FLOAT32 * student.parameters / ranks
    gradients = FLOAT32 * sum(map(math.prod, student.trained(run.freeze_vision))) / ranks
    optimizer = 2 * gradients
    resident = {} if choice.offload else {"student's weights": weights, "optimizer states": optimizer}
    contexts = (3 if colocated else 2) * CONTEXT

    generate, settings, cached_tokens = _generate(student, machine, run, choice, resident, contexts)
    score = {
        "teacher's weights": BFLOAT16 * teacher.parameters / choice.teacher_shards,
        "gathered weights": _gathered(teacher),
        "activations": run.per_gpu * scoring_bytes_per_token(teacher),
        "logits": FLOAT32 * run.logits_chunk_tokens * teacher.vocabulary,
        "CUDA contexts": contexts if colocated else CONTEXT,
    }
    update = {
        "student's weights": weights,
        "optimizer states": optimizer,
        "gradients": gradients,
        "gathered weights and gradients": _gathered(student) + _gathered_gradients(student),
        "activations and logits": _update(student, run),
        "CUDA contexts": contexts,
    }
    phases = {"generate": generate, "score": resident | score if colocated else score, "update": update}

    host, host_start = _host(student, teacher, run, choice)
    short = {phase: sum(held.values()) - machine.memory for phase, held in phases.items()}
    if machine.host_memory is not None:
        short["host"] = sum(host.values()) - machine.host_memory
        short["host, at the start"] = sum(host_start.values()) - machine.host_memory
    settings |= _settings(choice, run)
    return Placement(
        settings=settings,
        phases=phases,
        host=host,
        host_start=host_start,
        short={phase: missing for phase, missing in short.items() if missing > 0},
        cached_tokens=cached_tokens,
    )


def _update(student: ModelSize, run: Run) -> float:
    """Return the bytes of activations and logits of a micro-batch of the update."""
    if run.share_prompts:
        # Where most tokens are of responses, the more is kept.
        return shared_update_bytes(student, run.per_gpu, run.per_gpu, run.logits_chunk_tokens)
    return run.per_gpu * update_bytes_per_token(student, 1 if run.padding_removed else 3)


def _generate(
    student: ModelSize,
    machine: Machine,
    run: Run,
    choice: Choice,
    resident: dict[str, float],
    contexts: float,
) -> tuple[dict[str, float], dict[str, str], int]:
    """Return what generation holds, the settings of the rollout, and the tokens that its cache has place for."""
    free = machine.memory - sum(resident.values()) - contexts
    share = max(min(math.floor(20 * free / machine.memory) / 20, LARGEST_SHARE), 0.05)
    work = PREFILL_TOKENS * scoring_bytes_per_token(student) + FLOAT32 * SAMPLED_ROWS * student.vocabulary
    longest = run.max_prompt + run.max_response
    split = 1
    while True:
        weights = BFLOAT16 * student.parameters / split
        per_token = 2 * BFLOAT16 * student.layers * student.key_value / split
        cache = share * machine.memory - weights - work
        larger = 2 * split
        if cache >= longest * per_token or choice.actor_gpus % larger or student.heads % larger:
            break
        split = larger
    # If there is too little, it says how much one sequence needs.
    cache = max(cache, longest * per_token)
    rollout = "actor_rollout_ref.rollout"
    settings = {
        f"{rollout}.tensor_model_parallel_size": str(split),
        f"{rollout}.gpu_memory_utilization": f"{share:.2f}",
    }
    held = {"vLLM's weights": weights, "vLLM's work": work, "keys and values": cache, "CUDA contexts": contexts}
    return resident | held, settings, int(cache // per_token)


def _host(
    student: ModelSize, teacher: ModelSize, run: Run, choice: Choice
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the host memory of the fullest node, between phases and while weights are loaded."""
    ranks = choice.actor_gpus * choice.actor_nodes
    host: dict[str, float] = {}
    if choice.placement == "colocated":
        host["teacher's weights"] = choice.teacher_gpus * pinned_bytes(teacher.shapes, choice.teacher_shards, BFLOAT16)
    if choice.offload:
        trained = student.trained(run.freeze_vision)
        host["student's weights"] = choice.actor_gpus * pinned_bytes(student.shapes, ranks, FLOAT32)
        host["optimizer states"] = choice.actor_gpus * 2 * pinned_bytes(trained, ranks, FLOAT32)
    # The first rank builds the whole model on the host, and sends it to the others; verl has every rank build it if
    # input and output embeddings are tied.
    copies = {
        "student": FLOAT32 * student.parameters * (choice.actor_gpus if student.tied else 1),
        "teacher": BFLOAT16 * teacher.parameters * (choice.teacher_gpus if teacher.tied else 1),
    }
    # The student is loaded first, and the teacher when the student is where it stays.
    starts: list[dict[str, float]] = [
        {"student's weights, whole": copies["student"]},
        host | {"teacher's weights, whole": copies["teacher"]},
    ]
    return host, max(starts, key=lambda held: sum(held.values()))


def _settings(choice: Choice, run: Run) -> dict[str, str]:
    settings = {
        "trainer.nnodes": str(choice.actor_nodes),
        "trainer.n_gpus_per_node": str(choice.actor_gpus),
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": str(run.per_gpu),
        "actor_rollout_ref.model.enable_gradient_checkpointing": "True",
        "teacher.placement": choice.placement,
        "teacher.max_token_len_per_gpu": str(run.per_gpu),
    }
    if run.share_prompts:
        settings["+student.share_prompts"] = "True"
    if run.freeze_vision:
        settings["actor_rollout_ref.actor.freeze_vision_tower"] = "True"
    if choice.placement == "dedicated":
        settings["teacher.n_gpus_per_node"] = str(choice.teacher_gpus)
        settings["teacher.nnodes"] = str(choice.teacher_nodes)
    if choice.teacher_shards != choice.teacher_gpus * choice.teacher_nodes:
        settings["teacher.fsdp.fsdp_size"] = str(choice.teacher_shards)
    if choice.offload:
        settings["actor_rollout_ref.actor.fsdp_config.param_offload"] = "True"
        settings["actor_rollout_ref.actor.fsdp_config.optimizer_offload"] = "True"
    return settings


def choices(machine: Machine) -> list[Choice]:
    """Return the ways to place student and teacher, in the order in which they are preferred."""
    found: list[Choice] = []
    everything = machine.gpus * machine.nodes
    # One copy of the teacher per node keeps its traffic within the node.
    shards = [machine.gpus, everything] if machine.nodes > 1 else [everything]
    for offload in (False, True):
        found += [
            Choice("colocated", machine.gpus, machine.nodes, machine.gpus, machine.nodes, size, offload)
            for size in shards
        ]
    for offload in (False, True):
        found += [Choice("dedicated", *gpus, offload) for gpus in _divisions(machine)]
    return found


def _divisions(machine: Machine) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield the actor's GPUs and nodes, and the teacher's GPUs, nodes and shards; few GPUs for the teacher first."""
    if machine.nodes == 1:
        half = machine.gpus // 2
        if half and not machine.gpus % 2:
            # verl divides a batch by the number of the actor's GPUs, and batches are powers of two.
            yield half, 1, half, 1, half
        return
    for nodes in range(1, machine.nodes // 2 + 1):
        yield machine.gpus, machine.nodes - nodes, machine.gpus, nodes, machine.gpus * nodes


@dataclass(frozen=True)
class Plan:
    """All placements of a run, in the order in which they are preferred."""

    student: ModelSize
    teacher: ModelSize
    machine: Machine
    run: Run
    placements: tuple[Placement, ...]

    @property
    def chosen(self) -> Placement:
        """Return the first placement that fits; if none does, the one that lacks the least."""
        fitting = (placement for placement in self.placements if placement.fits)
        return next(fitting, None) or min(self.placements, key=lambda placement: max(placement.short.values()))

    def as_dict(self) -> dict[str, Any]:
        """Return everything as it is written to JSON; sizes in bytes."""

        def model(size: ModelSize) -> dict[str, Any]:
            fields = {key: value for key, value in asdict(size).items() if key not in ("shapes", "tower")}
            return fields | {"parameters": size.parameters}

        return {
            "student": model(self.student),
            "teacher": model(self.teacher),
            "machine": asdict(self.machine),
            "run": asdict(self.run) | {"per_gpu": self.run.per_gpu},
            "fits": self.chosen.fits,
            "chosen": self.placements.index(self.chosen),
            "placements": [asdict(placement) | {"fits": placement.fits} for placement in self.placements],
        }


def make_plan(student: ModelSize, teacher: ModelSize, machine: Machine, run: Run) -> Plan:
    """Reckon every placement."""
    placements = tuple(place(student, teacher, machine, run, choice) for choice in choices(machine))
    return Plan(student, teacher, machine, run, placements)


# --- text -------------------------------------------------------------------------------------------------------------


def describe(plan: Plan) -> str:
    """Return a plan as text; sizes in GB (10^9 bytes)."""
    machine, chosen = plan.machine, plan.chosen
    lines = [f"{role:8} {_describe_model(getattr(plan, role))}" for role in ("student", "teacher")]
    lines += [
        f"machine  {machine.nodes} x {machine.gpus} GPUs of {machine.memory / GB:.0f} GB, micro-batches of "
        f"{plan.run.per_gpu:,} tokens",
        "",
    ]
    if chosen.fits:
        lines.append(f"fits: {title(chosen)}")
    else:
        lines.append(f"nothing fits; the nearest is: {title(chosen)}")
        lines += [f"    {phase} lacks {missing / GB:.1f} GB" for phase, missing in chosen.short.items()]
    lines += ["", "per GPU, in GB"]
    for phase, held in chosen.phases.items():
        lines += [f"  {phase:32}{sum(held.values()) / GB:8.1f}", *_list(held)]
    lines += ["", "host memory per node, in GB"]
    for moment, held in (("between phases", chosen.host), ("at the start", chosen.host_start)):
        lines += [f"  {moment:32}{sum(held.values()) / GB:8.1f}", *_list(held)]
    lines += [
        "",
        f"vLLM has room for {chosen.cached_tokens:,} tokens of keys and values per GPU",
        "",
        "settings",
        *(f"    {key}={value}" for key, value in chosen.settings.items()),
    ]
    others = [placement for placement in plan.placements if placement is not chosen]
    if others:
        lines += ["", "other placements"]
    for placement in others:
        short = ", ".join(f"{phase} lacks {missing / GB:.1f} GB" for phase, missing in placement.short.items())
        lines.append(f"    {title(placement)}: {short or 'fits'}")
    return "\n".join([*lines, *_notes(plan)])


def _describe_model(model: ModelSize) -> str:
    return f"{model.name}: {model.parameters / GB:.2f}e9 parameters, {model.layers} layers of width {model.hidden:,}"


def title(placement: Placement) -> str:
    """Return the name of a placement, as text and tables show it."""
    settings = placement.settings
    name = settings["teacher.placement"]
    if name == "dedicated":
        name += f" on {settings['teacher.nnodes']} x {settings['teacher.n_gpus_per_node']} GPUs"
    if "teacher.fsdp.fsdp_size" in settings:
        name += ", one copy of the teacher per node"
    if "actor_rollout_ref.actor.fsdp_config.param_offload" in settings:
        name += ", actor offloaded"
    return name


def _list(held: dict[str, float]) -> list[str]:
    return [f"    {name:30}{size / GB:8.1f}" for name, size in held.items()]


def _notes(plan: Plan) -> list[str]:
    """Return what the figures do not say."""
    notes = [
        "vision towers, Ray's object store and the libraries of about three processes per GPU are not counted",
    ]
    if not plan.chosen.fits:
        notes.append(
            "what takes less: more GPUs, shorter sequences (--max-prompt, --max-response), or LoRA "
            "(actor_rollout_ref.model.lora_rank=64), which has no gradients and states of the whole model"
        )
    if plan.student.experts or plan.teacher.experts:
        notes.append("activations of mixtures of experts are estimates, which nothing has been compared with")
    if plan.run.share_prompts:
        notes.append("in a micro-batch a prompt counts once for its responses, so that more rows fit into it")
    elif plan.run.padding_removed:
        notes.append("without flash-attn the actor holds all logits three times: see it with --no-flash-attn")
    return ["", *(f"note: {note}" for note in notes)]
