"""What is run against what: all of it data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from speed.subjects import Model

FLOOR, LEAST, USUAL, PEER, OURS = "floor", "least", "usual", "peer", "ours"


@dataclass(frozen=True)
class Contestant:
    """One way to do the job.

    Attributes:
        role: FLOOR (a bare loop), LEAST (what it takes with names, nothing checked), USUAL (torch by itself),
            PEER (another library or another way of torch's), OURS.
        call: The function that prepares it, `module:function` of this package.
        file: The kind of file that it reads, or writes a twin of.
        library: Another library that it needs: it runs in the environment of the peers.
        subject: Where it is another than the contest's.
    """

    label: str
    role: str
    call: str
    file: str = "pth"
    options: Mapping[str, object] = field(default_factory=dict)
    library: str = ""
    subject: str = ""


@dataclass(frozen=True)
class Contest:
    """Contestants that do the same job.

    Attributes:
        cache: "warm", "cold", or "written" (see `worker.Job`).
        fresh: The result is a new model, so its memory is no extra memory.
        gpu: Needs a CUDA card.
    """

    name: str
    subject: str
    cache: str
    contestants: tuple[Contestant, ...]
    fresh: bool = False
    gpu: bool = False


@dataclass(frozen=True)
class Profile:
    """A whole run.

    Attributes:
        seconds: No further round is begun where it would not end within them.
        together: Rounds go over all contests: the files of all subjects lie on the disk at once.
        abreast: So many contestants prepare at a time (and hold their models in memory).
    """

    name: str
    subjects: Mapping[str, Model]
    contests: tuple[Contest, ...]
    rounds: int
    seconds: float = float("inf")
    together: bool = False
    abreast: int = 1


_LOAD_MODEL = Contestant(
    "safetensors load_model", PEER, "peers:safetensors_load_model", "safetensors", {}, "safetensors"
)
_COPY = Contestant("safetensors load_file + copy_", PEER, "peers:safetensors_copy", "safetensors", {}, "safetensors")
_STREAMERS = (
    Contestant("fastsafetensors", PEER, "peers:fastsafetensors", "safetensors", {}, "fastsafetensors"),
    Contestant("runai-model-streamer", PEER, "peers:runai", "safetensors", {}, "runai-model-streamer"),
    Contestant("tensorizer (its own format)", PEER, "peers:tensorizer", "tensorizer", {}, "tensorizer"),
)
_MAPPED = Contestant("torch.load(mmap) + load_state_dict", PEER, "loading:torch_load", options={"mmap": True})
_TORCH = Contestant("torch.load + load_state_dict", PEER, "loading:torch_load")
_OTHERS = {"pth": (_MAPPED, _TORCH), "safetensors": (_LOAD_MODEL, _COPY, *_STREAMERS)}
# What stands between a bare loop and us: memory in many places, then names too.
_LEAST = {
    kind: (
        Contestant("bare preadv to each tensor's place", LEAST, "least:scattered", kind),
        Contestant(f"the least in Python, unchecked, .{kind}", LEAST, "least:into", kind),
    )
    for kind in _OTHERS
}
_ALL = {kind: (*_LEAST[kind], *others) for kind, others in _OTHERS.items()}
_BEST = {"pth": (_MAPPED,), "safetensors": (_COPY,)}
_NONE: Mapping[str, tuple[Contestant, ...]] = {"pth": (), "safetensors": ()}


def ready(subject: str) -> Contest:
    """From a path to a ready model."""
    contestants = [
        Contestant("usual recipe", USUAL, "loading:usual_recipe"),
        Contestant("meta build + bare read", FLOOR, "loading:bare_fresh"),
        *(
            Contestant(f"anycard .{kind}{' mmap' if mmap else ''}", OURS, "loading:anycard_fresh", kind, mmap)
            for kind in ("pth", "safetensors")
            for mmap in ({}, {"mmap": True})
        ),
    ]
    return Contest(f"path to ready model, {subject}", subject, "warm", tuple(contestants), fresh=True)


def into(subject: str, kind: str, cache: str, peers: Mapping[str, tuple[Contestant, ...]] = _ALL) -> Contest:
    """Into an existing model."""
    floor = Contestant("bare preadv", FLOOR, "loading:bare_into", kind)
    ours = Contestant("anycard", OURS, "loading:anycard_into", kind)
    return Contest(f"into a model, {subject} .{kind}, {cache}", subject, cache, (floor, *peers[kind], ours))


def cast(subject: str, dtype: str) -> Contest:
    """Into a model of another dtype."""
    contestants = (*_OTHERS["pth"], Contestant("anycard", OURS, "loading:anycard_into"))
    named = tuple(replace(c, options={**c.options, "dtype": dtype}) for c in contestants)
    return Contest(f"into a model of {dtype}, {subject} .pth, warm", subject, "warm", named)


def small() -> Contest:
    """10,000 tensors of 1 KB, and 10 of them for what a load costs anyhow."""
    ours = [
        Contestant(f"anycard .{kind}{words}", OURS, "loading:anycard_into", kind, subject=subject)
        for kind in ("pth", "safetensors")
        for words, subject in (("", ""), (", 10 tensors", "ten tensors"))
    ]
    contestants = (
        Contestant("bare preadv", FLOOR, "loading:bare_into", "safetensors"),
        _LOAD_MODEL,
        _COPY,
        Contestant("torch.load + copy_ by name", PEER, "loading:torch_load", options={"copy": True}),
        _TORCH,
        *(least for _, least in _LEAST.values()),
        *ours,
    )
    return Contest("10,000 tensors of 1 KB into a model", "small tensors", "warm", contestants)


def layers(sizes: tuple[int, ...] = (250, 500, 1000)) -> Contest:
    """How a load grows with the number of modules."""
    contestants = [
        Contestant(f"{label}, {size:,} layers", role, call, subject=f"{size} layers")
        for label, role, call in (
            ("torch.load + load_state_dict", PEER, "loading:torch_load"),
            ("anycard", OURS, "loading:anycard_into"),
        )
        for size in sizes
    ]
    return Contest("deep models: Linear(32, 32), .pth", f"{sizes[-1]} layers", "warm", tuple(contestants))


def save(subject: str, kind: str) -> Contest:
    """A durable file."""
    library = "" if kind == "pth" else "safetensors"
    name, call = ("torch.save", "torch_save") if kind == "pth" else ("safetensors save_file", "safetensors_save")
    contestants = (
        Contestant("bare write + fsync", FLOOR, "saving:bare", kind),
        Contestant(name, PEER, f"saving:{call}", kind, {"durable": False}, library),
        Contestant(f"{name} + fsync", PEER, f"saving:{call}", kind, {"durable": True}, library),
        Contestant("torch.save", PEER, "saving:torch_save", "pth", {"durable": False}),
        Contestant("anycard", OURS, "saving:anycard_save", kind),
    )
    kept = tuple(c for at, c in enumerate(contestants) if c.label not in {d.label for d in contestants[:at]})
    return Contest(f"durable save, {subject} .{kind}", subject, "written", kept)


def convert(subject: str, src: str, dst: str) -> Contest:
    """From one format to the other, durable."""
    contestants = (
        Contestant("cp + fsync", FLOOR, "streaming:copied", src),
        Contestant("anycard", OURS, "streaming:converted", src, {"suffix": f".{dst}"}),
    )
    return Contest(f"convert, {subject} .{src} to .{dst}", subject, "written", contestants)


def hashing(subject: str) -> tuple[Contest, ...]:
    """Checksums and fingerprints."""
    crc = Contestant("bare read + CRC-32, all cores", FLOOR, "streaming:bare_crc")
    ours = Contestant("anycard", OURS, "streaming:verified")
    digest = Contestant("bare read + BLAKE3, all cores", FLOOR, "streaming:bare_blake3")
    prints = Contestant("anycard", OURS, "streaming:fingerprinted")
    verify = Contest(f"verify, {subject} .pth", subject, "warm", (crc, ours))
    pairs = [(kind, (replace(digest, file=kind), replace(prints, file=kind))) for kind in ("pth", "safetensors")]
    return verify, *(Contest(f"fingerprint, {subject} .{kind}", subject, "warm", two) for kind, two in pairs)


def processes(subject: str) -> tuple[Contest, ...]:
    """Whole processes: `anycard show`, `import anycard`."""
    bare = Contestant("bare interpreter", FLOOR, "streaming:interpreter", options={"code": "pass"})
    show = [Contestant(f"anycard show .{kind}", OURS, "streaming:shown", kind) for kind in ("pth", "safetensors")]
    ours = Contestant("import anycard", OURS, "streaming:interpreter", options={"code": "import anycard"})
    return (
        Contest(f"anycard show, {subject}", subject, "warm", (bare, *show)),
        Contest("import anycard", subject, "warm", (bare, ours)),
    )


def gpu(subject: str) -> Contest:
    """To the GPU, from the page cache."""
    contestants = (
        Contestant("pinned copy", FLOOR, "on_gpu:pinned_copy", "safetensors"),
        Contestant("torch.load(map_location='cuda')", PEER, "on_gpu:torch_load"),
        Contestant("safetensors to cuda", PEER, "on_gpu:safetensors_load", "safetensors", {}, "safetensors"),
        Contestant("fastsafetensors", PEER, "on_gpu:fastsafetensors_load", "safetensors", {}, "fastsafetensors"),
        Contestant("anycard .pth", OURS, "on_gpu:anycard_load", "pth"),
        Contestant("anycard .safetensors", OURS, "on_gpu:anycard_load", "safetensors"),
    )
    return Contest(f"to the GPU, {subject}", subject, "warm", contestants, fresh=True, gpu=True)


def _without(contest: Contest, *labels: str) -> Contest:
    return replace(contest, contestants=tuple(c for c in contest.contestants if c.label not in labels))


_KINDS = ("pth", "safetensors")
_SUBJECTS = {
    "resnet152": Model(),
    "large fp32": Model(160, 2048),
    "large bf16": Model(320, 2048, "bfloat16"),
    "small tensors": Model(10_000, 16, bias=False),
    "ten tensors": Model(10, 16, bias=False),
    "one tensor": Model(1, 8192, bias=False),
    **{f"{size} layers": Model(size, 32) for size in (250, 500, 1000)},
}
WARM_UP, TINY = "warm-up", Model(2, 16)  # what every contestant runs on first

FULL = Profile(
    "full",
    _SUBJECTS,
    (
        ready("resnet152"),
        *(into("resnet152", kind, "warm") for kind in _KINDS),
        *(save("resnet152", kind) for kind in _KINDS),
        small(),
        layers(),
        ready("large fp32"),
        *(
            into("large fp32", kind, cache, peers)
            for kind in _KINDS
            for cache, peers in (("warm", _ALL), ("cold", _OTHERS))
        ),
        *(save("large fp32", kind) for kind in _KINDS),
        *(convert("large fp32", *pair) for pair in (_KINDS, _KINDS[::-1])),
        *hashing("large fp32"),
        *processes("large fp32"),
        gpu("large fp32"),
        cast("one tensor", "bfloat16"),
        ready("large bf16"),
        *(into("large bf16", kind, cache, _BEST) for kind in _KINDS for cache in ("warm", "cold")),
    ),
    rounds=5,
)
QUICK = Profile(
    "quick",
    {**_SUBJECTS, "large fp32": Model(24, 2048)},
    (
        _without(ready("resnet152"), "anycard .pth mmap"),
        *(into("resnet152", kind, "warm", _BEST) for kind in _KINDS),
        _without(save("resnet152", "pth"), "torch.save + fsync"),
        _without(
            small(),
            "bare preadv",
            "safetensors load_model",
            "torch.load + load_state_dict",
            *(least.label for _, least in _LEAST.values()),
        ),
        _without(
            layers((250, 1000)),
            "torch.load + load_state_dict, 250 layers",
            "torch.load + load_state_dict, 1,000 layers",
        ),
        into("large fp32", "pth", "warm", _NONE),
        into("large fp32", "safetensors", "cold", _NONE),
        convert("large fp32", *_KINDS),
        *hashing("large fp32")[::2],
        *processes("large fp32"),
        gpu("large fp32"),
    ),
    rounds=3,
    seconds=110,
    together=True,
    abreast=2,
)
SMOKE = Profile("smoke", {}, (into(WARM_UP, "pth", "warm", {"pth": ()}), *processes(WARM_UP)), rounds=1)
PROFILES = {profile.name: profile for profile in (FULL, QUICK, SMOKE)}
