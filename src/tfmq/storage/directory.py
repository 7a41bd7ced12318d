"""What is saved in a directory: its quantized components, their manifests and files, checked against each
other.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .atomic import read_json, read_tensors, tensor_names, write_json
from .checkpoint import MANIFEST_FILE, verify, verify_architecture
from .container import check_container
from .errors import ForeignFileError, MissingFileError
from .fields import Fields
from .fit import PACKED, check_parts
from .listing import FILES, verify_listed, write_listing
from .manifest import Manifest

__all__ = [
    "METHOD",
    "PIPELINE_FILE",
    "REPORT_FILE",
    "check_files",
    "components",
    "holds_quantized",
    "refuse_orphans",
    "relist",
    "stored_bytes",
    "stored_manifest",
    "verified",
    "verify_component",
    "verify_files",
]

PIPELINE_FILE = "model_index.json"
CONFIG_FILE = "config.json"
REPORT_FILE = "tfmq_report.json"
METHOD = "tfmq"


def _configurations(directory: Path) -> dict[Path, dict[str, Any]]:
    """Return what is configured in a pipeline or component directory, by folder."""
    folders = [directory, *sorted(path for path in directory.iterdir() if path.is_dir())]
    return {folder: read_json(folder / CONFIG_FILE) for folder in folders if (folder / CONFIG_FILE).exists()}


def components(directory: Path) -> dict[Path, Manifest]:
    """Return the manifest of every quantized component of a pipeline or component directory, denoisers
    first.

    Raises:
        CheckpointError: a configuration cannot be read, or holds no valid manifest where it should.
    """
    found = {
        folder: Manifest.of_config(config, source=folder / CONFIG_FILE, method=METHOD)
        for folder, config in _configurations(directory).items()
    }
    kept = [(folder, manifest) for folder, manifest in found.items() if manifest is not None]
    return dict(sorted(kept, key=lambda entry: entry[1].structure.timestep is None))


def holds_quantized(path: Path) -> bool:
    """Whether `path` is a directory that holds a tfmq model, whole or damaged."""
    if not path.is_dir() or (path / MANIFEST_FILE).exists():
        return path.is_dir()
    manifests = [config.get("quantization_config") for config in _configurations(path).values()]
    return any(
        isinstance(manifest, Mapping) and manifest.get("quant_method") == METHOD for manifest in manifests
    )


def stored_manifest(directory: Path) -> Manifest:
    """Return the manifest of the quantized model in `directory`; of two in one pipeline the first one's.

    Raises:
        ForeignFileError: there is none.
        CheckpointError: it cannot be read.
    """
    if (directory / MANIFEST_FILE).exists():
        return Manifest.from_json(read_json(directory / MANIFEST_FILE), source=directory / MANIFEST_FILE)
    manifests = list(components(directory).values())
    if not manifests:
        raise ForeignFileError(f"{directory} holds no model quantized by tfmq")
    return manifests[0]


def stored_bytes(directory: Path) -> int:
    """Return the bytes on disk of the quantized model in `directory`: tensors, manifest and configuration.

    Where a pipeline has two, these are the first one's, whose manifest `stored_manifest` returns; pass the
    component's own directory for the other.
    """
    folders = [directory] if (directory / MANIFEST_FILE).exists() else list(components(directory))[:1]
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir() if path.is_file())


def refuse_orphans(directory: Path) -> None:
    """Refuse packed weights whose configuration has lost its manifest: diffusers would take them for a
    damaged full-precision model.

    Raises:
        ForeignFileError: there are such.
    """
    found = components(directory)
    for path in sorted(directory.rglob("*.safetensors")):
        if path.parent not in found and any(name.endswith(PACKED) for name in tensor_names(path)):
            raise ForeignFileError(
                f"{path} holds packed weights, but {path.parent / CONFIG_FILE} "
                "has no tfmq manifest; copy it again"
            )


def verify_component(
    tensors: Mapping[str, Tensor], manifest: Manifest, configuration: Mapping[str, Any], *, source: Path
) -> None:
    """Check the tensors and the `configuration` of a component against its manifest; `source` is the file
    with both of them.

    Raises:
        CheckpointError: see `verify`, `check_parts`, `verify_architecture`.
    """
    verify(tensors, manifest.values, source=source)
    check_parts(tensors, manifest.structure, source=source)
    verify_architecture(configuration, manifest.values, source=source)


def verified(directory: Path) -> Iterator[tuple[dict[str, Tensor], Manifest]]:
    """Yield the tensors and the manifest of every quantized component, checked against each other.

    Raises:
        CheckpointError: see `tfmq.storage.errors`.
    """
    for folder, manifest in components(directory).items():
        tensors = {
            name: tensor for path in _tensor_files(folder) for name, tensor in read_tensors(path)[0].items()
        }
        verify_component(tensors, manifest, read_json(folder / CONFIG_FILE), source=folder / CONFIG_FILE)
        yield tensors, manifest


def _tensor_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise MissingFileError(f"{folder} has a tfmq configuration and no .safetensors file")
    return files


def check_files(directory: Path) -> None:
    """Check all that can be without the values of tensors: manifests, file layout, and the files of a
    pipeline against their list.

    Raises:
        CheckpointError: see `tfmq.storage.errors`.
    """
    found = components(directory)
    verify_listed(directory, found, expected=_listed(directory))
    refuse_orphans(directory)
    for folder in found:
        for path in _tensor_files(folder):
            check_container(path)


def verify_files(directory: Path) -> None:
    """Check the files of every quantized component against its manifest, and the others of a pipeline against
    their list.

    Raises:
        CheckpointError: see `tfmq.storage.errors`.
    """
    check_files(directory)
    for _ in verified(directory):
        pass


def _listed(directory: Path) -> str | None:
    """Return the digest of the list that a pipeline was saved with, as its report has it; None where it has
    none.
    """
    path = directory / REPORT_FILE
    if not path.exists():
        return None
    report = Fields.of(read_json(path), str(path))
    return report.text(FILES, longest=64) if FILES in report.values else None


def relist(directory: str | Path) -> None:
    """Accept the files of a saved pipeline as they are now: list them anew, such as after a scheduler's
    configuration was edited.

    What a component's own manifest seals is checked as ever, and stays what it is.

    Raises:
        CheckpointError: no quantized pipeline, or a component is damaged.
    """
    path = Path(directory)
    found = components(path) if path.is_dir() else {}
    if not found or not (path / PIPELINE_FILE).exists():
        raise ForeignFileError(f"{path} holds no pipeline with a model quantized by tfmq")
    for _ in verified(path):
        pass
    digest = write_listing(path, components=found, excluded=(REPORT_FILE,))
    if (path / REPORT_FILE).exists():
        write_json(path / REPORT_FILE, {**read_json(path / REPORT_FILE), FILES: digest})
