# SPDX-License-Identifier: Apache-2.0
"""Classify the tokens of a batch, for metrics by kind of token and for the ends of responses."""

from collections.abc import Collection, Sequence

import numpy as np

# A token belongs to the first class that fits: ends of responses; tokens with a digit; tokens without letters or digits
# (punctuation, whitespace, LaTeX braces, special tokens); words shortly after an image; all others.
CLASSES = ("eos", "digits", "format", "vision_adjacent", "other")
EOS, DIGITS, FORMAT, VISION_ADJACENT, OTHER = range(len(CLASSES))
# Class of image placeholders in the vocabulary. In a response they count as format.
PLACEHOLDER = len(CLASSES)

# Number of tokens after the last placeholder of an image that are close to it.
VISION_REACH = 16

# Tokenizers decode a part of a character to this.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def classify_vocabulary(
    texts: Sequence[str], special: Collection[int], eos: Collection[int], placeholders: Collection[int]
) -> np.ndarray:
    """Return the class of every id, as far as the id alone determines it.

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
    # A part of a character is most likely part of a letter.
    return OTHER if INCOMPLETE in text or any(c.isalpha() for c in text) else FORMAT


def classify_tokens(
    table: np.ndarray,
    responses: np.ndarray,
    response_lengths: np.ndarray,
    prompts: np.ndarray | None = None,
    prompt_lengths: np.ndarray | None = None,
) -> np.ndarray:
    """Return the class of every response token.

    Args:
        table: of `classify_vocabulary`.
        responses: (tokens,) int64, ids of all responses, row after row, including those that the mask hides.
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
    if prompts is not None and prompt_lengths is not None and prompts.size:
        prompt_ends = prompt_lengths.cumsum()
        for distance in range(1, VISION_REACH + 1):
            # A placeholder at this distance before the response is close to its first tokens.
            rows = np.flatnonzero(prompt_lengths >= distance)
            rows = rows[table.take(prompts[prompt_ends[rows] - distance], mode="clip") == PLACEHOLDER]
            for row in rows:
                near[starts[row] : min(starts[row] + VISION_REACH + 1 - distance, ends[row])] = True
    classes[near & (classes == OTHER)] = VISION_ADJACENT
    return classes
