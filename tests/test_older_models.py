"""Whole models whose classes have grown since: rebuilt with the defaults of what came later, or told to lack it."""

from __future__ import annotations

import copyreg
import io
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import anycard
from helpers import Reduced, assert_same, assert_same_bits, filled, quiet, weights
from test_old_torch import old_python

HERE = __name__
# Every module kept a backend below 1.4; all else here came later.
OF_MODULE = (
    "_non_persistent_buffers_set", "_is_full_backward_hook", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_forward_pre_hooks", "_backward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


class _Backend:
    """Stands for torch.nn.backends.thnn's function, called."""

    def __reduce__(self) -> Any:
        from torch.nn.backends.thnn import _get_thnn_function_backend

        return _get_thnn_function_backend, ()


def older(module: nn.Module, *lacks: str) -> Any:
    """Pickles as the module without these attributes (of it and of all below it), as an old torch had it."""
    state = dict(module.__getstate__() or {}) if hasattr(module, "__getstate__") else dict(vars(module))
    for name in (*lacks, *OF_MODULE):
        state.pop(name, None)
    state["_buffers"] = {name: value for name, value in state["_buffers"].items() if name not in lacks}
    state["_modules"] = {name: older(child, *lacks) for name, child in state["_modules"].items() if child is not None}
    state["_backend"] = _Backend()
    return Reduced(copyreg._reconstructor, (type(module), object, None), state)


def rebuilt(made: Any, allow: Any = ()) -> nn.Module:
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    return anycard.load(file, allow=allow)


IMAGE, ROW, SEQUENCE = torch.rand(2, 2, 5, 5), torch.rand(2, 4), torch.rand(3, 2, 4)
LAYER = nn.TransformerEncoderLayer(4, 2, 8)
with quiet():
    CASES: dict[str, tuple[nn.Module, tuple[str, ...], tuple[torch.Tensor, ...]]] = {
        "convolution": (nn.Conv2d(2, 3, 3, padding=1), ("padding_mode", "_reversed_padding_repeated_twice"), (IMAGE,)),
        "transposed": (nn.ConvTranspose2d(2, 3, 3), ("padding_mode", "_reversed_padding_repeated_twice"), (IMAGE,)),
        "batch norm": (nn.BatchNorm2d(2), ("num_batches_tracked", "track_running_stats"), (IMAGE,)),
        "instance norm": (nn.InstanceNorm2d(2), ("num_batches_tracked", "track_running_stats"), (IMAGE,)),
        "upsample": (nn.Upsample(scale_factor=2), ("recompute_scale_factor", "align_corners"), (IMAGE,)),
        "pool": (nn.AvgPool2d(2), ("divisor_override", "count_include_pad", "ceil_mode"), (IMAGE,)),
        "gelu": (nn.GELU(), ("approximate",), (ROW,)), "silu": (nn.SiLU(), ("inplace",), (ROW,)),
        "softmax": (nn.Softmax(), ("dim",), (ROW,)), "relu": (nn.ReLU(), ("inplace",), (ROW,)),
        "layer norm": (nn.LayerNorm(4), (), (ROW,)),
        "attention": (nn.MultiheadAttention(4, 2), ("batch_first", "_qkv_same_embed_dim"), (SEQUENCE,) * 3),
        "encoder layer": (LAYER, ("norm_first", "activation_relu_or_gelu", "batch_first"), (SEQUENCE,)),
        "before activations": (LAYER, ("activation", "activation_relu_or_gelu", "norm_first"), (SEQUENCE,)),
        "encoder": (nn.TransformerEncoder(LAYER, 2, enable_nested_tensor=False),
                    ("enable_nested_tensor", "use_nested_tensor", "mask_check"), (SEQUENCE,)),
        "decoder": (nn.TransformerDecoderLayer(4, 2, 8), ("norm_first", "batch_first", "activation"), (SEQUENCE,) * 2),
        "transformer": (nn.Transformer(4, 2, 1, 1, 8), ("batch_first", "norm_first"), (SEQUENCE,) * 2),
        "lstm": (nn.LSTM(4, 3, 2), ("proj_size",), (SEQUENCE,)),
        "first lstm": (nn.LSTM(4, 3), ("proj_size", "_flat_weights", "_flat_weights_names"), (SEQUENCE,)),
        "gru": (nn.GRU(4, 3), ("proj_size", "_flat_weights", "_flat_weights_names"), (SEQUENCE,)),
        "bag": (nn.EmbeddingBag(5, 3), ("include_last_offset", "padding_idx"), (torch.tensor([[1, 2]]),)),
        "cross entropy": (nn.CrossEntropyLoss(), ("label_smoothing",), (ROW, torch.tensor([0, 1]))),
        "divergence": (nn.KLDivLoss(reduction="sum"), ("log_target",), (ROW, ROW)),
        "smooth": (nn.SmoothL1Loss(), ("beta",), (ROW, ROW.flip(0))),
        "nested": (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Upsample(scale_factor=2)),
                   ("padding_mode", "num_batches_tracked", "recompute_scale_factor"), (IMAGE,)),
    }  # fmt: skip


def first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:.*Implicit dimension choice")
@pytest.mark.filterwarnings("error:.*lacks")
def test_torchs_own_classes(kind: str, mode: str) -> None:
    """Without allow=: the rebuilt module computes what today's does, in both modes, and can be saved again."""
    module, lacks, given = CASES[kind]
    filled(module).train(mode == "train")
    made = rebuilt(older(module, *lacks))
    state = made.state_dict()
    known = {name: held for name, held in weights(module).items() if name.rpartition(".")[2] not in lacks}
    assert_same({name: state[name] for name in known}, known)
    with torch.no_grad():
        torch.manual_seed(0)
        want = first(module(*given))
        torch.manual_seed(0)
        assert_same_bits(first(made(*given)), want)
    assert repr(made)
    again = io.BytesIO()
    anycard.save(made, again, whole=True)
    again.seek(0)
    assert_same(weights(anycard.load(again)), weights(made))


def test_losses_that_kept_two_booleans() -> None:
    """size_average and reduce say what reduction is."""
    for old, reduction in (((True, True), "mean"), ((False, True), "sum"), ((True, False), "none")):
        loss = nn.MSELoss()
        loss.size_average, loss.reduce = old
        made = rebuilt(older(loss, "reduction"))
        assert made.reduction == reduction


def test_lists_and_dicts_of_parameters() -> None:
    """Below 1.12 they kept nothing but the parameters."""
    held = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3))])
    made = rebuilt(older(held, "_size"))
    assert [len(p) for p in made] == [2, 3]
    named = nn.ParameterDict({"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.zeros(3))})
    assert list(rebuilt(older(named, "_keys")).keys()) == ["a", "b"]


def test_a_class_that_has_another_name_today(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's projection was a _LinearWithBias in 1.4 to 1.8."""
    module = nn.MultiheadAttention(4, 2)
    old = type("_LinearWithBias", (nn.Linear,), {"__module__": "torch.nn.modules.linear"})
    monkeypatch.setattr(torch.nn.modules.linear, "_LinearWithBias", old, raising=False)
    module.out_proj.__class__ = old
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    monkeypatch.undo()
    made = anycard.load(file)
    assert_same(weights(made), weights(module))
    assert_same_bits(made(SEQUENCE, SEQUENCE, SEQUENCE)[0], module(SEQUENCE, SEQUENCE, SEQUENCE)[0])


class Base(nn.Module):
    """Has grown since the file was written."""

    def __init__(self, width: int, scale: float = 2.0, *, steps: Any = ()) -> None:
        super().__init__()
        self.width = width
        self.scale = scale
        self.steps = steps
        self.unread = width
        if width > 2:
            self.wide = True
        self.fc = nn.Linear(width, width)


class Grown(Base):
    """So has this one."""

    shift = 0.5

    def __init__(self, width: int, gate: float, scale: float = 3.0) -> None:
        super().__init__(width, scale)
        self.gate = gate
        self.rounds = 2
        self.shift = 0.25
        self.table = [width] * 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.rounds):
            x = self.fc(x) * self.scale + self.shift + len(self.steps)
        return x * self.gate + (self.width if hasattr(self, "wide") else 0)

    def look(self) -> list[int]:
        return self.table


def test_a_class_of_ones_own() -> None:
    """Defaults of the class's own signature, constants; what the class itself has stays; nothing runs."""
    model = Grown(2, 1.5)
    made = rebuilt(older(model, "scale", "steps", "rounds", "shift", "unread"), allow=[f"{HERE}.Grown"])
    assert (made.scale, made.steps, made.rounds, made.shift) == (3.0, (), 2, 0.5)
    assert "unread" not in vars(made) and "wide" not in vars(made)
    model.shift = 0.5
    assert_same_bits(made(torch.ones(1, 2)), model(torch.ones(1, 2)))


def test_what_has_no_default_is_named() -> None:
    """An error for what the class asks its caller for, a warning for what it computes."""
    with pytest.raises(anycard.CheckpointError, match=r"lacks Grown\.gate.*anycard\.load\(path, model\)") as caught:
        rebuilt(older(Grown(2, 1.5), "gate", "width"), allow=[f"{HERE}.Grown"])
    assert "Grown.width" in str(caught.value) and caught.value.name == "Grown.gate"
    with pytest.warns(UserWarning, match=r"lacks Grown\.table"):
        made = rebuilt(older(Grown(2, 1.5), "table"), allow=[f"{HERE}.Grown"])
    with pytest.raises(AttributeError, match="table"):
        made.look()
    fused = older(Grown(2, 1.5))
    del fused.call[2]["_modules"]["fc"]  # people merge layers, and delete the one
    with pytest.warns(UserWarning, match=r"lacks Grown\.fc"):
        rebuilt(fused, allow=[f"{HERE}.Grown"])


class Hooked(nn.Module):
    """Keeps its own methods."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.run = self.fc.forward
        self.register_forward_pre_hook(self.double)

    def double(self, module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (args[0] * 2,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


def test_methods_that_a_model_keeps() -> None:
    """Hooks that are methods, and methods as attributes: bound to the rebuilt modules; no other attribute is had."""
    model = Hooked()
    made = rebuilt(model, allow=[f"{HERE}.Hooked"])
    assert made.run.__self__ is made.fc
    assert_same_bits(made(torch.ones(1, 2)), model(torch.ones(1, 2)))
    with pytest.raises(anycard.UntrustedError) as caught:
        rebuilt(nn.LazyLinear(3))
    lazy = rebuilt(nn.LazyLinear(3), allow=caught.value.needed)
    assert lazy(torch.ones(1, 2)).shape == (1, 3)
    for name in ("__class__", "weight", "__dict__", "nothing"):
        odd = nn.Linear(2, 2)
        odd.kept = Reduced(getattr, (odd, name))
        with pytest.raises(anycard.FormatError, match=f"keeps '{name}'"):
            rebuilt(odd)


MAKE = """
import sys, torch
from torch import nn
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(4, 2, 8, activation="gelu")
models = {
    "conv": nn.Sequential(nn.Conv2d(2, 3, 3, padding_mode="circular"), nn.InstanceNorm2d(3), nn.GELU(), nn.Upsample(6)),
    "encoder": nn.TransformerEncoder(layer, 2), "lstm": nn.LSTM(4, 3, 2, bidirectional=True),
    "norms": nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.utils.spectral_norm(nn.Linear(4, 2))),
    "transformer": nn.Transformer(4, 2, 1, 1, 8).encoder, "parameters": nn.ParameterList([nn.Parameter(torch.ones(2))]),
}
given = {"conv": torch.rand(1, 2, 5, 5), "norms": torch.rand(2, 4), "parameters": None}
results = {}
for name, model in models.items():
    model.eval()
    x = given.get(name, torch.rand(3, 2, 4)) if name != "parameters" else None
    with torch.no_grad():
        y = None if x is None else model(x)
    results[name] = x, y[0] if isinstance(y, tuple) else y
    torch.save(model, f"{sys.argv[1]}/{name}.pt", _use_new_zipfile_serialization=name != "lstm")
torch.save(results, sys.argv[1] + "/results.pt")
"""


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_models_of_a_real_old_torch(tmp_path: Path) -> None:
    """PyTorch 1.13 wrote them; rebuilt here they compute the same."""
    subprocess.run([old_python(), "-W", "ignore", "-c", MAKE, str(tmp_path)], check=True, timeout=120)
    for name, (given, want) in torch.load(tmp_path / "results.pt", weights_only=True).items():
        try:
            made = anycard.load(tmp_path / f"{name}.pt")
        except anycard.UntrustedError as error:
            made = anycard.load(tmp_path / f"{name}.pt", allow=error.needed)
        if given is not None:
            with torch.no_grad():
                assert torch.allclose(first(made(given)), want, atol=1e-5), name
        assert_same(weights(made), anycard.read(tmp_path / f"{name}.pt"))
