"""Functions compiled to machine code, with a cache that also serves from a read-only file system.

Numba keeps a cache only where it may write. An image is compiled when it is built and read-only when it runs, so
here a cache that is there is read whether or not it can be written to, and a result that cannot be stored is not
an error. A changed line in any compiled module of this folder makes all that is stored stale, since one calls another.
"""

from __future__ import annotations

import hashlib
import pickle
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from numba import njit, types
from numba.core import serialize
from numba.core.caching import CompileResultCacheImpl, FunctionCache, InTreeCacheLocator, UserWideCacheLocator
from numba.extending import intrinsic

FOLDER = Path(__file__).parent


@lru_cache(maxsize=1)
def _source_digest() -> str:
    digest = hashlib.sha256()
    for module in sorted(FOLDER.glob("*.py")):
        text = module.read_bytes()
        if b"@compiled" in text or b"@inlined" in text or b"intrinsic(" in text:
            digest.update(text)
    return digest.hexdigest()


class _BesideTheSource(InTreeCacheLocator):
    """`__pycache__` of this folder, when it can be written to or holds the function already."""

    def get_source_stamp(self) -> str:
        return _source_digest()

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> InTreeCacheLocator | None:
        locator: Any = cls(py_func, py_file)
        if any(Path(locator.get_cache_path()).glob(f"*.{py_func.__qualname__}-*.nbi")):
            return cast(InTreeCacheLocator, locator)
        try:
            locator.ensure_cache_path()
        except OSError:
            return None
        return cast(InTreeCacheLocator, locator)


class _InTheHome(UserWideCacheLocator):
    def get_source_stamp(self) -> str:
        return _source_digest()


class _Nowhere(_BesideTheSource):
    """Nothing can be written and nothing is there: each process compiles for itself."""

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> InTreeCacheLocator:
        return cls(py_func, py_file)


class _Place(CompileResultCacheImpl):
    """Where results are, and in what form: compressed, since machine code and what it was made of fill an image."""

    _locator_classes = [_BesideTheSource, _InTheHome, _Nowhere]  # noqa: RUF012  # numba declares it so

    def reduce(self, data: Any) -> bytes:
        return zlib.compress(serialize.dumps(super().reduce(data)))  # type: ignore[no-untyped-call]

    def rebuild(self, target_context: Any, payload: Any) -> Any:
        whole = pickle.loads(zlib.decompress(payload))  # noqa: S301  # numba unpickles the same file itself
        return super().rebuild(target_context, whole)  # type: ignore[no-untyped-call]


class _Cache(FunctionCache):
    _impl_class = _Place

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except OSError:
            return  # read-only, and compiled for another processor: this process keeps what it compiled


def compiled(function: Callable[..., Any]) -> Any:
    """`function` compiled on its first call, without the GIL, and kept in the cache."""
    dispatcher: Any = njit(nogil=True)(function)
    dispatcher._cache = _Cache(function)  # type: ignore[no-untyped-call]  # enable_caching() with places of our own
    return dispatcher


def inlined(function: Callable[..., Any]) -> Any:
    """`function` as a part of those compiled that call it: a call with twenty arrays takes as long as a small count."""
    return njit(nogil=True, inline="always")(function)


def _popcount(typing_context: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


popcount: Any = intrinsic(_popcount)  # ones of a uint64, as int64
