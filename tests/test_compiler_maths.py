"""exp, log and their kin of the native code, over the whole range of floats, against 40 digits."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

from recurra.compiler.build import Builder
from recurra.compiler.ir import UNARY, Op
from recurra.compiler.llvm import maths
from recurra.compiler.llvm.kernel import Kernel
from recurra.compiler.llvm.target import Target
from recurra.compiler.operands import Operands

NAMES = ("exp", "log", "tanh", "sigmoid", "log_sigmoid", "erf", "atan")
TRUE = {
    "exp": mpmath.exp,
    "log": mpmath.log,
    "tanh": mpmath.tanh,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "log_sigmoid": lambda x: -mpmath.log1p(mpmath.exp(-x)),
    "erf": mpmath.erf,
    "atan": mpmath.atan,
    "sin": mpmath.sin,
    "cos": mpmath.cos,
}
# The largest relative error, in units of the last place of 1: 2^-23 and 2^-52.
BOUND = {
    np.float32: {
        "exp": 1.5,
        "log": 1.5,
        "tanh": 3.0,
        "sigmoid": 2.5,
        "log_sigmoid": 2.5,
        "erf": 2.5,
        "atan": 2.5,
        "sin": 2.5,
        "cos": 2.5,
    },
    np.float64: {
        "exp": 1.5,
        "log": 1.5,
        "tanh": 3.0,
        "sigmoid": 2.5,
        "log_sigmoid": 2.5,
        "erf": 2.5,
        "atan": 2.5,
        "sin": 2.5,
        "cos": 2.5,
    },
}


def run(names, x: np.ndarray, target: Target | None = None) -> list[np.ndarray]:
    b = Builder()
    value = b.input(x.size)
    program = b.finish([getattr(b, name)(value) for name in names], [])
    outputs, _ = Kernel(program, x.dtype, target)(Operands(1, 1, inputs=[x.reshape(1, 1, -1)]))
    return [output.reshape(-1) for output in outputs]


def sample(dtype) -> np.ndarray:
    """Both signs; every magnitude; closely where the functions bend, reduce their range, overflow or vanish."""
    random = np.random.default_rng(3)
    info = np.finfo(dtype)
    largest = 90 if dtype is np.float32 else 712
    magnitudes = 2.0 ** np.arange(info.minexp - info.nmant, info.maxexp)
    pieces = [
        magnitudes,
        magnitudes * (1 + random.random(magnitudes.size)),
        random.uniform(0, largest, 1500),
        random.uniform(0, 12, 1500),
        random.uniform(0, 1.5, 1500),
        np.log(2) / 2 * np.arange(1, 400),
        1 + random.uniform(-1e-3, 1e-3, 300),
    ]
    x = np.concatenate(pieces).astype(dtype)
    return np.concatenate([x, -x, np.array([0.0, -0.0], dtype)])


def errors(name: str, x: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Relative errors in units of the last place of 1; below the normal numbers, of the smallest of them."""
    info = np.finfo(x.dtype)
    result = np.zeros(x.size)
    with mpmath.workdps(40):
        for place, (one, value) in enumerate(zip(x.tolist(), found.tolist(), strict=True)):
            if name == "log" and one <= 0:
                right = -np.inf if one == 0 else np.nan
                result[place] = 0 if value == right or (np.isnan(right) and np.isnan(value)) else np.inf
                continue
            true = TRUE[name](mpmath.mpf(one))
            rounded = float(true)
            if abs(true) > float(info.max):
                result[place] = 0 if abs(value) >= float(info.max) and value * rounded > 0 else np.inf
            elif name == "sigmoid" and value == 0:
                result[place] = 0 if true < float(info.tiny) else np.inf
            else:
                scale = max(abs(true), mpmath.mpf(float(info.tiny)))
                result[place] = float(abs(mpmath.mpf(value) - true) / scale) / float(info.eps)
    return result


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_functions_are_right_over_the_whole_range(dtype):
    x = sample(dtype)
    for name, found in zip(NAMES, run(NAMES, x), strict=True):
        wrong = errors(name, x, found)
        worst = wrong.argmax()
        assert wrong[worst] <= BOUND[dtype][name], f"{name}({x[worst]!r}) = {found[worst]!r}: {wrong[worst]:.2f}"


def test_functions_are_right_without_fused_multiplication():
    x = sample(np.float32)[::7].copy()
    for name, found in zip(NAMES, run(NAMES, x, Target("x86-64", "", 16, 16)), strict=True):
        assert errors(name, x, found).max() <= BOUND[np.float32][name] + 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_infinity_saturates_and_nan_stays(dtype):
    x = np.array([np.inf, -np.inf, np.nan, -np.nan], dtype)
    expected = {
        "exp": [np.inf, 0, np.nan, np.nan],
        "log": [np.inf, np.nan, np.nan, np.nan],
        "tanh": [1, -1, np.nan, np.nan],
        "sigmoid": [1, 0, np.nan, np.nan],
        "log_sigmoid": [0, -np.inf, np.nan, np.nan],
        "sin": [np.nan, np.nan, np.nan, np.nan],
        "cos": [np.nan, np.nan, np.nan, np.nan],
        "erf": [1, -1, np.nan, np.nan],
        "atan": [np.pi / 2, -np.pi / 2, np.nan, np.nan],
        "floor": [np.inf, -np.inf, np.nan, np.nan],
        "round": [np.inf, -np.inf, np.nan, np.nan],
        "sqrt": [np.inf, np.nan, np.nan, np.nan],
        "abs": [np.inf, np.inf, np.nan, np.nan],
        "neg": [-np.inf, np.inf, np.nan, np.nan],
    }
    for name, found in zip(expected, run(expected, x), strict=True):
        np.testing.assert_array_equal(found, np.array(expected[name], dtype), err_msg=name)


def angles(dtype) -> np.ndarray:
    """Both signs; small ones; all over the range; as near to multiples of pi / 4 as floats come."""
    random = np.random.default_rng(4)
    largest = 1e5 if dtype is np.float32 else 1e6
    multiples = np.concatenate([np.arange(1, 500), random.integers(1, int(largest / np.pi * 4), 500)])
    pieces = [2.0 ** np.arange(-100, 1), random.uniform(0, 7, 1000), random.uniform(0, largest, 1000), [0.0, largest]]
    x = np.concatenate([*pieces, multiples * np.pi / 4]).astype(dtype)
    return np.concatenate([x, -x])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sine_and_cosine_are_right_up_to_many_turns(dtype):
    x = angles(dtype)
    for name, found in zip(("sin", "cos"), run(("sin", "cos"), x), strict=True):
        wrong = errors(name, x, found)
        worst = wrong.argmax()
        assert wrong[worst] <= BOUND[dtype][name], f"{name}({x[worst]!r}) = {found[worst]!r}: {wrong[worst]:.2f}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sine_and_cosine_of_what_is_far_too_large_stay_between_minus_one_and_one(dtype):
    x = (10.0 ** np.linspace(5, np.log10(np.finfo(dtype).max) - 0.01, 300)).astype(dtype)
    sine, cosine = run(("sin", "cos"), np.concatenate([x, -x]))
    assert np.abs(sine).max() <= 1
    assert np.abs(cosine).max() <= 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("machine", ["this", "a plain one"])
def test_rounding_is_exact_and_keeps_the_sign_of_zero(dtype, machine):
    random = np.random.default_rng(5)
    large = 2.0 ** np.arange(20, 60)
    pieces = [np.arange(0, 20, 0.25), random.uniform(0, 1e6, 200), large, large + 0.5, large - 0.5, [1e-30, np.inf]]
    x = np.concatenate(pieces).astype(dtype)
    x = np.concatenate([x, -x, np.array([np.nan], dtype)])
    floor, nearest = run(("floor", "round"), x, Target("x86-64", "", 16, 16) if machine != "this" else None)
    for found, right in ((floor, np.floor(x)), (nearest, np.round(x))):
        np.testing.assert_array_equal(found, right)
        np.testing.assert_array_equal(np.signbit(found), np.signbit(right))


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 3.0, 7.0, -1.0, -2.0, 0.5, -0.5, 0.3, -1.7])
def test_powers(exponent):
    x = np.concatenate([np.geomspace(1e-3, 1e3, 200), -np.geomspace(1e-3, 1e3, 50), [0.0, np.inf, np.nan]])
    b = Builder()
    program = b.finish([b.power(b.input(x.size), exponent)], [])
    (found,), _ = Kernel(program, np.float64)(Operands(1, 1, inputs=[x.reshape(1, 1, -1)]))
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(found.reshape(-1), np.power(x, exponent), rtol=1e-14, atol=0)


def test_every_unary_operation_has_code():
    assert {op.value for op in UNARY - {Op.NEG, Op.NOT, Op.POW}} == set(maths.FUNCTIONS)


@pytest.mark.parametrize(
    ("table", "place", "change"),
    [
        *[("_EXP", 4, 1e-3), ("_ATANH", 2, 1e-2), ("_LN2", 1, 1e-5), ("_LN2", 0, 1e-6), ("_ERF", 5, 1e-5)],
        *[
            ("_ERFC", 0, 1e-5),
            ("_ATAN", 2, 1e-4),
            ("_SIN", 3, 1e-5),
            ("_COS", 2, 1e-4),
            ("_HALF_PI", 4, 1e-11),
            ("_HALF_PI", 1, 1e-8),
        ],
    ],
)
def test_a_wrong_coefficient_is_told_apart(table, place, change, monkeypatch):
    waves = table in ("_SIN", "_COS", "_HALF_PI")
    check = test_sine_and_cosine_are_right_up_to_many_turns if waves else test_functions_are_right_over_the_whole_range
    numbers = list(getattr(maths, table)[False])
    numbers[place] += change
    monkeypatch.setitem(getattr(maths, table), False, tuple(numbers))
    with pytest.raises(AssertionError):
        check(np.float32)
