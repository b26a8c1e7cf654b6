"""Copies that go past the processor's caches, for what is larger than these.

A line of memory that is written the usual way is read first, which is a third of the time of a large copy; and what
is copied takes the place of what threads work with.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from services.enumeration.compiled import compiled
from services.enumeration.vector import cgutils

STREAMED_BYTES = 64 << 20  # from which on an array is written so: a few times the cache of a processor

_BYTE, _WORD = ir.IntType(8), ir.IntType(64)
_LINE_BYTES = 64
_LINE = ir.VectorType(_WORD, _LINE_BYTES // 8)


def _stream(typing_context: Any, source: Any, target: Any, at: Any) -> Any:
    """Copy the array to where target[at] of the flat target is; whole lines of memory at a time but for both ends."""
    if source.layout != "C" or target.layout != "C" or source.dtype != target.dtype:
        raise TypingError(f"{source} is not copied to {target}: both are of one type, and row after row")
    signature = types.void(source, target, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [
            context.make_array(kind)(context, builder, array)
            for kind, array in zip(signature.args[:2], arguments[:2], strict=True)
        ]
        from_, to = arrays[0].data, builder.gep(arrays[1].data, [arguments[2]])
        size = builder.mul(arrays[0].nitems, arrays[0].itemsize)
        bytes_at = _BYTE.as_pointer()
        target, source = builder.bitcast(to, bytes_at), builder.bitcast(from_, bytes_at)
        until_line = builder.and_(builder.neg(builder.ptrtoint(target, _WORD)), ir.Constant(_WORD, _LINE_BYTES - 1))
        short = builder.icmp_signed("<", size, until_line)
        head = builder.select(short, size, until_line)
        end = builder.add(head, builder.and_(builder.sub(size, head), ir.Constant(_WORD, -_LINE_BYTES)))
        cgutils.raw_memcpy(builder, target, source, head, 1)
        told = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        with cgutils.for_range_slice(builder, head, end, ir.Constant(_WORD, _LINE_BYTES)) as (at, _step):
            line = builder.load(builder.bitcast(builder.gep(source, [at]), _LINE.as_pointer()), align=1)
            place = builder.bitcast(builder.gep(target, [at]), _LINE.as_pointer())
            builder.store(line, place, align=_LINE_BYTES).set_metadata("nontemporal", told)
        cgutils.raw_memcpy(builder, builder.gep(target, [end]), builder.gep(source, [end]), builder.sub(size, end), 1)
        builder.fence("seq_cst")  # other threads see them only after it
        return context.get_dummy_value()

    return signature, generate


_put: Any = intrinsic(_stream)


@compiled
def stream(source: Any, target: Any, first: int) -> None:
    """target[first : first + len(source)] = source, of one type and both row after row."""
    _put(source, target, first * (target.size // max(1, len(target))))
