"""Watching the calls of modules: what is seen, in which order, what is replaced, and that no hook stays."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.nn.watch import ModuleCall, all_watched, watched


class Scaled(nn.Module):
    """Multiplies by a factor that may come by name."""

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return x * factor


def hooks(module: nn.Module) -> int:
    return sum(len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules())


def test_a_call_is_seen_before_and_after_with_all_its_arguments() -> None:
    module, x = Scaled(), torch.ones(2)
    seen: list[ModuleCall] = []
    with watched(module, before=seen.append, after=seen.append):
        output = module(x, factor=3.0)
    assert seen[0] == ("", module, (x,), {"factor": 3.0}, None)
    assert seen[1] == ("", module, (x,), {"factor": 3.0}, output)
    module(x)
    assert len(seen) == 2


def test_each_module_is_seen_by_its_name_in_the_order_of_calls() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    seen: list[str] = []
    with all_watched(
        dict(net.named_children()),
        before=lambda call: seen.append(f"to {call.name}"),
        after=lambda call: seen.append(f"from {call.name}"),
    ):
        net(torch.ones(1, 2))
    assert seen == ["to 0", "from 0", "to 1", "from 1"]


def test_who_watches_first_sees_first_and_may_replace_what_the_others_see() -> None:
    module, x = Scaled(), torch.ones(2)
    seen: list[Any] = []
    with (
        watched(module, before=lambda call: (call.args, {"factor": 2.0}), after=lambda call: call.output + 1),
        watched(
            module,
            before=lambda call: seen.append(call.kwargs),
            after=lambda call: seen.append(call.output.tolist()),
        ),
    ):
        assert module(x).tolist() == [3.0, 3.0]
    assert seen == [{"factor": 2.0}, [3.0, 3.0]]


@pytest.mark.parametrize("place", ["before", "after"])
def test_no_hook_stays_after_an_error(place: str) -> None:
    net = nn.Sequential(Scaled(), Scaled())

    def refuse(_: ModuleCall) -> None:
        raise RuntimeError("refused")

    with (
        pytest.raises(RuntimeError, match="refused"),
        all_watched(dict(net.named_children()), **{place: refuse}),
    ):
        net(torch.ones(1))
    assert hooks(net) == 0


def test_watching_can_stop_before_the_context_ends() -> None:
    module = Scaled()
    counts: list[int] = []

    def once(_: ModuleCall) -> None:
        counts.append(hooks(module))
        stop()

    with watched(module, before=once, after=lambda _: counts.append(-1)) as stop:
        module(torch.ones(1))
        module(torch.ones(1))
    assert counts == [2]
    assert hooks(module) == 0
