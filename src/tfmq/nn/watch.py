"""Watch the calls of modules for a while: the one place that hangs hooks on them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import nn


class ModuleCall(NamedTuple):
    """A call of a module that is watched by the name `name`; `output` is None before the module has run."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


# Looks at a call. None leaves the call as it is. Anything else takes the place of the output or, before the
# call, of its arguments, as the pair of `args` and `kwargs`.
See = Callable[[ModuleCall], Any]


@contextmanager
def all_watched(
    modules: Mapping[str, nn.Module], *, before: See | None = None, after: See | None = None
) -> Iterator[Callable[[], None]]:
    """Call `before` and `after` whenever one of `modules` runs while the context is open.

    They run in the order in which contexts were opened. The context gives a function that stops the watching
    before its end.
    """
    with ExitStack() as stack:
        for name, module in modules.items():
            if before is not None:
                handle = module.register_forward_pre_hook(_entering(name, before), with_kwargs=True)
                stack.callback(handle.remove)
            if after is not None:
                handle = module.register_forward_hook(_leaving(name, after), with_kwargs=True)
                stack.callback(handle.remove)
        yield stack.close


def watched(
    module: nn.Module, *, before: See | None = None, after: See | None = None
) -> AbstractContextManager[Callable[[], None]]:
    """Call `before` and `after` whenever `module` runs, by the name "", while the context is open; see
    `all_watched`.
    """
    return all_watched({"": module}, before=before, after=after)


def _entering(name: str, see: See) -> Callable[..., Any]:
    return lambda module, args, kwargs: see(ModuleCall(name, module, args, kwargs))


def _leaving(name: str, see: See) -> Callable[..., Any]:
    return lambda module, args, kwargs, output: see(ModuleCall(name, module, args, kwargs, output))
