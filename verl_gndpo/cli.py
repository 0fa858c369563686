# SPDX-License-Identifier: Apache-2.0
"""The command `verl-gndpo`. Each command imports what takes long to import by itself."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from verl_gndpo.doctor.check import Check

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


@app.callback()
def main() -> None:
    """GNDPO: on-policy distillation of multimodal models, as a plugin for stock verl."""


@app.command()
def doctor(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Arguments of your `python -m verl.trainer.main_ppo` command. None: environment only."),
    ] = None,
    config_path: Annotated[
        str, typer.Option("--config-path", "-cp", help="As for Hydra: a folder, absolute or relative to verl/trainer.")
    ] = "config",
    config_name: Annotated[str, typer.Option("--config-name", "-cn", help="As for Hydra.")] = "ppo_trainer",
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Also list patches of verl, estimators, bounds and model families.")
    ] = False,
) -> None:
    """Check whether a run can start: versions, plugin, accelerator, settings, models, data.

    Exit code 0: it can start. 1: something is wrong. 2: Hydra rejects the overrides.
    """
    # The folder that `python -m` puts first, too, so that a clone of verl in it is the one that is checked.
    sys.path.insert(0, os.getcwd())
    from verl_gndpo.doctor.environment import check_verl
    from verl_gndpo.doctor.run import run_checks

    with warnings.catch_warnings():
        # verl warns about every training engine that is not installed.
        warnings.simplefilter("ignore")
        check_verl()
        # If verl can't be imported, run_checks says why, and there is nothing to compose.
        config = _compose(config_path, config_name, overrides) if overrides and sys.modules.get("verl") else None
        checks = run_checks(config)
        extra = _inventory() if verbose and sys.modules.get("verl") else []

    _show(checks)
    for line in extra:
        typer.echo(line)
    errors, found_warnings = (sum(check.status == status for check in checks) for status in ("error", "warning"))
    counts = f"{errors} error(s), {found_warnings} warning(s)"
    if errors:
        typer.echo(f"not ready: {counts}")
        raise typer.Exit(1)
    if config is None:
        typer.echo(f"environment ready: {counts}; no run was checked: add the overrides of your main_ppo command")
    else:
        typer.echo(f"ready to start: {counts}")


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="metrics.jsonl of verl's file logger, or a folder with one. LABEL=RUN names its line. Runs with the "
            "same LABEL are seeds of one arm, drawn as a median with a band.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for index.html, PNGs and summary.json.")],
    teacher_accuracy: Annotated[
        list[str] | None,
        typer.Option(
            "--teacher-accuracy",
            metavar="[SOURCE=]SHARE",
            help="For the gap closed, per data source if there are several. Default: of the evaluation in the "
            "folder teacher beside a run, or teacher_accuracy in a summary.json there.",
        ),
    ] = None,
) -> None:
    """Draw and compare runs, finished or not, on a page with plots and a table.

    Exit code 0: the page is written. 1: a run can't be read, or the page can't be written.
    """
    from verl_gndpo.report.logs import ReportError
    from verl_gndpo.report.page import write_report

    try:
        page, arms = write_report(runs, out, teacher_accuracy or [])
    except (ReportError, OSError) as error:
        typer.echo(f"error   {error}", err=True)
        raise typer.Exit(1) from error
    for arm in arms:
        for run in arm["runs"]:
            for note in run["notes"]:
                typer.echo(f"note    {run['path']}: {note}")
    typer.echo(f"report of {sum(len(arm['runs']) for arm in arms)} run(s): {page}")


@app.command()
def plan(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Folder or hub id. Only its config is read.")],
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="Folder or hub id. Only its config is read.")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs per node.")] = 8,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes.")] = 1,
    memory: Annotated[float, typer.Option("--memory", min=1, help="GB per GPU, as in the card's name.")] = 80,
    host_memory: Annotated[
        float | None, typer.Option("--host-memory", min=1, help="GB of host memory per node. Default: not checked.")
    ] = None,
    max_prompt: Annotated[int, typer.Option("--max-prompt", min=1, help="data.max_prompt_length.")] = 8192,
    max_response: Annotated[int, typer.Option("--max-response", min=1, help="data.max_response_length.")] = 16384,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, help="Tokens per micro-batch. Default: one sequence of the largest length."),
    ] = None,
    freeze_vision: Annotated[
        bool, typer.Option("--freeze-vision", help="The student's vision tower is not trained.")
    ] = False,
    flash_attn: Annotated[
        bool, typer.Option("--flash-attn/--no-flash-attn", help="Whether the actor runs flash-attn without padding.")
    ] = True,
    share_prompts: Annotated[
        bool, typer.Option("--share-prompts", help="The actor runs with student.share_prompts=True.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoints.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with sizes in bytes.")] = False,
) -> None:
    """Reckon from two configs what each phase of a run holds per GPU and on the host, and how to place the teacher.

    Exit code 0: a placement fits. 1: none does, or a model can't be planned for.
    """
    from verl_gndpo.plan import GB, Machine, PlanError, Run, describe, make_plan, read_model

    machine = Machine(gpus, nodes, memory * GB, None if host_memory is None else host_memory * GB)
    run = Run(max_prompt, max_response, tokens, freeze_vision, padding_removed=flash_attn, share_prompts=share_prompts)
    try:
        sizes = [read_model(path, trust_remote_code) for path in (student, teacher)]
        made = make_plan(sizes[0], sizes[1], machine, run)
    except PlanError as error:
        typer.echo(f"error   {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(json.dumps(made.as_dict(), indent=1) if as_json else describe(made))
    if not made.chosen.fits:
        raise typer.Exit(1)


@app.command()
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A folder global_step_N of verl, its actor, or the run's folder (newest step)."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new folder. It must not exist.")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write LoRA adapters for peft. Default: merge them into the weights.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Model that training started from. Default: as the checkpoint says."),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        typer.Option("--dtype", help="Type of the weights. float32 keeps the trained weights exactly."),
    ] = "bfloat16",
    log: Annotated[
        Path | None,
        typer.Option(
            "--log", help="Log of verl's file logger, for the model card. Default: the run's, if it is found."
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
    ] = False,
) -> None:
    """Write a checkpoint of verl as a Hugging Face folder, load it again, and compare it with the checkpoint.

    Exit code 0: the folder is complete and equal to the checkpoint. 1: it is not, and nothing is written.
    """
    with warnings.catch_warnings():
        # verl warns about every training engine that is not installed.
        warnings.simplefilter("ignore")
        # verl first: its plugin makes torchvision importable on machines without an accelerator.
        import verl  # noqa: F401

        from verl_gndpo.export.command import export as run
        from verl_gndpo.export.folders import ExportError

        try:
            run(
                checkpoint,
                out,
                adapter=adapter,
                base=base,
                dtype=dtype,
                log=log,
                trust_remote_code=trust_remote_code,
                say=typer.echo,
            )
        except ExportError as error:
            typer.echo(f"error   {error}", err=True)
            raise typer.Exit(1) from error


@app.command()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Folders or hub ids; names that a server has, with --server.")
    ],
    data_files: Annotated[
        list[Path],
        typer.Option("--data", metavar="FILE", help="Parquet file, as verl reads. Give the option once per file."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for answers, index.html and summary.json.")],
    answers: Annotated[int, typer.Option("--n", min=1, help="Answers per problem.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 answers greedily.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first problems of each file.")] = None,
    max_prompt: Annotated[int, typer.Option("--max-prompt", min=1, help="As data.max_prompt_length.")] = 8192,
    max_response: Annotated[int, typer.Option("--max-response", min=1, help="As data.max_response_length.")] = 16384,
    reward: Annotated[
        str | None,
        typer.Option(
            "--reward-function",
            metavar="PATH:NAME",
            help="Grades instead of verl_gndpo.rewards: the run's reward.custom_reward_function, path and name.",
        ),
    ] = None,
    chat_template: Annotated[
        str, typer.Option("--chat-template-kwargs", metavar="JSON", help="As data.apply_chat_template_kwargs.")
    ] = "{}",
    mm_processor: Annotated[
        str, typer.Option("--mm-processor-kwargs", metavar="JSON", help="As data.mm_processor_kwargs.")
    ] = "{}",
    dtype: Annotated[str, typer.Option("--dtype", help="Of the weights, as vLLM's option.")] = "auto",
    memory: Annotated[float, typer.Option("--gpu-memory-utilization", min=0.05, max=1, help="As vLLM's option.")] = 0.9,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", min=1, help="GPUs per vLLM engine.")] = 1,
    data_parallel: Annotated[
        int | None,
        typer.Option("--data-parallel", min=1, help="vLLM engines. Default: all visible GPUs, or 1 on CPUs."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the models.")
    ] = False,
    servers: Annotated[
        list[str] | None,
        typer.Option(
            "--server",
            metavar="[MODEL=]URL",
            help="An OpenAI-compatible server answers for the model, or for all models.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            help="With --server: folder or hub id of the training's tokenizer and processor. The server's prompts must "
            "be those that they make. Default: MODEL if it is a folder here; else prompts are not compared.",
        ),
    ] = None,
    key_from: Annotated[
        str | None,
        typer.Option(
            "--api-key-env", metavar="NAME", help="Environment variable with the server's key. Default: no key."
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests to a server at a time.")] = 32,
) -> None:
    """Ask models the problems of benchmarks, grade the answers, and compare the models.

    Started again with the same arguments, it asks only what has no answer yet. Exit code 0: the page is written. 1: a
    model or a file can't be used, or answering failed.
    """
    from verl_gndpo.evaluation.command import EvaluationError, json_object, server_of
    from verl_gndpo.evaluation.command import evaluate as run
    from verl_gndpo.evaluation.job import Job, Means, digest

    means = Means(data_parallel, tensor_parallel, memory, trust_remote_code, concurrency, key_from)
    files = [str(path.expanduser().absolute()) for path in data_files]
    # A file that is missing is named by what follows.
    contents = [digest(Path(file)) if Path(file).is_file() else "" for file in files]
    try:
        template = json_object("--chat-template-kwargs", chat_template)
        processor = json_object("--mm-processor-kwargs", mm_processor)
        settings = (answers, temperature, seed, limit, max_prompt, max_response, dtype, template, processor)
        jobs = [
            Job(model, files, contents, *settings, *server_of(model, models, servers or [], tokenizer))
            for model in models
        ]
        run(jobs, out, typer.echo, reward, means)
    except EvaluationError as error:
        typer.echo(f"error   {error}", err=True)
        raise typer.Exit(1) from error


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False},
)
def data(context: typer.Context) -> None:
    """Convert published data sets to verl's parquet, mix them, and list them."""
    from verl_gndpo.data_command import main as run

    raise typer.Exit(run(context.args))


def _compose(config_path: str, config_name: str, overrides: list[str]) -> Any:
    """Return the config that main_ppo would get.

    Raises:
        typer.Exit: code 2, after Hydra's message, if it rejects an override or doesn't find the config.
    """
    # verl first: its plugins add our config groups to Hydra's search path.
    import verl  # isort: skip
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    # The folder of main_ppo, without importing main_ppo.
    folder = Path(verl.__file__).parent / "trainer" / config_path
    try:
        with hydra.initialize_config_dir(str(folder), version_base=None):
            return hydra.compose(config_name, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        typer.echo(f"Hydra rejects this command: {error}", err=True)
        plugin = _plugin_problem()
        if plugin:
            typer.echo(plugin, err=True)
        raise typer.Exit(2) from error


def _plugin_problem() -> str:
    """Return why Hydra does not know `+teacher=worker` and `+gndpo=default`, if verl has not loaded the plugin."""
    from verl_gndpo.doctor.environment import check_plugin

    return "\n".join(f"{check.detail} -> {check.remedy}" for check in check_plugin() if check.status == "error")


def _inventory() -> list[str]:
    """Return what is active beyond stock verl, one line each."""
    from verl_gndpo.doctor.inventory import list_families, list_patches, list_signals

    return [*list_patches(), *list_signals(), *list_families()]


def _show(checks: "list[Check]") -> None:
    """Print a table on a terminal. Elsewhere print one line per finding, which is never wrapped or cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        for check in checks:
            typer.echo(f"{check.status:8}{check}")
        return
    table = Table(show_lines=True)
    for title in ("", "check", "finding"):
        table.add_column(title, overflow="fold")
    for check in checks:
        finding = Text(check.detail)
        if check.remedy:
            finding.append(f"\n-> {check.remedy}", style="cyan")
        table.add_row(Text(check.status, style=STYLES[check.status]), check.name, finding)
    console.print(table)


if __name__ == "__main__":
    app()
