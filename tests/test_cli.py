"""The command line, in this process: what is printed where, and the exit codes."""

from __future__ import annotations

import json
import sys

import pytest

from recurra.cli import run as recurra

TEXT = "One fish, two fish, red fish, blue fish. Black fish, blue fish, old fish, new fish.\n" * 30
SMALL = "--hidden-size 8 --embedding-size 6 --batch-size 4 --window 10 --updates 4 --validation 0.1 --test 0.1"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("fish.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def trained(home, capsys):
    assert recurra(f"train language fish.txt {SMALL}".split()) == 0
    capsys.readouterr()
    return home / "runs" / "fish"


def test_training_makes_a_run_and_says_what_to_try_next(home, capsys):
    assert recurra(f"train language fish.txt {SMALL}".split()) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    for said in ("bits per character", "runs/fish/loss.svg", "recurra sample runs/fish", "Next:"):
        assert said in printed.err
    made = {path.name for path in (home / "runs" / "fish").iterdir()}
    assert made >= {"config.toml", "run.json", "vocabulary.json", "metrics.jsonl", "checkpoints", "loss.svg", "corpus"}
    assert recurra(f"train language fish.txt {SMALL} --json".split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["run"] == "runs/fish-2"
    assert result["updates"] == 4


def test_the_configuration_is_printed_stored_and_usable_again(home, capsys):
    assert recurra(f"train language fish.txt {SMALL} --print-config".split()) == 0
    printed = capsys.readouterr().out
    assert "hidden_size = 8" in printed
    assert not (home / "runs").exists()
    (home / "again.toml").write_text(printed)
    assert recurra(["train", "language", "fish.txt", "--config", "again.toml", "--layers", "2"]) == 0
    stored = (home / "runs" / "fish" / "config.toml").read_text()
    assert "hidden_size = 8" in stored
    assert "layers = 2" in stored


def test_the_environment_has_its_say(home, capsys, monkeypatch):
    monkeypatch.setenv("RECURRA_HIDDEN_SIZE", "33")
    assert recurra(["train", "language", "fish.txt", "--print-config"]) == 0
    assert "hidden_size = 33" in capsys.readouterr().out
    assert recurra(["train", "language", "fish.txt", "--hidden-size", "34", "--print-config"]) == 0
    assert "hidden_size = 34" in capsys.readouterr().out


def test_evaluate_sample_info_and_env_answer_people_and_programs(trained, capsys):
    assert recurra(["evaluate", str(trained)]) == 0
    assert "bits per character" in capsys.readouterr().out
    assert recurra(["evaluate", str(trained), "fish.txt", "--json", "--streams", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens predicted"] == len(TEXT) - 1
    assert recurra(["sample", str(trained), "--length", "12", "--seed", "3", "--prompt", "One "]) == 0
    printed = capsys.readouterr().out
    assert len(printed) == len("One ") + 12 + 1
    assert recurra(["sample", str(trained), "--length", "12", "--seed", "3", "--prompt", "One ", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == printed[4:-1]
    assert recurra(["sample", str(trained), "--length", "200", "--temperature", "0", "--stop", "i"]) == 0
    assert "i" not in capsys.readouterr().out
    for what in (str(trained), str(trained / "checkpoints" / "last.json")):
        assert recurra(["info", what, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["updates taken"] == 4
    assert recurra(["info", str(trained)]) == 0
    assert "weight_hh" in capsys.readouterr().out
    assert recurra(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["python"] == sys.version.split()[0]
    assert recurra(["resume", str(trained)]) == 0


@pytest.mark.parametrize(
    ("command", "code", "complaint"),
    [
        ("trian language fish.txt", 2, 'Did you mean "train"'),
        ("train language fish.txt --hiden-size 8", 2, "did you mean '--hidden-size'"),
        ("train language fish.txt --hidden-size many", 2, "many"),
        (
            "train language fish.txt --hidden-size 0",
            2,
            "a whole number, at least 1, at most 65536, got 0",
        ),
        ("train language fish.txt --cell lstn", 2, "lstn"),
        ("train language fish.txt --config absent.toml", 2, "absent.toml"),
        ("train language", 2, "TEXT"),
        ("train language absent.txt", 1, "absent.txt"),
        ("train language fish.txt --seed 99999999999999999999", 2, "expected seed to be"),
        ("train language fish.txt --folder fish.txt", 2, "fish.txt is a file"),
        ("train language fish.txt --hidden-size 99999999999", 2, "at most 65536"),
        ("train language fish.txt --batch-size 100000", 1, "a batch size of 2267 or less"),
        ("sample nowhere", 1, "there is no run in nowhere"),
        ("resume fish.txt", 1, "there is no run in fish.txt"),
        ("info fish.txt", 1, "fish.txt is no checkpoint"),
        ("complete nowhere", 1, "there is no run in nowhere"),
    ],
)
def test_a_mistake_ends_in_a_clear_error_and_the_right_exit_code(home, capsys, command, code, complaint):
    assert recurra(command.split()) == code
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not (home / "runs" / "fish").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "empty"),
        (b"abc", "short"),
        (b"\x7fELF\x00\x01" * 100, "unit byte"),
        (b"fine text \xff\xfe not fine" * 50, "unit byte"),
    ],
)
def test_a_file_that_is_no_text_is_refused(home, capsys, content, complaint):
    (home / "odd.txt").write_bytes(content)
    assert recurra(["train", "language", "odd.txt"]) == 1
    assert complaint in capsys.readouterr().err
    assert not (home / "runs").exists()
    assert recurra(["train", "language", "odd.txt", "--folder", "a/b/c"]) == 1
    assert not (home / "a").exists()


def test_sample_names_the_words_of_a_prompt_that_it_does_not_know(home, capsys):
    assert recurra(f"train language fish.txt {SMALL} --unit word".split()) == 0
    capsys.readouterr()
    command = ["sample", "runs/fish", "--length", "3", "--prompt"]
    assert recurra([*command, "One zebra, two zebra, <unk> gnu"]) == 0
    assert "not in the vocabulary, and read as <unk>: zebra, gnu\n" in capsys.readouterr().err
    assert recurra([*command, "One fish"]) == 0
    assert "vocabulary" not in capsys.readouterr().err


def test_any_file_trains_by_the_byte(home, capsys):
    (home / "odd.bin").write_bytes(bytes(range(256)) * 10)
    assert recurra(f"train language odd.bin --unit byte {SMALL}".split()) == 0


def test_a_text_the_model_has_no_characters_for_is_refused(trained, capsys):
    trained.parent.parent.joinpath("greek.txt").write_text("λόγος " * 50)
    assert recurra(["evaluate", str(trained), "greek.txt"]) == 1
    assert "λ" in capsys.readouterr().err
    assert recurra(["sample", str(trained), "--prompt", "λ"]) == 1
    assert "λ" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--temperature=-1", "--top-k=0", "--top-p=1.5", "--length=-3"])
def test_impossible_ways_to_sample_are_refused(trained, capsys, option):
    assert recurra(["sample", str(trained), option]) == 2
    assert "got" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_the_other_one_offered(trained, capsys):
    [tensors] = trained.joinpath("checkpoints").glob("*.safetensors")
    whole = tensors.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 16
    tensors.write_bytes(flipped)
    for command in ("sample", "resume", "evaluate", "info", "complete"):
        assert recurra([command, str(trained)]) == 1, command
        assert tensors.name in capsys.readouterr().err
    tensors.write_bytes(whole)
    assert recurra(["sample", str(trained), "--length", "2"]) == 0


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("tokenizers", "--unit subword --vocabulary-size 300", "recurra[text]"),
        ("tensorboard", "--tensorboard", "recurra[tracking]"),
    ],
)
def test_a_missing_extra_is_answered_with_the_command_that_installs_it(
    home, capsys, monkeypatch, package, arguments, extra
):
    for name in [package, "torch.utils.tensorboard"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert recurra(f"train language fish.txt {arguments}".split()) == 1
    assert f"pip install '{extra}'" in capsys.readouterr().err


def test_complete_answers_a_pipe_line_by_line(trained, capsys, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("One fi\ntwo \n"))
    assert recurra(["complete", str(trained), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["One fi", "two "]
    assert all(line["offers"] for line in lines)


def test_a_text_of_one_line_can_be_gone_on_with_without_a_prompt(home, capsys):
    (home / "line.txt").write_text("no end of the line " * 100)
    assert recurra(f"train language line.txt {SMALL}".split()) == 0
    assert recurra(["sample", "runs/line", "--length", "5", "--seed", "1"]) == 0
    assert len(capsys.readouterr().out) == 6


def test_training_that_never_gives_a_finite_loss_has_failed(home, capsys):
    wild = "--learning-rate 1e20 --weight-decay 1 --warmup 0 --skip-limit 100"
    assert recurra(f"train language fish.txt {SMALL} {wild}".split()) == 1
    assert "no evaluation in 4 updates gave a finite loss" in capsys.readouterr().err


def test_resume_does_not_start_over_where_the_last_checkpoint_is_gone(trained, capsys):
    metrics = (trained / "metrics.jsonl").read_text()
    (trained / "checkpoints" / "last.json").unlink()
    assert recurra(["resume", str(trained)]) == 1
    assert "copy best.json to last.json" in capsys.readouterr().err
    assert (trained / "metrics.jsonl").read_text() == metrics
    (trained / "checkpoints" / "last.json").write_bytes((trained / "checkpoints" / "best.json").read_bytes())
    assert recurra(["resume", str(trained)]) == 0


def test_resume_notices_a_vocabulary_that_is_not_the_runs_own(trained, capsys):
    file = trained / "vocabulary.json"
    file.write_text(file.read_text().replace("f", "F", 1) + " ")
    assert recurra(["resume", str(trained)]) == 1
    assert "vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--count=0", "--count=100000"])
def test_as_many_offers_as_nobody_reads_are_refused(trained, capsys, option):
    assert recurra(["complete", str(trained), option]) == 2
    assert "--count from 1 to 100" in capsys.readouterr().err


def test_a_prompt_that_cannot_be_read_prints_nothing(trained, capsys):
    assert recurra(["sample", str(trained), "--prompt", "日本"]) == 1
    assert capsys.readouterr().out == ""


def test_an_interrupt_is_said_and_ends_with_130(trained, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("recurra.cli.language.evaluate", interrupt)
    assert recurra(["evaluate", str(trained)]) == 130
    assert "interrupted" in capsys.readouterr().err
