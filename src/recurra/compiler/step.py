"""One step as one native call: what a stream runs for each of its inputs.

Everything of the step that depends on the state or on x is one program. What depends on weights and context alone is
calculated by PyTorch once, and again when they have changed.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from recurra.cell import Cell, State, leaves
from recurra.compiler.context import find_rows, flatten
from recurra.compiler.decompose import decompositions
from recurra.compiler.fingerprint import Attributes, fingerprint, look
from recurra.compiler.lines import at_line, line_of, name_of
from recurra.compiler.llvm.divide import TABLE
from recurra.compiler.llvm.kernel import Kernel, Workspace, kernel_for
from recurra.compiler.lower import Lowered, lower
from recurra.compiler.plan import Analysis
from recurra.compiler.rows import by_row
from recurra.compiler.schedule import LOOP, ONCE, Stage
from recurra.compiler.stages import ROWS, Compiled, build
from recurra.compiler.surroundings import TRACING, check, check_hooks, undisturbed
from recurra.compiler.trace import Step, trace, weights_of
from recurra.errors import BackendError

# As many steps are remembered.
_KEPT = 64
_ADVICE = "use backend='hoisted'", "use backend='loop'"
# Looked up once, for they are called at every push.
_version, _address = attrgetter("_version"), Tensor.data_ptr
_autocast, _empty_like = torch.is_autocast_enabled, torch.empty_like


class StepProgram:
    """The step of a cell for one kind of input, compiled. Batch size, weights and context may change freely.

    Raises BackendError where it cannot be compiled.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        if not step.old:
            raise BackendError("a native step needs a state, and this cell carries none; use backend='loop'")
        like = step.old[0].meta["val"]
        if like.device.type != "cpu":
            raise BackendError(f"native code is for the CPU, and the state is on {like.device}; use backend='loop'")
        analysis = Analysis(step)
        self.inputs, self.rows = analysis.inputs, analysis.rows
        carries = list(zip(step.old, step.new, strict=True))
        nodes = [node for node in analysis.order if node in analysis.forward and node.op == "call_function"]
        once = Stage(ONCE, tuple(node for node in nodes if node not in analysis.varying))
        every = Stage(LOOP, tuple(node for node in nodes if node in analysis.varying), tuple(range(len(carries))))
        for node in every.nodes:
            _check_dtypes(node)
        forms = dict.fromkeys(self.inputs, ONCE) | {step.x: ROWS}
        compiled = build(step, [once, every], self.rows, carries, forms, [step.y], self._lowered)
        *self.once, last = compiled
        if last.refused:
            raise BackendError(last.refused.replace(*_ADVICE))
        assert isinstance(last.native, _Lowered)
        lowered = last.native.lowered
        if lowered.outputs != (step.y,):
            raise BackendError("y is the same at every step, or x as it is; use backend='loop'")
        self.lowered: Lowered = lowered
        self.dtype: torch.dtype = like.dtype
        self.kernel: Kernel = kernel_for(lowered.program, str(like.dtype).removeprefix("torch."))
        self.text = "\n".join([*_listing("once", once), *_listing("at each push", every)])

    def _lowered(self, compiled: Compiled, forms: Mapping[fx.Node, str], free: frozenset[fx.Node]) -> _Lowered:
        return _Lowered(lower(compiled, self.rows, forms, free))

    def operands(self, B: int, given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The rows, vectors and matrices of the program, from the tensors of weights and context."""
        values = dict(zip(self.inputs, [*given, *self.step.constants.values()], strict=True))
        for stage in self.once:
            results = stage.function(B, *(values[node] for node in stage.inputs))
            values.update(zip(stage.outputs, results, strict=True))

        def flat(nodes: Sequence[fx.Node]) -> list[Tensor]:
            tensors = [(values[node], self.rows[node]) for node in nodes]
            return [(v if r is None else by_row(v, r)).detach().to(self.dtype).contiguous() for v, r in tensors]

        rows, vectors = flat(self.lowered.rows), flat(self.lowered.vectors)
        # Read at every step: copied, so that all weights are of one moment, as the packed matrices are.
        return [row.clone() for row in rows], [vector.clone() for vector in vectors], flat(self.lowered.matrices)


def _check_dtypes(node: fx.Node) -> None:
    """Raises BackendError for what PyTorch would not calculate: a product of float32 and float64, say."""
    if node.target is torch.ops.aten.cat.default or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return
    values = [operand.meta.get("val") for operand in node.all_input_nodes]
    found = {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}
    if len(found) > 1:
        kinds = " and ".join(sorted(map(str, found)))
        raise BackendError(f"{at_line(node)} takes {kinds}: convert x or the cell; use backend='loop'")


def _listing(title: str, stage: Stage[fx.Node]) -> list[str]:
    nodes = [f"{node.name} = {name_of(node)}({', '.join(map(str, node.args))})" for node in stage.nodes]
    lines = [line_of(node) for node in stage.nodes]
    found = [f"    {text}  # {line}" if line else f"    {text}" for text, line in zip(nodes, lines, strict=True)]
    return [f"  {title}:", *found] if found else []


class _Lowered:
    """A stage of native code that is not run as one of several."""

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        self.needs = (*lowered.inputs, *lowered.rows, *lowered.vectors, *lowered.matrices)
        self.gives = lowered.outputs

    def forward(self, call: Any, operands: Sequence[Tensor], state: Sequence[Tensor], fresh: Sequence[Tensor]) -> Any:
        raise NotImplementedError("a step is bound and pushed")

    def backward(self, call: Any, operands: Sequence[Tensor], gradient: Sequence[Tensor]) -> Any:
        raise NotImplementedError("a step is bound and pushed")


# Of cells that are alike but for the numbers of their weights, and so shared by them; a text says why there is none.
_PROGRAMS: dict[Hashable, StepProgram | str] = {}


def bind(
    backend: str, cell: Cell, x: Tensor, state: State, given: Any, context: Any, before: BoundStep | None = None
) -> BoundStep:
    """The step of ``cell`` for inputs like x (B, I), on the memory of ``state``, whose leaves are contiguous.

    ``backend`` is what was asked for, ``given`` is the context before the cell drew from it, and ``before`` is what was
    bound until now, on the same state.

    Raises BackendError where the step cannot be compiled; ShapeError where it does not return what a step must.
    """
    check_hooks(backend, cell)
    if torch.compiler.is_compiling():
        raise BackendError("a native step is no part of torch.compile; use backend='loop' inside of it")
    if torch.is_autocast_enabled("cpu"):
        raise BackendError("a native step keeps its precision, and autocast lowers it; use backend='loop'")
    parts, _ = flatten(context)
    # A trace lends the cell other weights for a moment.
    with TRACING:
        weights = weights_of(cell)
        tensors = [*weights.values(), *parts]
        check(backend, [x, *tensors, *leaves(state)])
        if any(tensor.is_inference() for tensor in tensors):
            raise BackendError(
                f"{type(cell).__name__} was made in inference mode, where PyTorch does not count changes of weights; "
                "make it outside, or use backend='loop'"
            )
        program = _program(cell, x, state, given, context, weights, parts)
        origin = Origin(cell, [*parts, *program.step.constants.values()])
    return BoundStep(program, origin, x, state, tensors, before)


def _program(
    cell: Cell, x: Tensor, state: State, given: Any, context: Any, weights: Mapping[str, Tensor], parts: list[Tensor]
) -> StepProgram:
    B = x.shape[0]
    key = (
        tuple((name, look(weight)) for name, weight in weights.items()),
        (x.dtype, x.device, x.shape[1:]),
        tuple((leaf.dtype, leaf.device, leaf.shape[1:]) for leaf in leaves(state)),
        flatten(context)[1],
        tuple(look(part, B) for part in parts),
        None if given is context else tuple(look(part, B) for part in flatten(given)[0]),
        fingerprint(cell),
        tuple(name for name, _ in cell.named_modules()),
    )
    program = _PROGRAMS.pop(key, None)
    if program is None:
        try:
            rows = find_rows(cell, B, given, context)
            with undisturbed():
                traced = trace(cell, x, state, context, rows, decompositions())
            program = StepProgram(traced)
        except BackendError as error:
            # Without its traceback, which holds the cell.
            program = str(error)
    _PROGRAMS[key] = program
    if len(_PROGRAMS) > _KEPT:
        _PROGRAMS.pop(next(iter(_PROGRAMS)))
    if isinstance(program, str):
        raise BackendError(program)
    return program


class BoundStep:
    """A step on its way through a stream: a program, the weights as they were, and the state, which it writes."""

    def __init__(
        self,
        program: StepProgram,
        origin: Origin,
        x: Tensor,
        state: State,
        tensors: Sequence[Tensor],
        before: BoundStep | None = None,
    ) -> None:
        self.program, self._origin, self._state = program, origin, state
        # Set by whoever knows that everything must be read again.
        self.outdated = False
        kernel, B = program.kernel, x.shape[0]
        self._threads = torch.get_num_threads()
        # Below the work that is worth a second thread, the number of threads does not matter.
        self._divisible = kernel.divide(1, B, 2)[1] > 1
        self._members = kernel.divide(1, B, self._threads)[1]
        self._x_dtype = x.dtype
        self._direct = x.dtype is program.dtype
        # x where it cannot be read as it lies, and where threads of a team find it; y in its turn.
        with torch.inference_mode(False):
            like = program.step.y.meta["val"]
            self._x = torch.empty_like(x, dtype=program.dtype, memory_format=torch.contiguous_format)
            self._y = torch.empty(B, *like.shape[1:], dtype=program.dtype, device=x.device)
        self._cast = None if like.dtype is program.dtype else like.dtype
        self._likes = {x.shape: self._y}
        if B == 1:
            self._likes[x.shape[1:]] = self._y[0]
        if before is not None and before.program is program and before._members >= self._members:
            self.workspace: Workspace = before.workspace
        else:
            self.workspace = kernel.workspace(B, self._members)
        with torch.no_grad():
            rows, vectors, matrices = program.operands(B, tensors)
        # These are read at every step.
        self._kept = rows, vectors
        self._call = kernel.bind(
            1,
            B,
            operands=[
                *(self._x.data_ptr() for _ in program.lowered.inputs),
                *map(_address, (*rows, *vectors, *matrices)),
            ],
            state=[*map(_address, leaves(state))],
            outputs=[self._y.data_ptr()],
            threads=self._threads,
            workspace=self.workspace,
        )
        self._x_address = self._x.data_ptr()
        # Converted once: that takes longer than a small step.
        whole = [ctypes.c_int64(number) for number in (0, B, 0, 1)]
        self._run = partial(kernel.native_run, ctypes.c_void_p(self.workspace.address), *whole)
        self._words = self.workspace.words.data
        entries = kernel.layout.entries
        self._y_word = TABLE + entries["output", 0]
        # Without an input, the word is written over at once.
        self._x_word = TABLE + entries.get(("input", 0), entries["output", 0])

    def __str__(self) -> str:
        return self.program.text

    def push(self, x: Tensor) -> Tensor | None:
        """One step of every row. x (B, I) -> y (B, O); with a batch size of 1 also (I,) -> (O,).

        None, and nothing done, where this is not the step for that x, or something has changed since it was bound.
        """
        like = self._likes.get(x.shape)
        if (
            like is None
            or x.dtype is not self._x_dtype
            or type(x) is not Tensor
            or not x.is_cpu
            or self.outdated
            or _autocast("cpu")
            or self._origin.changed()
            or (self._divisible and self._threads != torch.get_num_threads())
        ):
            return None
        if self._members > 1:
            return self._share(x, like)
        words = self._words
        if self._direct and x.is_contiguous() and not x.is_neg():
            words[self._x_word] = x.data_ptr()
        else:
            self._x.copy_(x.detach())
            words[self._x_word] = self._x_address
        y = _empty_like(like)
        words[self._y_word] = y.data_ptr()
        self._run()
        return y if self._cast is None else y.to(self._cast)

    def _share(self, x: Tensor, like: Tensor) -> Tensor:
        """The same by several threads."""
        self._x.copy_(x.detach())
        self._call.share()
        return like.to(self._cast, copy=True) if self._cast else like.clone()


class Origin(Attributes):
    """Notices when something changes that a compiled step was made from, as far as PyTorch and Python let it be known.

    Seen are other tensors in a place of a weight, tensors given other memory, changes that PyTorch counts, and what
    ``Attributes`` sees. Not seen is what is written past PyTorch's counter, as ``weight.data.add_(1)`` and numpy write.
    """

    def __init__(self, cell: Cell, others: Sequence[Tensor]) -> None:
        super().__init__(cell)
        self._tensors = [*weights_of(cell).values(), *others]
        self._numbers = self._read()
        # As long as the memory lives, no other tensor can have its address.
        self._memory = [tensor.detach() for tensor in self._tensors]

    def changed(self) -> bool:
        try:
            return super().changed() or self._read() != self._numbers
        except Exception:
            # Lent weights have no memory.
            return True

    def _read(self) -> list[int]:
        tensors = self._tensors
        return [*map(_version, tensors), *map(_address, tensors)]
