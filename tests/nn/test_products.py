import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from tfmq.kernels.kernel import Rows
from tfmq.nn import products as nn_products
from tfmq.nn.product_mode import ProductMode, sites
from tfmq.nn.products import ProductKernels, ProductQuantizers, attach_products
from tfmq.numerics.attention import Attention
from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.rotation import rotate
from tfmq.quantizers.activation import ActivationQuantizer


def plain(site: int, left: Tensor, right: Tensor) -> Tensor:
    return left @ right


def heads(*, keys: int = 7, key_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 5, 8), torch.randn(2, key_heads, keys, 8), torch.randn(2, key_heads, keys, 6)


BOOL_MASK = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.4
BOOL_MASK[..., 0] = True
DEAD_ROW = BOOL_MASK.clone()
DEAD_ROW[:, :, 2] = False


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": BOOL_MASK},
        {"attn_mask": torch.linspace(-4, 4, 35).reshape(1, 1, 5, 7)},
        {"attn_mask": torch.zeros(5, 7).masked_fill(~BOOL_MASK[0, 0], -torch.inf), "scale": 2.0},
        {"attn_mask": DEAD_ROW},
        {"enable_gqa": True},
        {"enable_gqa": True, "is_causal": True, "scale": 0.1},
    ],
)
def test_attention_in_full_precision_is_torchs(options: dict[str, Any]) -> None:
    query, key, value = heads(key_heads=2 if options.get("enable_gqa") else 4)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(
        Attention.of(query, key, value, **options).by(plain, 0), expected, rtol=1e-5, atol=1e-6
    )


def test_attention_is_the_formula_in_float64() -> None:
    query, key, value = (tensor.double() for tensor in heads())
    weights = (torch.einsum("bhqd,bhkd->bhqk", query, key) / math.sqrt(8)).exp()
    expected = torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdim=True), value)
    torch.testing.assert_close(Attention.of(query, key, value).by(plain, 0), expected)


def test_attention_quantizes_q_k_and_then_probabilities_and_v() -> None:
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(site: int, left: Tensor, right: Tensor) -> Tensor:
        seen[site] = left, right
        return left @ right

    query, key, value = heads()
    Attention.of(query, key, value).by(watch, 3)
    assert list(seen) == [3, 4]
    assert seen[3][0] is query and torch.equal(seen[3][1], key.transpose(-2, -1)) and seen[4][1] is value
    torch.testing.assert_close(seen[4][0].sum(-1), torch.ones(2, 4, 5))


def test_dropout_is_refused_by_value() -> None:
    with pytest.raises(ValueError, match=r"dropout must be 0 .* 0\.1"):
        Attention.of(*heads(), dropout_p=0.1)


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch.matmul": lambda a, b: torch.matmul(a, b),
    "torch.bmm": lambda a, b: torch.bmm(a, b),
    "operator": lambda a, b: a @ b,
    "method matmul": lambda a, b: a.matmul(b),
    "method bmm": lambda a, b: a.bmm(b),
    "torch.baddbmm": lambda a, b: torch.baddbmm(torch.zeros(1), a, b, beta=0),
    "method baddbmm": lambda a, b: torch.zeros(2, 3, 5).baddbmm(a, b),
    "keyword bmm": lambda a, b: torch.bmm(a, mat2=b),
    "keyword matmul": lambda a, b: torch.matmul(input=a, other=b),
    "keyword baddbmm": lambda a, b: torch.baddbmm(torch.zeros(1), batch1=a, batch2=b, beta=0),
    "method keyword": lambda a, b: a.bmm(mat2=b),
    "method keyword matmul": lambda a, b: a.matmul(other=b),
    "einsum": lambda a, b: torch.einsum("b i d, b d j -> b i j", a, b),
    "einsum of a list": lambda a, b: torch.einsum("bid,bdj->bij", [a, b]),
}


@pytest.mark.parametrize("name", CALLS)
def test_both_operands_of_every_spelling_of_a_product_are_replaced(name: str) -> None:
    left, right = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    with ProductMode(lambda site, a, b: (a * 2, b + 1)) as mode:
        out = CALLS[name](left, right)
    assert mode.site == 1
    torch.testing.assert_close(out, torch.bmm(left * 2, right + 1))


def test_an_einsum_with_a_weight_is_no_product_of_activations() -> None:
    """The rows of a weight are no samples, which a batch of several timesteps would take them for."""
    x, weight = torch.randn(2, 3, 4), torch.randn(4, 5)
    with ProductMode(lambda site, a, b: (a * 2, b + 1)) as mode:
        out = torch.einsum("bnd,de->bne", x, weight)
    assert mode.site == 0 and sites(torch.einsum, ("bnd,de->bne", x, weight)) == 0
    torch.testing.assert_close(out, x @ weight)


class Product(nn.Module):
    """Two sites, counted in call order; the second fused attention counts two more."""

    def __init__(self, child: nn.Module | None = None) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        x = x @ x.transpose(-2, -1) @ x
        x = self.child(x) if self.child is not None else x
        return F.scaled_dot_product_attention(x, x, x)

    def greet(self) -> str:
        return "hello"


def recorder(log: list[tuple[str, int]], name: str) -> ProductQuantizers:
    quantizers = ProductQuantizers([None], [None])

    def forward(site: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        log.append((name, site))
        return left, right

    quantizers.forward = forward  # type: ignore[method-assign]
    return quantizers


def test_a_product_belongs_to_its_innermost_owner_alone() -> None:
    log: list[tuple[str, int]] = []
    inner, outer = Product(), Product()
    outer.child = inner
    attach_products(inner, recorder(log, "inner"))
    attach_products(outer, recorder(log, "outer"))
    outer(torch.randn(1, 2, 3, 4))
    inner_sites = [("inner", site) for site in range(4)]
    assert log == [("outer", 0), ("outer", 1), *inner_sites, ("outer", 2), ("outer", 3)]


def test_sites_are_counted_anew_in_every_call() -> None:
    log: list[tuple[str, int]] = []
    module = Product()
    attach_products(module, recorder(log, "m"))
    for _ in range(2):
        module(torch.randn(1, 2, 3, 4))
    assert [site for _, site in log] == [0, 1, 2, 3] * 2


def test_an_error_in_an_owner_leaves_no_mode_behind() -> None:
    log: list[tuple[str, int]] = []
    failing, module = Product(child=nn.Linear(99, 1)), Product()
    attach_products(failing, recorder(log, "failing"))
    attach_products(module, recorder(log, "m"))
    with pytest.raises(RuntimeError):
        failing(torch.randn(1, 2, 3, 4))
    log.clear()
    module(torch.randn(1, 2, 3, 4))
    assert [name for name, _ in log] == ["m"] * 4
    assert ProductMode._stack() == []


def quantizers(count: int) -> ProductQuantizers:
    def fitted(scale: float) -> ActivationQuantizer:
        quantizer = ActivationQuantizer(IntegerFormat(8))
        quantizer.fit(torch.full((1, 1), scale), torch.full((1, 1), 128.0))
        return quantizer

    return ProductQuantizers(
        [fitted(0.1 + 0.01 * i) for i in range(count)], [fitted(0.2 + 0.01 * i) for i in range(count)]
    )


@pytest.mark.parametrize("most", [1, 3 * 8 * 7, 2**20])
@pytest.mark.parametrize(
    "mask", [None, BOOL_MASK, DEAD_ROW, torch.linspace(-4, 4, 7), torch.linspace(-4, 4, 35).reshape(5, 7)]
)
def test_many_scores_are_computed_a_block_of_queries_at_a_time(
    monkeypatch: pytest.MonkeyPatch, most: int, mask: Tensor | None
) -> None:
    products, call = quantizers(3), Attention.of(*heads(), attn_mask=mask)
    assert call.scores == 2 * 4 * 5 * 7
    whole = products.attend(1, call)
    monkeypatch.setattr(nn_products, "WHOLE", 0)
    monkeypatch.setattr(nn_products, "BLOCK", most)
    blocks = list(call.blocks(most))
    assert all(block.scores <= max(most, 8 * 7) for block in blocks)
    assert [block.query.shape[-2] for block in blocks] == {1: [1] * 5, 3 * 8 * 7: [3, 2]}.get(most, [5])
    parts, by = list[int](), Attention.by
    monkeypatch.setattr(Attention, "by", lambda part, *_: parts.append(part.scores) or by(part, *_))
    with torch.no_grad():
        torch.testing.assert_close(products.attend(1, call), whole, rtol=1e-6, atol=1e-6)
    assert parts == [block.scores for block in blocks]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated", "ignore::torch.jit.TracerWarning")
def test_who_watches_the_probabilities_or_wants_a_gradient_or_no_values_gets_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    products, call, seen = quantizers(2), Attention.of(*heads()), list[torch.Size]()
    monkeypatch.setattr(nn_products, "WHOLE", 0)
    monkeypatch.setattr(nn_products, "BLOCK", 1)
    monkeypatch.setattr(Attention, "blocks", lambda *_: pytest.fail("cut into blocks"))
    products.attend(0, call)
    with torch.no_grad():
        watch = products.left[1].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
        products.attend(0, call)
        watch.remove()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = mode.from_tensor(call.query)
            assert products.attend(0, Attention.of(fake, fake, fake)).shape == fake.shape
        attend = lambda query: products.attend(0, Attention.of(query, query, query))  # noqa: E731
        traced = torch.jit.trace(attend, call.query, check_trace=False)
    assert seen == [torch.Size([2, 4, 5, 7])] and traced(call.query).shape == call.query.shape


@pytest.mark.parametrize("size", [4, 256, 1024])
def test_a_rotation_is_no_product_of_attention(size: int) -> None:
    """Layers rotate their inputs within the forward of the module that has the products."""
    with ProductMode(lambda site, *_: pytest.fail(f"counted as site {site}")):
        rotate(torch.randn(2, 3, size), size)


def test_spared_products_take_their_operands_as_they_come() -> None:
    products, (left, right) = quantizers(2), torch.randn(2, 3, 4)
    assert not torch.equal(products(0, left, right)[0], left)
    products.spare()
    for site in range(2):
        assert all(map(torch.equal, products(site, left, right), (left, right)))
    assert not list(products.state_dict())


def test_an_owner_keeps_its_class_methods_state_and_values() -> None:
    module, stock = Product(), Product()
    attach_products(module, ProductQuantizers([None] * 4, [None] * 4))
    assert isinstance(module, Product) and type(module).__name__ == "Product" and module.greet() == "hello"
    x = torch.randn(1, 2, 3, 4)
    torch.testing.assert_close(module(x), stock(x))
    assert type(stock) is Product, "other instances of the class are left alone"


def test_copies_of_an_owner_have_quantizers_of_their_own() -> None:
    module = Product()
    attach_products(module, quantizers(4))
    other = copy.deepcopy(module)
    x = torch.randn(1, 2, 3, 4)
    expected = module(x)
    assert torch.equal(other(x), expected)
    other.tfmq_products.left[0].scale.mul_(3)
    assert not torch.equal(other(x), expected)
    assert torch.equal(module(x), expected)


def test_each_site_has_its_own_grid_and_disabling_restores_full_precision() -> None:
    module, q = Product(), quantizers(4)
    attach_products(module, q)
    x = torch.randn(1, 2, 3, 4)
    first = q.left[0](x) @ q.right[0](x.transpose(-2, -1))
    second = q.left[1](first) @ q.right[1](x)
    weights = torch.softmax(q.left[2](second) @ q.right[2](second).transpose(-2, -1) / 2, dim=-1)
    torch.testing.assert_close(module(x), q.left[3](weights) @ q.right[3](second), rtol=0, atol=1e-6)
    q.enabled = False
    torch.testing.assert_close(module(x), Product()(x))


def test_a_site_beyond_those_fitted_stays_in_full_precision() -> None:
    module = Product()
    attach_products(module, quantizers(1))
    x = torch.randn(1, 2, 3, 4)
    q = module.tfmq_products
    after = (q.left[0](x) @ q.right[0](x.transpose(-2, -1))) @ x
    torch.testing.assert_close(module(x), F.scaled_dot_product_attention(after, after, after))


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x * 2, x * 3)


def test_a_kernel_of_attention_gets_the_call_with_the_grids_of_all_four_operands() -> None:
    module, q, x = Attends(), quantizers(2), torch.randn(1, 2, 3, 4)
    seen: list[tuple[Attention, tuple[Rows, ...]]] = []

    def kernel(call: Attention, rows: tuple[Rows, ...]) -> Tensor:
        seen.append((call, rows))
        return torch.full_like(call.value, 7.0)

    attach_products(module, q)
    q.execute(ProductKernels(lambda left, _, right, __: left @ right, attention=kernel))
    assert bool((module(x) == 7).all())
    ((call, rows),) = seen
    assert torch.equal(call.query, x) and torch.equal(call.key, x * 2) and torch.equal(call.value, x * 3)
    assert [
        row.scales is grid.scale
        for row, grid in zip(rows, (q.left[0], q.right[0], q.left[1], q.right[1]), strict=True)
    ] == [True] * 4


@pytest.mark.parametrize(
    "reason", ["it declines", "a site is in full precision", "a graph is captured", "sites have kernels"]
)
def test_without_a_kernel_of_attention_the_products_are_computed_one_by_one(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, q, x = Attends(), quantizers(1 if "full" in reason else 2), torch.randn(1, 2, 3, 4)
    attach_products(module, q)
    calls: list[str] = []

    def product(left: Tensor, _: Rows, right: Tensor, __: Rows) -> Tensor:
        calls.append("product")
        return left @ right

    def declines(call: Attention, rows: tuple[Rows, ...]) -> None:
        calls.append("attention")

    if "sites" in reason:
        q.execute(ProductKernels(sites={0: product, 1: product}))
    else:
        q.execute(ProductKernels(product, attention=declines))
    if "graph" in reason:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(module(x), Attends()(x))
    assert calls == {
        "it declines": ["attention", "product", "product"],
        "a site is in full precision": ["product"],
    }.get(reason, ["product"] * 2)
