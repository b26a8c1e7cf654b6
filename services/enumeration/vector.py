"""Popcounts of eight items at a time, as vectors, so that short rows of a joint count run as fast as long ones."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils as numba_cgutils
from numba.extending import intrinsic

LANES = 8  # items side by side; an array of words is as wide as a multiple of them
cgutils: Any = numba_cgutils  # it has no types
_VECTOR = ir.VectorType(ir.IntType(64), LANES)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _lanes(builder: Any, address: Any) -> Any:
    return builder.bitcast(address, _VECTOR.as_pointer())


def _splat(builder: Any, word: Any) -> Any:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), word, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), zeros)


def _ones(builder: Any, vector: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR])
    count = cgutils.get_or_insert_function(builder.module, kind, f"llvm.ctpop.v{LANES}i64")
    return builder.call(count, [vector])


def _meet(
    typing_context: Any, words: Any, stride: Any, begin: Any, end: Any, i: Any, j: Any, planes: Any, first: Any,
    fields: Any, cells: Any
) -> Any:  # fmt: skip
    """cells[first + f][j..j+7] += ones of words[w, i] & words[w, j..j+7] & planes[w, first + f], w in begin..end - 1.

    words: flat (W * stride,) uint64; planes: (W, P) uint64; fields: a tuple as long as the planes taken at once;
    cells: (F, width) int64.
    """
    signature = types.void(
        words, types.int64, types.int64, types.int64, types.int64, types.int64, planes, types.int64, fields, cells
    )

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, step, low, high, row, column, plane_array, start, _, cell_array = arguments
        kinds = signature.args
        count = len(kinds[8])
        plane_data = context.make_array(kinds[6])(context, builder, plane_array)
        cell_data = context.make_array(kinds[9])(context, builder, cell_array)
        n_plane = builder.extract_value(plane_data.shape, 1)
        n_cell = builder.extract_value(cell_data.shape, 1)
        rows = [builder.add(start, ir.Constant(ir.IntType(64), f)) for f in range(count)]
        targets = [
            _lanes(builder, builder.gep(cell_data.data, [builder.add(builder.mul(r, n_cell), column)])) for r in rows
        ]
        masks = [builder.gep(plane_data.data, [r]) for r in rows]
        sums = [cgutils.alloca_once(builder, _VECTOR) for _ in rows]
        for place, target in zip(sums, targets, strict=True):
            builder.store(builder.load(target, align=8), place)
        with cgutils.for_range_slice(builder, low, high, ir.Constant(ir.IntType(64), 1)) as (w, _):
            at = builder.mul(w, step)
            word = builder.load(_address(context, builder, kinds[0], array, builder.add(at, row)))
            line = builder.load(
                _lanes(builder, _address(context, builder, kinds[0], array, builder.add(at, column))), align=8
            )
            for place, mask in zip(sums, masks, strict=True):
                inside = builder.and_(word, builder.load(builder.gep(mask, [builder.mul(w, n_plane)])))
                ones = _ones(builder, builder.and_(line, _splat(builder, inside)))
                builder.store(builder.add(builder.load(place), ones), place)
        for place, target in zip(sums, targets, strict=True):
            builder.store(builder.load(place), target, align=8)
        return context.get_dummy_value()

    return signature, generate


def _move_together(
    typing_context: Any, line: Any, j: Any, inside: Any, steps: Any, w: Any, offset: Any, over: Any, here: Any,
    after: Any,
) -> Any:  # fmt: skip
    """Pick the bits `inside` of line[j..j+7], moved together by steps[:, w], and append them at bit `offset` of
    here[j..j+7]; what does not fit, when `over`, goes to after[j..j+7].

    line, here, after: (width,) uint64; steps: (6, W) uint64, what moves by 1, 2, 4, … 32.
    """
    signature = types.void(line, types.int64, types.uint64, steps, types.int64, types.int64, types.boolean, here, after)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line_array, column, mask, step_array, at, bit, spills, here_array, after_array = arguments
        kinds, word = signature.args, ir.IntType(64)
        source = _lanes(builder, _address(context, builder, kinds[0], line_array, column))
        x = builder.and_(builder.load(source, align=8), _splat(builder, mask))
        step_data = context.make_array(kinds[3])(context, builder, step_array)
        n_steps = builder.extract_value(step_data.shape, 1)
        for s in range(6):
            step = builder.load(builder.gep(step_data.data, [at]))
            at = builder.add(at, n_steps)
            moved = builder.and_(x, _splat(builder, step))
            shifted = builder.lshr(moved, ir.Constant(_VECTOR, [1 << s] * LANES))
            x = builder.or_(builder.xor(x, moved), shifted)
        target = _lanes(builder, _address(context, builder, kinds[7], here_array, column))
        fresh = builder.icmp_signed("==", bit, ir.Constant(word, 0))
        with builder.if_else(fresh) as (then, otherwise):
            with then:
                builder.store(x, target, align=8)
            with otherwise:
                up = builder.shl(x, _splat(builder, bit))
                builder.store(builder.or_(builder.load(target, align=8), up), target, align=8)
        with builder.if_then(cgutils.as_bool_bit(builder, spills)):
            down = builder.lshr(x, _splat(builder, builder.sub(ir.Constant(word, 64), bit)))
            spill = _lanes(builder, _address(context, builder, kinds[8], after_array, column))
            builder.store(down, spill, align=8)
        return context.get_dummy_value()

    return signature, generate


meet: Any = intrinsic(_meet)
move_together: Any = intrinsic(_move_together)


def padded(width: int) -> int:
    """`width` items with room for whole vectors."""
    return -(-width // LANES) * LANES
