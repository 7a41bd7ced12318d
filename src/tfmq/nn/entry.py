"""Checks of a described layer against the architecture that it is put into: what does not fit would be found
at the first call only.
"""

from collections.abc import Mapping
from typing import Any


def _check_groups(name: str, spec: Mapping[str, Any], channels: int) -> None:
    together = {
        "rotates {} inputs together": spec.get("rotated", 0),
        "has weights in groups of {} inputs": spec.get("group", 0),
    }
    for does, size in together.items():
        if size and channels % size:
            text = does.format(size)
            raise ValueError(f"{name}: the checkpoint {text}, the architecture has {channels} there")


def check_layer(name: str, spec: Mapping[str, Any], axis: int, *, channels: int, groups: int) -> None:
    """Refuse what a layer with its `channels`, of each of so many `groups`, at `axis` of the input cannot
    have.

    Raises:
        ValueError: segments of another width or at another axis; a dynamic or rotated input of anything but a
            linear layer; an order of channels that are in groups; a width that does not divide into rotated
            groups, or into those of the weight.
    """
    given, segments, rotated = spec["input"] or {}, spec["segments"], spec.get("rotated", 0)
    if segments and sum(segments) != channels:
        raise ValueError(
            f"{name}: the checkpoint splits {sum(segments)} channels, the architecture has {channels} there"
        )
    if axis != -1 and ("dynamic" in given or rotated):
        kind = "rotated" if rotated else "dynamic"
        raise ValueError(f"{name}: the checkpoint has a {kind} input, which linear layers alone have")
    if spec.get("ordered") and groups > 1:
        raise ValueError(
            f"{name}: the checkpoint orders channels that the architecture has in {groups} groups"
        )
    _check_groups(name, spec, channels)
    if segments and given.get("axis", axis) != axis:
        raise ValueError(
            f"{name}: the checkpoint splits axis {given['axis']} of the input, "
            f"the channels of the architecture are on axis {axis}"
        )
