"""Tokenizers as OpenVINO models, which GenAI runs in the place of transformers'."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

END = np.iinfo(np.int64).max


def write_tokenizer(tokenizer: Any, directory: Path, *, limit: int, texts: Sequence[str]) -> None:
    """Write a tokenizer of transformers to a new folder: its own files, and models that make tokens of a text
    and text of tokens.

    Args:
        tokenizer: a fast one of transformers.
        directory: takes `openvino_tokenizer.xml`, `openvino_detokenizer.xml` and their weights beside the
            tokenizer's own files.
        limit: tokens of the longest text; GenAI cuts what is longer, the token that ends it included, so the
            model itself keeps that one.
        texts: what is read by both for a comparison; a difference is warned of.

    Raises:
        ValueError: OpenVINO cannot convert it.
    """
    from openvino.exceptions import OVTypeError
    from openvino_tokenizers import convert_tokenizer

    try:
        model, back = convert_tokenizer(tokenizer, with_detokenizer=True)
    except (OVTypeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"OpenVINO cannot convert the {type(tokenizer).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error
    keep_end(model, limit)
    tokenizer.save_pretrained(str(directory))
    ov.save_model(model, directory / "openvino_tokenizer.xml", compress_to_fp16=False)
    ov.save_model(back, directory / "openvino_detokenizer.xml", compress_to_fp16=False)
    _compare(model, tokenizer, limit, texts)


def keep_end(model: ov.Model, limit: int) -> None:
    """Cut a text of more than `limit` tokens as transformers does, in place: its first `limit - 1` tokens and
    the last one, which ends it.
    """
    for port in model.outputs:
        result = port.get_node()
        tokens, names = result.input_value(0), port.get_names()
        length = ops.gather(ops.shape_of(tokens), np.array([1]), np.array(0))
        first = ops.subtract(ops.minimum(length, np.array([limit])), np.array([1]))
        one = np.array([1])
        cut = ops.concat(
            [
                ops.slice(tokens, np.array([0]), first, one, one),
                ops.slice(tokens, np.array([-1]), np.array([END]), one, one),
            ],
            1,
        )
        tokens.get_tensor().set_names(set())
        cut.output(0).get_tensor().set_names(names)
        result.input(0).replace_source_output(cut.output(0))
    model.validate_nodes_and_infer_types()


def _compare(model: ov.Model, tokenizer: Any, limit: int, texts: Sequence[str]) -> None:
    """Warn where a converted tokenizer does not make the tokens of the original."""
    compiled = ov.Core().compile_model(model, "CPU")
    other = [text for text in dict.fromkeys(("", *texts)) if not _same(compiled, tokenizer, limit, text)]
    if other:
        warnings.warn(
            f"OpenVINO's tokenizer reads {len(other)} of the prompts otherwise than "
            f"{type(tokenizer).__name__}, such as {other[0]!r}: GenAI draws them from other tokens",
            stacklevel=2,
        )


def _same(compiled: Any, tokenizer: Any, limit: int, text: str) -> bool:
    expected = tokenizer(text, padding="max_length", max_length=limit, truncation=True).input_ids
    try:
        (tokens,) = compiled([text])["input_ids"].tolist()
    except RuntimeError:
        # A byte that the vocabulary lacks ends the library's own look-up.
        return False
    return [*tokens, *[tokenizer.pad_token_id] * (limit - len(tokens))] == expected
