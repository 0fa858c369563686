# SPDX-License-Identifier: Apache-2.0
"""What every converter shares: open a source, check each row, write verl's parquet, read it back through verl.

A converter states its data set as a `Recipe` and hands it to `main`. Rows stream from source to file in small batches,
so memory does not grow with the data set. Files are written into a hidden folder beside their destination and moved
into place only when every split has been converted and read back; a failure leaves what was there before.

verl's reader asserts on a bad row in the middle of training, or drops it without a word while it filters long prompts.
The checks here (`verl_row`) are what makes that impossible; a row that fails one is counted and named, never repaired.
"""

from .cli import INSTRUCTION, convert, main
from .errors import ConversionError, DroppedRow, SourceError
from .row import IMAGE_PLACEHOLDER
from .source import SPLIT_ALIASES, Problem, Recipe, SourceRow, Split

__all__ = [
    "IMAGE_PLACEHOLDER",
    "INSTRUCTION",
    "SPLIT_ALIASES",
    "ConversionError",
    "DroppedRow",
    "Problem",
    "Recipe",
    "SourceError",
    "SourceRow",
    "Split",
    "convert",
    "main",
]
