"""The loop IR: its text, what the verifier refuses, what the passes do, and what the interpreter says it means."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop_programs import PLAIN, PROGRAMS, lstm, plain_run, random_operands
from random_programs import programs
from recurra.compiler import interpret as interpreter
from recurra.compiler import passes
from recurra.compiler.build import Builder
from recurra.compiler.interpret import interpret
from recurra.compiler.ir import Op, Program, parse
from recurra.compiler.passes import drop_dead, optimise, share, simplify, sink_slices
from recurra.compiler.regions import group
from recurra.compiler.verify import verify
from recurra.errors import BackendError, ShapeError

VARIANTS = [
    {},
    {"lengths": True},
    {"resets": True},
    {"reverse": True},
    {"lengths": True, "resets": True, "reverse": True},
]


# Text

SMALL = """\
carry 2
input 4
vector 2
matrix 4x2
%0 = carry [index=0] : 2
%1 = input [index=0] : 4
%2 = matmul %0 [index=0 transposed] : 4
%3 = add %1 %2 : 4
%4 = slice %3 : 2
%5 = slice %3 [start=2] : 2
%6 = vector [index=0] : 2
%7 = lt %4 %6 : 2 bool
%8 = where %7 %5 %4 : 2
%9 = const [number=-0.5] : 1
%10 = broadcast %9 : 2
%11 = mul %8 %10 : 2
%12 = pow %11 [number=3.0] : 2
output %12 %3
new %11
"""


def test_the_text_of_a_program_is_stable_and_can_be_read_again():
    program = verify(parse(SMALL))
    assert str(program) == SMALL
    b = Builder()
    h, x, v, w = b.carry(2), b.input(4), b.vector(2), b.matrix(4, 2)
    z = x + b.matmul(h, w, transposed=True)
    low, high = z[:2], z[2:]
    new = b.apply(Op.WHERE, low < v, high, low) * -0.5
    built = b.finish([b.power(new, 3), z], [new])
    operands = random_operands(program, 3, 2)
    same(interpret(built, operands), interpret(program, operands))


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_survives_its_text(name):
    program = PROGRAMS[name](5)
    assert parse(str(program)) == program
    assert parse(str(optimise(program))) == optimise(program)


@pytest.mark.parametrize("line", ["%0 = carry", "%1 = carry : 2", "%0 = carrot : 2", "hello", "%0 = carry : x"])
def test_text_that_is_no_program_is_refused(line):
    with pytest.raises(BackendError, match=r"line 2 .* cannot be read"):
        parse(f"carry 2\n{line}\n")


# Verifier

WRONG = [
    ("%3 = add %1 %2 : 4", "%3 = add %1 %20 : 4", r"%20 is not defined, in\n  %3 = add %1 %20 : 4"),
    ("%3 = add %1 %2 : 4", "%3 = add %1 %4 : 4", "%4 is used before it is defined"),
    ("%3 = add %1 %2 : 4", "%3 = add %1 %3 : 4", "%3 is used before it is defined: a program has no cycles"),
    ("%3 = add %1 %2 : 4", "%3 = add %1 : 4", "add takes 2 values, got 1"),
    ("%3 = add %1 %2 : 4", "%3 = add %1 %0 : 4", "%0 has width 2, not 4"),
    ("%8 = where %7 %5 %4 : 2", "%8 = where %5 %5 %4 : 2", "%5 is float, not bool"),
    ("%8 = where %7 %5 %4 : 2", "%8 = where %7 %7 %4 : 2", "%7 is bool, not float"),
    ("%7 = lt %4 %6 : 2 bool", "%7 = lt %4 %6 : 2", "lt gives a bool, not a float"),
    ("%12 = pow %11 [number=3.0] : 2", "%12 = slice %7 : 2", "%7 is bool, not float"),
    ("%5 = slice %3 [start=2] : 2", "%5 = slice %3 [start=3] : 2", "features 3 to 5 of 4"),
    ("%5 = slice %3 [start=2] : 2", "%5 = slice %3 [start=-1] : 2", "features -1 to 1 of 4"),
    ("[index=0 transposed] : 4", "[index=0] : 4", "columns 0 to 4 of a matrix with 2"),
    ("[index=0 transposed] : 4", "[index=0 top=1 transposed] : 4", "rows 1 to 3 of a matrix with 2"),
    ("[index=0 transposed] : 4", "[index=0 top=-1 transposed] : 4", "rows -1 to 1 of a matrix with 2"),
    ("%4 = slice %3 : 2", "%4 = gather %3 [features=4,0] : 2", "feature 4 of 4"),
    ("%4 = slice %3 : 2", "%4 = gather %3 [features=0,-1] : 2", "feature -1 of 4"),
    ("%4 = slice %3 : 2", "%4 = gather %3 [features=0] : 2", "what it gathers has width 1, not 2"),
    ("%4 = slice %3 : 2", "%4 = gather %3 %2 [features=0,1] : 2", "gather takes 1 values, got 2"),
    ("%8 = where %7 %5 %4 : 2", "%8 = gather %7 [features=1,1] : 2", "%7 is bool, not float"),
    ("[index=0 transposed] : 4", "[index=0 start=1 transposed] : 4", "columns 1 to 5 of a matrix with 4"),
    ("[index=0 transposed] : 4", "[index=1 transposed] : 4", "there is no matrix 1"),
    ("%10 = broadcast %9 : 2", "%10 = broadcast %3 : 2", r"2 features are no axes .* where 4 are \(outer, 1\)"),
    ("%10 = broadcast %9 : 2", "%10 = broadcast %4 [inner=3] : 2", r"axes \(outer, many, 3\) where 2 are"),
    ("%10 = broadcast %9 : 2", "%10 = broadcast %4 [inner=0] : 2", r"axes \(outer, many, 0\) where 2 are"),
    ("%6 = vector [index=0] : 2", "%6 = vector [index=1] : 2", "there is no vector 1, only 1"),
    ("%6 = vector [index=0] : 2", "%6 = row [index=0] : 2", "there is no row 0, only 0"),
    ("%6 = vector [index=0] : 2", "%6 = vector [index=0] : 3", "vector 0 has width 2, not 3"),
    ("%9 = const [number=-0.5] : 1", "%9 = const [number=-0.5] : 2", "a constant has width 1, not 2"),
    ("%10 = broadcast %9 : 2", "%10 = sum %9 : 2", r"1 features are no axes .* where 2 are \(outer, 1\)"),
    ("%10 = broadcast %9 : 2", "%10 = max %3 [inner=4] : 2", r"axes \(outer, many, 4\) where 2 are"),
    ("%10 = broadcast %9 : 2", "%10 = concat %9 : 2", "what it joins has width 1, not 2"),
    ("%10 = broadcast %9 : 2", "%10 = concat : 2", "concat takes at least 1 value"),
    ("%4 = slice %3 : 2", "%4 = slice %3 : 0", "a value has at least 1 feature, not 0"),
    ("output %12 %3", "output %12 %12", "%12 is an output twice"),
    ("output %12 %3", "output %7", "%7 is bool: an output or new carry is a float"),
    ("output %12 %3", "output %40", "%40 is not defined, but is an output or a new carry"),
    ("new %11", "", "1 carries have 0 new values"),
    ("new %11", "new %3", "carry 0 has width 2, its new value %3 4"),
]


@pytest.mark.parametrize(("right", "wrong", "message"), WRONG)
def test_the_verifier_says_what_is_wrong_and_where(right, wrong, message):
    assert SMALL.count(right) == 1
    with pytest.raises(BackendError, match=message):
        verify(parse(SMALL.replace(right, wrong)))


# Meaning


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_the_interpreter_agrees_with_the_equations(name, variant):
    program = PROGRAMS[name](3)
    operands = random_operands(program, 6, 4, **variant)
    outputs, state = interpret(program, operands)
    y, ends = plain_run(PLAIN[name], operands, program.nodes[program.outputs[0]].width)
    np.testing.assert_allclose(outputs[0], y, rtol=0, atol=1e-13)
    for found, expected in zip(state, ends, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_a_wrong_operation_is_told_apart(monkeypatch):
    monkeypatch.setitem(interpreter.FUNCTIONS, Op.SIGMOID, lambda x: 1 / (1 + np.exp(x)))
    with pytest.raises(AssertionError):
        test_the_interpreter_agrees_with_the_equations("gru_after", {})


def test_operands_that_do_not_fit_are_named():
    program = lstm(3)
    operands = random_operands(program, 4, 2, resets=True)
    operands.check(program, np.dtype(np.float64))
    for change, message in [
        ({"inputs": []}, "expected 1 arrays of kind input, got 0"),
        ({"state": [operands.state[0], operands.state[1][:1]]}, r"state 1 to be \(2, 3\) of float64"),
        ({"matrices": [operands.matrices[0].astype(np.float32)]}, r"matrix 0 to be \(12, 3\) of float64.*float32"),
        ({"inputs": [operands.inputs[0].transpose(0, 2, 1).copy().transpose(0, 2, 1)]}, "not contiguous"),
        ({"fresh": None}, "resets need the fresh state"),
        ({"resets": operands.resets.astype(int)}, r"resets 0 to be \(4, 2\) of bool"),
        ({"lengths": np.array([1, 2, 3])}, r"lengths 0 to be \(2,\)"),
    ]:
        with pytest.raises(ShapeError, match=message):
            replace(operands, **change).check(program, np.dtype(np.float64))


# Passes


def after(apply, text: str) -> str:
    return str(verify(apply(verify(parse(text)))))


def test_constants_are_folded():
    text = (
        "carry 1\n%0 = const [number=2.0] : 1\n%1 = exp %0 : 1\n%2 = mul %0 %1 : 1\n"
        "%3 = pow %2 [number=2.0] : 1\nnew %3\n"
    )
    assert after(optimise, text) == f"carry 1\n%0 = const [number={float((2 * np.exp(2.0)) ** 2)!r}] : 1\nnew %0\n"


def test_what_is_one_number_for_all_features_is_calculated_once():
    text = "carry 1 3\n%0 = carry [index=0] : 1\n%1 = broadcast %0 : 3\n%2 = exp %1 : 3\nnew %0 %2\n"
    expected = "carry 1 3\n%0 = carry [index=0] : 1\n%1 = exp %0 : 1\n%2 = broadcast %1 : 3\nnew %0 %2\n"
    assert after(optimise, text) == expected


def test_multiplying_by_one_is_dropped_and_adding_zero_is_not():
    text = (
        "carry 1\n%0 = carry [index=0] : 1\n%1 = const [number=1.0] : 1\n%2 = mul %0 %1 : 1\n"
        "%3 = const [number=0.0] : 1\n"
    )
    kept = "carry 1\n%0 = carry [index=0] : 1\n%1 = const [number=0.0] : 1\n%2 = add %0 %1 : 1\nnew %2\n"
    # -0.0 + 0.0 is 0.0.
    assert after(optimise, text + "%4 = add %2 %3 : 1\nnew %4\n") == kept


def test_slices_of_slices_and_joins_are_undone():
    text = (
        "carry 4\n%0 = carry [index=0] : 4\n%1 = slice %0 [start=1] : 3\n%2 = slice %1 [start=1] : 2\n"
        "%3 = concat %2 %1 : 5\n%4 = slice %3 [start=1] : 4\nnew %4\n"
    )
    expected = (
        "carry 4\n%0 = carry [index=0] : 4\n%1 = slice %0 [start=1] : 3\n%2 = slice %0 [start=3] : 1\n"
        "%3 = concat %2 %1 : 4\nnew %3\n"
    )
    assert after(optimise, text) == expected


def test_gathers_are_undone_where_they_take_neighbours_or_one_feature_alone():
    text = (
        "carry 4\n%0 = carry [index=0] : 4\n%1 = slice %0 [start=1] : 3\n%2 = gather %1 [features=2,0,1] : 3\n"
        "%3 = gather %2 [features=1,2] : 2\n%4 = gather %2 [features=0,0,0] : 3\n%5 = gather %2 [features=0,2] : 2\n"
        "%6 = concat %0 %2 : 7\n%7 = gather %6 [features=6,4] : 2\noutput %3 %4 %5 %7\nnew %0\n"
    )
    expected = (
        "carry 4\n%0 = carry [index=0] : 4\n%1 = slice %0 [start=1] : 2\n%2 = slice %0 [start=3] : 1\n"
        "%3 = broadcast %2 : 3\n%4 = gather %0 [features=3,2] : 2\n%5 = slice %0 [start=2] : 2\n"
        "output %1 %3 %4 %5\nnew %0\n"
    )
    simple = drop_dead(share(simplify(simplify(parse(text)))))
    operands = random_operands(simple, 2, 3)
    same(interpret(simple, operands), interpret(parse(text), operands))
    assert str(simple) == expected


def test_features_that_are_no_neighbours_are_read_in_the_region_that_wants_them():
    text = (
        "carry 4\nmatrix 4x4\n%0 = carry [index=0] : 4\n%1 = gather %0 [features=3,1,0,2] : 4\n%2 = tanh %1 : 4\n"
        "%3 = matmul %1 [index=0] : 4\n%4 = add %2 %3 : 4\nnew %4\n"
    )
    plan = group(verify(parse(text)))
    assert plan.homes == {1, 2, 4}
    assert plan.view(1).features == (3, 1, 0, 2)
    assert plan.source(3).features == ()


def test_equal_values_are_shared_and_dead_ones_dropped():
    text = (
        "carry 1\n%0 = carry [index=0] : 1\n%1 = exp %0 : 1\n%2 = exp %0 : 1\n%3 = tanh %0 : 1\n"
        "%4 = add %1 %2 : 1\nnew %4\n"
    )
    expected = "carry 1\n%0 = carry [index=0] : 1\n%1 = exp %0 : 1\n%2 = add %1 %1 : 1\nnew %2\n"
    assert after(lambda program: drop_dead(share(program)), text) == expected


def test_zero_and_minus_zero_are_not_the_same_constant():
    text = "carry 1\n%0 = const [number=0.0] : 1\n%1 = const [number=-0.0] : 1\n%2 = div %0 %1 : 1\nnew %2\n"
    assert after(share, text) == text


def test_equal_outputs_stay_two_outputs():
    text = (
        "carry 1\n%0 = carry [index=0] : 1\n%1 = exp %0 : 1\n%2 = exp %0 : 1\n%3 = exp %0 : 1\n"
        "output %1 %2 %3\nnew %0\n"
    )
    program = optimise(parse(text))
    outputs, _ = interpret(program, random_operands(program, 2, 3))
    assert len(outputs) == 3
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])


GATES = """\
carry 2
input 4
matrix 2x4
%0 = carry [index=0] : 2
%1 = input [index=0] : 4
%2 = matmul %0 [index=0] : 4
%3 = add %1 %2 : 4
%4 = slice %3 : 2
%5 = slice %3 [start=2] : 2
%6 = mul %4 %5 : 2
"""


def test_slices_sink_to_the_columns_of_the_matrix():
    assert after(optimise, GATES + "new %6\n") == (
        "carry 2\ninput 4\nmatrix 2x4\n%0 = carry [index=0] : 2\n%1 = input [index=0] : 4\n%2 = slice %1 : 2\n"
        "%3 = matmul %0 [index=0] : 2\n%4 = add %2 %3 : 2\n%5 = slice %1 [start=2] : 2\n"
        "%6 = matmul %0 [index=0 start=2] : 2\n%7 = add %5 %6 : 2\n%8 = mul %4 %7 : 2\nnew %8\n"
    )


def test_a_value_that_is_needed_whole_is_not_cut():
    text = GATES + "output %3\nnew %6\n"
    assert after(optimise, text) == str(parse(text))


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("apply", [simplify, share, drop_dead, sink_slices, optimise])
def test_a_pass_changes_no_number(apply, name):
    program = PROGRAMS[name](3)
    operands = random_operands(program, 3, 4, lengths=True, resets=True)
    same(interpret(verify(apply(program)), operands), interpret(program, operands))


@given(programs())
@settings(max_examples=60, deadline=None)
def test_passes_change_no_number_of_random_programs(program):
    operands = random_operands(program, 2, 2)
    same(interpret(optimise(program), operands), interpret(program, operands))


def same(found, expected):
    for one, other in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def forget_start(rewriter, place, start, width):
    return passes_slice(rewriter, place, 0, width)


passes_slice = passes._slice


def test_a_pass_that_forgets_where_a_slice_starts_is_told_apart(monkeypatch):
    monkeypatch.setattr(passes, "_slice", forget_start)
    with pytest.raises(AssertionError):
        test_a_pass_changes_no_number(optimise, "lstm")


# Regions


def test_the_gates_of_an_lstm_are_one_region():
    plan = group(optimise(lstm(8)))
    (region,) = plan.regions
    assert region.width == 8
    assert len(region.products) == 4
    assert len(region.stores) == 2


def test_a_product_of_a_computed_value_waits_for_the_whole_value():
    plan = group(optimise(PROGRAMS["gru_before"](8)))
    assert [len(region.products) for region in plan.regions] == [2, 1]
    assert str(plan).count("keep") == 3


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("prepare", [optimise, verify])
def test_no_region_reads_what_a_later_one_writes(name, prepare):
    check_order(prepare(PROGRAMS[name](6)))


@given(programs())
@settings(max_examples=60, deadline=None)
def test_regions_of_random_programs_are_in_order(program):
    check_order(program)
    check_order(optimise(program))


def check_order(program: Program) -> None:
    plan = group(program)
    written: dict[int, int] = {}

    def read(view) -> None:
        node = program.nodes[view.place]
        if view.home:
            assert written.get(view.place, 0) == node.width, f"%{view.place} is read too early"

    for region in plan.regions:
        here = {*region.products, *region.pointwise}
        for product in region.products:
            read(plan.source(product))
        args = [arg for place in (*region.pointwise, *region.reductions) for arg in program.nodes[place].args]
        for arg in [*args, *(store.value for store in region.stores)]:
            if arg not in here:
                read(plan.view(arg))
        for store in region.stores:
            assert program.nodes[store.value].width == region.width
            written[store.home] = written.get(store.home, 0) + region.width
        for place in region.reductions:
            written[place] = program.nodes[place].width
    assert all(written[home] == program.nodes[home].width for home in plan.homes)


# The strategy itself


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_random_programs_are_well_formed(data):
    program = data.draw(programs())
    verify(program)
    assert program.new
