"""What is mixed into the class of a module, and what of the class stays."""

import inspect
from copy import deepcopy
from typing import Any

from torch import Tensor, nn, ones

from tfmq.nn.subclass import mix_in


class Doubled:
    """Doubles what a module returns."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().forward(*args, **kwargs)  # type: ignore[misc]


class Raised:
    """Adds one to what a module returns."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 1 + super().forward(*args, **kwargs)  # type: ignore[misc]


class Shifted(nn.Module):
    """Adds a shift."""

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        return x + shift


def test_the_subclass_has_the_name_and_the_signature_of_the_class_and_is_made_once() -> None:
    one, other, plain = Shifted(), Shifted(), Shifted()
    mix_in(one, Doubled, {"mark": 1})
    mix_in(other, Doubled, {"mark": 2})
    kind = type(one)
    assert type(other) is kind and type(plain) is Shifted
    assert isinstance(one, Shifted) and isinstance(one, Doubled)
    assert (kind.__name__, kind.__module__) == (Shifted.__name__, Shifted.__module__)
    assert inspect.signature(one.forward) == inspect.signature(plain.forward)
    assert kind.mark == 1  # type: ignore[attr-defined]


def test_what_is_mixed_in_computes_around_the_class_and_moves_along_with_copies() -> None:
    module = Shifted()
    mix_in(module, Doubled)
    assert float(deepcopy(module)(ones(()), shift=2.0)) == 6.0
    mix_in(module, Raised)
    assert float(module(ones(()), shift=2.0)) == 7.0
