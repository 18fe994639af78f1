"""The command that shows schedules: its three views, pictures, tables of one's own."""

import json

import pytest

from deepseek_jax.parallel.pipeline import actions, schedules
from deepseek_jax.parallel.pipeline.schedules import SCHEDULES
from experiments import common, schedule

SIZES = ["--ranks=4", "--microbatches=8"]


def shown(capsys, *words):
    schedule.main([*words])
    return capsys.readouterr().out


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        common.guarded(schedule.main, [*words])
    streams = capsys.readouterr()
    assert streams.err.startswith("error: ") and streams.err.count("\n") == 1
    assert (stop.value.code, streams.out) == (common.BAD_INPUT, "")
    return streams.err


@pytest.mark.parametrize("name", SCHEDULES)
def test_text_is_the_table_and_nothing_else(name, capsys):
    text = shown(capsys, f"--name={name}", *SIZES, "--text")
    assert text.count("\n") == 4
    assert actions.parse(text) == schedules.build(name, 4, 8).table


def test_json_has_everything(capsys):
    words = ["--name=dualpipe", "--ranks=8", "--microbatches=20", "--json"]
    made = json.loads(shown(capsys, *words, "--cost=F=1,I=1,W=1,pair=3"))
    assert made["makespan"] == 66 and made["cost"]["B"] == 2
    assert made["stages"] == 8 and made["stages_of"][1] == [1, 6]
    bubble, memory = made["bubble"], made["memory"]
    assert bubble["idle"] == [6] * 8 and bubble["expected"] == 6
    assert bubble["share"] == 6 / 66 and bubble["unmet"] == []
    assert memory["live"] == [9] * 8 and memory["expected"] == 9
    assert memory["deferred"] == [1, 2, 3, 4, 4, 3, 2, 1] and memory["copies"] == 2
    table = actions.parse("\n".join(made["table"]))
    assert table == schedules.build("dualpipe", 8, 20).table
    cheaper = json.loads(shown(capsys, *words, "--cost", "pair=2,comm=0.1"))
    assert cheaper["makespan"] < 66
    assert cheaper["bubble"]["unmet"] == ["comm = 0", "F&B = F + B"]


def test_the_view_for_people(capsys):
    lines = shown(capsys, "--name=1f1b", "--ranks=2", "--microbatches=2").splitlines()
    assert lines == [
        "1f1b: 2 ranks, 2 microbatches, 2 stages",
        "cost F=1 I=1 W=1 B=2 pair=3 comm=0",
        "",
        "FF..BB.BB",
        ".FBBFBB..",
        "",
        "rank  stages  idle  live  deferred",
        "   0       0     3     2         0",
        "   1       1     3     1         0",
        "",
        "makespan     9; in lockstep 10",
        "bubble       3 at most, 33.3%; (PP - 1)(F + B) = 3",
        "activations  2 at most; PP = 2",
        "parameters   1 of 2 stages on a rank",
    ]
    view = shown(capsys, "--name=dualpipe", *SIZES, "--cost=pair=2.5")
    assert "4 stages, each in 2 places" in view
    assert "The bubble's formula assumes F&B = F + B." in view
    assert view.splitlines()[3].startswith("FFFfiwfFb")  # direction 1 in lower case


def test_long_schedules_fit_a_terminal(capsys):
    view = shown(capsys, "--name=gpipe", "--ranks=2", "--microbatches=200")
    assert max(map(len, view.splitlines())) == schedule.COLUMNS


def test_chunks(capsys):
    words = ["--name=interleaved", *SIZES, "--text"]
    assert "F3:7" in shown(capsys, *words, "--chunks=4")
    assert "F1:7" in shown(capsys, *words) and "F2" not in shown(capsys, *words)


@pytest.mark.parametrize("form", ["svg", "png"])
def test_pictures(form, tmp_path, capsys):
    path = tmp_path / "new" / "picture"
    assert shown(capsys, "--name=zb1p", *SIZES, f"--{form}", str(path)) == f"{path}\n"
    begin = {"svg": b"<?xml", "png": b"\x89PNG"}[form]
    assert path.read_bytes().startswith(begin)
    assert [each.name for each in path.parent.iterdir()] == ["picture"]
    error = refused(capsys, "--name=zb1p", *SIZES, f"--{form}", str(tmp_path))
    assert f"--{form}: {tmp_path} is a folder" in error


def test_a_table_of_one_s_own(tmp_path, capsys):
    words, path = ["--name=1f1b", *SIZES], tmp_path / "mine"
    text = shown(capsys, *words, "--text")
    changed = text.replace("B0:7", "I0:7 W0:7")
    path.write_text(changed)
    assert shown(capsys, *words, "--file", str(path), "--text") == changed
    given = [*words, "--file", str(path)]
    path.write_text(text.replace("F0:3 B0:0", "B0:0 F0:3", 1))
    assert "makespan     36;" in shown(capsys, *given)  # of 33: a forward comes late
    path.write_text(text.replace("F0:0 F0:1", "F0:1 F0:1", 1))
    assert "rank 0, tick 1, F0:1: is done a second time" in refused(capsys, *given)
    path.write_text(text.replace("F0:0", "G0:0", 1))
    assert "rank 0, op 0, 'G0:0': must be" in refused(capsys, *given)
    path.write_text(text[: text.index("\n")])
    assert "table of 1 ranks: must be of 4" in refused(capsys, *given)
    path.write_bytes(b"\xff\xfe")
    assert f"--file {path}: must be a text file" in refused(capsys, *given)
    assert "must be a text file" in refused(capsys, *words, "--file", "nowhere")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name=1f1b", "--ranks=4"], "required: --microbatches; see"),
        (["--name=pipe", *SIZES], "name = 'pipe': must be one of gpipe, 1f1b"),
        (["--name=dualpipe", "--ranks=3", "--microbatches=8"], "ranks = 3: must be ev"),
        (["--name=zb1p", *SIZES, "--chunks=2"], "chunks = 2: zb1p has none"),
        (["--name=1f1b", *SIZES, "--cost=F"], "--cost F: 'F' must be NAME=TIME"),
        (["--name=1f1b", *SIZES, "--cost=F=x"], "--cost F=x: 'F=x' must be NAME=TIME"),
        (["--name=1f1b", *SIZES, "--cost=X=1"], "cost X: must be one of F, I, W, B"),
        (["--name=1f1b", *SIZES, "--json", "--text"], "not allowed with"),
    ],
    ids=str,
)
def test_bad_input(words, message, capsys):
    assert message in refused(capsys, *words)


def test_help_names_every_schedule(capsys):
    with pytest.raises(SystemExit) as stop:
        schedule.main(["--help"])
    text = capsys.readouterr().out
    assert not stop.value.code and "{names}" not in text
    assert all(
        f"{name}  " in text and kind.about in text for name, kind in SCHEDULES.items()
    )
