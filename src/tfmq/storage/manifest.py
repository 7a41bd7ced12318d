"""The manifest as a frozen value of checked types: what a program may rely on before it builds anything from
a file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from .checkpoint import check_format
from .fields import Fields, refusal
from .parts import Structure

__all__ = ["Manifest", "Provenance"]

SHA256 = re.compile("[0-9a-f]{64}")
# Most steps or images that a manifest may name. No real model comes near it.
MOST = 10**9
# Most characters of what people write, such as a name or a source.
LONGEST_TEXT = 2**16


@dataclass(frozen=True)
class Provenance:
    """What a manifest says of the job that made the model, as far as anything reads it; all of it may be
    missing.

    Attributes:
        scheme: name of the recipe.
        recipe: every field of it, as JSON has them.
        steps: the number of steps that the model was moved to, or else calibrated on.
        calibrated_steps: the number of steps that it was calibrated on.
        eta, guidance_scale, spacing: how the pipeline was called in calibration.
        maintenance: how temporal features were maintained.
        published: figures of the full-precision model.
        inputs: errors of static and dynamic input grids, of layers that were measured.
    """

    scheme: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    calibrated_steps: int | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    spacing: Literal["quadratic"] | None = None
    maintenance: str | None = None
    published: tuple[Mapping[str, Any], ...] = ()
    inputs: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def from_json(cls, fields: Fields) -> "Provenance":
        """Return what `fields`, a manifest's `provenance`, say.

        Raises:
            ForeignFileError: a value of another type; names its place.
        """
        recipe, rebaked = _optional(fields, "recipe"), _optional(fields, "rebaked")
        calibration, temporal = _optional(recipe, "calibration"), _optional(recipe, "temporal")
        steps = partial(Fields.integer, least=1, most=MOST)
        name, calibrated = partial(Fields.text, longest=LONGEST_TEXT), calibration.optional("steps", steps)
        return cls(
            scheme=None if recipe.values.get("name") == "" else recipe.optional("name", name),
            recipe=recipe.values,
            steps=rebaked.optional("steps", steps) or calibrated,
            calibrated_steps=calibrated,
            eta=calibration.optional("eta", Fields.number),
            guidance_scale=calibration.optional("guidance_scale", Fields.number),
            spacing=calibration.optional("spacing", partial(Fields.choice, allowed=("quadratic",))),  # type: ignore[arg-type]
            maintenance=temporal.optional("maintenance", Fields.text),
            published=tuple(map(_figure, recipe.optional("published", Fields.parts) or ())),
            inputs=tuple(map(_measured, fields.optional("inputs", Fields.parts) or ())),
        )


@dataclass(frozen=True)
class Manifest:
    """A manifest, checked.

    Attributes:
        values: every field as it stands in the file; what was sealed, and what is written again.
        digest: SHA-256 of the tensors.
        seal: SHA-256 of all fields but this one; hence it stands for the whole component.
        structure: the quantized parts.
        architecture: what is sealed of a component's configuration.
        provenance: the job that made the model.
    """

    values: Mapping[str, Any]
    digest: str
    seal: str
    structure: Structure
    architecture: Mapping[str, Any]
    provenance: Provenance

    @classmethod
    def from_json(cls, values: Any, *, source: object) -> "Manifest":
        """Return the manifest with these fields; `source` names the file in messages.

        Raises:
            ForeignFileError: no manifest, or a field of another type; names its place.
            VersionError: the version is one that this tfmq does not read.
        """
        fields = Fields.of(values, str(source))
        check_format(values, source=str(source))
        for name in ("digest", "seal"):
            if not SHA256.fullmatch(fields.text(name)):
                raise fields.refuse(name, "64 hexadecimal digits")
        return cls(
            values=values,
            digest=fields.text("digest"),
            seal=fields.text("seal"),
            structure=Structure.from_json(fields.part("structure")),
            architecture=_optional(fields, "architecture").values,
            provenance=Provenance.from_json(_optional(fields, "provenance")),
        )

    @classmethod
    def of_config(cls, configuration: Mapping[str, Any], *, source: object, method: str) -> "Manifest | None":
        """Return the manifest in a component's `configuration`; None where it has none, or one of another
        quantization method.

        Raises:
            ForeignFileError, VersionError: see `from_json`.
        """
        quantization = configuration.get("quantization_config")
        if quantization is None:
            return None
        if not isinstance(quantization, Mapping):
            raise refusal(str(source), "quantization_config", quantization, "an object")
        return (
            cls.from_json(quantization, source=source) if quantization.get("quant_method") == method else None
        )


def _optional(fields: Fields, name: str) -> Fields:
    """Return an object, or an empty one where there is none."""
    return fields.part(name) if fields.has(name) else Fields({}, fields.source, f"{fields.path}{name}.")


def _figure(fields: Fields) -> Mapping[str, Any]:
    """Return a published figure."""
    texts = {name: fields.text(name, longest=LONGEST_TEXT) for name in ("metric", "source")}
    numbers = {name: fields.number(name) for name in ("value", "tolerance")}
    counts = {name: fields.integer(name, 1, MOST) for name in ("num_images", "steps")}
    if numbers["tolerance"] <= 0:
        raise fields.refuse("tolerance", "a number above 0")
    return {**texts, **numbers, **counts}


def _measured(fields: Fields) -> Mapping[str, Any]:
    """Return the errors that were measured for the input of a layer."""
    return {
        **{name: fields.text(name) for name in ("name", "kept")},
        **{name: fields.number(name) for name in ("static", "dynamic")},
    }
