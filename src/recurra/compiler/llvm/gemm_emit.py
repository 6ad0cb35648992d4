"""Native code for products of two large matrices, C = start + A B, and for sums over the rows of one.

C is cut into parts, which the threads draw. A part takes the K axis in blocks, in order, and adds each block's product
to C; the block's piece of B is packed in panels before. No sum is divided among threads, and where K is cut depends on
K alone: the numbers are the same to the bit for any number of threads and parts.

A row whose width is no multiple of a vector has its last vector moved back, so that it ends where the row ends. It
calculates some columns twice, in the same tile. Vectors are masked only where C is narrower than one.

Legend: D any feature.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from recurra.compiler.llvm.code import I64, POINTER, VOID, Code, Floats
from recurra.compiler.llvm.divide import LINE
from recurra.compiler.llvm.pack import transpose
from recurra.compiler.llvm.target import Target

# The words of a call: for each matrix where it is and the numbers from one row, and from one column, to the next.
# start is what the sums begin with. apart: numbers from one thread's memory to the next one's.
PRODUCT = (
    *("M", "N", "K", "a", "a_row", "a_column", "b", "b_row", "b_column", "c", "c_row"),
    *("start", "start_row", "start_column", "row_parts", "column_parts", "memory", "apart"),
)
# more: 1 if the sums are added to what ``out`` has.
SUMS = ("R", "D", "a", "a_row", "out", "parts", "more")
# Then the counters, each with a cache line of its own: parts that have been drawn, threads that have come.
COUNTERS = -(-max(len(PRODUCT), len(SUMS)) // LINE) * LINE
WORDS = COUNTERS + 2 * LINE

# Measured, see docs/lab-notes.md. How much of K is one block, how many vectors of columns of B are packed at once, and
# how many bytes of A are swept with them while they are in the second cache.
DEPTH = 512
WIDTH = 24
CHUNK = 2**18
# Sums over rows: columns at once, in vectors; rows at once; and how many times before they are added to a second sum,
# for precision.
SPAN = 128
AHEAD = 8
TURNS = 64


# Rows of a tile: as many as fit into the registers, then what is left.
HEIGHTS = (6, 4, 2, 1)


def widest(floats: Floats) -> int:
    """How many vectors a tile is wide at most."""
    return 4 if floats.registers == 32 else 2


def emit(dtype: np.dtype[Any], target: Target) -> tuple[str, int]:
    """LLVM assembly of ``product(words)`` and ``sums(words)``, for each thread of a team.

    And how many numbers of memory a thread needs for a product.
    """
    module = ir.Module("recurra")
    floats = Floats(module, dtype, target)
    _product(floats)
    _sums(floats)
    return str(module), WIDTH * floats.lanes * DEPTH


def _product(floats: Floats) -> None:
    function = ir.Function(floats.module, ir.FunctionType(VOID, [POINTER]), "product")
    part_function = _part(floats)
    code = Code(floats, function)
    b = code.b
    words = function.args[0]
    word = {name: code.entry(words, place, I64) for place, name in enumerate(PRODUCT)}
    place = _count(code, words, 1)
    own = code.at(b.inttoptr(word["memory"], POINTER), b.mul(place, word["apart"]))
    vectors = _ceiling(code, word["N"], floats.lanes)
    column_parts = word["column_parts"]
    with code.tickets(lambda: _count(code, words, 0), b.mul(word["row_parts"], column_parts)) as part:
        down, across = b.udiv(part, column_parts), b.urem(part, column_parts)
        rows = _share(code, word["M"], down, word["row_parts"])
        columns = _share(code, vectors, across, column_parts)
        b.call(part_function, [words, own, *rows, *columns])
    b.ret_void()


def _part(floats: Floats) -> ir.Function:
    """``f(words, memory, first row, last row, first vector, last vector)``: a part of C."""
    most, lanes = widest(floats), floats.lanes
    strips = [_strip(floats, columns) for columns in range(1, most + 1)]
    narrow_strip, narrow_pack = _strip(floats, 1, narrow=True), _narrow_pack(floats)
    pack = _pack(floats)
    function = floats.function("part", [POINTER, POINTER, I64, I64, I64, I64])
    code = Code(floats, function)
    b = code.b
    words, memory, top, bottom, left, right = function.args
    word = {name: code.entry(words, place, I64) for place, name in enumerate(PRODUCT)}
    a, matrix, c, start = (b.inttoptr(word[name], POINTER) for name in ("a", "b", "c", "start"))
    # Where the last vector begins.
    end = b.sub(word["N"], code.number(lanes))
    one = code.number(1)
    blocks = _ceiling(code, word["K"], DEPTH)
    panels = _ceiling(code, b.sub(right, left), most)
    groups = _ceiling(code, panels, WIDTH // most)

    def panel(index: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """Its first vector, how many it has, its first column, and from there to where its last vector begins."""
        first, last = (b.add(left, bound) for bound in _share(code, b.sub(right, left), index, panels))
        column = code.times(first, lanes)
        last_column = code.smaller(code.times(b.sub(last, one), lanes), end)
        return first, b.sub(last, first), column, b.sub(last_column, column)

    def strip(columns: ir.Value, arguments: list[ir.Value]) -> None:
        after = b.append_basic_block("after")
        switch = b.switch(columns, after)
        for count, each in enumerate(strips, start=1):
            block = b.append_basic_block(f"columns{count}")
            switch.add_case(ir.Constant(I64, count), block)
            b.position_at_end(block)
            b.call(each, arguments)
            b.branch(after)
        b.position_at_end(after)

    with code.loop(blocks) as block:
        k, k_end = _share(code, word["K"], block, blocks)
        length = b.sub(k_end, k)
        first_block = b.icmp_unsigned("==", block, code.number(0), name="first_block")
        begin = b.select(first_block, start, c)
        begin_row = b.select(first_block, word["start_row"], word["c_row"])
        begin_column = b.select(first_block, word["start_column"], one)
        with b.if_then(b.icmp_unsigned("<", word["N"], code.number(lanes)), likely=False):
            source = code.at(matrix, b.mul(k, word["b_row"]))
            b.call(narrow_pack, [source, word["b_row"], word["b_column"], memory, length, word["N"]])
            here = code.at(a, b.add(b.mul(top, word["a_row"]), b.mul(k, word["a_column"])))
            into, since = code.at(c, b.mul(top, word["c_row"])), code.at(begin, b.mul(top, begin_row))
            arguments = [here, word["a_row"], word["a_column"], memory, length, since, begin_row, into, word["c_row"]]
            b.call(narrow_strip, [*arguments, word["N"], b.sub(bottom, top)])
        groups = b.select(b.icmp_unsigned("<", word["N"], code.number(lanes)), code.number(0), groups)
        chunks = _ceiling(code, b.mul(b.sub(bottom, top), length), CHUNK // floats.bytes)
        with code.loop(groups) as group:
            low, high = _share(code, panels, group, groups)
            origin = panel(low)[0]

            def packed(first: ir.Value, origin: ir.Value = origin) -> ir.Value:
                return code.at(memory, b.mul(code.times(b.sub(first, origin), lanes), length))

            with code.loop(high, low) as index:
                first, columns, column, last = panel(index)
                source = code.at(matrix, b.add(b.mul(k, word["b_row"]), b.mul(column, word["b_column"])))
                b.call(pack, [source, word["b_row"], word["b_column"], packed(first), length, columns, last])
            with code.loop(chunks) as chunk:
                upper, lower = (b.add(top, each) for each in _share(code, b.sub(bottom, top), chunk, chunks))
                here = code.at(a, b.add(b.mul(upper, word["a_row"]), b.mul(k, word["a_column"])))
                with code.loop(high, low) as index:
                    first, columns, column, last = panel(index)
                    into = code.at(c, b.add(b.mul(upper, word["c_row"]), column))
                    since = code.at(begin, b.add(b.mul(upper, begin_row), b.mul(column, begin_column)))
                    arguments = [here, word["a_row"], word["a_column"], packed(first), length, since, begin_row]
                    strip(columns, [*arguments, into, word["c_row"], last, b.sub(lower, upper)])
    b.ret_void()
    return function


def _strip(floats: Floats, columns: int, narrow: bool = False) -> ir.Function:
    """``f(a, a row, a column, panel, length, start, start row, c, c row, last, rows)``: all rows times one panel.

    Of a ``narrow`` one, ``last`` is how many columns it has, less than a vector.
    """
    name = "strip_narrow" if narrow else f"strip_{columns}"
    function = floats.function(name, [POINTER, I64, I64, POINTER, I64, POINTER, I64, POINTER, I64, I64, I64])
    code = Code(floats, function)
    b = code.b
    a, a_row, a_column, panel, length, start, start_row, c, c_row, last, rows = function.args
    offsets = [*(column * floats.lanes for column in range(columns - 1)), code.number(0) if narrow else last]
    mask = code.first_lanes(last) if narrow else None

    def tile(height: int, a: ir.Value, start: ir.Value, c: ir.Value) -> None:
        begin = _lines(code, start, start_row, height)
        factors = _lines(code, a, a_row, height)
        first = [code.load(code.at(line, offset), mask) for line in begin for offset in offsets]
        with code.sums(first, length) as (k, sums, following):
            line = code.at(panel, code.times(k, columns * floats.lanes))
            weights = [code.load(code.at(line, column * floats.lanes)) for column in range(columns)]
            step = b.mul(k, a_column)
            # Where A is turned, this is what the tiles below read at this step.
            code.prefetch(code.at(a, code.plus(step, 64 // floats.bytes)))
            for row, from_ in enumerate(factors):
                factor = code.load_splat(code.at(from_, step))
                for column, weight in enumerate(weights):
                    following.append(code.fma(factor, weight, sums[row * columns + column]))
        into = [code.at(line, offset) for line in _lines(code, c, c_row, height) for offset in offsets]
        for total, target in zip(following, into, strict=True):
            code.store(total, target, mask)

    for height in HEIGHTS:
        with code.sums([a, start, c], b.udiv(rows, code.number(height))) as (_, places, following):
            tile(height, *places)
            steps = zip(places, (a_row, start_row, c_row), strict=True)
            following += [code.at(place, code.times(step, height)) for place, step in steps]
        a, start, c = following
        rows = b.urem(rows, code.number(height))
    b.ret_void()
    return function


def _lines(code: Code, base: ir.Value, row: ir.Value, count: int) -> list[ir.Value]:
    return [code.at(base, code.times(row, index)) for index in range(count)]


def _pack(floats: Floats) -> ir.Function:
    """``f(source, row, column, target, length, columns, last)``: a panel (length, columns, lanes) of a matrix."""
    turn = _turn(floats)
    function = floats.function("pack", [POINTER, I64, I64, POINTER, I64, I64, I64])
    code = Code(floats, function)
    b, lanes = code.b, floats.lanes
    source, row, column, target, length, columns, last = function.args
    apart = code.times(columns, lanes)
    plain = b.icmp_unsigned("==", column, code.number(1))
    with code.loop(columns) as each:
        is_last = b.icmp_unsigned("==", code.plus(each, 1), columns)
        offset = b.select(is_last, last, code.times(each, lanes))
        to = code.at(target, code.times(each, lanes))
        with b.if_else(plain) as (straight, turned):
            with straight, code.loop(length) as k:
                code.store(code.load(code.at(code.at(source, offset), b.mul(k, row))), code.at(to, b.mul(k, apart)))
            with turned:
                b.call(turn, [code.at(source, b.mul(offset, column)), column, to, apart, length])
    b.ret_void()
    return function


def _narrow_pack(floats: Floats) -> ir.Function:
    """``f(source, row, column, target, length, columns)``: a panel of one vector, of fewer columns and zeros."""
    function = floats.function("pack_narrow", [POINTER, I64, I64, POINTER, I64, I64])
    code = Code(floats, function)
    b, lanes = code.b, floats.lanes
    source, row, column, target, length, columns = function.args
    with code.loop(length) as k:
        line, place = code.at(source, b.mul(k, row)), code.at(target, code.times(k, lanes))
        code.store(floats.splat(0.0), place)
        with code.loop(columns) as each:
            number = b.load(code.at(line, b.mul(each, column)), typ=floats.scalar, align=floats.bytes)
            b.store(number, code.at(place, each), align=floats.bytes)
    b.ret_void()
    return function


def _turn(floats: Floats) -> ir.Function:
    """``f(source, column, target, apart, length)``: a vector of columns that are rows of the source."""
    function = floats.function("turn", [POINTER, I64, POINTER, I64, I64])
    code = Code(floats, function)
    b, lanes = code.b, floats.lanes
    source, column, target, apart, length = function.args
    squares = b.udiv(length, code.number(lanes))
    with code.loop(squares) as square:
        k = code.times(square, lanes)
        lines = [code.load(line) for line in _lines(code, code.at(source, k), column, lanes)]
        places = _lines(code, code.at(target, b.mul(k, apart)), apart, lanes)
        for line, place in zip(transpose(code, lines), places, strict=True):
            code.store(line, place)
    with code.loop(length, code.times(squares, lanes)) as k, code.loop(lanes) as lane:
        number = b.load(code.at(source, b.add(k, b.mul(lane, column))), typ=floats.scalar, align=floats.bytes)
        b.store(number, code.at(target, b.add(b.mul(k, apart), lane)), align=floats.bytes)
    b.ret_void()
    return function


def _sums(floats: Floats) -> None:
    """``sums(words)``: the sums over the rows of A (R, D). Each is one thread's, in an order that R alone decides."""
    function = ir.Function(floats.module, ir.FunctionType(VOID, [POINTER]), "sums")
    code = Code(floats, function)
    b, lanes = code.b, floats.lanes
    words = function.args[0]
    word = {name: code.entry(words, place, I64) for place, name in enumerate(SUMS)}
    a, out = (b.inttoptr(word[name], POINTER) for name in ("a", "out"))
    R, row = word["R"], word["a_row"]
    more = b.icmp_unsigned("!=", word["more"], code.number(0))
    vectors = _ceiling(code, word["D"], lanes)
    end = b.sub(word["D"], code.number(lanes))
    partial, total = (b.alloca(floats.vector, SPAN) for _ in range(2))

    def add(rows: list[ir.Value], first: ir.Value, last: ir.Value) -> None:
        with code.loop(last, first) as vector:
            column = code.smaller(code.times(vector, lanes), end)
            terms = [code.load(code.at(each, column)) for each in rows]
            while len(terms) > 1:
                terms = [b.fadd(one, other) for one, other in zip(terms[::2], terms[1::2], strict=True)]
            place = code.at(partial, code.times(b.sub(vector, first), lanes))
            code.store(b.fadd(code.load(place), terms[0]), place)

    def flush(count: ir.Value) -> None:
        with code.loop(count) as vector:
            here, there = (code.at(each, code.times(vector, lanes)) for each in (partial, total))
            code.store(b.fadd(code.load(there), code.load(here)), there)
            code.store(floats.splat(0.0), here)

    narrow = b.icmp_unsigned("<", word["D"], code.number(lanes))
    with b.if_then(narrow, likely=False):
        _narrow_sums(code, a, out, word, more)
    parts = b.select(narrow, code.number(0), word["parts"])
    with code.tickets(lambda: _count(code, words, 0), parts) as part:
        left, right = _share(code, vectors, part, word["parts"])
        spans = _ceiling(code, b.sub(right, left), SPAN)
        with code.loop(spans) as span:
            first, last = (b.add(left, each) for each in _share(code, b.sub(right, left), span, spans))
            count = b.sub(last, first)
            with code.loop(count) as vector:
                place = code.times(vector, lanes)
                column = code.smaller(code.times(b.add(first, vector), lanes), end)
                before = code.load(code.at(out, column))
                code.store(b.select(more, before, floats.splat(0.0)), code.at(total, place))
                code.store(floats.splat(0.0), code.at(partial, place))
            turns = b.udiv(R, code.number(AHEAD))
            with code.loop(turns) as turn:
                top = code.times(turn, AHEAD)
                add([code.at(a, b.mul(code.plus(top, each), row)) for each in range(AHEAD)], first, last)
                with b.if_then(b.icmp_unsigned("==", b.urem(turn, code.number(TURNS)), code.number(TURNS - 1))):
                    flush(count)
            with code.loop(R, code.times(turns, AHEAD)) as each:
                add([code.at(a, b.mul(each, row))], first, last)
            flush(count)
            with code.loop(count) as vector:
                column = code.smaller(code.times(b.add(first, vector), lanes), end)
                code.store(code.load(code.at(total, code.times(vector, lanes))), code.at(out, column))
    b.ret_void()


def _narrow_sums(code: Code, a: ir.Value, out: ir.Value, word: dict[str, ir.Value], more: ir.Value) -> None:
    """The sums over the rows of A that are narrower than a vector, AHEAD * TURNS rows at once, for precision."""
    b, many, none = code.b, AHEAD * TURNS, code.floats.splat(0.0)
    mask = code.first_lanes(word["D"])
    before = b.select(more, code.load(out, mask), none)
    with code.sums([before], _ceiling(code, word["R"], many)) as (block, (total,), following):
        first = code.times(block, many)
        last = code.smaller(code.plus(first, many), word["R"])
        with code.sums([none], last, first) as (row, (partial,), more_rows):
            more_rows.append(b.fadd(partial, code.load(code.at(a, b.mul(row, word["a_row"])), mask)))
        following.append(b.fadd(total, more_rows[0]))
    code.store(following[0], out, mask)


def _count(code: Code, words: ir.Value, counter: int) -> ir.Value:
    """Counts one more. Gives the number before."""
    place = code.b.gep(words, [code.number(COUNTERS + counter * LINE)], source_etype=I64)
    return code.b.atomic_rmw("add", place, code.number(1), "monotonic")


def _ceiling(code: Code, number: ir.Value, size: int) -> ir.Value:
    return code.b.udiv(code.plus(number, size - 1), code.number(size))


def _share(code: Code, total: ir.Value, part: ir.Value, parts: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Where one of nearly equal parts begins and ends. The last one is never the smallest."""
    b = code.b
    return b.udiv(b.mul(part, total), parts), b.udiv(b.mul(code.plus(part, 1), total), parts)
