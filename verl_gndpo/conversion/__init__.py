# SPDX-License-Identifier: Apache-2.0
"""Convert published data sets to verl's parquet: open a source, check each row, write the file, read it back.

A converter declares its data set as a `Recipe` and hands it to `main`. Rows stream from the source through worker
processes into the file, so memory does not grow with the data set. Files are written into a hidden folder beside their
destination. They are moved into place only when every split has been converted and read back, so a failure leaves the
previous files untouched.

verl's reader asserts on a bad row in the middle of training, or drops it silently while it filters long prompts. The
checks here (`row.convert_row`) prevent both: a fault with exactly one right repair is repaired, and any other row is
dropped. Both are counted and reported by id.
"""

from .command import main
from .errors import ConversionError, DroppedRow, SourceError
from .images import ImageStore
from .pipeline import convert
from .recipe import Problem, Recipe
from .split import SourceRow, Split
from .text import IMAGE_PLACEHOLDER, IN_THE_PICTURE, split_choices, tagged_answer, without_placeholders

__all__ = [
    "IMAGE_PLACEHOLDER",
    "IN_THE_PICTURE",
    "ConversionError",
    "DroppedRow",
    "ImageStore",
    "Problem",
    "Recipe",
    "SourceError",
    "SourceRow",
    "Split",
    "convert",
    "main",
    "split_choices",
    "tagged_answer",
    "without_placeholders",
]
