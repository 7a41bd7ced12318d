"""The device that `--device` names: of torch, or of the engine that computes."""

import typer


def check_device(name: str | None) -> None:
    """Refuse a device that torch does not know or does not have.

    Raises:
        typer.BadParameter: no such kind of device.
        ValueError: this machine, or this torch, has none.
    """
    if name is None:
        return
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(
            f"{name!r} is no device; give cpu, cuda, cuda:1 or the like (--backend openvino has its own)",
            param_hint="--device",
        ) from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"cannot use the device {name}: {str(error).splitlines()[0]}") from error


def check_devices(name: str | None, backend: str) -> tuple[str | None, str]:
    """Return the device of torch and that of OpenVINO: `--device` names the latter where the backend is
    `openvino`, and torch stays on the CPU then.

    Raises:
        typer.BadParameter: torch knows no such kind of device.
        ValueError: this machine has no such device.
        MissingExtraError: OpenVINO is not installed.
    """
    from tfmq.backends.openvino_device import CPU

    if backend != "openvino" or name is None:
        check_device(name)
        return name, CPU
    from tfmq.backends.openvino import shared_core
    from tfmq.backends.openvino_device import check_device as check_engine
    from tfmq.errors import require

    require("openvino", extra="openvino")
    check_engine(shared_core(), name.upper())
    return None, name.upper()
