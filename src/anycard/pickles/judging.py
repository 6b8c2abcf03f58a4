"""What a global named by a pickle means for whoever loads the file the ordinary way.

A closed set of what is harmless, not lists of what is bad: what is not in it is unknown, and that is not clean.
The names of what is known to run code only make the report say so.
"""

from __future__ import annotations

from anycard.tensors import BY_STORAGE, DTYPES

TENSORS, INERT, UNKNOWN, RUNS = "torch's own tensor format", "inert data", "unknown", "runs code"
CLEAN = frozenset((TENSORS, INERT))

_OLD_TENSORS = {name.replace("Storage", "Tensor") for name in BY_STORAGE}
_TENSOR_NAMES = {
    "torch": {*BY_STORAGE, *_OLD_TENSORS, *DTYPES, "UntypedStorage", "Size", "device", "Tensor", "per_tensor_affine",
              "per_channel_affine", "strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc"},
    "torch.cuda": {*BY_STORAGE, *_OLD_TENSORS},
    "torch.storage": {"UntypedStorage", "TypedStorage", "_UntypedStorage", "_TypedStorage"},
    "torch._utils": {
        "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter",
        "_rebuild_parameter_with_state", "_rebuild_qtensor", "_rebuild_sparse_tensor", "_rebuild_sparse_csr_tensor",
        "_rebuild_nested_tensor", "_rebuild_meta_tensor_no_storage", "_rebuild_device_tensor_from_numpy",
        "_rebuild_device_tensor_from_cpu_tensor", "_rebuild_xla_tensor", "_rebuild_wrapper_subclass",
    },
    "torch._tensor": {"_rebuild_from_type", "_rebuild_from_type_v2", "Tensor"},
    "torch.tensor": {"_rebuild_from_type", "_rebuild_from_type_v2", "Tensor"},
    "torch.nn.parameter": {"Parameter", "Buffer"},
    "torch.serialization": {"_get_layout"},
    "torch.jit._script": {"unpackage_script_module"},  # TorchScript in a torch package, looked at by itself
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata",
        "BytesStorageMetadata", "MetadataIndex", "StorageMeta",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}  # fmt: skip
_INERT_NAMES = {
    "builtins": {"set", "frozenset", "bytearray", "bytes", "complex", "list", "dict", "tuple", "int", "float", "str",
                 "bool", "slice", "range", "object", "Ellipsis", "NotImplemented", "NoneType"},
    "collections": {"OrderedDict", "defaultdict", "Counter", "deque"},
    "_codecs": {"encode"},
    "copyreg": {"_reconstructor"},
    "argparse": {"Namespace"},
    "types": {"SimpleNamespace"},
    "pathlib": {"Path", "PurePath", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PurePath", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "datetime": {"datetime", "date", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "uuid": {"UUID", "SafeUUID"},
    "numpy": {"ndarray", "dtype", *(f"{kind}{bits}" for kind in ("int", "uint", "float", "complex")
                                    for bits in (8, 16, 32, 64, 128)), "bool_", "str_", "bytes_"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
    "omegaconf.dictconfig": {"DictConfig"},
    "omegaconf.listconfig": {"ListConfig"},
    "omegaconf.base": {"ContainerMetadata", "Metadata"},
    "omegaconf.nodes": {"AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode", "BytesNode", "PathNode"},
    "torch.torch_version": {"TorchVersion"},
    "typing": {"Any", "Dict", "List", "Optional", "Union", "Tuple"},
    # joblib's arrays, whose elements the interpreter follows
    "joblib.numpy_pickle": {"NumpyArrayWrapper"},
    "sklearn.externals.joblib.numpy_pickle": {"NumpyArrayWrapper"},
}  # fmt: skip
_RUNS_MODULES = frozenset(
    """
    os posix nt subprocess sys shutil socket ctypes _ctypes importlib runpy pty commands code codeop pickle _pickle
    cPickle marshal operator _operator functools webbrowser asyncio multiprocessing http urllib requests httpx aiohttp
    pip pdb bdb timeit cProfile profile trace ftplib smtplib telnetlib ssl signal threading _thread gc inspect pydoc
    platform tempfile io _io builtins types atexit site venv ensurepip zipimport imp dill cloudpickle joblib
    """.split()
)
_RUNS_NAMES = frozenset(
    (
        ("torch", "load"), ("torch.storage", "_load_from_bytes"), ("torch.serialization", "load"), ("numpy", "load"),
        ("torch.hub", "load"), ("torch.jit", "load"), ("torch._inductor.codecache", "compile_file"),
    )
)  # fmt: skip


_SCRIPT_LISTS = frozenset(
    ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
)


def judge(module: str, name: str, *, script: bool = False) -> str:
    """TENSORS, INERT, UNKNOWN or RUNS for the global `module.name`.

    Args:
        script: It stands in a TorchScript archive, whose classes are its own and are made without a call.
    """
    if script and (module.startswith("__torch__") or (module == "torch.jit._pickle" and name in _SCRIPT_LISTS)):
        return TENSORS
    if name in _TENSOR_NAMES.get(module, ()):
        return TENSORS
    if name in _INERT_NAMES.get(module, ()):
        return INERT
    if (module, name) in _RUNS_NAMES or module.partition(".")[0] in _RUNS_MODULES:
        return RUNS
    return UNKNOWN
