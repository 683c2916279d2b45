"""Every command that the READMEs show is understood, and every script has a --help."""
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import evaluate
import fit
import sweep
import train
from data import DataConfig, LookConfig, PrepareConfig, parse_flags
from model import ModelConfig

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "results/README.md", ROOT / "tests/bench/README.md"]
SCRIPTS = ["model.py", "data.py", "data.py look", "data.py prepare", "train.py", "evaluate.py",
           "sweep.py", "fit.py"]


def shown():
    """The command lines of our scripts in the READMEs, in code blocks and in backticks."""
    found = {}
    for readme in READMES:
        text = readme.read_text().replace("\\\n", " ")
        for line in re.findall(r"(?:python|torchrun)[^`\n|]*?\b\w+\.py[^`\n|]*", text):
            line = line.split("&&")[0].split("#")[0].strip()
            if not re.search(r"\.\.\.|…|tests/|pytest|python -", line):
                found[re.sub(r"\s+", " ", line)] = None
    return list(found)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, monkeypatch, capsys):
    file, *command = script.split()
    monkeypatch.setattr(sys, "argv", [file, *command, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / file), run_name="__main__")
    said = capsys.readouterr()
    assert not stop.value.code and not said.err and len(said.out) > 200


def test_there_are_commands_in_the_readmes():
    assert len(shown()) > 25


@pytest.mark.parametrize("line", shown())
def test_a_command_of_the_readmes_is_understood(line):
    """Its flags are parsed as the script does it. SystemExit would be an unknown flag or value."""
    words = shlex.split(line)
    number = next(k for k, word in enumerate(words) if word.endswith(".py"))
    script, argv = words[number], words[number + 1:]
    if script == "train.py":
        parse_flags((ModelConfig, DataConfig, train.TrainConfig), "x", train.PRESETS, argv=argv)
    elif script == "evaluate.py":
        parse_flags((evaluate.EvaluateConfig,), "x", positional="path", argv=argv)
    elif script == "fit.py":
        fit.arguments(argv)
    elif script == "sweep.py":
        config, flags = parse_flags((sweep.SweepConfig,), "x", rest=True, argv=argv)
        parse_flags((ModelConfig, DataConfig, train.TrainConfig), "x", train.PRESETS, argv=flags)
    elif script == "data.py":
        more = PrepareConfig if argv[:1] == ["prepare"] else LookConfig
        assert argv[0] in ("prepare", "look")
        parse_flags((DataConfig, more), "x", argv=argv[1:])
    else:
        assert script == "model.py"
