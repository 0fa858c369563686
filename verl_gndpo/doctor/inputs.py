# SPDX-License-Identifier: Apache-2.0
"""Read what several checks need of one run, each thing once."""

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from verl_gndpo.config import (
    ConfigError,
    GNDPOConfig,
    TeacherConfig,
    TeacherSection,
    read_signal_config,
    read_teacher_config,
)
from verl_gndpo.doctor.check import select
from verl_gndpo.doctor.parquet import CANNOT_READ, DataError, DataFile


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

    def files(self, key: str) -> list[str]:
        """Return the files of `data.<key>`, which may name one, several or none."""
        files = self.config.data.get(key)
        return [files] if isinstance(files, str) else list(files or ())

    def file(self, name: str) -> DataFile:
        """Return a parquet file of the data by the name that the config gives it. It may be missing or damaged."""
        if name not in self._files:
            source = select(self.config, "data.reward_fn_key", "data_source")
            teacher = self.settings.teacher
            routing = TeacherSection().routing_key if teacher is None else teacher.routing_key
            self._files[name] = DataFile(Path(name).expanduser(), self.config.data, source, routing)
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
            except (DataError, *CANNOT_READ):
                return None
        return found
