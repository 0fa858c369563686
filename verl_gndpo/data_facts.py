# SPDX-License-Identifier: Apache-2.0
"""The facts that a parquet file states about the data sets that its rows come from.

A converter declares the facts of its set once. They travel in the metadata of the parquet schema, under the key
`verl_gndpo`, through conversion and mixing to the checks before a run. A file that another program wrote has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

KEY = b"verl_gndpo"
VERSION = 1


class FactsError(ValueError):
    """The facts in a file's metadata cannot be read; the message says why."""


@dataclass(frozen=True)
class SetFacts:
    """The facts of one data set, as one file holds it.

    Args:
        name: name of the converter.
        hub_id: hub id of the set, which is also the `data_source` of its rows.
        license: licence of the set, as its authors state it.
        validation_only: why no model may be trained on the set; "" when training is allowed.
        answer_types: answer types that its rows can have (`verl_gndpo.rewards` grades them).
        split: split of the set that was converted.
        prompt_style: how the questions are put to the model.
    """

    name: str
    hub_id: str
    license: str
    validation_only: str = ""
    answer_types: tuple[str, ...] = ()
    split: str = ""
    prompt_style: str = ""


@dataclass(frozen=True)
class FileFacts:
    """The facts of one parquet file.

    Args:
        written_by: the converter that wrote the file, or "mix".
        sets: one entry for each converted file that rows come from.
        options: how `mix` joined the sets; empty for a converter's file.
    """

    written_by: str
    sets: tuple[SetFacts, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def validation_only(self) -> str:
        """Return why the file must not be trained on: the first reason among its sets, or ""."""
        return next((facts.validation_only for facts in self.sets if facts.validation_only), "")

    def metadata(self) -> dict[bytes, bytes]:
        """Return the facts as parquet schema metadata, for `read_facts`."""
        return {KEY: json.dumps({"version": VERSION} | asdict(self)).encode()}


def read_facts(metadata: Mapping[bytes, bytes] | None) -> FileFacts | None:
    """Read the facts of a parquet file.

    Args:
        metadata: metadata of the file's schema, such as `pyarrow.parquet.read_schema(path).metadata`.

    Returns:
        The facts; None when the file states none, because another program wrote it.

    Raises:
        FactsError: the facts are damaged, or another version of this package wrote them.
    """
    if not metadata or KEY not in metadata:
        return None
    try:
        stated = json.loads(metadata[KEY])
        version = stated.pop("version", None)
        if version == VERSION:
            found = stated.pop("sets")
            sets = tuple(SetFacts(**facts | {"answer_types": tuple(facts["answer_types"])}) for facts in found)
            return FileFacts(sets=sets, **stated)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FactsError(f"metadata {KEY.decode()} is damaged ({type(error).__name__}: {error})") from error
    raise FactsError(f"metadata {KEY.decode()} has version {version}, expected {VERSION}")
