"""Other tensors in place of a model's own, in what one thread computes; the model itself holds what it held."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, no_type_check

from torch import Tensor
from torch.overrides import TorchFunctionMode

from tl_scopes.models.threads import here, put_back


class Substitution(TorchFunctionMode):
    """Inside, torch's functions and methods take other tensors wherever this thread hands them certain tensors.

    A kernel that is handed a tensor past torch's functions (`torch.autograd.Function.apply`) takes it as it is.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.pairs = {id(own): (own, other) for own, other in pairs}

    @no_type_check  # nothing here has a type, and looking for one at each operation would double the time of the tests
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Every operation of the pass comes by here, so that a call of `other` for each argument would be felt.
        pairs = self.pairs
        if self in here.suspended:
            return func(*args, **kwargs) if kwargs else func(*args)
        args = [pairs[id(a)][1] if id(a) in pairs else self.other(a) if type(a) in (list, tuple) else a for a in args]
        return func(*args, **{name: self.other(value) for name, value in kwargs.items()}) if kwargs else func(*args)

    @no_type_check
    def other(self, value: Any) -> Any:
        """What stands in the place of a value, which is the value itself as a rule; lists are looked through."""
        if type(value) in (list, tuple):
            return type(value)(map(self.other, value))
        found = self.pairs.get(id(value))
        return value if found is None else found[1]


def frozen(parameters: Sequence[Tensor]) -> AbstractContextManager[object]:
    """Inside, parameters take no gradients, so that the graph keeps no activations for their sake.

    Other threads may train them at the same time.
    """
    trained = [(parameter, parameter.detach()) for parameter in parameters if parameter.requires_grad]
    return Substitution(trained) if trained else nullcontext()


@contextmanager
def exchanged(*substitutions: Substitution) -> Iterator[None]:
    """Inside, this thread computes with the weights of these substitutions, and `in_use` says so."""
    with ExitStack() as stack, put_back() as afterwards:
        afterwards(setattr, here, "exchanges", here.exchanges)
        here.exchanges += substitutions
        for substitution in substitutions:
            stack.enter_context(substitution)
        yield


@contextmanager
def as_then(exchanges: tuple[Substitution, ...]) -> Iterator[None]:
    """Inside, this thread computes as it did inside of these exchanges, whatever others it is inside of now."""
    if exchanges == here.exchanges:
        yield
        return
    with put_back() as afterwards:
        afterwards(setattr, here, "suspended", here.suspended)
        afterwards(setattr, here, "exchanges", here.exchanges)
        here.suspended = tuple(one for one in (*here.suspended, *here.exchanges) if one not in exchanges)
        here.exchanges = ()
        with exchanged(*exchanges):
            yield


def in_use(weight: Tensor) -> Tensor:
    """What this thread computes with in place of a weight."""
    for substitution in reversed(here.exchanges):
        weight = substitution.other(weight)
    return weight
