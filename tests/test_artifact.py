"""Saved models: what they compute with once they are loaded."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor, nn

import tfmq
from tfmq.artifact import save
from tfmq.backends.auto import CONVERTING
from tfmq.backends.execution import backend_names
from tfmq.errors import MissingExtraError
from tfmq.kernels.onednn import available
from tfmq.models.sampler import LoopSampler
from tfmq.nn.plan import packed_layers
from tfmq.nn.submodules import submodules
from tfmq.numerics.errors import sqnr_db
from tfmq.quantizers.part import Held
from tfmq.recipes.recipe import Calibration
from tfmq.storage.errors import ChecksumError

# Those that give layers a kernel: two compute in floating point, and some convert the model as a whole.
KERNELS = [name for name in backend_names() if name not in ("auto", "simulated", "float", *CONVERTING)]


@pytest.fixture(scope="module")
def original(
    build: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[DDIMPipeline, Path]:
    """Return a tiny pipeline that was quantized in memory, and where it was saved."""
    directory = tmp_path_factory.mktemp("artifact")
    pipeline = DDIMPipeline(build("unet")[0].module, DDIMScheduler())
    pipeline.save_pretrained(directory / "stock")
    recipe = replace(tfmq.scheme("rtn_w4a8"), calibration=Calibration(samples=1, steps=3))
    tfmq.quantize(pipeline, recipe, output_dir=directory / "quantized")
    return pipeline, directory


@torch.no_grad()
def output(unet: nn.Module) -> Tensor:
    return unet(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(333)).sample


def kernels(unet: nn.Module) -> set[str]:
    return {type(layer.kernel).__name__ for layer in packed_layers(unet).values()}


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_loading_takes_the_fastest_backend(original: tuple[DDIMPipeline, Path]) -> None:
    pipeline, directory = original
    unet = tfmq.load(directory / "quantized").unet
    assert kernels(unet) == {"NoneType"}, "which it is shows at the first call"
    assert sqnr_db(output(pipeline.unet), output(unet)) > 25
    assert kernels(unet) == ({"OnednnKernel"} if available() else {"NoneType"})


def test_a_directory_takes_the_place_of_an_empty_one_where_the_system_renames_to_no_taken_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    rename = Path.replace

    def strict(source: Path, target: Path) -> Path:
        if target.exists():
            raise PermissionError(f"{target} is there")
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", strict)
    module = nn.Linear(2, 2)
    (tmp_path / "empty").mkdir()
    save(module, tmp_path / "empty", manifest={}, extra={})
    assert (tmp_path / "empty" / "tfmq_model.safetensors").is_file()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(PermissionError, match="full is there"):
        save(module, tmp_path / "full", manifest={}, extra={})
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_where_a_model_came_from_is_forgotten_whatever_the_encoding_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Owner:
        def save_pretrained(self, directory: str) -> None:
            Path(directory).mkdir()
            vocabulary = {"_name_or_path": "somewhere", "Łódź": 1}
            text = json.dumps(vocabulary, ensure_ascii=False)
            Path(directory, "config.json").write_text(text, encoding="utf-8")

    monkeypatch.setattr("locale.getencoding", lambda: "ascii")
    monkeypatch.setattr("io.text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")
    save(Owner(), tmp_path / "saved", manifest={}, extra={})
    text = (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"Łódź": 1}


def test_the_simulation_is_bitwise_the_model_in_memory(original: tuple[DDIMPipeline, Path]) -> None:
    pipeline, directory = original
    unet = tfmq.load(directory / "quantized", backend="simulated").unet
    assert kernels(unet) == {"NoneType"} and torch.equal(output(unet), output(pipeline.unet))
    component = tfmq.load(
        directory / "quantized" / "unet", backend="simulated", options=tfmq.Options(weights="packed")
    )
    assert not submodules(component, Held)
    assert torch.equal(output(component), output(pipeline.unet))


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_saving_after_execution_writes_the_same_files(
    original: tuple[DDIMPipeline, Path], tmp_path: Path, backend: str
) -> None:
    pipeline, directory = original
    loaded = tfmq.load(directory / "quantized", backend=backend)
    tfmq.load(directory / "quantized", backend="simulated").save_pretrained(tmp_path / "before")
    output(loaded.unet)
    loaded.save_pretrained(tmp_path / "after")
    assert files(tmp_path / "after") == files(tmp_path / "before")
    assert torch.equal(output(tfmq.load(tmp_path / "after", backend="simulated").unet), output(pipeline.unet))
    assert torch.equal(output(tfmq.load(tmp_path / "after", backend=backend).unet), output(loaded.unet))


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_a_bare_checkpoint(sampler: Callable[..., LoopSampler], tmp_path: Path, backend: str) -> None:
    drawn = sampler("plain")
    tfmq.quantize(
        drawn,
        replace(tfmq.scheme("rtn_w4a8"), calibration=Calibration(samples=1, steps=3)),
        output_dir=tmp_path / "q",
    )
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([333.0, 0.0])
    expected = drawn.denoiser.module(x, t)
    module = tfmq.load(tmp_path / "q", module=sampler("plain", seed=1).denoiser.module, backend=backend)
    assert kernels(module) != {"NoneType"} and sqnr_db(expected, module(x, t)) > 35
    tfmq.execute(module, "simulated")
    assert torch.equal(module(x, t), expected)


@pytest.mark.parametrize(
    "open_it", [DDIMPipeline.from_pretrained, tfmq.load, lambda path: tfmq.load(path, module=nn.Identity())]
)
def test_a_changed_architecture_is_refused(
    original: tuple[DDIMPipeline, Path], tmp_path: Path, open_it: Callable[[Path], Any]
) -> None:
    shutil.copytree(original[1] / "quantized", tmp_path / "q")
    path = tmp_path / "q" / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"act_fn": "relu"}))
    with pytest.raises(ChecksumError, match="act_fn is 'relu', was 'silu'"):
        open_it(tmp_path / "q")
    del config["act_fn"]
    path.write_text(json.dumps(config))
    with pytest.raises(ChecksumError, match="act_fn is missing"):
        open_it(tmp_path / "q")


def test_entries_that_a_later_diffusers_adds_are_no_change(
    original: tuple[DDIMPipeline, Path], tmp_path: Path
) -> None:
    shutil.copytree(original[1] / "quantized", tmp_path / "q")
    path = tmp_path / "q" / "unet" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"new_option": None, "_diffusers_version": "9.0"})
    )
    assert torch.equal(output(tfmq.load(tmp_path / "q", backend="simulated").unet), output(original[0].unet))


def test_a_full_precision_pipeline_has_no_backend(original: tuple[DDIMPipeline, Path]) -> None:
    _, directory = original
    assert isinstance(tfmq.load(directory / "stock"), DDIMPipeline)
    with pytest.raises(ValueError, match="holds no model quantized by tfmq"):
        tfmq.load(directory / "stock", backend="simulated")


def test_refusals(original: tuple[DDIMPipeline, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, directory = original
    with pytest.raises(
        ValueError, match=r"no backend 'abacus'; choose one of auto, .*reference, simulated, torch"
    ):
        tfmq.load(directory / "quantized", backend="abacus")

    def missing(_: object) -> str:
        raise MissingExtraError("this needs abacus; install it with: pip install 'tfmq[abacus]'")

    monkeypatch.setattr("tfmq.backends.onednn.Torch.missing", missing)
    with pytest.raises(MissingExtraError, match=r"tfmq\[abacus\]"):
        tfmq.load(directory / "quantized", backend="torch")
    unet = tfmq.load(directory / "quantized").unet
    assert output(unet).isfinite().all() and kernels(unet) == {"NoneType"}


# Runs each statement in a process of its own, which has imported neither tfmq nor diffusers; what these take
# longest to import is there already, or they do without.
FRESH = """
import os, sys
from contextlib import suppress
sys.modules |= dict.fromkeys(["peft", "scipy"])
for name in ("torch._dynamo", "torch.fx.experimental.symbolic_shapes", "transformers.modeling_utils"):
    with suppress(ImportError):
        __import__(name)
directory, *statements = sys.argv[1:]
for statement in statements:
    assert not {"tfmq", "diffusers"} & sys.modules.keys()
    child = os.fork() if len(statements) > 1 else 0
    if child == 0:
        exec(f"import tfmq\\n{statement}")
        print(type(pipeline.unet.tfmq_steps).__name__, flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {statement}")
# Without letting go of all that was imported, which takes a second.
os._exit(0)
"""


def test_a_fresh_process_loads_whatever_imports_diffusers_first(original: tuple[DDIMPipeline, Path]) -> None:
    statements = (
        "pipeline = tfmq.load(directory)",
        "from diffusers import DiffusionPipeline\npipeline = DiffusionPipeline.from_pretrained(directory)",
    )
    path = os.pathsep.join(
        filter(None, [str(Path(tfmq.__file__).parent.parent), os.environ.get("PYTHONPATH")])
    )
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for some in [statements] if hasattr(os, "fork") else [(each,) for each in statements]:
        child = subprocess.run(
            [sys.executable, "-c", FRESH, original[1] / "quantized", *some],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert child.returncode == 0 and child.stdout == len(some) * "StepContext\n", child.stderr
