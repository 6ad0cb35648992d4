"""Settings: where they come from, which one wins, and what is said of a wrong one."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recurra.errors import ConfigError
from recurra.tasks.language_config import LanguageConfig
from recurra.training.config import read_complete, resolve, settings, to_toml


def test_defaults_are_overruled_by_toml_then_environment_then_flags(tmp_path):
    file = tmp_path / "some.toml"
    file.write_text("[model]\nhidden_size = 11\nlayers = 2\nembedding_size = 7\n")
    config = resolve(
        LanguageConfig,
        toml=file,
        environ={"RECURRA_LAYERS": "3", "RECURRA_EMBEDDING_SIZE": "8", "RECURRA_CACHE_DIR": "/", "HOME": "/"},
        flags={"embedding_size": 9, "hidden_size": None},
    )
    assert (config.model.hidden_size, config.model.layers, config.model.embedding_size) == (11, 3, 9)
    assert config.training == LanguageConfig().training


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[model]\nhiden_size = 3", "unknown setting 'hiden_size' in section [model]"),
        ("[model]\nhiden_size = 3", "did you mean 'hidden_size'?"),
        ("[modle]\nhidden_size = 3", "did you mean 'model'?"),
        ("model = 3", "expected a section [model]"),
        ("[model]\nhidden_size = 0", "a whole number, at least 1, at most 65536, got 0"),
        ("[model]\nhidden_size = 2.5", "got 2.5"),
        ("[model]\nhidden_size = true", "got True"),
        ("[model]\ncell = 'lstn'", "one of lstm, gru"),
        ("[training]\nclip_norm = -1", "a number, or none, above 0, got -1"),
        ("[training]\nlearning_rate = nan", "got nan"),
        ("[training]\nlearning_rate = inf", "got inf"),
        ("[training", "is not a TOML file"),
    ],
)
def test_a_wrong_toml_file_is_refused_with_what_was_expected(tmp_path, text, complaint):
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve(LanguageConfig, toml=file, environ={})
    assert complaint in str(caught.value)
    assert "wrong.toml" in str(caught.value)


def test_a_wrong_variable_or_flag_is_refused_by_its_own_name():
    with pytest.raises(ConfigError, match="RECURRA_HIDEN_SIZE: did you mean 'RECURRA_HIDDEN_SIZE'"):
        resolve(LanguageConfig, environ={"RECURRA_HIDEN_SIZE": "3"})
    with pytest.raises(ConfigError, match="got 'many' in the environment variable RECURRA_LAYERS"):
        resolve(LanguageConfig, environ={"RECURRA_LAYERS": "many"})
    with pytest.raises(ConfigError, match=r"expected dropout to be a number.*got 1.0 of --dropout"):
        resolve(LanguageConfig, environ={}, flags={"dropout": 1.0})
    with pytest.raises(ConfigError, match="unknown setting 'droput'"):
        resolve(LanguageConfig, environ={}, flags={"droput": 0.1})


def test_a_missing_configuration_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*absent\.toml"):
        resolve(LanguageConfig, toml=tmp_path / "absent.toml", environ={})


def test_none_is_written_out():
    assert resolve(LanguageConfig, environ={}, flags={"clip_norm": "none"}).training.clip_norm is None
    with pytest.raises(ConfigError):
        resolve(LanguageConfig, environ={}, flags={"learning_rate": "none"})


def strategy(setting):
    limits = setting.limits
    if limits["choices"]:
        values = st.sampled_from(limits["choices"])
    elif setting.kind is bool:
        values = st.booleans()
    elif setting.kind is int:
        values = st.integers(min_value=int(limits["low"] or 0), max_value=limits["high"] or 2**40)
    else:
        low = max(limits["low"] or 0.0, math.nextafter(limits["above"] or 0.0, 1))
        values = st.floats(low, limits["high"] or math.nextafter(limits["below"] or 1e9, 0))
    return values | st.none() if setting.optional else values


@given(st.fixed_dictionaries({name: strategy(each) for name, each in settings(LanguageConfig).items()}))
def test_a_configuration_survives_its_own_toml(tmp_path_factory, values):
    file = tmp_path_factory.mktemp("toml") / "all.toml"
    flags = {name: "none" if value is None else value for name, value in values.items()}
    config = resolve(LanguageConfig, environ={}, flags=flags)
    file.write_text(to_toml(config))
    assert resolve(LanguageConfig, toml=file, environ={}) == config
    assert read_complete(LanguageConfig, file) == config
    file.write_text(file.read_text().replace("seed =", "# seed ="))
    with pytest.raises(ConfigError, match="it lacks seed"):
        read_complete(LanguageConfig, file)


def test_reading_settings_does_not_load_torch():
    code = "import sys, recurra.tasks.language_config, recurra.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
