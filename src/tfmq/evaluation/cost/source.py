"""What a benchmark runs, on disk: processes of their own load it from there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tfmq.artifact import load
from tfmq.backends.backend import Options
from tfmq.calibration.store import CalibrationStore
from tfmq.errors import require
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.module_file import ModuleFile
from tfmq.nn.plan import packed_weights
from tfmq.storage.atomic import read_tensors, write_tensors

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A quantized denoiser, its full-precision original, and calls of it.

    Args:
        quantized: directory of the quantized denoiser; None where only the original is measured.
        folder: holds the original and the calls; `write` makes it.
        module: gives a sampler of the original, for modules that diffusers cannot build from a configuration;
            only its architecture matters.
        sample: name of the denoiser's sample argument, where it is not called as usual.
        timestep: name of its timestep argument, where it is not called as usual.
    """

    quantized: Path | None
    folder: Path
    module: ModuleFile | None = None
    sample: str | None = None
    timestep: str | None = None

    def write(self, original: nn.Module, calls: Sequence[Inputs]) -> None:
        """Save the original and the calls."""
        if self.module is None:
            original.save_pretrained(str(self.folder / "original"))  # type: ignore[operator]
        else:
            (self.folder / "original").mkdir(parents=True, exist_ok=True)
            write_tensors(self.folder / "original" / WEIGHTS, original.state_dict())
        store = CalibrationStore(self.folder / "calls")
        store.clear()
        for call in calls:
            store.append(call)

    def calls(self, batch: int) -> list[Inputs]:
        """Return the calls with `batch` rows each."""
        return [fitted(call, batch) for call in CalibrationStore(self.folder / "calls")]

    def import_needs(self) -> None:
        """Import what loading either model imports, so that the time and memory of loading are the model's
        own.
        """
        if self.module is None:
            require("diffusers", extra="diffusers")
            from tfmq.integrations.diffusers.saved import component_class
            from tfmq.storage.atomic import read_json

            component_class(str(read_json(self.folder / "original" / "config.json").get("_class_name")))

    def original(self) -> nn.Module:
        """Load the full-precision denoiser."""
        folder = self.folder / "original"
        if self.module is None:
            from tfmq.integrations.diffusers.saved import load_component
            from tfmq.storage.atomic import read_json

            module: nn.Module = load_component(
                folder, str(read_json(folder / "config.json").get("_class_name"))
            )
        else:
            module = self._architecture()
            module.load_state_dict(read_tensors(folder / WEIGHTS)[0])
        return module.requires_grad_(False).eval()

    def original_bytes(self) -> int:
        """Return the bytes on disk of the full-precision denoiser."""
        return sum(path.stat().st_size for path in (self.folder / "original").iterdir())

    def executed(self, backend: str, options: Options) -> nn.Module:
        """Load the quantized denoiser, ready to run.

        Raises:
            ValueError: there is none, or the machine cannot run it by `backend`.
        """
        if self.quantized is None:
            raise ValueError("there is no quantized model to run")
        module: nn.Module = load(
            self.quantized,
            module=self._architecture() if self.module else None,
            backend=backend,
            options=options,
        )
        return module

    def view(self, module: nn.Module) -> Denoiser:
        """Return a model of this source as a denoiser."""
        return Denoiser(module, sample=self.sample, timestep=self.timestep)

    def _architecture(self) -> nn.Module:
        assert self.module is not None
        return self.module.sampler().denoiser.module

    def to_json(self) -> dict[str, Any]:
        """Return the fields as values that JSON keeps."""
        return {name: None if value is None else str(value) for name, value in vars(self).items()}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "Source":
        """Return the source of `to_json`."""
        quantized = Path(fields["quantized"]) if fields["quantized"] is not None else None
        module = ModuleFile.parse(fields["module"]) if fields["module"] is not None else None
        return Source(
            quantized=quantized,
            folder=Path(fields["folder"]),
            module=module,
            sample=fields["sample"],
            timestep=fields["timestep"],
        )


def fitted(call: Inputs, batch: int) -> Inputs:
    """Return the call with `batch` rows: its first ones, or its rows over and over."""
    size = len(call)
    rows = [number % size for number in range(batch)]
    return call.map(lambda tensor: tensor[rows] if tensor.ndim and tensor.shape[0] == size else tensor)


def dequantized(module: Any) -> nn.Module:
    """Return a full-precision diffusers model with the dequantized weights of a quantized one: as fast as its
    original.

    Raises:
        ValueError: not a diffusers model.
    """
    from tfmq.integrations.diffusers.architecture import QUANTIZATION, stock_class

    config = {
        name: value
        for name, value in module.config.items()
        if name != QUANTIZATION and not name.startswith("_")
    }
    stock: nn.Module = stock_class(module).from_config(config)  # type: ignore[attr-defined]
    packed, known = packed_weights(module), module.state_dict()
    state = {}
    for name in stock.state_dict():
        owner, _, last = name.rpartition(".")
        if owner in packed:
            state[name] = packed[owner].stock_weight if last == "weight" else getattr(packed[owner], last)
        else:
            # A layer behind a table is its `block`.
            state[name] = known[name] if name in known else known[f"{owner}.block.{last}"]
    stock.load_state_dict(state)
    return stock
