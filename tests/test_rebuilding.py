"""Whole models, rebuilt: what is needed and not there, what torch itself keeps on modules."""

from __future__ import annotations

import collections
import copyreg
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import anycard
from helpers import Reduced, assert_same, assert_same_bits, everything, filled, quiet

HERE = __name__


def saved(model: Any, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file, **options)
    file.seek(0)
    return file


def plainly(model: Any, **options: Any) -> Any:
    """What plain PyTorch makes of it."""
    return torch.load(saved(model, **options), weights_only=False)


def rebuilt(model: Any, *allow: str, **options: Any) -> Any:
    """What anycard makes of it, with every class of this file allowed."""
    return anycard.load(saved(model, **options), allow=[HERE, *allow])


class Holder(nn.Module):
    """Keeps one thing."""

    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.held = held

    @classmethod
    def of(cls) -> Holder:
        return cls()

    @staticmethod
    def twice(x: Any) -> Any:
        return 2 * x


# What is needed and not there.

NET = "from torch import nn\nclass Net(nn.Module):\n    pass\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes one of these modules; all are forgotten at the end."""
    monkeypatch.syspath_prepend(tmp_path)
    written = [tmp_path / f"{name}.py" for name in ("gone_models", "moved_old", "moved_new")]
    yield lambda name, text: (tmp_path / f"{name}.py").write_text(text)
    for path in written:
        sys.modules.pop(path.stem, None)


def of_module(name: str, folder: Path) -> Path:
    """A whole model whose class a module of that name held."""
    kind = type("Net", (nn.Module,), {"__module__": name})
    sys.modules[name] = type(sys)(name)
    sys.modules[name].Net = kind  # type: ignore[attr-defined]
    try:
        torch.save(kind(), folder / "a.pt")
    finally:
        del sys.modules[name]
    return folder / "a.pt"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "No module named 'gone_models'"), ("import gone_cv2", "No module named 'gone_cv2'"),
        ("raise OSError('no driver')", "OSError: no driver"), ("class Other: pass", "gone_models has no Net"),
        ("import json as Net", "is a module"), ("Net = 3", "gone_models.Net"),
    ],
)  # fmt: skip
def test_what_is_allowed_and_not_to_be_had(package: Any, tmp_path: Path, text: str | None, reason: str) -> None:
    """First the class has to be allowed; then the error is no longer about trust, and gives the reason."""
    if text is not None:
        package("gone_models", text)
    path = of_module("gone_models", tmp_path)
    with pytest.raises(anycard.UntrustedError) as asked:
        anycard.load(path)
    assert asked.value.needed == ("gone_models.Net",)
    for allow in (asked.value.needed, "gone_models", "gone_models.*"):
        with pytest.raises(anycard.CheckpointError) as caught:
            anycard.load(path, allow=allow)
        assert not isinstance(caught.value, anycard.UntrustedError)
        assert reason in str(caught.value) and "anycard.load(path, model)" in str(caught.value)
        assert caught.value.name == "gone_models.Net"


def test_a_class_that_moved(package: Any, tmp_path: Path) -> None:
    """Where the old module only imports it, the error names the new one; with both allowed it is rebuilt."""
    path = of_module("moved_old", tmp_path)
    package("moved_old", "from moved_new import Net")
    package("moved_new", NET)
    with pytest.raises(anycard.UntrustedError, match=r"moved_new\.Net \(which moved_old\.Net is today\)") as caught:
        anycard.load(path, allow="moved_old")
    assert caught.value.needed == ("moved_old", "moved_new.Net")
    for allow in (caught.value.needed, ["moved_old.Net", "moved_new"]):
        assert type(anycard.load(path, allow=allow)).__module__ == "moved_new"
    with pytest.raises(anycard.UntrustedError):
        anycard.load(path, allow=["moved_new"])


def test_what_a_module_imports_is_not_called_by_its_name(package: Any) -> None:
    """A function that an allowed module merely imported has to be allowed where it is defined."""
    package("moved_old", "from glob import escape")
    import moved_old  # type: ignore[import-not-found]

    call = Reduced(moved_old.escape, ("*",))
    moved_old.escape.__module__ = "moved_old"
    try:
        file = saved(Holder(call))
    finally:
        moved_old.escape.__module__ = "glob"
    with pytest.raises(anycard.UntrustedError, match=r"glob\.escape \(which moved_old\.escape is today\)"):
        anycard.load(file, allow=[HERE, "moved_old.escape", "glob"])


def test_the_error_can_be_pasted() -> None:
    """It repeats what was allowed already, and tells apart what cannot be had even then."""
    model = nn.Sequential(Holder(), Holder(Reduced(getattr, ("text", "upper"))))
    with pytest.raises(anycard.UntrustedError) as caught:
        anycard.load(saved(model), allow="somebody.Else")
    assert caught.value.needed == ("somebody.Else", f"{HERE}.Holder")
    assert f"allow={list(caught.value.needed)!r}" in str(caught.value)
    assert "cannot be had" in str(caught.value) and "upper" in str(caught.value)
    with pytest.raises(anycard.CheckpointError, match="getattr") as after:
        anycard.load(saved(model), allow=caught.value.needed)
    assert not isinstance(after.value, anycard.UntrustedError)


class Failing:
    """Its state is not taken."""

    def __setstate__(self, state: Any) -> None:
        raise KeyError("old state")


def test_what_an_allowed_class_raises_names_it() -> None:
    """A CheckpointError, as everything that a load raises."""
    failing = Failing()
    failing.state = 1  # type: ignore[attr-defined]
    with pytest.raises(anycard.CheckpointError, match=r"Failing cannot be rebuilt: KeyError: 'old state'"):
        rebuilt(Holder(failing))


# Classes in classes, and their functions.


class Outer(nn.Module):
    """Has a class of its own."""

    class Inner(nn.Module):
        """Within."""

        class Innermost(nn.Linear):
            """Within that."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Outer.Inner(), Outer.Inner.Innermost(2, 2)
        self.kind = Outer.Inner


@pytest.mark.parametrize("protocol", [2, 4])
def test_nested_classes(protocol: int) -> None:
    """They are asked for by their own names and rebuilt; `show` has their names too."""
    model = filled(Outer())
    with pytest.raises(anycard.UntrustedError) as caught:
        anycard.load(saved(model, pickle_protocol=protocol))
    names = ("Outer", "Outer.Inner", "Outer.Inner.Innermost")
    assert set(caught.value.needed) == {f"{HERE}.{name}" for name in names}
    for allow in (caught.value.needed, [HERE]):
        made = anycard.load(saved(model, pickle_protocol=protocol), allow=allow)
        assert type(made.inner) is Outer.Inner and type(made.last) is Outer.Inner.Innermost
        assert made.kind is Outer.Inner
        assert_same(everything(made), everything(model))


def test_functions_of_classes() -> None:
    """A class method, a static method, a plain one, torch's own functions: the very same ones."""
    functions = [Holder.of, Holder.twice, Holder.forward, torch.relu, nn.functional.gelu, torch.tanh]
    made = rebuilt(Holder([*functions, ..., torch.strided, torch.per_tensor_affine, int])).held
    assert made == [*functions, ..., torch.strided, torch.per_tensor_affine, int]


class Meta(type):
    """Makes classes."""


def test_a_file_makes_no_classes() -> None:
    """A metaclass of an allowed module has to be allowed by its own name."""
    made = Reduced(copyreg._reconstructor, (Meta, object, None))
    with pytest.raises(anycard.UntrustedError, match=r"Meta"):
        rebuilt(Holder(made))


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Holder, "__subclasses__"), (Holder, "__class__"), (Holder, "__dict__"), (Holder.twice, "__globals__"),
     (torch.relu, "__self__"), (Holder, "forward.__globals__"), (collections, "namedtuple")],
)  # fmt: skip
def test_getattr_is_never_called(owner: Any, name: str) -> None:
    """Whatever is allowed: nothing leads from a class or a function to what it is made of."""
    if owner is collections:
        owner = Reduced(getattr, (Holder, "of"))
    with pytest.raises(anycard.CheckpointError):
        rebuilt(Holder(Reduced(getattr, (owner, name))), "builtins.getattr", "torch._C.*", "builtins.*")


# What torch itself keeps on modules.


def pruned(method: Any, **options: Any) -> nn.Module:
    module = nn.Linear(4, 4)
    method(module, "weight", **options)
    return module


def hooked() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_load_state_dict_pre_hook(nn.functional.relu)
    return module


def twice_pruned() -> nn.Module:
    return prune.random_unstructured(pruned(prune.l1_unstructured, amount=2), "weight", amount=2)


with quiet():
    KEPT = {
        "weight norm": nn.Sequential(*(nn.utils.weight_norm(nn.Linear(2, 2), dim=dim) for dim in (0, 1))),
        "spectral norm": nn.Sequential(*(nn.utils.spectral_norm(m) for m in (nn.Conv1d(2, 2, 1), nn.Linear(2, 3)))),
        "l1": pruned(prune.l1_unstructured, amount=3), "random": pruned(prune.random_unstructured, amount=3),
        "ln": pruned(prune.ln_structured, amount=1, n=2, dim=0), "identity": pruned(prune.identity),
        "structured": pruned(prune.random_structured, amount=1, dim=0), "twice": twice_pruned(),
        "mask": pruned(prune.custom_from_mask, mask=torch.eye(4)), "hook": hooked(),
        "gelu": nn.TransformerEncoderLayer(4, 2, 8, activation="gelu"),
        "relu": nn.TransformerEncoderLayer(4, 2, 8, activation=torch.relu),
    }  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("whole", [True, False])
def test_what_torch_keeps_on_modules(name: str, whole: bool) -> None:
    """Old norms, pruning, hooks with their module, functions: no allow=, and what plain PyTorch loads, bit for bit."""
    model = KEPT[name].eval()
    file = saved(model)
    if whole:
        file = io.BytesIO()
        anycard.save(model, file, whole=True)
        file.seek(0)
    made, theirs = anycard.load(file), torch.load(file.seek(0) or file, weights_only=False)
    assert_same(everything(made), everything(theirs))
    for ours, other in zip(made.modules(), theirs.modules(), strict=True):
        assert vars(ours).keys() == vars(other).keys()
        for group in ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"):
            kept, wanted = getattr(ours, group), getattr(other, group)
            assert [(k, type(v), vars(v).keys()) for k, v in kept.items()] == [
                (k, type(v), vars(v).keys()) for k, v in wanted.items()
            ]
    if name == "spectral norm":
        assert made[1].weight.data_ptr() == made[1].weight_orig.data_ptr()
    x = torch.rand(1, 2, 2 if name in ("weight norm", "spectral norm", "hook") else 4)
    assert_same_bits(made(x), theirs(x))


def test_scan_tells_them_from_nothing_else_of_a_whole_model(tmp_path: Path) -> None:
    """What hangs on a layer is judged as the layer itself: unknown until allowed."""
    torch.save(KEPT["spectral norm"], tmp_path / "a.pt")
    found = {finding.name: finding for finding in anycard.scan(tmp_path / "a.pt").bad}
    assert {"torch.nn.modules.linear.Linear", "torch.nn.utils.spectral_norm.SpectralNorm"} <= found.keys()
    assert {finding.kind for finding in found.values()} == {"unknown"}
