"""What a load would do: plain data, printable, made without torch and without reading a byte."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from anycard.tensors import TensorInfo

_META = "give a callable that builds the model instead"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass
class LoadPlan:
    """Which stored tensor goes where, and what does not fit. `print()` it for a table.

    Attributes:
        path: The file.
        model: The model's class name.
        key: The place in the file that was chosen.
        pairs: Canonical name in the model -> stored name in the file, of all that will be read.
        missing: Names that the model has and the file lacks.
        unexpected: Names that the file has and the model lacks.
        renamed: Stored name -> canonical name, where they differ.
        shapes: Name -> (shape in the file, shape in the model), where they differ.
        casts: Name -> (dtype in the file, dtype in the model), where they differ.
        refused: The names among `casts` that would lose a kind (float into integer).
        layouts: Name -> layout of a tensor of the model that is not dense ("sparse_coo"), so that nothing can fill it.
        conflicts: Pairs of tied names for which the file stores two tensors.
        nearest: Missing name -> the nearest name in the file of the same shape.
        notes: What else a reader should know, a line each.
        called: Modules that load themselves and are called for real.
        unfillable: Names on the meta device that the file does not hold, so that nothing gives them values.
        objections: What modules of the model say against the file; a load is refused with strict=False, too.
    """

    path: str
    model: str
    key: str = ""
    pairs: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    casts: dict[str, tuple[str, str]] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    layouts: dict[str, str] = field(default_factory=dict)
    conflicts: tuple[tuple[str, str], ...] = ()
    nearest: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    called: tuple[str, ...] = ()
    unfillable: tuple[str, ...] = ()
    objections: tuple[str, ...] = ()
    total: int = 0
    nbytes: int = 0

    @property
    def fits(self) -> bool:
        """A strict load would go through (values of tied names aside)."""
        names = self.missing or self.unexpected or self.shapes or self.refused or self.layouts or self.unfillable
        return not (names or self.objections)

    def problems(self) -> list[str]:
        """A line for everything that does not fit."""
        lines = [f"  missing     {self._missing(name)}" for name in self.missing]
        lines += [f"  unexpected  {self._unexpected(name)}" for name in self.unexpected]
        lines += [
            f"  shape       {name}: {_size(stored)} in the file, {_size(own)} in the model"
            for name, (stored, own) in self.shapes.items()
        ]
        lines += [
            f"  dtype       {name}: {self.casts[name][0]} in the file into {self.casts[name][1]} would lose what it is"
            for name in self.refused
        ]
        lines += [
            f"  layout      {name}: {layout} in the model, and only dense tensors can be filled: to_dense()"
            for name, layout in self.layouts.items()
        ]
        lines += [f"  no value    {name}: on the meta device and not in the file; {_META}" for name in self.unfillable]
        lines += [f"  refused     {' '.join(text.split())}" for text in self.objections]
        return lines

    def _renames(self) -> list[str]:
        """A line for each rename; where many names lost or got the same prefix, one line for all of them."""
        groups: dict[tuple[str, str], list[str]] = {}
        for stored, name in self.renamed.items():
            same = len(os.path.commonprefix([stored[::-1], name[::-1]]))  # noqa: RUF071 - letters are meant
            groups.setdefault((stored[: len(stored) - same], name[: len(name) - same]), []).append(stored)
        lines = []
        for (old, new), names in groups.items():
            if len(names) > 3:
                lines.append(f"{len(names)} names: {old}* -> {new}*")
            else:
                lines += [f"{stored} -> {self.renamed[stored]}" for stored in names]
        return lines

    def _missing(self, name: str) -> str:
        near = self.nearest.get(name)
        return f"{name}   nearest in the file: {near}, same shape" if near else name

    def _unexpected(self, name: str) -> str:
        return f"{name}   in the file it lies beside {self.key!r}" if self.key and name in self.missing else name

    def verdict(self) -> str:
        """One line: does it fit, and how much of it."""
        size = f"{self.nbytes / 1e6:,.1f} MB"
        counts = [
            f"{len(held)} {word}"
            for held, word in (
                (self.missing, "missing"), (self.unexpected, "unexpected"),
                (self.shapes, "of another shape"), (self.refused, "of another kind of dtype"),
                (self.layouts, "not dense in the model"), (self.unfillable, "without a value"),
                (self.objections, "refused by the model itself"),
            )
            if held
        ]  # fmt: skip
        fit = f"{len(self.pairs)} of {self.total} tensors fit ({size})"
        return f"fits: {fit}" if self.fits else f"does not fit: {', '.join([fit, *counts])}"

    def __str__(self) -> str:
        lines = [f"{self.path} -> {self.model}: {self.verdict()}"]
        if self.key:
            lines.append(f"  from        {self.key!r} in the file")
        lines += self.problems()
        lines += [
            f"  cast        {name}: {stored} in the file, {own} in the model"
            for name, (stored, own) in self.casts.items()
            if name not in self.refused
        ]
        lines += [f"  tied        {a} and {b}: two tensors in the file, one in the model" for a, b in self.conflicts]
        lines += [f"  renamed     {text}" for text in self._renames()]
        lines += [f"  note        {note}" for note in self.notes]
        return "\n".join(_CONTROL.sub("?", line) for line in lines)


LoadPlan.__module__ = "anycard"


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def nearest_names(
    missing: tuple[str, ...],
    own: Mapping[str, tuple[int, ...]],
    unexpected: Mapping[str, TensorInfo],
    most: int = 20,
) -> dict[str, str]:
    """For the first few missing names the nearest unexpected one of the same shape."""
    found = {}
    for name in missing[:most]:
        same = [n for n, info in unexpected.items() if info.shape == own[name]]
        best = difflib.get_close_matches(name, same[:1000], n=1, cutoff=0.0)
        if best:
            found[name] = best[0]
    return found
