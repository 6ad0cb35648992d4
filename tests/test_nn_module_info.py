"""PyTorch's own samples for RNN, LSTM and GRU, right and wrong ones, given to recurra.nn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import recurra.nn
from oracles_torch import close, everything

INFOS = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls in (torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU)
}
ASKED: dict[str, Any] = {"device": "cpu", "requires_grad": True, "training": False}


def samples(name: str) -> list[Any]:
    return list(INFOS[name].module_inputs_func(INFOS[name], dtype=torch.float64, with_packed_sequence=True, **ASKED))


def wrong_samples(name: str, dtype: torch.dtype) -> list[Any]:
    return list(INFOS[name].module_error_inputs_func(INFOS[name], dtype=dtype, **ASKED))


def test_there_are_samples_for_all_three() -> None:
    assert {name: len(samples(name)) for name in INFOS} == {"RNN": 64, "LSTM": 32, "GRU": 32}
    assert all(len(wrong_samples(name, torch.float64)) >= 14 for name in INFOS)


@pytest.mark.parametrize("name", INFOS)
def test_right_samples_give_what_torch_gives(name: str) -> None:
    for sample in samples(name):
        made = []
        for module in (recurra.nn, torch.nn):
            torch.manual_seed(2)
            arguments = sample.constructor_input
            made.append(getattr(module, name)(*arguments.args, **arguments.kwargs, dtype=torch.float64))
        given = sample.forward_input.args
        assert not sample.forward_input.kwargs
        assert close(everything(made[0], *given), everything(made[1], *given)), sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", INFOS)
def test_wrong_samples_raise_what_torch_raises(name: str, dtype: torch.dtype) -> None:
    for sample in wrong_samples(name, dtype):
        build, call = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
        if sample.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(sample.error_type, match=sample.error_regex):
                getattr(recurra.nn, name)(*build.args, **build.kwargs)
            continue
        module = getattr(recurra.nn, name)(*build.args, **build.kwargs)
        with pytest.raises(sample.error_type, match="expected"):
            module(*call.args, **call.kwargs)
