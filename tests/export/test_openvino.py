"""Conversion for OpenVINO, whatever the graph comes from."""

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("openvino")

from tfmq.backends.openvino import shared_core
from tfmq.export.openvino import from_torch
from tfmq.export.quiet import quiet_tools


@pytest.mark.parametrize("captured", [False, True])
def test_a_graph_is_converted_and_nobody_is_told(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry = pytest.importorskip("openvino_telemetry.main")
    said: list[Any] = []
    monkeypatch.setattr(telemetry.Telemetry, "send_event", lambda *given, **_: said.append(given))
    module, x = nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 4)).eval(), torch.randn(3, 6)
    with torch.no_grad(), quiet_tools():
        source = torch.export.export(module, (x,)) if captured else torch.jit.trace(module, x)
        model = from_torch(source)
        hints = {"INFERENCE_PRECISION_HINT": "f32"}
        (found,) = shared_core().compile_model(model, "CPU", hints)([x.numpy()]).values()
        torch.testing.assert_close(torch.from_numpy(found), module(x))
    assert not said
