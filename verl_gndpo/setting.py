# SPDX-License-Identifier: Apache-2.0
"""Declare one setting: its default, the values that it may have, and what it means."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """The only place of a setting's default, range and documentation.

    Attributes:
        default: value when a config does not give the setting.
        doc: meaning and unit, one or two sentences.
        above, at_least, below, at_most: limits of a number; None: no such limit.
        choices: values that a name may have; None: any.
        also: values outside of the limits that have a meaning of their own, which `doc` states.
        null: what null stands for, where it is allowed beside the range; "" where it needs no explanation.
    """

    default: Any
    doc: str
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] | None = None
    also: tuple[float, ...] = ()
    null: str = ""

    @property
    def range(self) -> str:
        """The allowed values in words, as they follow "must be"; "" where any value is allowed."""
        if self.choices is not None:
            return " | ".join(self.choices)
        limits = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        words = " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if limit is not None)
        return " or ".join([*(f"{value:g}" for value in self.also), words] if words else [])

    def allows(self, value: Any) -> bool:
        """Return whether a value lies in the range. NaN lies in no range; null (None) is not judged here."""
        if self.choices is not None:
            return value in self.choices
        return value in self.also or not (
            (self.above is not None and not value > self.above)
            or (self.at_least is not None and not value >= self.at_least)
            or (self.below is not None and not value < self.below)
            or (self.at_most is not None and not value <= self.at_most)
        )

    def as_field(self) -> Any:
        """Return the dataclass field that this setting is; `of` finds the setting again."""
        metadata = {"setting": self}
        if isinstance(self.default, dict | list):
            return dataclasses.field(default_factory=self.default.copy, metadata=metadata)
        return dataclasses.field(default=self.default, metadata=metadata)

    def as_optional_field(self) -> Any:
        """Return a dataclass field that is null unless given, for a value that a preset or the default fills in."""
        return dataclasses.field(default=None, metadata={"setting": self})


def setting(default: Any, doc: str, **limits: Any) -> Any:
    """Declare a dataclass field by its `Setting`."""
    return Setting(default, doc, **limits).as_field()


def of(field: dataclasses.Field) -> Setting | None:
    """Return the setting that declared a dataclass field; None for a field that holds a section."""
    return field.metadata.get("setting")
