"""The documentation, executed: marked blocks run, links lead somewhere, and functions are where a page says
they are.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import tfmq
from tfmq.artifact import load
from tfmq.backends.auto import CANDIDATES
from tfmq.evaluation.cost import worker
from tfmq.evaluation.cost.timing import Slice
from tfmq.evaluation.cost.variant import Setting
from tfmq.nn.plan import packed_layers
from tfmq.numerics.equivalence import EQUALIZERS
from tfmq.numerics.estimators import ESTIMATORS
from tfmq.numerics.grids import GRIDS
from tfmq.recipes import presets
from tfmq.recipes.recipe import Calibration, Recipe
from tfmq.recipes.yaml import load as load_recipe
from tfmq.reconstruction.solvers import SOLVERS
from tfmq.storage.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
# ```python test model: the block runs in an empty folder that holds `model`; `folders` has what to ask for.
# ```python test small: the embedded model is a tiny pipeline, and w4a8 a recipe that learns next to nothing.
# ```python test as:mine.py: the block is what ```sh test mine.py finds in its folder under that name; there
# each `tfmq` line is run.
FENCE = re.compile(r"^```(python|yaml|sh) test([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PLACE = re.compile(r"\]\(((?:\.\./)?src/[^)#\s]+\.py)\)((?:,? `\w+`)+)")


class Block(NamedTuple):
    """A marked block of a page: where it stands, its language, the folders it needs, and its text."""

    page: Path
    line: int
    language: str
    needs: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{where(self.page)}:{self.line}"


def quick(steps: int) -> Recipe:
    """Return w4a8 with one short step of everything that takes long."""
    recipe = tfmq.scheme("w4a8")
    return replace(
        recipe,
        weights=replace(recipe.weights, ranges="min_max"),
        activations=replace(recipe.activations, ranges="min_max"),
        rounding=replace(recipe.rounding, solver="nearest"),
        temporal=replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=2)),
        calibration=Calibration(samples=2, steps=steps, interval=steps // 2, batch_size=2),
    )


def where(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield Block(page, text.count("\n", 0, found.start()) + 1, found[1], tuple(found[2].split()), found[3])


BLOCKS = [block for page in PAGES for block in blocks(page)]


def execute(block: Block) -> dict[str, Any]:
    """Run a Python block and return its names; a traceback shows the line of the page."""
    names: dict[str, Any] = {"__name__": "documentation"}
    exec(compile("\n" * block.line + block.text, str(block.page), "exec"), names)
    return names


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `stock`, a tiny full-precision pipeline, and `model`, the same at W4A8."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    shape = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    kinds = {
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "attention_head_dim": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = DDIMPipeline(unet=UNet2DModel(**shape, **kinds), scheduler=DDIMScheduler())
    root = tmp_path_factory.mktemp("folders")
    pipeline.save_pretrained(root / "stock")
    tfmq.quantize(pipeline, quick(4), output_dir=root / "model")
    return root


def _export(folders: Path) -> None:
    """Write the quantized pipeline's denoiser for OpenVINO."""
    pytest.importorskip("openvino")
    from tfmq.export.directory import export
    from tfmq.targets import open_sampler

    sampler = open_sampler(folders / "model")
    (folders / "exported").mkdir()
    export(sampler.denoiser, sampler.example(), folders / "exported", to="openvino")


class InProcess:
    """A worker of `tfmq bench` without a process; tests/cli/test_module.py has the processes."""

    def __init__(self, name: str, setting: Setting, *, build: bool = False) -> None:
        setting.folder.mkdir(parents=True, exist_ok=True)
        self.name, self.setting = name, setting

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *error: object) -> None:
        return

    @torch.no_grad()
    def answer(self) -> dict[str, Any]:
        self.prepared, self.calls, spent = worker._loaded(self.name, self.setting)
        return spent

    @torch.no_grad()
    def ask(self, **order: Any) -> dict[str, Any]:
        return worker.ORDERS[order["do"]](self.prepared, self.calls, order)

    def turn(self) -> Slice:
        return Slice(**self.ask(do="time", seconds=0.0))


@pytest.fixture
def lay_out(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Block], None]:
    """Return a function that makes the current folder an empty one with what a block needs."""

    def prepare(block: Block) -> None:
        # What takes long beside what the page is about: a graph for each command, a process for each variant.
        monkeypatch.setitem(CANDIDATES, "cpu", ("float", "torch"))
        monkeypatch.setattr("tfmq.evaluation.cost.bench.Worker", InProcess)
        for name in block.needs:
            if name.startswith("as:"):
                continue
            if name == "small":
                recipe = quick(50 if block.language == "python" else 10)
                monkeypatch.setitem(presets._SCHEMES, "w4a8", lambda recipe=recipe: recipe)
                monkeypatch.setattr("tfmq.targets.SHELVES", (tmp_path / "shelf",))
                shutil.copytree(folders / "stock", tmp_path / "shelf" / "default")
                continue
            if name.endswith(".py"):
                (source,) = (
                    other for other in BLOCKS if other.page == block.page and f"as:{name}" in other.needs
                )
                (tmp_path / name).write_text(source.text)
                continue
            if name == "exported" and not (folders / name).exists():
                _export(folders)
            shutil.copytree(folders / name, tmp_path / name)
        monkeypatch.chdir(tmp_path)

    return prepare


def test_there_are_blocks_to_run() -> None:
    assert {block.page.name for block in BLOCKS} >= {"format.md", "extending.md", "README.md"}


def _restored(register: dict[str, Any], before: Mapping[str, Any]) -> None:
    register.clear()
    register.update(before)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_blocks_run(block: Block, lay_out: Callable[[Block], None]) -> None:
    """What a block registers is gone afterwards."""
    lay_out(block)
    with ExitStack() as stack:
        for register in (EQUALIZERS, ESTIMATORS, GRIDS, SOLVERS):
            stack.callback(_restored, register, dict(register))
        execute(block)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "sh"], ids=str)
def test_commands_run(
    block: Block, lay_out: Callable[[Block], None], capsys: pytest.CaptureFixture[str]
) -> None:
    from tfmq.cli.commands import run

    lay_out(block)
    commands = [
        shlex.split(line, comments=True)[1:]
        for line in block.text.replace("\\\n", " ").splitlines()
        if line.startswith("tfmq ")
    ]
    assert commands
    for command in commands:
        assert run(command) == 0, (command, capsys.readouterr().err)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_yaml_blocks_are_recipes(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(block.text, encoding="utf-8")
    load_recipe(path)


def test_the_documented_reader_agrees_with_tfmq_on_every_packed_layer(
    lay_out: Callable[[Block], None],
) -> None:
    (block,) = [block for block in BLOCKS if "def read_weight(" in block.text]
    lay_out(block)
    read = execute(block)["read_weight"]
    unet: nn.Module = load("model").unet
    layers = packed_layers(unet)
    assert {layer.format.bits for layer in layers.values()} == {4, 8} and any(
        layer.segments for layer in layers.values()
    )
    for name, layer in layers.items():
        assert torch.equal(torch.from_numpy(read("model/unet", name, layer.shape)), layer.weight), name


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(
        r"^#+ (.+)$",
        re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL),
        re.MULTILINE,
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=where)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=where)
def test_functions_are_where_the_page_says(page: Path) -> None:
    for path, names in PLACE.findall(page.read_text(encoding="utf-8")):
        source = (page.parent / path).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^\s*(?:def|class) {name}\b|^\s*{name}\b.* = ", source, re.MULTILINE), (
                f"{path} does not define {name}"
            )


def test_the_format_names_every_error() -> None:
    def below(kind: type[Exception]) -> Iterator[str]:
        for child in kind.__subclasses__():
            yield child.__name__
            yield from below(child)

    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    import tfmq.storage.journal  # noqa: F401  the set is complete once this is imported

    assert not [name for name in below(CheckpointError) if f"`{name}`" not in text]


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in DOCS if page.name != "README.md" and f"]({page.name})" not in index]


def test_the_ablation_is_the_one_that_was_measured() -> None:
    page = (ROOT / "docs" / "ablation.md").read_text(encoding="utf-8")
    measured = ROOT / "benchmarks" / "results" / "ablation"
    assert (measured / "ablation.md").read_text(encoding="utf-8") in page, (
        "write it with benchmarks/ablation.py --write-docs"
    )


def test_the_readme_has_rows_of_the_ablation() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (W\d+A\d+) \| (\S+) \| ([\d.]+) \| ([\d.]+) \|$", readme, re.MULTILINE)
    summary = json.loads(
        (ROOT / "benchmarks" / "results" / "ablation" / "ablation.json").read_text(encoding="utf-8")
    )["summary"]
    measured = {
        (row["scheme"].upper(), row["method"]): (f"{row['psnr_db']:.2f}", f"{row['ssim']:.4f}")
        for row in summary
    }
    assert 1 < len(rows) <= 8
    assert all(
        measured[bits, method.replace("**tfmq**", "tfmq_cache")] == (psnr, ssim)
        for bits, method, psnr, ssim in rows
    )


def test_the_readme_keeps_to_its_form() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("\n|---") == 1 and len(re.findall(r"!\[", readme)) == 1
    assert [
        len(block.text.strip().replace("\n\n", "\n").splitlines()) for block in blocks(ROOT / "README.md")
    ] == [5, 5]
