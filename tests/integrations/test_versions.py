"""Libraries that are too old are named, not met by errors about files that are whole."""

from types import SimpleNamespace

import pytest
from torch import nn

from tfmq.integrations.diffusers.quantizer import TFMQConfig, TFMQQuantizer
from tfmq.integrations.text import stored_state


def test_a_diffusers_that_shows_no_files_is_named() -> None:
    """Before 0.39 it did not call `maybe_update_loaded_keys`."""
    quantizer = TFMQQuantizer(TFMQConfig(), pre_quantized=True)
    with pytest.raises(RuntimeError, match=r"diffusers \d.* is too old to check a quantized model with"):
        quantizer.preprocess_model(nn.Linear(2, 2))


def test_a_transformers_that_does_not_say_what_is_tied_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"transformers \d.* is too old to quantize a text encoder with"):
        stored_state(SimpleNamespace(state_dict=dict))
