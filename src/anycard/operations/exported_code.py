"""What loading an exported program (`.pt2`) runs: sizes that sympy evaluates, and compiled libraries.

Source: torch/_export/serde/serialize.py `_parse_sym_expr`, torch/_inductor/package.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

# Compiled by AOTInductor: unpacked and opened when it is loaded.
COMPILED = re.compile(r"(^|/)data/aotinductor/")
# What torch and sympy print sizes with.
_FUNCTIONS = frozenset(
    """
    Symbol Integer Float Rational Add Mul Pow Mod Max Min Abs Eq Ne Ge Gt Le Lt And Or Not Piecewise ExprCondPair
    floor ceiling sqrt FloorDiv ModularIndexing Where PythonMod CleanDiv CeilDiv CeilToInt FloorToInt TruncToInt
    TruncToFloat RoundToInt RoundDecimal IntTrueDiv FloatTrueDiv ToFloat PowByNatural FloatPow LShift RShift Identity
    BitwiseFn_bitwise_and BitwiseFn_bitwise_or OpaqueUnaryFn_sqrt OpaqueUnaryFn_log OpaqueUnaryFn_log2 OpaqueUnaryFn_exp
    """.split()
)
_ALLOWED = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Constant, ast.Name, ast.Call, ast.keyword,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context, ast.Tuple,
)  # fmt: skip
_MOST = 100_000  # characters


def evaluated(data: bytes) -> Iterator[str]:
    """The expressions in a program's JSON that are more than arithmetic on sizes.

    Raises:
        ValueError, RecursionError: It is no JSON.
    """
    stack = [json.loads(data)]
    seen: set[str] = set()
    while stack:
        held = stack.pop()
        if isinstance(held, list):
            stack += held
        elif isinstance(held, dict):
            stack += held.values()
            if "expr_str" in held and not (type(text := held["expr_str"]) is str and text in seen):
                seen.add(str(text))
                if not _is_arithmetic(text):
                    yield str(text)


def _is_arithmetic(text: Any) -> bool:
    if type(text) is not str or len(text) > _MOST:
        return False
    try:
        return all(map(_is_harmless, ast.walk(ast.parse(text, mode="eval"))))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
    if isinstance(node, ast.Name):
        return "__" not in node.id
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.isidentifier() and "__" not in node.value  # a symbol's name
    return isinstance(node, _ALLOWED)
