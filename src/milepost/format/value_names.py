"""The globals allowed in the pickle of a value, and a check of untrusted values without torch.

The loader (``tensors.value_reader``) constructs some of these, and torch's restricted reader the others; a test
compares the three. A load refuses anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from milepost.format.dtype import DTYPES
from milepost.format.pickle_dialect import Dialect, Global
from milepost.format.pickle_reader import read_pickle
from milepost.format.record_reader import read_pickle_entry
from milepost.format.zip_directory import ZipDirectory

_MAX_VALUE_NBYTES = 64 << 30
_MAX_ENTRIES = 1 << 18


def _named(prefix: str, names: str) -> set[str]:
    return {f"{prefix}.{name}" for name in names.split()}


_PATHS = "PosixPath PurePosixPath PureWindowsPath WindowsPath"
_ELEMENTS = "BFloat16 Bool Byte Char Double Float Half Int Long Short"
_STORAGES = f"{_ELEMENTS} ComplexDouble ComplexFloat".split()
_BITS = range(1, 8)

VALUE_NAMES: frozenset[str] = frozenset(
    {
        *_named("__builtin__", "bool bytearray bytes complex dict float frozenset int list long set slice tuple"),
        *_named("__builtin__", "unicode xrange"),
        *_named("builtins", "bool bytearray bytes complex dict float frozenset int list range set slice str tuple"),
        *_named("collections", "Counter OrderedDict defaultdict deque"),
        *_named("datetime", "date datetime time timedelta timezone"),
        *_named("numpy._core.multiarray", "_reconstruct scalar"),
        *_named("numpy.core.multiarray", "_reconstruct scalar"),
        *_named("numpy", "dtype ndarray"),
        *_named("pathlib", _PATHS),
        *_named("pathlib._local", _PATHS),
        *("_codecs.encode", "_io.BytesIO", "decimal.Decimal", "fractions.Fraction", "zoneinfo.ZoneInfo"),
        "milepost.make_registered",
        *(f"torch.{name}" for name in DTYPES),
        *_named("torch", "per_channel_affine per_channel_affine_float_qparams per_channel_symmetric"),
        *_named("torch", "per_tensor_affine per_tensor_symmetric qint8 qint32 quint8 quint4x2 quint2x4"),
        *(f"torch.{kind}{bits}" for kind in ("int", "uint") for bits in _BITS),
        *(f"torch.{kind}Storage" for kind in (*_STORAGES, "QInt32", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4")),
        *(f"torch.cuda.{kind}Storage" for kind in _STORAGES),
        *(f"torch{place}.{kind}Tensor" for place in ("", ".cuda") for kind in _ELEMENTS.split()),
        *(
            f"torch{place}.sparse.{kind}Tensor"
            for place in ("", ".cuda")
            for kind in _ELEMENTS.split()
            if kind != "Bool"
        ),
        *_named("torch", "Size Tensor device"),
        *_named("torch.storage", "TypedStorage UntypedStorage"),
        *_named("torch._utils", "_rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter"),
        *_named("torch._utils", "_rebuild_parameter_with_state _rebuild_qtensor _rebuild_sparse_tensor"),
        *_named("torch._utils", "_rebuild_nested_tensor _rebuild_wrapper_subclass _rebuild_meta_tensor_no_storage"),
        *_named("torch._utils", "_rebuild_device_tensor_from_cpu_tensor _rebuild_device_tensor_from_numpy"),
        *("torch._tensor._rebuild_from_type_v2", "torch.nn.parameter.Parameter"),
        *("torch.serialization._get_layout", "torch.torch_version.TorchVersion"),
    }
)


class _StandIn:
    """Stands in for all parts of a value."""

    def extend(self, items: list[object]) -> None:
        """Ignore appended items, which were already examined."""

    def __setitem__(self, key: object, value: object) -> None:
        """Ignore the item, like ``extend``."""


def _stand_in(*args: object) -> object:
    return _StandIn()


_GLOBALS: Mapping[str, Global] = {name: Global(name, call=_stand_in, new=True) for name in VALUE_NAMES}
_DIALECT = Dialect(
    check_key=lambda key: None,
    lists=(list, _StandIn),
    dicts=(dict, _StandIn),
    build=lambda target, state: isinstance(target, _StandIn),
)


def check_value(read: Callable[[int, int], bytes], nbytes: int) -> None:
    """Check the value in a ``torch.save`` record of ``nbytes``, read by ``read(offset, nbytes)``.

    Raises:
        FormatError: a load would refuse it: it is malformed, would need to run code, or exceeds a limit.
    """
    archive = ZipDirectory(read, nbytes, max_entries=_MAX_ENTRIES)
    pickled, _ = read_pickle_entry(archive, _MAX_VALUE_NBYTES)
    read_pickle(pickled, _GLOBALS, _stand_in, dialect=_DIALECT, max_nbytes=_MAX_VALUE_NBYTES)
