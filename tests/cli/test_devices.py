"""Which library `--device` speaks of."""

import pytest
import typer

from tfmq.cli.devices import check_devices


def test_a_device_is_that_of_what_computes() -> None:
    assert check_devices(None, "openvino") == (None, "CPU")
    assert check_devices("cpu", "torch") == ("cpu", "CPU")
    pytest.importorskip("openvino")
    assert check_devices("cpu", "openvino") == (None, "CPU")
    assert check_devices("auto:cpu", "openvino") == (None, "AUTO:CPU")
    with pytest.raises(ValueError, match=r"OpenVINO sees no device 'ABACUS'; it sees .*CPU"):
        check_devices("abacus", "openvino")
    with pytest.raises(typer.BadParameter, match="--backend openvino has its own"):
        check_devices("GPU", "auto")
