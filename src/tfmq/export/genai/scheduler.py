"""The configuration of a scheduler such that OpenVINO GenAI steps as diffusers does."""

from collections.abc import Mapping
from typing import Any

# Schedulers that GenAI has, and the values of their settings that it does not compute with.
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": True, "thresholding": True},
    "EulerDiscreteScheduler": {
        "use_karras_sigmas": True,
        "use_exponential_sigmas": True,
        "use_beta_sigmas": True,
    },
    "EulerAncestralDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {"use_dynamic_shifting": True},
    "LCMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": False},
}
# The schedules that its files may name. It computes two of them, and these an entry off.
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
RESCALED = "rescale_betas_zero_snr"


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """Return what `scheduler_config.json` holds of a scheduler of diffusers: its own configuration, with the
    noise levels as a list.

    A list is what both libraries read to the same numbers: GenAI knows no cosine schedule, and computes the
    linear ones without their last value.

    Raises:
        ValueError: GenAI has no such scheduler, or not with these settings.
    """
    name = type(scheduler).__name__
    if name not in UNSUPPORTED:
        raise ValueError(
            f"OpenVINO GenAI has no {name}; it has {', '.join(UNSUPPORTED)}: choose one and try again"
        )
    config: dict[str, Any] = dict(scheduler.config)
    for setting, value in UNSUPPORTED[name].items():
        if setting in config and bool(config[setting]) == value:
            raise ValueError(f"OpenVINO GenAI's {name} does not compute with {setting}={value}")
    if "trained_betas" in config:
        _check_schedule(name, config)
        plain = type(scheduler).from_config({**config, RESCALED: False} if RESCALED in config else config)
        config["trained_betas"] = plain.betas.tolist()
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return {"_class_name": name, "_diffusers_version": config.get("_diffusers_version"), **public}


def _check_schedule(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a schedule that GenAI's reader does not know, even with its values as a list."""
    if config["beta_schedule"] not in SCHEDULES:
        raise ValueError(
            f"OpenVINO GenAI's {name} knows no beta_schedule={config['beta_schedule']!r}; "
            f"it knows {', '.join(SCHEDULES)}"
        )
