# SPDX-License-Identifier: Apache-2.0
"""Read what several checks need of one run, each thing once."""

import os
import warnings
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from verl_gndpo.config import (
    ConfigError,
    GNDPOConfig,
    TeacherConfig,
    TeacherSection,
    read_signal_config,
    read_teacher_config,
)
from verl_gndpo.conversion.lengths import Measure, measure_of
from verl_gndpo.doctor.check import describe_error, select
from verl_gndpo.doctor.parquet import CANNOT_READ, DataFile


def local_path(name: str) -> Path:
    """Return the path of a file of the data by the name that the config gives it."""
    # `Path.expanduser` raises for a user that does not exist.
    return Path(os.path.expanduser(name))


class Settings(NamedTuple):
    """The two sections that this project adds to verl's config."""

    signal: GNDPOConfig | None
    """`algorithm.gndpo`; None if it can't be read."""

    teacher: TeacherConfig | None
    """`teacher`; None if it can't be read."""

    problems: list[ConfigError]
    """Why sections can't be read."""


class Inputs:
    """The config of one run, its settings and its data files. Reads lazily, and each thing once."""

    def __init__(self, config: Any):
        self.config = config
        self._files: dict[str, DataFile] = {}

    @cached_property
    def settings(self) -> Settings:
        """Return the sections `algorithm.gndpo` and `teacher` of a run with one of this project's estimators."""
        signal = teacher = None
        problems = []
        try:
            signal = read_signal_config(self.config.algorithm, self.config.algorithm.adv_estimator)
        except ConfigError as error:
            problems.append(error)
        try:
            teacher = read_teacher_config(self.config)
        except ConfigError as error:
            problems.append(error)
        return Settings(signal, teacher, problems)

    @cached_property
    def measure(self) -> tuple[Measure | None, str]:
        """Return the measure of prompts in tokens of the student, and ""; or None and why there is none."""
        model, data = self.config.actor_rollout_ref.model, self.config.data
        path = model.get("tokenizer_path") or model.path
        if data.get("mm_processor_kwargs"):
            return None, "data.mm_processor_kwargs may change the number of image tokens"
        try:
            from verl.utils.fs import copy_to_local

            with warnings.catch_warnings():
                # `check_models` reports a processor that can't be loaded.
                warnings.simplefilter("ignore")
                template = dict(data.get("apply_chat_template_kwargs") or {})
                return measure_of(copy_to_local(path), bool(model.get("trust_remote_code")), template), ""
        except Exception as error:  # whatever transformers raises on a model that it can't load
            return None, f"{path}: {describe_error(error)}"

    def files(self, key: str) -> list[str]:
        """Return the files of `data.<key>`, which may name one, several or none."""
        files = self.config.data.get(key)
        several = OmegaConf.is_list(files)
        # A name that is no text is reported as a file that does not exist.
        return [str(name) for name in (files if several else [files]) if several or files is not None]

    def file(self, name: str) -> DataFile:
        """Return a parquet file of the data by the name that the config gives it. It may be missing or damaged."""
        if name not in self._files:
            source = select(self.config, "data.reward_fn_key", "data_source")
            teacher = self.settings.teacher
            routing = TeacherSection().routing_key if teacher is None else teacher.routing_key
            self._files[name] = DataFile(local_path(name), self.config.data, source, routing)
        return self._files[name]

    def rows_with_images(self, key: str) -> Counter[str] | None:
        """Return the number of rows with images in the files of `data.<key>`, by their value of the routing column.

        None: a file is not local, not parquet or not readable, or a class of the user reads it.
        """
        if select(self.config, "data.custom_cls.path"):
            return None
        found: Counter[str] = Counter()
        for file in self.files(key):
            if "://" in file or not file.endswith(".parquet"):
                return None
            try:
                found += self.file(file).summary.rows_with_images
            # `check_data` reports it.
            except CANNOT_READ:
                return None
        return found
