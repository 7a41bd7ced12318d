"""A CLIP tokenizer whose vocabulary is the words of captions."""

import itertools
import json
from pathlib import Path

from transformers import CLIPTokenizer

from tfmq.evaluation.adherence.scenes import COLOURS, DIGITS, PLACES, SLANTS, STROKES

LENGTH = 20
START, END = "<|startoftext|>", "<|endoftext|>"


def words() -> list[str]:
    """Return every word that a caption can have, sorted."""
    groups = (STROKES, SLANTS, COLOURS, DIGITS, PLACES, ("a", "an", "on", "ground"))
    return sorted({word for group in groups for phrase in group for word in phrase.split()})


def _pieces(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Return what byte pair encoding makes of a word: the earliest merge that fits, again and again."""
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while fitting := [pair for pair in itertools.pairwise(pieces) if pair in merges]:
        at = list(itertools.pairwise(pieces)).index(min(fitting, key=merges.index))
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the ids and the merges of byte pair encoding under which each word is one token; other text
    falls into letters.
    """
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = letters + [f"{letter}</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in words():
        while len(pieces := _pieces(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
            tokens.append(pieces[0] + pieces[1])
    tokens += [START, END]
    return {token: index for index, token in enumerate(tokens)}, merges


def build_tokenizer() -> CLIPTokenizer:
    """Return the tokenizer; captions are padded to `LENGTH` tokens."""
    ids, merges = vocabulary()
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=LENGTH)


def save_tokenizer(directory: Path) -> None:
    """Save the tokenizer, also in the two files that older releases of transformers read."""
    build_tokenizer().save_pretrained(directory)
    ids, merges = vocabulary()
    (directory / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (directory / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8"
    )
