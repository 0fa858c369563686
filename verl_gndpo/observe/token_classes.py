# SPDX-License-Identifier: Apache-2.0
"""What kind of token each one of a batch is: the metrics by kind, and the ends of responses."""

from collections.abc import Collection, Sequence

import numpy as np

# Disjoint: a token is of the first kind that fits. What ends a response, then what has a digit, then what has neither
# letters nor digits (punctuation, whitespace, LaTeX braces, special tokens), then words close behind an image, then all
# others.
CLASSES = ("eos", "digits", "format", "vision_adjacent", "other")
EOS, DIGITS, FORMAT, VISION_ADJACENT, OTHER = range(len(CLASSES))
# Of the vocabulary only: where images stand. In a response it counts as format.
PLACEHOLDER = len(CLASSES)

# How far behind the last placeholder of an image a token is still close to it.
VISION_REACH = 16

# What a tokenizer decodes a part of a character to.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def classify_vocabulary(
    texts: Sequence[str], special: Collection[int], eos: Collection[int], placeholders: Collection[int]
) -> np.ndarray:
    """The kind of every id, as far as the id alone tells.

    Args:
        texts: each id's token, decoded.
        special: ids of special tokens, which are format whatever their text is.
        eos: ids that end a response.
        placeholders: ids at which images and videos stand.

    Returns:
        (len(texts) + 1,) uint8: indices of `CLASSES`, or PLACEHOLDER; the last entry, OTHER, is for all ids beyond.
    """
    table = np.array([*map(_classify, texts), OTHER], np.uint8)
    for ids, kind in ((special, FORMAT), (placeholders, PLACEHOLDER), (eos, EOS)):
        table[[i for i in ids if i < len(texts)]] = kind
    return table


def _classify(text: str) -> int:
    if any(c.isdigit() for c in text):
        return DIGITS
    # A part of a character is as likely a part of a letter.
    return OTHER if INCOMPLETE in text or any(c.isalpha() for c in text) else FORMAT


def classify_tokens(
    table: np.ndarray,
    responses: np.ndarray,
    response_lengths: np.ndarray,
    prompts: np.ndarray | None = None,
    prompt_lengths: np.ndarray | None = None,
) -> np.ndarray:
    """The kind of every response token.

    Args:
        table: of `classify_vocabulary`.
        responses: (tokens,) int64, ids of all responses, row after row, those that the mask leaves out included.
        response_lengths: (batch,).
        prompts, prompt_lengths: likewise; None: images in prompts are not seen.

    Returns:
        (tokens,) uint8, indices of `CLASSES`.
    """
    classes = table.take(responses, mode="clip")
    ends = response_lengths.cumsum()
    starts = ends - response_lengths
    near = np.zeros(classes.size, bool)
    placeholders = np.flatnonzero(classes == PLACEHOLDER)
    if placeholders.size:
        end = ends[np.searchsorted(ends, placeholders, side="right")]
        for distance in range(1, VISION_REACH + 1):
            near[(placeholders + distance)[placeholders + distance < end]] = True
        classes[placeholders] = FORMAT
    if prompts is not None and prompts.size:
        prompt_ends = prompt_lengths.cumsum()
        for distance in range(1, VISION_REACH + 1):
            # What stands so far before the response makes its first tokens close.
            rows = np.flatnonzero(prompt_lengths >= distance)
            rows = rows[table.take(prompts[prompt_ends[rows] - distance], mode="clip") == PLACEHOLDER]
            for row in rows:
                near[starts[row] : min(starts[row] + VISION_REACH + 1 - distance, ends[row])] = True
    classes[near & (classes == OTHER)] = VISION_ADJACENT
    return classes
