"""Every Triton kernel compiled by its own compiler for three architectures, without a GPU; what the
instructions must be.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

CAPABILITIES = (80, 89, 90)
# Shared memory that a block may have there.
SHARED = {80: 166912, 89: 101376, 90: 232448}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return what compiled.py beside this file prints in a process of its own, where kernels are not
    interpreted.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))
    }
    command = [sys.executable, str(Path(__file__).with_name("compiled.py")), *map(str, CAPABILITIES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(printed: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what the compiler made of each kernel, by name and capability."""
    return printed["kernels"]


def test_launches_specialise_to_sizes_of_one(printed: dict[str, dict[str, Any]]) -> None:
    """Triton makes a constant of each argument that is 1, which is no tensor inside of a kernel."""
    assert printed["failed"] == {}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles(compiled: dict[str, dict[str, Any]], capability: int) -> None:
    made = {name: targets[str(capability)] for name, targets in compiled.items()}
    assert made and all(one["target"] == capability and one["cubin"] > 0 for one in made.values())
    assert all(one["shared"] <= SHARED[capability] for one in made.values()), made


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_products_run_on_tensor_cores_with_loads_in_flight(
    compiled: dict[str, dict[str, Any]], capability: int
) -> None:
    made = {name: targets[str(capability)] for name, targets in compiled.items()}
    integer = {name for name, one in made.items() if one["integer"]}
    assert integer == {name for name in made if name.endswith("a8") or " w4a8" in name or " w8a8" in name}
    products = {name: one for name, one in made.items() if name in integer or name.endswith("a16")}
    assert all(one["asynchronous"] for one in products.values()), products
    assert all(made[name]["warpgroup"] == (capability == 90) for name in integer), (
        "Hopper's own instructions on Hopper, and only there"
    )
    assert all(one["floating"] for name, one in products.items() if name.endswith("a16"))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_is_fused_that_the_reference_rounds(
    compiled: dict[str, dict[str, Any]], capability: int
) -> None:
    """A multiplication and the addition behind it are rounded apart, or outputs would differ from the
    reference in the last bit.
    """
    counts = {name: targets[str(capability)]["fused"] for name, targets in compiled.items()}
    assert not any(count for name, count in counts.items() if "w8a8" in name and "linear" not in name), counts
