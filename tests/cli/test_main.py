"""The entry point: help, errors in one sentence, exit codes, and nothing heavy before it is needed."""

import os
import signal
import subprocess
import sys

import pytest

import mmbridge
from mmbridge.cli.main import COMMANDS, main

PROGRAM = [sys.executable, "-m", "mmbridge"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_examples(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    examples = text.partition("examples:")[2].splitlines()
    assert sum(line.strip().startswith(f"mmbridge {command}") for line in examples) >= 2
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"\n    {command} " in capsys.readouterr().out


def test_no_command_shows_the_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: mmbridge")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["--verison"], "'--verison' is not an option of mmbridge; see `mmbridge --help`."),
        (["train"], "the following arguments are required: RECIPE; see `mmbridge train --help`."),
        (
            ["generate", "x", "--out", "y"],
            "the following arguments are required: --messages; see `mmbridge generate --help`.",
        ),
        (["generate", "x", "--seed", "y"], "argument --seed: invalid int value: 'y'; see `mmbridge generate --help`."),
        (["train", "x", "--res"], "train does not take '--res'; see `mmbridge train --help`."),
        (["train", "x", "--resume", "--overwrite"], "argument --overwrite: not allowed with argument --resume; see "),
        (["ls", "recipes", "*", "more"], "ls does not take 'more'; see `mmbridge ls --help`."),
        (["ls", "recpes"], "there is no kind 'recpes' to list; did you mean 'recipes' or "),
        (
            ["train", "tiny/encoder_alignment", "--out", "x", "run.stpes=1"],
            "run.stpes is not a known key; did you mean 'st",
        ),
        (["train", "tiny/encoder_alignment", "steps"], "override 'steps' is not of the form key=value"),
        (
            ["validate", "tiny/encoder_aligment"],
            "neither a file nor a shipped recipe; did you mean 'tiny/encoder_alignment'",
        ),
        (["cp", "tiny/encoder_alignment", "/dev/null/x"], "/dev/null: file exists."),
    ],
)
def test_bad_command_lines_are_one_sentence_and_exit_code_2(arguments, sentence, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("mmbridge: ")
    assert sentence in line


def test_overrides_may_stand_behind_options(capsys, tmp_path):
    assert (
        main(["train", "tiny/encoder_alignment", "run.steps=1", "--out", str(tmp_path), "run.seed=x", "run.steps=y"])
        == 2
    )
    assert "run.steps is 'y'" in capsys.readouterr().err


def test_traceback_is_shown_on_request():
    arguments = [*PROGRAM, "validate", "nowhere"]
    result = subprocess.run(arguments, env={**os.environ, "MMBRIDGE_TRACEBACK": "1"}, capture_output=True, text=True)
    assert "Traceback" in result.stderr
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_interruption_is_one_line_and_exit_code_130(tmp_path):
    dialogue = tmp_path / "dialogue.json"
    os.mkfifo(dialogue)
    process = subprocess.Popen(
        [*PROGRAM, "generate", "x", "--messages", dialogue, "--out", tmp_path],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    with dialogue.open("w"):  # returns when the command has begun to read the dialogue
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "mmbridge: interrupted\n"


def test_reader_that_goes_away_is_no_error():
    process = subprocess.Popen([*PROGRAM, "ls"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141


def test_installed_program_and_module_are_the_same():
    version = subprocess.run([*PROGRAM, "--version"], capture_output=True, text=True, check=True).stdout
    assert version == f"mmbridge {mmbridge.__version__}\n"
    program = os.path.join(os.path.dirname(sys.executable), "mmbridge")
    assert subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout == version


def test_help_takes_less_than_a_third_of_a_second():
    times = []
    for _ in range(3):
        process = subprocess.Popen([*PROGRAM, "train", "--help"], stdout=subprocess.DEVNULL)
        _, _, usage = os.wait4(process.pid, 0)
        times.append(usage.ru_utime + usage.ru_stime)  # not the clock's time, which depends on what else is running
    assert min(times) < 0.3
