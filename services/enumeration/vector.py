"""Eight words at a time, as vectors: popcounts, bits moved together, and tags compared into words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from llvmlite.ir.values import MDValue
from numba import types
from numba.core import cgutils as numba_cgutils
from numba.extending import intrinsic

LANES = 8  # items side by side; an array of words is as wide as a multiple of them
COUNTS_VECTORS = bool(binding.get_host_cpu_features().get("avx512vpopcntdq"))  # in one instruction
cgutils: Any = numba_cgutils  # it has no types
_WORD = ir.IntType(64)
_VECTOR = ir.VectorType(_WORD, LANES)
_COUNTS = ir.VectorType(ir.IntType(32), LANES)
_BITS = 64
HALF = 16  # bits of half a cell
SHORT = 4  # items of a slice that fit a word
_ITEMS = ir.VectorType(ir.IntType(16), SHORT * LANES)
_CHOICE = ir.VectorType(ir.IntType(1), LANES)
VECTOR_FIELDS = 4  # of what is told of the cells that are written together


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _lanes(builder: Any, address: Any) -> Any:
    return builder.bitcast(address, _VECTOR.as_pointer())


def _splat(builder: Any, word: Any, kind: Any = _VECTOR) -> Any:
    nothing = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(nothing, word, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(_index(kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, nothing, zeros)


def _ones(builder: Any, vector: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR])
    count = cgutils.get_or_insert_function(builder.module, kind, f"llvm.ctpop.v{LANES}i64")
    return builder.call(count, [vector])


class _LoopName(MDValue):  # type: ignore[misc]  # llvmlite has no types
    """The name of a loop, by which LLVM is told of it: metadata whose first operand is itself."""

    def __init__(self, module: Any, told: Any) -> None:
        super().__init__(module, [], name=str(len(module.metadata)))
        self.operands = (self, told)

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def _keep_rolled(builder: Any, last: Any) -> None:
    """Have the loop that ends with block `last` stay as short as it is: unrolled, it needs more registers than there
    are, and most are over in a few turns.
    """
    told = builder.module.add_metadata([ir.MetaDataString(builder.module, "llvm.loop.unroll.disable")])
    last.terminator.set_metadata("llvm.loop", _LoopName(builder.module, told))


def _meet(
    typing_context: Any, rows: Any, rows_from: Any, rows_stride: Any, columns: Any, from_: Any, stride: Any, n: Any,
    half: Any, fresh: Any, chosen: Any, some: Any, at_once: Any, low: Any, high: Any, cells: Any, origin: Any,
    width: Any,
) -> Any:  # fmt: skip
    """cells[origin + i * width + j] += ones of row i & column j over n words, for each i in chosen[some..].

    rows, columns: flat uint64, a word of row i at rows[rows_from + i], the next rows_stride further, and of column j
    at columns[from_ + j]; half: 0, or after how many of the n words a cell, which has counted in its lower half, takes
    this in its upper half as well; low: a multiple of LANES, of which as many columns are taken as reach `high`; fresh:
    whether what was in cells counts for nothing; chosen: int64, of which as many are taken as the tuple at_once has;
    cells: flat int32.
    """
    whole = types.int64
    signature = types.void(
        rows, whole, whole, columns, whole, whole, whole, whole, types.boolean, chosen, whole, at_once, whole, whole,
        cells, whole, whole,
    )  # fmt: skip

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (row_array, row_at, row_step, array, at, step, length, first_part, anew, row_numbers, start, _, begin, end,
         target, first_line, each) = arguments  # fmt: skip
        kinds = signature.args
        columns_at = _address(context, builder, kinds[3], array, at)
        lines, sources = [], []
        for r in range(len(kinds[11])):
            index = builder.add(start, ir.Constant(_WORD, r))
            number = builder.load(_address(context, builder, kinds[9], row_numbers, index))
            sources.append(_address(context, builder, kinds[0], row_array, builder.add(row_at, number)))
            line = builder.add(first_line, builder.mul(number, each))
            lines.append(_address(context, builder, kinds[14], target, line))
        sums = [cgutils.alloca_once(builder, _VECTOR) for _ in lines]
        keep = builder.not_(cgutils.as_bool_bit(builder, anew))
        with cgutils.for_range_slice(builder, begin, end, ir.Constant(_WORD, LANES)) as (column, _):
            places = [builder.bitcast(builder.gep(line, [column]), _COUNTS.as_pointer()) for line in lines]
            for total in sums:
                builder.store(ir.Constant(_VECTOR, [0] * LANES), total)
            with builder.if_then(keep):
                for place, total in zip(places, sums, strict=True):
                    builder.store(builder.zext(builder.load(place, align=4), _VECTOR), total)
            column_at = builder.gep(columns_at, [column])

            def add_words(begin_word: Any, end_word: Any, column_at: Any = column_at) -> None:
                one = ir.Constant(_WORD, 1)
                with cgutils.for_range_slice(builder, begin_word, end_word, one) as (word_number, _word):
                    below = builder.gep(column_at, [builder.mul(word_number, step)])
                    words = builder.load(_lanes(builder, below), align=8)
                    row_offset = builder.mul(word_number, row_step)
                    for source, total in zip(sources, sums, strict=True):
                        word = _splat(builder, builder.load(builder.gep(source, [row_offset])))
                        ones = _ones(builder, builder.and_(words, word))
                        builder.store(builder.add(builder.load(total), ones), total)
                    last = builder.block
                _keep_rolled(builder, last)

            with builder.if_then(builder.icmp_signed(">", first_part, ir.Constant(_WORD, 0))):
                add_words(ir.Constant(_WORD, 0), first_part)
                for total in sums:
                    counted = builder.load(total)
                    above_half = builder.shl(counted, ir.Constant(_VECTOR, [HALF] * LANES))
                    builder.store(builder.add(counted, above_half), total)
            add_words(first_part, length)
            for place, total in zip(places, sums, strict=True):
                builder.store(builder.trunc(builder.load(total), _COUNTS), place, align=4)
        return context.get_dummy_value()

    return signature, generate


def _less(
    typing_context: Any, cells: Any, to: Any, step: Any, before: Any, after: Any, whole: Any, from_: Any, low: Any,
    high: Any,
) -> Any:  # fmt: skip
    """cells[to + j] = whole[from_ + j] less cells[to + j + k * step] for -before <= k <= after but 0, for low <= j <
    high and for what more a multiple of LANES takes in before and after; cells, whole: flat int32.
    """
    place = types.int64
    signature = types.void(cells, place, place, place, place, whole, place, place, place)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, out, each, n_before, n_after, whole_array, whole_at, begin, end = arguments
        kind, whole_kind = signature.args[0], signature.args[5]
        left = cgutils.alloca_once(builder, _COUNTS)
        first = builder.sub(out, builder.mul(n_before, each))
        second = builder.add(out, each)

        def lanes(kind: Any, array: Any, at: Any) -> Any:
            return builder.bitcast(_address(context, builder, kind, array, at), _COUNTS.as_pointer())

        def take(at: Any, n: Any) -> None:
            with cgutils.for_range(builder, n) as loop:
                other = builder.load(lanes(kind, array, builder.add(at, builder.mul(loop.index, each))), align=4)
                builder.store(builder.sub(builder.load(left), other), left)
                last = builder.block
            _keep_rolled(builder, last)

        from_ = builder.and_(begin, ir.Constant(_WORD, -LANES))
        with cgutils.for_range_slice(builder, from_, end, ir.Constant(_WORD, LANES)) as (j, _step):
            builder.store(builder.load(lanes(whole_kind, whole_array, builder.add(whole_at, j)), align=4), left)
            take(builder.add(first, j), n_before)
            take(builder.add(second, j), n_after)
            builder.store(builder.load(left), lanes(kind, array, builder.add(out, j)), align=4)
        return context.get_dummy_value()

    return signature, generate


def _move_together(
    typing_context: Any, source: Any, from_: Any, inside: Any, steps: Any, w: Any, offset: Any, over: Any,
    out: Any, here: Any, after: Any,
) -> Any:  # fmt: skip
    """Pick the bits `inside` of source[from_..+7], moved together by steps[:, w], and append them at bit `offset` of
    out[here..+7]; what does not fit, when `over`, goes to out[after..+7].

    source, out: flat uint64; steps: (6, W) uint64, what moves by 1, 2, 4, … 32.
    """
    whole = types.int64
    signature = types.void(source, whole, types.uint64, steps, whole, whole, types.boolean, out, whole, whole)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, column, mask, step_array, at, bit, spills, out_array, here_at, after_at = arguments
        kinds = signature.args
        words = builder.load(_lanes(builder, _address(context, builder, kinds[0], array, column)), align=8)
        x = builder.and_(words, _splat(builder, mask))
        step_data = context.make_array(kinds[3])(context, builder, step_array)
        n_steps = builder.extract_value(step_data.shape, 1)
        for s in range(6):
            step = builder.load(builder.gep(step_data.data, [at]))
            at = builder.add(at, n_steps)
            moved = builder.and_(x, _splat(builder, step))
            shifted = builder.lshr(moved, ir.Constant(_VECTOR, [1 << s] * LANES))
            x = builder.or_(builder.xor(x, moved), shifted)
        target = _lanes(builder, _address(context, builder, kinds[7], out_array, here_at))
        fresh = builder.icmp_signed("==", bit, ir.Constant(_WORD, 0))
        with builder.if_else(fresh) as (then, otherwise):
            with then:
                builder.store(x, target, align=8)
            with otherwise:
                up = builder.shl(x, _splat(builder, bit))
                builder.store(builder.or_(builder.load(target, align=8), up), target, align=8)
        with builder.if_then(cgutils.as_bool_bit(builder, spills)):
            down = builder.lshr(x, _splat(builder, builder.sub(ir.Constant(_WORD, 64), bit)))
            spill = _lanes(builder, _address(context, builder, kinds[7], out_array, after_at))
            builder.store(down, spill, align=8)
        return context.get_dummy_value()

    return signature, generate


def _equal(typing_context: Any, codes: Any, a: Any, code: Any) -> Any:
    """A word that says which of codes[a, :64] are `code`; codes: (A, 64) of an unsigned type."""
    signature = types.uint64(codes, types.int64, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, line, wanted = arguments
        kind = signature.args[0]
        vector = ir.VectorType(ir.IntType(kind.dtype.bitwidth), _BITS)
        address = _address(context, builder, kind, array, builder.mul(line, ir.Constant(_WORD, _BITS)))
        row = builder.load(builder.bitcast(address, vector.as_pointer()), align=1)
        same = builder.icmp_unsigned("==", row, _splat(builder, builder.trunc(wanted, vector.element), vector))
        return builder.bitcast(same, _WORD)

    return signature, generate


def _put_frequent(
    typing_context: Any, cells: Any, start: Any, more: Any, vectors: Any, begin: Any, end: Any, least: Any, line: Any,
    last: Any, shift: Any, with_sums: Any, weight: Any, at: Any, items: Any, width: Any, count: Any, total: Any,
) -> Any:  # fmt: skip
    """Write the slices of the cells that have at least `least` rows from line `at`; the next free line.

    vectors: (V, 4) int64, of each LANES cells where the first is, its column, which lanes count, and what their slices
    have of the row; those from `begin` to `end` are written. cells: flat int32, rows at start + such a place and, where
    `with_sums`, sums at more + that, of which `weight` times makes the total; shift: HALF where rows are the lower half
    of a cell and its sum the upper, or 0; line, last: what all slices and what those of a column have; both, and that
    of a row, 16 bits an item. items: flat int16, as many a line as the tuple `width` is long, at most SHORT; total:
    flat. LANES lines are written at a time, of which the next may be written over the last.
    """
    whole = types.int64
    signature = whole(
        cells, whole, whole, vectors, whole, whole, types.int32, whole, last, types.int32, types.boolean, types.float64,
        whole, items, width, count, total,
    )  # fmt: skip
    floats = ir.VectorType(ir.DoubleType(), LANES)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (array, rows_at, sums_at, parts, begin, end, fewest, all_have, item_array, above, summed, factor, first,
         out_items, _, out_count, out_total) = arguments  # fmt: skip
        kinds = signature.args
        n_items = len(kinds[14])
        kept = [SHORT * s + i for s in range(LANES) for i in range(n_items)]
        next_line = cgutils.alloca_once_value(builder, first)
        least_rows = _splat(builder, fewest, _COUNTS)
        row_bits = builder.lshr(ir.Constant(_COUNTS, [-1] * LANES), _splat(builder, above, _COUNTS))
        upper = ir.Constant(_COUNTS, [HALF] * LANES)
        part_data = context.make_array(kinds[3])(context, builder, parts)

        def read(index: Any) -> Any:
            address = _address(context, builder, kinds[0], array, index)
            return builder.load(builder.bitcast(address, _COUNTS.as_pointer()), align=4)

        def put(values: Any, kind: Any, out: Any, line: Any, each: int = 1) -> None:
            address = _address(context, builder, kind, out, builder.mul(line, ir.Constant(_WORD, each)))
            builder.store(values, builder.bitcast(address, values.type.as_pointer()), align=1)

        def put_all(total_of: Callable[[Any, Any, Any], Any] | None) -> None:
            with cgutils.for_range_slice(builder, begin, end, ir.Constant(_WORD, 1)) as (part, _step):
                to = builder.load(next_line)
                told = builder.gep(part_data.data, [builder.mul(part, ir.Constant(_WORD, VECTOR_FIELDS))])
                cell, column, lanes, of_row = (
                    builder.load(builder.gep(told, [ir.Constant(_WORD, r)])) for r in range(VECTOR_FIELDS)
                )
                both = read(builder.add(rows_at, cell))
                inside = builder.bitcast(builder.trunc(lanes, ir.IntType(LANES)), _CHOICE)
                enough = builder.icmp_signed(">=", builder.and_(both, row_bits), least_rows)
                chosen = builder.and_(inside, enough)
                own = builder.load(_lanes(builder, _address(context, builder, kinds[8], item_array, column)), align=8)
                own = builder.or_(own, _splat(builder, builder.or_(of_row, all_have)))
                lines = builder.bitcast(_together(builder, own, chosen), _ITEMS)
                lines = builder.shuffle_vector(lines, lines, ir.Constant(_index(len(kept)), kept))
                put(lines, kinds[13], out_items, to, n_items)
                both = _together(builder, both, chosen)
                put(builder.and_(both, row_bits), kinds[15], out_count, to)
                if total_of is not None:
                    totals = builder.sitofp(total_of(both, cell, chosen), floats)
                    put(builder.fmul(totals, _splat(builder, factor, floats)), kinds[16], out_total, to)
                found = builder.zext(builder.ctpop(builder.bitcast(chosen, ir.IntType(LANES))), _WORD)
                builder.store(builder.add(to, found), next_line)

        def upper_half(both: Any, _cell: Any, _chosen: Any) -> Any:
            return builder.lshr(both, upper)

        def other_field(_both: Any, cell: Any, chosen: Any) -> Any:
            return _together(builder, read(builder.add(sums_at, cell)), chosen)

        with builder.if_else(cgutils.as_bool_bit(builder, summed)) as (with_sums, without):
            with with_sums, builder.if_else(cgutils.is_not_null(builder, above)) as (halves, apart):
                with halves:
                    put_all(upper_half)
                with apart:
                    put_all(other_field)
            with without:
                put_all(None)
        return builder.load(next_line)

    return signature, generate


def _index(lanes: int) -> Any:
    return ir.VectorType(ir.IntType(32), lanes)


def _together(builder: Any, values: Any, chosen: Any) -> Any:
    """The lanes of `values` that are `chosen`, moved to the front."""
    kind = ir.FunctionType(values.type, [values.type, chosen.type, values.type])
    name = f"llvm.experimental.vector.compress.v{LANES}{values.type.element}"
    compress = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(compress, [values, chosen, ir.Constant(values.type, ir.Undefined)])


meet: Any = intrinsic(_meet)
less: Any = intrinsic(_less)
move_together: Any = intrinsic(_move_together)
equal: Any = intrinsic(_equal)
put_frequent: Any = intrinsic(_put_frequent)


def padded(width: int) -> int:
    """`width` items with room for whole vectors."""
    return -(-width // LANES) * LANES
