"""The Python sources in a torch package: whether loading an object of theirs would do more than define things.

Importing a source runs its top level and the bodies of its classes; loading an object makes it without
`__init__` and gives it its state. A closed set says what may stand there: definitions, constants, imports of
modules that do nothing by being imported, a few calls. Bodies of functions run when somebody calls the model.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping

_MOST_SOURCE = 256 << 10  # bytes; what is longer is no source that anyone wrote
_UNKNOWN = "what has several meanings"
# Imports that do nothing but give names.
_IMPORTS = frozenset(
    """
    __future__ abc argparse array base64 bisect collections contextlib copy csv dataclasses datetime decimal enum
    fractions functools glob gzip hashlib heapq inspect io itertools json logging math numbers operator os pathlib
    pickle random re string struct sys tempfile time types typing typing_extensions unicodedata uuid warnings weakref
    zipfile zlib einops numpy omegaconf packaging PIL scipy timm torch torchaudio torchvision tqdm transformers yaml
    """.split()
)
_CALLS = frozenset(
    """
    torch.set_num_threads torch.set_grad_enabled torch.manual_seed torch.device torch.no_grad torch.inference_mode
    typing.TypeVar typing.NewType typing.cast collections.namedtuple dataclasses.dataclass dataclasses.field
    logging.getLogger warnings.filterwarnings warnings.simplefilter re.compile math.sqrt math.log
    builtins.frozenset builtins.set builtins.tuple builtins.list builtins.dict builtins.range builtins.len
    builtins.float builtins.int builtins.str builtins.bool functools.lru_cache
    """.split()
)
_DECORATORS = _CALLS | frozenset(
    """
    builtins.staticmethod builtins.classmethod builtins.property abc.abstractmethod typing.overload typing.final
    functools.cached_property functools.cache torch.jit.export torch.jit.ignore torch.jit.unused torch.jit.script
    torch.jit.script_method torch.jit.interface
    """.split()
)
_BUILTINS = frozenset(
    """
    object int float str bool bytes list tuple dict set frozenset complex type property staticmethod classmethod
    range len Exception ValueError TypeError RuntimeError KeyError NotImplementedError ImportError None True False
    NotImplemented Ellipsis slice super print __name__ __file__
    """.split()
)
# What classes may be made of: they run nothing of their own when an object is given its state.
_BASES = (
    "here", "packaged.", "torch.nn.", "torch.autograd.Function", "torch.utils.data.", "typing.", "typing_extensions.",
    "enum.", "abc.ABC", "builtins.object", "builtins.Exception", "builtins.ValueError", "builtins.RuntimeError",
    "builtins.dict", "builtins.list", "builtins.tuple", "builtins.str", "builtins.int", "collections.OrderedDict",
)  # fmt: skip
# Methods that nothing calls while an object is loaded, and names that say nothing but what they say.
_METHODS = frozenset(
    """
    __init__ __post_init__ __call__ __repr__ __str__ __len__ __iter__ __next__ __getitem__ __setitem__ __contains__
    __enter__ __exit__ __add__ __radd__ __sub__ __mul__ __rmul__ __truediv__ __neg__ __matmul__ __bool__ __int__
    __float__ __getstate__ __reversed__ __lt__ __le__ __gt__ __ge__
    """.split()
)
_NAMES = frozenset("__all__ __version__ __author__ __constants__ __slots__ __doc__ __license__ __email__".split())


def modules_of(names: Iterable[str], folder: str) -> dict[str, str]:
    """The modules that a package's records are: dotted name -> record name."""
    found = {}
    for name in names:
        inner = name[len(folder) :]
        if name.startswith(folder) and inner.endswith(".py") and not inner.startswith(".data/"):
            module = inner[: -len(".py")].removesuffix("/__init__").replace("/", ".")
            found[module] = name
    return found


def what_runs(code: bytes, modules: Mapping[str, str]) -> str:
    """The first thing that importing a source, or loading an object of its classes, would run; "" for none.

    Args:
        modules: All that the package holds, which it may import.
    """
    if len(code) > _MOST_SOURCE:
        return f"a source of {len(code):,} bytes"
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"no Python source: {type(error).__name__}"
    try:
        _Top(modules).body(tree.body)
    except _RunsError as error:
        return str(error)
    except RecursionError:
        return "an expression without end"
    return ""


class _RunsError(Exception):
    def __init__(self, node: ast.AST, what: str) -> None:
        super().__init__(f"line {getattr(node, 'lineno', '?')}: {what}")


class _Top:
    """Statements that run on import, and what the names stand for that they use."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._modules = modules
        self._names: dict[str, str] = {name: f"builtins.{name}" for name in _BUILTINS}

    def body(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            self._import(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self._function(node)
        elif isinstance(node, ast.ClassDef):
            self._class(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            self._assign(node)
        elif isinstance(node, ast.Expr):
            self._value(node.value)
        elif isinstance(node, ast.If):
            self._value(node.test)
            self.body([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            self._try(node)
        elif not isinstance(node, ast.Pass):
            raise _RunsError(node, f"a {type(node).__name__} statement at the top level")

    def _try(self, node: ast.Try) -> None:
        for handler in node.handlers:
            if handler.type is not None:
                self._value(handler.type)
            if handler.name is not None:
                self._bind(node, handler.name, _UNKNOWN)
        self.body([*node.body, *node.orelse, *node.finalbody, *(s for h in node.handlers for s in h.body)])

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                meaning = self._module(node, alias.name)
                first = alias.name.partition(".")[0]
                self._bind(node, alias.asname or first, meaning if alias.asname else self._module(node, first))
            return
        module = "packaged." if node.level else self._module(node, node.module or "")
        for alias in node.names:
            if alias.name == "*":
                raise _RunsError(node, f"import of every name of {module}")
            self._bind(node, alias.asname or alias.name, f"{module}.{alias.name}")

    def _module(self, node: ast.AST, module: str) -> str:
        """What an imported module's name stands for: one of the package's own is nobody else's."""
        if any(name == module or name.startswith(module + ".") for name in self._modules):
            return f"packaged.{module}"
        if module.partition(".")[0] not in _IMPORTS:
            raise _RunsError(node, f"import of {module}")
        return module

    def _bind(self, node: ast.AST, name: str, meaning: str) -> None:
        if _special(name) and name not in _NAMES:
            raise _RunsError(node, f"{name} is given a meaning")
        self._name(name, meaning)

    def _name(self, name: str, meaning: str) -> None:
        """Which of two meanings holds depends on what runs."""
        self._names[name] = meaning if self._names.get(name, meaning) == meaning else _UNKNOWN

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if _special(node.name) and node.name not in _METHODS:
            raise _RunsError(node, f"{node.name} is defined, which may run on load")
        for decorator in node.decorator_list:
            self._decorator(decorator)
        arguments = node.args
        annotated = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        values = [*arguments.defaults, *arguments.kw_defaults, node.returns]
        for value in (*values, *(a.annotation for a in annotated if a is not None)):
            if value is not None:
                self._value(value)
        self._name(node.name, "here")

    def _class(self, node: ast.ClassDef) -> None:
        if node.keywords:
            raise _RunsError(node, f"class {node.name} has a metaclass or arguments")
        for decorator in node.decorator_list:
            self._decorator(decorator)
        bases = [self._base(node, base) for base in node.bases]
        members = any(base.startswith("enum.") for base in bases)  # which are made while the class is
        if members and (
            any(isinstance(inside, (ast.FunctionDef, ast.AsyncFunctionDef)) for inside in ast.walk(node))
            or not all(base.startswith(("enum.", "builtins.")) for base in bases)
        ):
            raise _RunsError(node, f"class {node.name} has members, and methods that may run when they are made")
        inner = _Top(self._modules)
        inner._names = dict(self._names)
        inner.body(node.body)
        self._name(node.name, f"enum.{node.name}" if members else "here")

    def _base(self, node: ast.ClassDef, base: ast.expr) -> str:
        if isinstance(base, ast.Subscript):
            self._value(base.slice)
            base = base.value
        meaning = self._meaning(base)
        if not meaning.startswith(_BASES):
            raise _RunsError(node, f"class {node.name} is a {meaning}")
        return meaning

    def _decorator(self, node: ast.expr) -> None:
        callee = node.func if isinstance(node, ast.Call) else node
        if self._meaning(callee) not in _DECORATORS:
            raise _RunsError(node, f"the decorator {ast.unparse(callee)[:60]}")
        if isinstance(node, ast.Call):
            self._arguments(node)

    def _assign(self, node: ast.Assign | ast.AnnAssign) -> None:
        if isinstance(node, ast.AnnAssign):
            self._value(node.annotation)
        if node.value is not None:
            self._value(node.value)
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            for part in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
                if not isinstance(part, ast.Name):
                    raise _RunsError(node, f"an assignment to {ast.unparse(part)[:60]}")
                self._bind(node, part.id, "here")

    def _value(self, node: ast.expr) -> None:
        """An expression that gives a value and does nothing."""
        if isinstance(node, (ast.Name, ast.Attribute)):
            self._meaning(node)
        elif isinstance(node, ast.Call):
            if self._meaning(node.func) not in _CALLS:
                raise _RunsError(node, f"a call of {ast.unparse(node.func)[:60]}")
            self._arguments(node)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Pow, ast.LShift)):
            raise _RunsError(node, "arithmetic that may have no end")
        elif isinstance(
            node,
            (ast.Constant, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare,
             ast.Subscript, ast.Slice, ast.IfExp, ast.JoinedStr, ast.FormattedValue, ast.Starred),
        ):  # fmt: skip
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self._value(child)
        elif isinstance(node, ast.Lambda):
            for value in (*node.args.defaults, *node.args.kw_defaults):
                if value is not None:
                    self._value(value)
        else:
            raise _RunsError(node, f"a {type(node).__name__} expression")

    def _arguments(self, node: ast.Call) -> None:
        for value in (*node.args, *(keyword.value for keyword in node.keywords)):
            self._value(value)

    def _meaning(self, node: ast.expr) -> str:
        """The dotted name that an expression stands for; "here" for what the source defines."""
        if isinstance(node, ast.Name):
            if node.id not in self._names:
                raise _RunsError(node, f"the name {node.id}")
            return self._names[node.id]
        if isinstance(node, ast.Attribute) and not (_special(node.attr) and node.attr != "__name__"):
            return f"{self._meaning(node.value)}.{node.attr}"
        raise _RunsError(node, f"a use of {ast.unparse(node)[:60]}")


def _special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")
