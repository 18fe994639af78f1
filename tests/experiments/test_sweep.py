"""Sweeps: what is refused before the start, what is run, skipped, resumed and reported.

Runs are those of `fake_train.py`; the last test trains for real.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from deepseek_jax.analysis.runs import FAILED
from deepseek_jax.config import STRATEGIES, Config, to_dict
from deepseek_jax.model.count import count_parameters
from experiments import common, sweep
from experiments.launch import control, local, plan, population
from experiments.launch.progress import Progress
from tests.train.corpus import write_corpus

ROOT = Path(__file__).resolve().parents[2]
TINY = "experiments/configs/tiny.py"
SWEEP = '''"""Which is best?

More about it.
"""

CONFIG = "{config}"


def sweep(arg=None):
    for strategy in ({strategies}):
        for seed in range(2):
            yield {{
                "name": f"{{strategy}}-s{{seed}}",
                "balance.strategy": strategy,
                "seed": seed,
                "train.steps": {steps},
                **({{"data.batch": 8}} if arg == "small" else {{}}),
            }}


def metrics():
    return ("ce", "maxvio_batch")
'''


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def write(tmp_path):
    """Writes a sweep file: the example, with other strategies or steps, or any text."""

    def write(
        text: str = SWEEP, strategies: str = "'none', 'v3'", steps: int = 8
    ) -> str:
        path = tmp_path / "sweep_file.py"
        if text is SWEEP:
            text = text.format(config=TINY, strategies=strategies, steps=steps)
        path.write_text(text)
        return str(path)

    return write


ONE_GROUP = {
    "name": "all",
    "model.moe.num_experts": 16,
    "model.moe.num_groups": 1,
    "model.moe.keep_groups": 1,
}


def points(*each: dict, config: str = TINY) -> str:
    return f'"""T."""\nCONFIG = {config!r}\ndef sweep():\n    yield from {each!r}\n'


def fake(**modes: str) -> local.Command:
    """The command of a fake run; `modes` by the run's name."""

    def command(planned, item, folder):
        config = json.dumps(item.record()["config"])
        mode = modes.get(item.name.replace("-", "_"), "")
        module = [sys.executable, "-m", "tests.experiments.fake_train"]
        return [*module, config, str(folder), mode]

    return command


def rows_of(workdir: Path) -> dict[str, dict]:
    return {
        row["name"]: row for row in json.loads((workdir / "summary.json").read_text())
    }


def starts_of(workdir: Path, name: str) -> list[str]:
    return (workdir / name / "starts").read_text().splitlines()


def start(spec: str, workdir: Path, command=None, workers: int = 1) -> int:
    planned = plan.load(spec)
    plan.save(planned, workdir)
    return local.run(planned, workdir, workers, command or fake())


def test_a_sweep_file_becomes_a_plan(write):
    planned = plan.load(write(), command="the command")
    assert [item.name for item in planned.items] == [
        "none-s0",
        "none-s1",
        "v3-s0",
        "v3-s1",
    ]
    assert (planned.title, planned.about) == ("Which is best?", "More about it.")
    assert planned.metrics == ("ce", "maxvio_batch")
    third = planned.items[2]
    assert (third.config.balance.strategy, third.config.seed) == ("v3", 0)
    assert third.config.train.steps == 8
    base = common.from_config_dict(plan.base_config(TINY))
    assert third.config.model == base.model
    assert plan.load(f"{write()}:small").items[0].config.data.batch == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (points({"balance.sped": 1e-2}), "run sped=0.01: .*'balance.speed'"),
        (points({"model.moe.top_k": 9}), r"run top_k=9: model.moe.top_k = 9"),
        (points({"balance": {}}), "balance"),
        (
            points({"balance.strategy": "quantile", "model.moe.top_k": 16} | ONE_GROUP),
            r"top_k = 16: must be below num_experts = 16 for .*'quantile'",
        ),
        (points({"seed": "x"}), "seed=x"),
        (points({"seed": 1}, {"seed": 1}), "2 runs are named 'seed=1'"),
        (points({"name": "a/b"}), "'a/b'"),
        (points({"name": ".."}), r"'\.\.'"),
        (points(), "nothing to run"),
        (
            points({}, config="experiments/configs/tinny.py"),
            "tinny.py: there is no such",
        ),
        ('"""T."""\nCONFIG = "x"\n', r"no function sweep\(\)"),
        ('"""T."""\ndef sweep():\n    yield {}\n', "names no CONFIG"),
    ],
)
def test_what_is_refused_before_the_start(text, message, write):
    with pytest.raises(ValueError, match=message):
        plan.load(write(text))


def test_an_argument_that_a_sweep_does_not_take(write):
    with pytest.raises(ValueError, match="takes no argument"):
        plan.load(f"{write(points({}))}:smoke")
    with pytest.raises(ValueError, match="there is no such file"):
        plan.load("nowhere.py")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({}, "base"),
        ({"balance.strategy": "v3", "seed": 1}, "v3-seed=1"),
        ({"balance.speed": 1e-4, "data.source": "a b/c"}, "speed=0.0001-source=a_b_c"),
    ],
)
def test_default_names(overrides, name):
    assert plan.default_name(overrides) == name


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 7),
        ("balance.strategy", "aux_seq"),
        ("balance.speed", 1e-5),
        ("balance.speed", 0),
        ("data.segment_mask", True),
        ("data.weights", ""),
        ("data.weights", "code=2,speech=1"),
        ("balance.speed_changes", ((100, 1e-3), (200, 0.0))),
        ("optim.mtp_weight_changes", ((5, 0.1),)),
    ],
)
def test_the_command_line_says_what_was_checked(key, value, write, monkeypatch):
    (item,) = plan.load(write(points({key: value}))).items
    words = ["train", f"--config={TINY}", plan.flag(key, value)]
    monkeypatch.setattr(sys, "argv", words)  # where ml_collections looks for overrides
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    values(words)
    assert common.from_config_dict(holder.value) == item.config


@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("demo.py", 4),
        ("balancing.py", 33),
        ("balancing.py:paper", 15),
        ("balancing.py:pair", 12),
        ("balancing.py:smoke", 4),
        ("bias_rate.py", 24),
        ("bias_rate.py:decades", 15),
        ("experts.py", 21),
        ("mla_rank.py", 21),
        ("mla_rank.py:smoke", 14),
        ("fp8.py", 24),
        ("fp8.py:v3", 6),
        ("fp8.py:short", 24),
        ("mtp_depth.py", 24),
        ("mtp_depth.py:depths", 9),
        ("node_limit.py", 15),
        ("schedules.py", 7),
    ],
)
def test_the_sweeps_of_this_repository(file, count):
    planned = plan.load(f"experiments/sweeps/{file}")
    assert len(planned.items) == count
    assert planned.title.endswith("?")
    path, _, _ = f"experiments/sweeps/{file}".partition(":")
    command = f"  python -m experiments.sweep --sweep={path} --workdir=runs/"
    assert command in Path(path).read_text()


@pytest.mark.parametrize("file", ["fp8.py", "bias_rate.py"])
def test_a_part_that_a_sweep_does_not_have(file):
    with pytest.raises(ValueError, match=f"{file}: :some is unknown.*:smoke"):
        plan.load(f"experiments/sweeps/{file}:some")


def test_experts_are_cut_and_shared_at_equal_parameters():
    """But for routers, which have a column and a bias for each expert."""
    items = plan.load("experiments/sweeps/experts.py").items[:7]
    sizes = []
    for model in (item.config.model for item in items):
        routers = model.moe.num_experts * (model.dim + 1) * model.num_moe
        counts = count_parameters(model)
        sizes.append((counts.total - routers, counts.active - routers))
    assert len({*sizes[:3]}) == len({*sizes[3:]}) == 1


def test_the_balancing_sweep_has_every_strategy_and_seed():
    items = plan.load("experiments/sweeps/balancing.py").items
    found = {(item.config.balance.strategy, item.config.seed) for item in items}
    assert found == {(strategy, seed) for strategy in STRATEGIES for seed in range(3)}


def test_a_dry_run_says_the_budget_and_starts_nothing(write, tmp_path, capsys):
    workdir = tmp_path / "out"
    assert sweep.main([f"--sweep={write()}", f"--workdir={workdir}", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("budget: ") and "\nruns: " in said
    assert not workdir.exists()
    workdir.mkdir()
    (workdir / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="holds a single run"):
        sweep.main([f"--sweep={write()}", f"--workdir={workdir}", "--dry-run"])


def test_overrides_are_not_for_a_sweep_s_command_line(write, tmp_path):
    with pytest.raises(ValueError, match=r"--config\.train\.steps=5: overrides.*file"):
        sweep.main(
            [
                f"--sweep={write()}",
                f"--workdir={tmp_path / 'out'}",
                "--config.train.steps=5",
            ]
        )


def test_a_sweep_runs_and_a_second_start_has_nothing_to_do(write, tmp_path):
    spec, workdir = write(), tmp_path / "out"
    assert start(spec, workdir) == 0
    rows = rows_of(workdir)
    assert {row["status"] for row in rows.values()} == {"done"}
    assert all(row["eval_ce"] and row["steps"] == 8 for row in rows.values())
    assert (rows["v3-s1"]["strategy"], rows["v3-s1"]["seed"]) == ("v3", 1)
    log = (workdir / "none-s0" / "log.txt").read_text()
    assert log.startswith("$ ") and "fake_train" in log
    assert start(spec, workdir) == 0
    assert [len(starts_of(workdir, name)) for name in rows] == [1] * 4


def test_one_failure_does_not_stop_the_others_and_resumes(write, tmp_path, capsys):
    spec, workdir = write(), tmp_path / "out"
    command = fake(none_s0="fail", none_s1="die", v3_s0="short")
    assert start(spec, workdir, command) == 1
    rows = rows_of(workdir)
    states = [row["status"] for row in rows.values()]
    assert states == ["failed", "failed", "failed", "done"]
    assert rows["none-s0"]["steps"] == 3 and rows["none-s0"]["eval_ce"] is None
    said = capsys.readouterr().err
    assert "none-s0: FAILED: error: the disk is full" in said
    assert "none-s1: FAILED: error: killed by SIGKILL" in said
    assert "v3-s0: FAILED: error: ended without a final evaluation" in said
    assert start(spec, workdir) == 0
    assert {row["status"] for row in rows_of(workdir).values()} == {"done"}
    resumed = [int(line.split()[0]) for line in starts_of(workdir, "none-s0")]
    assert resumed[0] == 0 and resumed[1] >= 3
    assert len(starts_of(workdir, "v3-s1")) == 1


def test_runs_end_with_a_sweep_that_is_killed(tmp_path):
    """Else they would hold their folders, and the same sweep could not go on."""
    run = (
        "import time; from experiments import common; common.end_with_parent(); "
        "print(1, flush=True); time.sleep(60)"
    )
    code = (
        "import os, subprocess, sys, time; from experiments import common\n"
        f"child = subprocess.Popen([sys.executable, '-c', {run!r}], "
        "env=os.environ | {common.PARENT: str(os.getpid())}, stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as sweep:
        child = Path("/proc") / sweep.stdout.readline().decode().strip()
        sweep.kill()
    for _ in range(200):
        # One that has ended has no command line, until somebody asks how it ended.
        if not child.exists() or not (child / "cmdline").read_bytes():
            return
        time.sleep(0.05)
    pytest.fail("the run outlived its sweep")


def test_runs_may_be_added_and_nothing_else_changed(write, tmp_path):
    workdir = tmp_path / "out"
    assert start(write(strategies="'none',"), workdir) == 0
    assert start(write(), workdir) == 0
    assert len(rows_of(workdir)) == 4
    assert [len(starts_of(workdir, name)) for name in rows_of(workdir)] == [1] * 4
    before = (workdir / "sweep.json").read_text()
    for changed, message in (
        (lambda: write(strategies="'v3',"), "'none-s0' isn't in this one"),
        (lambda: f"{write()}:small", "data.batch = 16 there and 8 here"),
        (lambda: write(steps=9), "train.steps = 8 there and 9 here"),
    ):
        with pytest.raises(ValueError, match=message):
            start(changed(), workdir)
    assert (workdir / "sweep.json").read_text() == before


def test_a_folder_of_a_single_run_is_refused(write, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds a single run"):
        start(write(), tmp_path)


def test_workers_share_the_cores(write, tmp_path):
    workdir = tmp_path / "out"
    assert start(write(), workdir, workers=2) == 0
    cores = len(os.sched_getaffinity(0))
    share = max(1, cores // 2)
    for name in rows_of(workdir):
        (line,) = starts_of(workdir, name)
        assert int(line.split("=")[1]) in (share, cores - share)


TEAM = """
import subprocess, sys
from pathlib import Path

for argument in sys.argv[1:]:
    folder, mode, config = argument.split(" ", 2)
    with (Path(folder) / "log.txt").open("a") as log:
        command = [sys.executable, "-m", "tests.experiments.fake_train"]
        subprocess.run([*command, config, folder, mode], stderr=log)
sys.exit("error: enough of them")
"""


def test_runs_that_share_a_process_end_each_for_itself(
    write, tmp_path, monkeypatch, capsys
):
    """One says itself why it fails, another only ends with the process."""
    planned = plan.load(write(strategies="'none', 'v3'"))
    modes = {"v3-s1": "fail", "none-s1": "die"}
    configs = {each.name: json.dumps(each.record()["config"]) for each in planned.items}

    def command(names, workdir):
        given = [f"{workdir / n} {modes.get(n, 'well')} {configs[n]}" for n in names]
        return [sys.executable, "-c", TEAM, *given]

    monkeypatch.setattr(local.population, "command", command)
    workdir = tmp_path / "out"
    plan.save(planned, workdir)
    assert local.run(planned, workdir, vectorize=4) == 1
    said = capsys.readouterr().err
    assert "2 runs as one program, 2 times" in said
    states = {name: row["status"] for name, row in rows_of(workdir).items()}
    failed = {"v3-s1", "none-s1"}
    assert states == {n: "failed" if n in failed else "done" for n in states}
    assert "v3-s1: FAILED: error: the disk is full" in said
    assert "none-s1: FAILED: error: enough of them" in said
    assert local.run(planned, workdir, command=fake(), vectorize=4) == 0


def test_runs_are_put_together_by_what_they_share(write):
    planned = plan.load(write(strategies="'none', 'v3'"))
    names = [item.name for item in planned.items]
    found = population.teams(planned, names[:3], 2)
    assert found == [["none-s0", "none-s1"], ["v3-s0"]]
    line = population.told(found, 2)
    assert line == (
        "--vectorize 2: 2 runs as one program; alone, as they are like no other: 1"
    )
    assert "no two runs" in population.told(found[1:], 2)


def test_a_run_on_a_mesh_is_not_put_together(write):
    text = points({"name": "wide", "mesh.data": 2}, {"name": "narrow"})
    planned = plan.load(write(text))
    with pytest.raises(ValueError, match="run wide: mesh has 2 devices"):
        population.teams(planned, ["wide", "narrow"], 2)


@pytest.mark.parametrize("workers", range(1, 12))
def test_shares_are_even_and_use_every_core(workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3, 10)))
    shares = local.shares(workers)
    assert len(shares) == workers
    if workers > 1:
        assert set().union(*shares) == set(range(3, 10))
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_the_summary_is_whole_at_every_moment(write, tmp_path, monkeypatch):
    """Every state that is written is a known one, and valid JSON."""
    seen = []
    real = local.tables.write_summaries

    def spy(path, rows):
        real(path, rows)
        seen.append(
            [row["status"] for row in json.loads((path / "summary.json").read_text())]
        )

    monkeypatch.setattr(local.tables, "write_summaries", spy)
    start(write(strategies="'none',"), tmp_path / "out", fake(none_s1="fail"))
    assert seen == [
        ["pending", "pending"],
        ["running", "pending"],
        ["done", "pending"],
        ["done", "running"],
        ["done", "failed"],
    ]


DRIVER = """
import sys
from pathlib import Path
from experiments.launch import local, plan, population
from tests.experiments.test_sweep import fake
planned = plan.load(sys.argv[1])
plan.save(planned, Path(sys.argv[2]))
sys.exit(local.run(planned, Path(sys.argv[2]), 2, fake(none_s0="slow", none_s1="slow")))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_lets_the_runs_save_and_exits_130(number, write, tmp_path, capsys):
    spec, workdir = write(), tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, spec, str(workdir)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    started = [workdir / name / "metrics.jsonl" for name in ("none-s0", "none-s1")]

    def has_stepped(path):
        return path.exists() and '"loss"' in path.read_text()

    while not all(map(has_stepped, started)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "the same command goes on from here" in said
    rows = rows_of(workdir)
    assert [row["status"] for row in rows.values()] == 2 * ["stopped"] + 2 * ["pending"]
    control.status(workdir)
    assert "4 runs: 2 stopped, 2 pending" in capsys.readouterr().out
    assert 1 <= rows["none-s0"]["steps"] < 8
    assert start(spec, workdir) == 0
    resumed = [int(line.split()[0]) for line in starts_of(workdir, "none-s0")]
    assert len(resumed) == 2 and resumed[1] >= 1


def test_a_follower_keeps_up_with_a_growing_and_a_cut_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = local.Follower(path)
    assert follower.latest() == {}
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert follower.latest()["step"] == 1
    with path.open("a") as file:
        file.write('ss": 2.0}\n{"step": 2, "eval_ce": 1.0}\n')
    assert follower.latest() == {"step": 2, "loss": 2.0}
    path.with_suffix(".new").write_text('{"step": 1, "loss": 3.5}\n')
    path.with_suffix(".new").replace(path)
    assert follower.latest() == {"step": 1, "loss": 3.5}


SUMMARY = {
    "name": str,
    "overrides": dict,
    "strategy": str,
    "seed": int,
    "steps": int,
    "eval_ce": float,
    "maxvio_global": float,
    "maxvio_batch": float,
    "dead_experts": int,
    "tokens_per_s": float,
    "status": str,
}


def command_line(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.sweep", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--sweep"),
        (("--sweep=nowhere.py", "--workdir=x"), "nowhere.py: there is no such file"),
        (
            ("--sweep=experiments/sweeps/demo.py", "--workdir=x", "--workers=0"),
            "1 or more",
        ),
    ],
)
def test_bad_input_ends_with_2(arguments, message):
    done = command_line(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (ROOT / "x").exists()


def test_a_corpus_is_opened_before_the_first_run(tmp_path):
    file = tmp_path / "sweep_file.py"
    environment = {"DEEPSEEK_JAX_CACHE": str(tmp_path / "cache")}
    file.write_text(points({"name": "away", "data.source": "nowhere/*.txt"}))
    done = command_line(
        f"--sweep={file}", f"--workdir={tmp_path / 'out'}", **environment
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: run away: data.source = 'nowhere/*.txt': no such file; give 'builtin', "
        "a corpus folder, or a path or pattern of .txt, .jsonl, .jsonl.gz, .parquet "
        "files\n"
    )
    assert not (tmp_path / "out").exists()


def test_each_corpus_is_opened_once(tmp_path, write, monkeypatch):
    opened = []
    monkeypatch.setattr(plan, "open_corpus", opened.append)
    each = [{"data.source": s, "seed": n} for n in (0, 1) for s in ("a.txt", "b.txt")]
    plan.open_corpora(plan.load(write(points(*each))))
    assert [data.source for data in opened] == ["a.txt", "b.txt"]


def test_a_real_sweep(tmp_path):
    """What summary.json says is what the runs' own records say."""
    corpus = write_corpus(tmp_path / "corpus")
    small = {
        "data.source": str(corpus),
        "data.tokenizer": "bytes",
        "data.batch": 4,
        "data.length": 32,
        "model.vocab_size": 264,
        "model.dim": 16,
        "model.num_layers": 2,
        "model.dense_dim": 16,
        "model.moe.ffn_dim": 8,
        "runtime.block": 8,
    }
    each = [{"name": f"v3-s{seed}", "seed": seed} | small for seed in (0, 1)]
    file = tmp_path / "small.py"
    file.write_text(points(*each, config=f"{TINY}:smoke"))
    workdir = tmp_path / "out"
    environment = {"DEEPSEEK_JAX_CACHE": str(tmp_path / "cache")}
    arguments = (f"--sweep={file}", f"--workdir={workdir}")
    done = command_line(*arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert "Report:" in done.stdout
    rows = rows_of(workdir)
    assert list(rows) == ["v3-s0", "v3-s1"]
    for seed, row in enumerate(rows.values()):
        assert row.keys() >= SUMMARY.keys()
        for name, kind in SUMMARY.items():
            assert isinstance(row[name], kind), name
        lines = (workdir / row["name"] / "metrics.jsonl").read_text().splitlines()
        *_, training, evaluation = map(json.loads, lines)
        assert (row["strategy"], row["seed"], row["status"]) == ("v3", seed, "done")
        assert row["overrides"] == {"seed": seed} | small
        assert row["steps"] == training["step"] == evaluation["step"] == 6
        assert row["eval_ce"] == evaluation["eval_ce"]
        assert row["maxvio_global"] == evaluation["eval_maxvio_global"]
        assert row["maxvio_batch"] == training["maxvio_batch"]  # 10% of six steps
    assert (workdir / "report.html").stat().st_size > 4e6
    assert (workdir / "figures" / "overview.png").exists()
    again = command_line(*arguments, **environment)
    assert again.returncode == 0 and "2 of 2 runs are done already" in again.stderr
    assert rows_of(workdir) == rows


def test_the_config_saved_is_the_config_checked(write, tmp_path):
    planned = plan.load(write())
    plan.save(planned, tmp_path)
    saved = json.loads((tmp_path / "sweep.json").read_text())
    configs = [record["config"] for record in saved["runs"]]
    expected = [json.loads(json.dumps(to_dict(item.config))) for item in planned.items]
    assert configs == expected
    assert common.from_config_dict(configs[0]) == planned.items[0].config
    assert isinstance(planned.items[0].config, Config)


@pytest.mark.parametrize(
    ("log", "shown"),
    [
        ("$ train\n", "none-s0 +1 0/8"),
        ("$ train\ncompiling the training step\n", "0/8 (compiling the training step)"),
        ("$ train\nstep 1/8  loss 3\n", "none-s0 +1 0/8"),
        ("step 4/8  loss 3\nevaluating after step 4\n", "(evaluating after step 4)"),
        ("a word " * 20, "(" + ("a word " * 20)[:50] + ")"),
        ("$ train\nerror: it is full\n", "none-s0 +1 0/8"),
    ],
)
def test_progress_says_what_a_run_does_besides_steps(
    log, shown, write, tmp_path, capsys
):
    state = local.State(plan.load(write()), tmp_path)
    (tmp_path / "none-s0").mkdir()
    (tmp_path / "none-s0" / "log.txt").write_text(log)
    progress = Progress(state)
    progress.live = True
    progress.show([["none-s0", "none-s1"]])
    assert f"{shown}  ETA" in capsys.readouterr().err


def test_a_run_that_failed_stays_so_until_it_starts_anew(write, tmp_path):
    spec, workdir = write(), tmp_path / "out"
    assert start(spec, workdir, fake(v3_s0="fail")) == 1
    state = local.State(plan.load(spec), workdir)
    assert state.named(FAILED) == ["v3-s0"]
    others = set(state.items) - {"v3-s0"}
    assert local.run(state.plan, workdir, command=fake(), only=others) == 0
    assert rows_of(workdir)["v3-s0"]["status"] == FAILED
    assert start(spec, workdir) == 0
    assert {row["status"] for row in rows_of(workdir).values()} == {"done"}
