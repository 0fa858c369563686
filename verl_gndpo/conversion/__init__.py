# SPDX-License-Identifier: Apache-2.0
"""What every converter shares: open a source, check each row, write verl's parquet, read it back through verl.

A converter states its data set as a `Recipe` and hands it to `main`. Rows stream from the source through worker
processes into the file, so memory does not grow with the data set. Files are written into a hidden folder beside their
destination and moved into place only when every split has been converted and read back; a failure leaves what was there
before.

verl's reader asserts on a bad row in the middle of training, or drops it without a word while it filters long prompts.
The checks here (`convert_row`) are what makes that impossible: a fault with one right repair is repaired, any other row
is dropped, and both are counted and named.
"""

from .cli import convert, main, staging
from .errors import ConversionError, DroppedRow, SourceError
from .images import ImageStore
from .prompt import STYLES
from .recipe import Problem, Recipe
from .source import SourceRow, Split
from .text import IMAGE_PLACEHOLDER, split_choices, tagged_answer
from .write import RowGroups

__all__ = [
    "IMAGE_PLACEHOLDER",
    "STYLES",
    "ConversionError",
    "DroppedRow",
    "ImageStore",
    "Problem",
    "Recipe",
    "RowGroups",
    "SourceError",
    "SourceRow",
    "Split",
    "convert",
    "main",
    "split_choices",
    "staging",
    "tagged_answer",
]
