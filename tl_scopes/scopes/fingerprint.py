"""What tells one scope from another: its name, its class and the contents of its options, the same in every process."""

import copyreg
import dis
import inspect
import json
import random
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from tl_scopes import models
from tl_scopes.jacobian.linearization import Linearization
from tl_scopes.models import Model
from tl_scopes.scopes.scope import Scope, require_scope
from tl_scopes.scopes.written import as_written

Contents: TypeAlias = list[Any] | str
"""Nested lists of texts and numbers, which JSON keeps as they are."""

Part: TypeAlias = tuple[str, Any]
"""A part of an object: where it stands in it, `.alpha` say, and the part."""

_PLAIN = (bool, int, float, complex, str, bytes)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_READS, _READS_OF = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"), ("LOAD_ATTR", "LOAD_METHOD")
_PACKAGES = frozenset({"site-packages", "dist-packages"})
_INSTALLED = tuple({Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def names_as_written(scopes: Scope | Iterable[Scope] | Mapping[str, Scope]) -> dict[str, Scope]:
    """Scopes by name: the names that were given, or else the scopes as they are written.

    Raises:
        ValueError: when there are no scopes, or two of the same name.
        TypeError: for something that is not a scope.
    """
    given = scopes.values() if isinstance(scopes, Mapping) else scopes
    listed = list(given) if isinstance(given, Iterable) else [given]
    if not listed:
        raise ValueError("there are no scopes to evaluate: give one at least, [SemanticScope()] say.")
    for scope in listed:
        require_scope(scope)
    if isinstance(scopes, Mapping):
        return dict(scopes)
    named = {as_written(scope): scope for scope in listed}
    if len(named) < len(listed):
        raise ValueError(f"there are {len(listed)} scopes and {len(named)} names: name them, in a dict.")
    return named


def names(scopes: Iterable[Scope] | Mapping[str, Scope]) -> dict[str, Scope]:
    """Scopes by name: the names that were given, or the scopes as they are written, without addresses in memory.

    Raises:
        ValueError: when there are no scopes, or two of the same name.
        TypeError: for something that is not a scope.
    """
    found = names_as_written(scopes)
    if isinstance(scopes, Mapping):
        return found
    stable = {without_addresses(name): scope for name, scope in found.items()}
    if len(stable) < len(found):
        raise ValueError(f"there are {len(found)} scopes and {len(stable)} names: name them, in a dict.")
    return stable


def settings_of(model: Model, scopes: Mapping[str, Scope], remedy: str) -> dict[str, Any]:
    """What results in a file depend on, beside the prompts, as numbers and texts: the model, its weights, the scopes.

    Args:
        model: a checked model.
        scopes: the scopes by name.
        remedy: what to do where the model has hooks.

    Cost: a pass over the weights, on the CPU.

    Raises:
        ValueError: for a model with hooks of the user's.
        TypeError: for a scope with an option whose contents cannot be read.
    """
    if models.user_hooks(model) or models.has_backward_hooks(model):
        raise ValueError(
            "the model has hooks of yours, and in a file results under hooks cannot be told from those without: "
            f"{remedy}."
        )
    return {
        "tl_scopes": version("tl-scopes"),
        "model": models.model_name(model).removeprefix(models.FOLDER_PREFIX),  # which older files do not have
        "weights": models.fingerprint(model),
        "dtype": str(models.autocast_of(model) or next(model.parameters()).dtype).removeprefix("torch."),
        "scopes": {name: identity(scope, name) for name, scope in scopes.items()},
    }


def without_addresses(text: str) -> str:
    """A text without addresses in memory, which differ between processes: `<function f>` for `<function f at 0x7f>`."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def identity(scope: Scope, name: str) -> str:
    """A scope as it is written, with a checksum of its class and of all that its options hold.

    Args:
        scope: any scope.
        name: what errors call it.

    Raises:
        TypeError: for an option whose contents cannot be read.
    """
    checksum = zlib.crc32(json.dumps(contents(scope, f"the scope {name!r}")).encode())
    return f"{without_addresses(as_written(scope))} holding {checksum:08x}"


def contents(value: Any, name: str = "the value") -> Contents:
    """What an object holds: the same for its like, made anew or in another process, and different for all others.

    Tensors and arrays count by their numbers, modules by their parameters and buffers, models of TransformerLens by
    their weights, other objects by what pickle would save of them. A function or a class counts by its name. Outside of
    installed packages it also counts by its code, with all that it reads of its module, and of other modules outside of
    packages: numbers, containers, objects, functions and classes. So a scope that was edited, or a table that it looks
    up, is not taken for what it was. What a function keeps in such a variable from call to call counts too:
    `functools.cache` keeps it apart. Generators do not count, since what they will give cannot be told.

    Args:
        value: any object.
        name: what errors call it.

    Raises:
        TypeError: for an object whose contents cannot be read, a lock or an open file say, also within another, or as a
            variable that a function reads; for a model with hooks of the user's.
    """
    try:
        return _Reader().read(value, name, ())
    except RecursionError:
        raise TypeError(_refusal(value, name, "is nested too deeply")) from None


class _Reader:
    """Reads one object."""

    def __init__(self, seen: Mapping[int, Any] = MappingProxyType({})) -> None:
        self.seen: dict[int, Any] = dict(seen)
        """Classes, functions and modules that were read already, by id: they refer to one another."""

    def read(self, value: Any, name: str, above: tuple[int, ...]) -> Contents:
        """The contents of an object that is part of others, `above`."""
        cls = type(value)
        if value is None or cls in _PLAIN:
            return [cls.__name__, repr(value)]
        if isinstance(value, _GENERATORS):
            return "a generator"
        if isinstance(value, Tensor):
            return _numbers(value, name)
        if id(value) in above:
            return ["above", above.index(id(value))]
        if id(value) in self.seen:
            return ["seen", list(self.seen).index(id(value))]
        if isinstance(value, type | FunctionType) and _is_installed(value):
            return ["named", _full_name(value)]
        if isinstance(value, type | FunctionType | nn.Module):
            self.seen[id(value)] = value
        above = (*above, id(value))

        def read(*parts: Part) -> list[Contents]:
            return [[place, self.read(part, f"{name}{place}", above)] for place, part in parts]

        if cls is np.ndarray and not value.dtype.hasobject:
            return ["array", str(value.dtype), list(value.shape), zlib.crc32(np.ascontiguousarray(value).tobytes())]
        if cls in (list, tuple):
            return [cls.__name__, *read(*((f"[{i}]", part) for i, part in enumerate(value)))]
        if cls in (dict, MappingProxyType):
            pairs = list(value.items())
            return ["mapping", *read(*((" (a key)", key) for key, _ in pairs)), *read(*_items(pairs))]
        if isinstance(value, set | frozenset):
            # Each part by itself, since their order is another in each process.
            parts = [_Reader(self.seen).read(part, name, above) for part in value]
            return [*read(("", cls)), *sorted(parts, key=json.dumps)]
        if isinstance(value, Enum):
            return [*read(("", cls)), value.name]
        if isinstance(value, ModuleType):
            return ["module", value.__name__]
        if isinstance(value, CodeType):
            constants = read(*(("", constant) for constant in value.co_consts))
            return ["code", value.co_code.hex(), *value.co_names, *value.co_varnames, *constants]
        if isinstance(value, type):
            return ["class", _full_name(value), *read(*_parts_of_class(value))]
        if isinstance(value, FunctionType):
            return ["function", _full_name(value), *read(*_parts_of_function(value))]
        if isinstance(value, MethodType | classmethod | staticmethod):
            return [cls.__name__, *read(("", getattr(value, "__self__", None)), ("", value.__func__))]
        if isinstance(value, property):
            return ["property", *read(("", value.fget), ("", value.fset), ("", value.fdel))]
        if isinstance(value, cached_property):
            return ["cached_property", *read(("", value.func))]
        if isinstance(value, nn.Module) and _is_model(value):
            return [*read(("", cls)), _weights(value, name)]
        if (isinstance(value, nn.Module) or is_dataclass(value)) and not _says_what_it_saves(cls):
            return [*read(("", cls)), *read(*_attributes(value))]
        saved = _saved(value, name)
        if isinstance(saved, str):
            return ["global", _full_name(value), saved, *read(*_wrapped(value))]
        make, arguments, state, items, pairs = (*saved, None, None, None)[:5]
        held = [*_attributes_in(value, state), *(("", part) for part in items or ()), *_items(pairs or ())]
        return [_full_name(make), *read(*(("", part) for part in arguments)), *read(*held)]


def _numbers(tensor: Tensor, name: str) -> Contents:
    try:
        plain = tensor.detach().cpu()
        dense = plain if plain.layout is torch.strided else plain.to_dense()
        data = dense.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8).numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # on the meta device, or quantised
        raise TypeError(_refusal(tensor, name)) from error
    return ["tensor", str(tensor.dtype), list(tensor.shape), zlib.crc32(data.data)]


def _is_model(module: nn.Module) -> bool:
    """Whether it is a model of TransformerLens, which keeps much that is another in each process."""
    return all(hasattr(module, name) for name in ("hook_dict", "cfg", "to_tokens"))


def _weights(model: Model, name: str) -> Contents:
    if models.user_hooks(model) or models.has_backward_hooks(model):
        raise TypeError(_refusal(model, name, "has hooks of yours, and cannot be told from one without"))
    try:
        return ["weights", models.fingerprint(model)]
    except (RuntimeError, NotImplementedError) as error:  # offloaded
        raise TypeError(_refusal(model, name)) from error


def _wrapped(value: Any) -> Iterator[Part]:
    """The function of the user's in what `functools.cache` has made of it."""
    if hasattr(value, "__wrapped__") and not _is_installed(value):
        yield ".__wrapped__", value.__wrapped__


def _saved(value: Any, name: str) -> Any:
    """What pickle would save: a name; or a function, its arguments, and then a state, list items and mapping items."""
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        return reduce(value) if reduce else value.__reduce_ex__(4)
    except Exception as error:
        raise TypeError(_refusal(value, name)) from error


def _refusal(value: Any, name: str, why: str = "cannot be compared with another one") -> str:
    return (
        f"{name} is a {type(value).__qualname__}, which {why}, so the results of two scopes could be mixed up in a "
        "file: put numbers, texts, tensors or a module in its place, or give the class that holds it a __getstate__ "
        "that returns what its scores depend on; `tls.evaluate` also goes without `path`."
    )


def _says_what_it_saves(cls: type) -> bool:
    """Whether a class has a `__getstate__` or `__reduce__` of its own, not the one of all dataclasses or modules."""
    for name in ("__getstate__", "__reduce__", "__reduce_ex__"):
        found = getattr(cls, name, None)
        general = found is getattr(nn.Module, name, None) or getattr(found, "__module__", "") == "dataclasses"
        if isinstance(found, FunctionType) and not general:
            return True
    return False


def _attributes(value: Any) -> Iterator[Part]:
    """What a module or a dataclass holds, without what was derived from its options.

    A module's hooks count without the numbers that they have in this process. A dataclass's field is derived where it
    is neither an argument nor compared.
    """
    hidden, slots = set(), {}
    if is_dataclass(value):
        hidden = {field.name for field in fields(value) if not (field.init or field.compare)}
        slots = {field.name: getattr(value, field.name) for field in fields(value) if hasattr(value, field.name)}
    if isinstance(value, Linearization):  # a pass keeps ids, and what it was asked for
        hidden |= {"trace"}
        yield from ((".embeddings", value.embeddings), (".rules", value.rules))
    held = slots | getattr(value, "__dict__", {})
    for place, part in _attributes_in(value, {key: part for key, part in held.items() if key not in hidden}):
        is_hooks = isinstance(value, nn.Module) and "_hooks" in place and isinstance(part, Mapping)
        yield place, list(part.values()) if is_hooks else part


def _attributes_in(value: Any, state: Any) -> Iterator[Part]:
    """The attributes in the state of an object, without those that a cached_property keeps there, and a hash."""
    if type(state) is not dict:
        yield "", state
        return
    for key, part in state.items():
        cached = isinstance(inspect.getattr_static(type(value), str(key), None), cached_property)
        if not cached and key != "_original_object_hash":  # transformers', which is another in each process
            yield f".{key}", part


def _items(pairs: Iterable[tuple[Any, Any]]) -> Iterator[Part]:
    for key, part in pairs:
        yield f"[{key!r}]" if type(key) in _PLAIN else " (a value)", part


def _full_name(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', None)}.{named.__qualname__}"


def _is_installed(value: Any) -> bool:
    """Whether a class or function is found under its name in Python, this package or another installed one."""
    module = sys.modules.get(value.__module__)
    found: Any = module
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not value:
        return False
    file = getattr(module, "__file__", None)
    return _is_of_package(value.__module__, file)


def _is_of_package(module: str | None, file: str | None) -> bool:
    """Whether a module is of Python, this package or another installed one, by its name and its file."""
    if file is None or module is None:
        return module in sys.builtin_module_names
    if module.partition(".")[0] == __name__.partition(".")[0]:
        return True
    path = Path(file)
    return not _PACKAGES.isdisjoint(path.parts) or any(path.is_relative_to(folder) for folder in _INSTALLED)


def _parts_of_class(cls: type) -> Iterator[Part]:
    """The classes that it is derived from, its methods, and what else it holds."""
    for base in cls.__bases__:
        yield f" (the class {base.__qualname__})", base
    for key, part in sorted(vars(cls).items()):
        written = isinstance(part, FunctionType | property | classmethod | staticmethod)
        hidden = key.startswith("__") or key in ("_abc_impl", "_backward_cls") or inspect.ismemberdescriptor(part)
        if written or not hidden:
            yield f".{key}", part


def _parts_of_function(function: FunctionType) -> Iterator[Part]:
    """Its code without the docstring, its defaults, the variables around it, and what it reads of its module and of
    others that are not of packages."""
    code = function.__code__
    yield "", code.replace(co_consts=tuple(constant for constant in code.co_consts if constant is not function.__doc__))
    yield " (a default)", function.__defaults__
    yield " (a default)", function.__kwdefaults__
    for key, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        yield f" (the variable {key!r})", _in_cell(cell)
    if not _is_of_package(function.__globals__.get("__name__"), function.__globals__.get("__file__")):
        for key, part in dict(_variables_read(code, function.__globals__)).items():
            yield f" (the variable {key!r})", part


def _variables_read(code: CodeType, variables: Mapping[str, Any]) -> Iterator[Part]:
    """The variables of its module that a function reads, and of a module among them the ones that it reads of that."""
    found: Part | None = None
    for step in dis.get_instructions(code):
        if step.opname in _READS and step.argval in variables:
            found = step.argval, variables[step.argval]
        elif step.opname in _READS_OF and found is not None and hasattr(found[1], step.argval):
            found = f"{found[0]}.{step.argval}", getattr(found[1], step.argval)
        elif step.opname != "EXTENDED_ARG":
            found = None
        if found is not None and not isinstance(found[1], ModuleType):
            yield found
            found = None
        elif found is not None and _is_of_package(found[1].__name__, getattr(found[1], "__file__", None)):
            found = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _variables_read(constant, variables)


def _in_cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return None
