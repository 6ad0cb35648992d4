"""Packing: the matrices, in the order in which the products read them.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from collections.abc import Mapping

from llvmlite import ir

from recurra.compiler.llvm.code import I32, I64, POINTER, Code, Floats
from recurra.compiler.llvm.layout import BLOCK, Group, Layout, Sweep


def pack_function(floats: Floats, layout: Layout) -> ir.Function:
    """``pack(table, unit)``: one piece of one group's panel. There are ``layout.units`` of them."""
    function = floats.function("pack", [POINTER, I64])
    code = Code(floats, function)
    b = code.b
    table, unit = function.args
    rest = _rest(floats)
    kinds = {turned: _columns(floats, rest, turned) for turned in (False, True)}
    before = 0
    for sweep, group, turned, pieces in layout.pieces:
        piece = b.sub(unit, code.number(before))
        with b.if_then(b.icmp_unsigned("<", piece, code.number(pieces))):
            if turned:
                _step(code, layout, sweep, group, table, piece, (code.number(0), code.number(group.length)), kinds)
            else:
                top = code.times(piece, BLOCK)
                rows = code.smaller(b.sub(code.number(group.length), top), BLOCK)
                with code.loop(sweep.steps) as step:
                    _step(code, layout, sweep, group, table, step, (top, rows), kinds)
        before += pieces
    b.ret_void()
    return function


def _step(
    code: Code,
    layout: Layout,
    sweep: Sweep,
    group: Group,
    table: ir.Value,
    step: ir.Value,
    lines: tuple[ir.Value, ir.Value],
    kinds: Mapping[bool, ir.Function],
) -> None:
    """One step of a group's panel: of the matrix's rows the first and how many."""
    b, lanes, count = code.b, layout.lanes, len(group.products)
    top, rows = lines
    first = code.times(step, sweep.stride)
    vectors = code.smaller(b.sub(code.number(sweep.vectors), first), sweep.stride)
    # From one row of the matrix to the next.
    apart = code.times(vectors, count * lanes)
    start = code.plus(code.times(first, group.length * count * lanes), group.offset)
    panel = code.at(code.entry(table, layout.entries["panels", 0]), b.add(start, b.mul(top, apart)))
    for column, place in enumerate(group.products):
        node = layout.program.nodes[place]
        matrix = code.entry(table, layout.entries["matrix", node.index])
        stride = code.entry(table, layout.entries["matrix_stride", node.index], I64)
        with code.loop(vectors) as vector:
            begin = code.times(code.plus(first, vector), lanes)
            present = code.smaller(b.sub(code.number(sweep.region.width), begin), lanes)
            row, feature = code.plus(top, node.top), code.plus(begin, node.start)
            row, feature = (feature, row) if node.transposed else (row, feature)
            source = code.at(matrix, b.add(b.mul(row, stride), feature))
            target = code.at(panel, code.times(code.plus(code.times(vectors, column), vector), lanes))
            b.call(kinds[node.transposed], [source, stride, target, apart, rows, present])


def _columns(floats: Floats, rest: ir.Function, turned: bool) -> ir.Function:
    """``f(source, stride, target, apart, length, present)``: as many columns as a vector has lanes.

    Number k of column ``lane`` is at ``source[k * stride + lane]``, or ``source[lane * stride + k]`` if turned, and
    goes to ``target[k * apart + lane]``. Columns from ``present`` on do not exist, and are zero.
    """
    function = floats.function("pack_turned" if turned else "pack_plain", [POINTER, I64, POINTER, I64, I64, I64])
    code = Code(floats, function)
    b, lanes, one = code.b, floats.lanes, code.number(1)
    source, stride, target, apart, length, present = function.args
    along, across = (one, stride) if turned else (stride, one)
    with b.if_then(b.icmp_unsigned("<", present, code.number(lanes)), likely=False):
        b.call(rest, [source, across, along, target, apart, length, present])
        b.ret_void()
    if not turned:
        with code.loop(length) as k:
            code.store(code.load(code.at(source, b.mul(k, stride))), code.at(target, b.mul(k, apart)))
        b.ret_void()
        return function
    apart_of, stride_of = ([code.times(each, lane) for lane in range(lanes)] for each in (apart, stride))
    blocks = b.udiv(length, code.number(lanes))
    with code.loop(blocks) as block:
        k = code.times(block, lanes)
        here = code.at(source, k)
        lines = [code.load(code.at(here, offset)) for offset in stride_of]
        to = code.at(target, b.mul(k, apart))
        for offset, line in zip(apart_of, transpose(code, lines), strict=True):
            code.store(line, code.at(to, offset))
    done = code.times(blocks, lanes)
    more = code.at(target, b.mul(done, apart))
    b.call(rest, [code.at(source, done), across, along, more, apart, b.sub(length, done), present])
    b.ret_void()
    return function


def _rest(floats: Floats) -> ir.Function:
    """``f(source, across, along, target, apart, length, present)``: number by number."""
    function = floats.function("pack_rest", [POINTER, I64, I64, POINTER, I64, I64, I64])
    code = Code(floats, function)
    b = code.b
    source, across, along, target, apart, length, present = function.args
    with code.loop(length) as k:
        here, to = code.at(source, b.mul(k, along)), code.at(target, b.mul(k, apart))
        code.store(floats.splat(0.0), to)
        with code.loop(present) as lane:
            number = b.load(code.at(here, b.mul(lane, across)), typ=floats.scalar, align=floats.bytes)
            b.store(number, code.at(to, lane), align=floats.bytes)
    b.ret_void()
    return function


def transpose(code: Code, lines: list[ir.Value]) -> list[ir.Value]:
    """As many vectors as each has lanes, turned: squares of 1, 2, 4, ... lanes change places in pairs of vectors."""
    lanes, lines = len(lines), list(lines)
    size = 1
    while size < lanes:
        for low in range(lanes):
            if low & size:
                continue
            one, other = lines[low], lines[low + size]
            firsts = [lane if not lane & size else lanes + lane - size for lane in range(lanes)]
            seconds = [lane + size if not lane & size else lanes + lane for lane in range(lanes)]
            lines[low], lines[low + size] = (
                code.b.shuffle_vector(one, other, ir.Constant(ir.VectorType(I32, lanes), order))
                for order in (firsts, seconds)
            )
        size *= 2
    return lines
