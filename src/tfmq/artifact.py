"""Quantized models on disk: a diffusers pipeline directory, or a bare checkpoint for a module that diffusers does not know."""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tfmq.backends.backend import Options
from tfmq.backends.execution import AUTO, execute
from tfmq.nn.structure import assemble, describe
from tfmq.storage.atomic import full_disk_named, read_json, read_tensors, tensor_names, write_json
from tfmq.storage.checkpoint import MANIFEST_FILE, load_checkpoint, save_checkpoint, seal, verify, verify_architecture
from tfmq.storage.errors import ForeignFileError, MissingFileError
from tfmq.storage.listing import verify_listed, write_listing

PIPELINE_FILE = "model_index.json"
METHOD = "tfmq"


def _components(directory: Path) -> dict[Path, Mapping[str, Any]]:
    """Return the manifest of every quantized component of a pipeline or component directory."""
    folders = [directory, *sorted(path for path in directory.iterdir() if path.is_dir())]
    configs = {folder: read_json(folder / "config.json") for folder in folders if (folder / "config.json").exists()}
    manifests = {folder: config.get("quantization_config") or {} for folder, config in configs.items()}
    return {folder: manifest for folder, manifest in manifests.items() if manifest.get("quant_method") == METHOD}


def is_quantized(path: Path) -> bool:
    """Whether `path` is a directory that holds a tfmq model."""
    return path.is_dir() and ((path / MANIFEST_FILE).exists() or bool(_components(path)))


def calibrated_steps(manifest: Mapping[str, Any]) -> int | None:
    """Return the number of steps that a quantized model was moved to or calibrated on; None where the manifest has none."""
    provenance = manifest.get("provenance", {})
    steps = (provenance.get("recipe", {}).get("calibration", {}) | provenance.get("rebaked", {})).get("steps")
    return None if steps is None else int(steps)


def stored_manifest(directory: Path) -> Mapping[str, Any]:
    """Return the manifest of the quantized model in `directory`.

    Raises:
        ForeignFileError: there is none.
    """
    if (directory / MANIFEST_FILE).exists():
        return read_json(directory / MANIFEST_FILE)
    manifests = list(_components(directory).values())
    if not manifests:
        raise ForeignFileError(f"{directory} holds no model quantized by tfmq")
    return manifests[0]


def stored_bytes(directory: Path) -> int:
    """Return the bytes on disk of the quantized model in `directory`: tensors, manifest and configuration.

    Of two in one pipeline those of the first, whose manifest `stored_manifest` gives; pass the component's own directory for the other.
    """
    folders = [directory] if (directory / MANIFEST_FILE).exists() else list(_components(directory))[:1]
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir() if path.is_file())


def refuse_orphans(directory: Path) -> None:
    """Refuse packed weights whose configuration has lost its manifest: diffusers would take them for a damaged full-precision model.

    Raises:
        ForeignFileError: there are such.
    """
    components = _components(directory)
    for path in sorted(directory.rglob("*.safetensors")):
        if path.parent not in components and any(name.endswith(".packed") for name in tensor_names(path)):
            raise ForeignFileError(f"{path} holds packed weights, but {path.parent / 'config.json'} has no tfmq manifest; copy it again")


def _verified(directory: Path) -> Iterator[tuple[dict[str, Tensor], Mapping[str, Any]]]:
    """Yield the tensors and the manifest of every quantized component, checked against each other.

    Raises:
        CheckpointError: see `tfmq.storage.errors`.
    """
    components = _components(directory)
    for folder, manifest in components.items():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise MissingFileError(f"{folder} has a tfmq configuration and no .safetensors file")
        tensors = {name: tensor for path in files for name, tensor in read_tensors(path)[0].items()}
        verify(tensors, manifest, source=folder / "config.json")
        verify_architecture(read_json(folder / "config.json"), manifest, source=folder / "config.json")
        yield tensors, manifest


def verify_files(directory: Path) -> None:
    """Check the files of every quantized component against its manifest, and the others of a pipeline against their list.

    Raises:
        CheckpointError: see `tfmq.storage.errors`.
    """
    refuse_orphans(directory)
    verify_listed(directory)
    for _ in _verified(directory):
        pass


def check_quantizable(module: nn.Module) -> None:
    """Raise `ValueError` for a diffusers model whose quantized form could not be loaded again; any other module passes."""
    if "diffusers" in sys.modules:
        from tfmq.integrations.diffusers.adapters import check_fused

        check_fused(module)


def stored_architecture(module: nn.Module) -> Mapping[str, Any]:
    """Return what a diffusers model saves of its architecture, for its manifest to seal; nothing of any other module."""
    if "diffusers" not in sys.modules:
        return {}
    from tfmq.integrations.diffusers.architecture import configuration

    return configuration(module)


def mark(module: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Make a diffusers model that was quantized in memory save with its manifest; any other module is left alone."""
    if "diffusers" in sys.modules:
        from tfmq.integrations.diffusers.quantizer import mark_quantized

        mark_quantized(module, manifest)


def remark(module: nn.Module, **provenance: Any) -> None:
    """Seal a quantized diffusers model again after its tables changed, with more `provenance`; any other module is left alone."""
    if "diffusers" not in sys.modules:
        return
    from tfmq.integrations.diffusers.architecture import manifest_of

    manifest = manifest_of(module)
    if manifest is not None:
        fields = {**manifest, "structure": describe(module), "provenance": {**manifest["provenance"], **provenance}}
        mark(module, seal(module.state_dict(), fields, table=False))


def _forget_origin(directory: Path) -> None:
    """Drop the path that diffusers notes in every configuration: where a model came from must not change the bytes of the result."""
    for path in sorted(directory.rglob("*.json")):
        values = json.loads(path.read_text())
        if isinstance(values, dict) and values.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def save(owner: Any, directory: Path, *, manifest: Mapping[str, Any], extra: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a quantized pipeline, diffusers model or plain module to `directory`, which appears complete or not at all.

    Args:
        owner: what has `save_pretrained`, or an `nn.Module` without it.
        directory: must not exist, or be empty.
        manifest: the sealed manifest.
        extra: further JSON files by name.

    Raises:
        StorageFullError: no space is left; nothing is kept of the attempt.
    """
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with full_disk_named(partial):
            if hasattr(owner, "save_pretrained"):
                owner.save_pretrained(str(partial))
                _forget_origin(partial)
                if (partial / PIPELINE_FILE).exists():
                    write_listing(partial, sealed=_components(partial))
            else:
                save_checkpoint(partial, owner.state_dict(), manifest)
            for name, value in extra.items():
                write_json(partial / name, value)
            partial.replace(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(directory: str | Path, *, module: nn.Module | None = None, backend: str = AUTO, options: Options | None = None) -> Any:
    """Load a model from a directory, ready to run: a pipeline, a diffusers component, or with `module` a bare checkpoint.

    What "auto", `cuda` and `operators` prepare moves with the model; what another backend prepares stays where the model was loaded to: after
    moving the model to another device, call `tfmq.execute` again.

    Args:
        directory: written by `tfmq.quantize` or `save_pretrained`.
        module: the full-precision architecture (its weights do not matter), for models that diffusers cannot build by itself. It is
            changed in place and returned.
        backend: what computes, see `tfmq.execute`. "auto" measures at the first call, and leaves a full-precision pipeline as it is;
            "simulated" is bitwise what `tfmq.quantize` left in memory.
        options: memory and compilation; see `tfmq.Options`.

    Raises:
        CheckpointError: a damaged, truncated, foreign or incomplete checkpoint.
        ValueError: the architecture does not fit; a bare checkpoint without `module`; no such backend, or the machine lacks what it needs.
        MissingExtraError: the backend's library is not installed.
    """
    path = Path(directory)
    loaded = _load(path, module)
    if backend != AUTO or is_quantized(path):
        execute(loaded, backend, options=options)
    return loaded


def _load(path: Path, module: nn.Module | None) -> Any:
    if not path.is_dir():
        raise MissingFileError(f"{path} is not a directory; pass what tfmq quantize wrote")
    if (path / MANIFEST_FILE).exists() or module is not None:
        return _load_into(path, module)
    verify_files(path)
    if not (path / PIPELINE_FILE).exists() and not _components(path):
        raise ForeignFileError(f"{path} holds no model quantized by tfmq")
    from tfmq.integrations.diffusers.saved import load_component, load_pipeline

    if (path / PIPELINE_FILE).exists():
        return load_pipeline(path)
    return load_component(path, str(read_json(path / "config.json").get("_class_name")))


def _load_into(path: Path, module: nn.Module | None) -> nn.Module:
    if module is None:
        raise ValueError(f"{path} is a bare checkpoint; pass the architecture: tfmq.load(directory, module=...)")
    tensors, manifest = load_checkpoint(path) if (path / MANIFEST_FILE).exists() else _load_only_component(path)
    assemble(module, manifest["structure"])
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the architecture it is loaded into: {' '.join(str(error).split())}") from error
    mark(module, manifest)
    return module.requires_grad_(False).eval()


def _load_only_component(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    refuse_orphans(path)
    components = list(_verified(path))
    if len(components) != 1:
        raise ForeignFileError(f"{path} holds {len(components)} models quantized by tfmq; pass the directory of one")
    return components[0]
