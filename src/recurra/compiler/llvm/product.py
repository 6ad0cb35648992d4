"""The inner loop: a tile of rows times a panel of packed weights, all sums in registers.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

from llvmlite import ir

from recurra.compiler.llvm.code import I64, POINTER, Code, Floats


def product(floats: Floats, columns: int, most_rows: int) -> ir.Function:
    """``f(panel, sources, rows, length, tile)``.

    Row r of the tile (rows, columns, lanes) becomes the sum over k of ``sources[r][k]`` times row k of the panel
    (length, columns, lanes). ``rows`` is from 1 to ``most_rows``, each a loop of its own.
    """
    name = f"product_{columns}_{most_rows}"
    found = floats.module.globals.get(name)
    if found is not None:
        return found
    function = floats.function(name, [POINTER, POINTER, I64, I64, POINTER])
    function.attributes.add("noinline")
    code = Code(floats, function)
    entry = code.b.block
    cases = []
    for rows in range(1, most_rows + 1):
        block = code.b.append_basic_block(f"rows{rows}")
        code.b.position_at_end(block)
        _tile(code, function, columns, rows)
        code.b.ret_void()
        cases.append(block)
    code.b.position_at_end(entry)
    switch = code.b.switch(function.args[2], cases[0])
    for rows, block in enumerate(cases[1:], start=2):
        switch.add_case(ir.Constant(I64, rows), block)
    return function


def _tile(code: Code, function: ir.Function, columns: int, rows: int) -> None:
    panel, sources, _, length, tile = function.args
    starts = [code.entry(sources, row) for row in range(rows)]
    # Every sum is taken in the order of k, whatever the height of the tile: a row's numbers are the same to the
    # bit however many rows are beside it.
    zeros = [code.floats.splat(0.0)] * (columns * rows)
    with code.sums(zeros, length) as (k, sums, following):
        line = code.at(panel, code.times(k, columns * code.floats.lanes))
        weights = [code.load(code.at(line, column * code.floats.lanes)) for column in range(columns)]
        for row, start in enumerate(starts):
            factor = code.load_splat(code.at(start, k))
            for column, weight in enumerate(weights):
                following.append(code.fma(factor, weight, sums[row * columns + column]))
    for place, total in enumerate(following):
        code.store(total, code.at(tile, place * code.floats.lanes))
