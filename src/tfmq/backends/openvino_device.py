"""The devices that OpenVINO sees, and the settings that each takes. CPUs alone have been tested."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

CPU = "CPU"
# Devices that share work among others, which may follow a colon.
VIRTUAL = ("AUTO", "BATCH", "HETERO", "MULTI")
# Settings that virtual devices hand on to any of theirs.
SHARED = ("PERFORMANCE_HINT", "INFERENCE_PRECISION_HINT", "CACHE_DIR")


def check_device(core: Any, name: str) -> None:
    """Refuse a device that OpenVINO does not see.

    >>> check_device(type("Core", (), {"available_devices": ["CPU", "GPU.0"]}), "AUTO:GPU,CPU")

    Raises:
        ValueError: there is no such device; says which ones there are.
    """
    seen: Sequence[str] = core.available_devices
    kind, _, rest = name.partition(":")
    # A list may have priorities, "GPU(2)", and what is left out, "-CPU".
    asked = [re.sub(r"^-|\(\d+\)$", "", part) for part in rest.split(",") if part]
    named = asked if kind in VIRTUAL else [name]
    for device in named:
        if not any(one == device or one.startswith(f"{device}.") for one in seen):
            whole = "" if device == name else f" of {name!r}"
            raise ValueError(
                f"OpenVINO sees no device {device!r}{whole}; it sees {', '.join(seen)}, and shares work "
                f"among them by {', '.join(VIRTUAL)}"
            )


def on_cpu(name: str) -> bool:
    """Whether a device is the CPU, or may hand work to it.

    >>> [on_cpu(name) for name in ("CPU", "GPU.0", "AUTO:GPU,CPU", "AUTO")]
    [True, False, True, True]
    """
    kind, _, rest = name.partition(":")
    return name == CPU or (kind in VIRTUAL and (not rest or CPU in rest))


def settings_for(core: Any, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `settings` that a device takes."""
    if name == CPU:
        return dict(settings)
    virtual = name.partition(":")[0] in VIRTUAL
    known = SHARED if virtual else core.get_property(name, "SUPPORTED_PROPERTIES")
    return {setting: value for setting, value in settings.items() if setting in known}
