"""Command lines: defaults < --config < flags, with the same one-line errors everywhere."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from typing import Any, Literal

import pytest

from intarsia import cli
from intarsia.cli import Flags, RunError, UserError, load_tree, parse, run_main
from intarsia.config import Budget, Config, ConfigError, Place
from intarsia.registry import Registry

TOOLS: Registry[Any] = Registry("tool")


class ToolConfig(Config, registry=TOOLS):
    """Base."""


class SawConfig(ToolConfig):
    teeth: int = 20
    """How many teeth."""
    maker: str = "anon"
    grip: ToolConfig | None = None


TOOLS.register("saw", SawConfig)(type("Saw", (), {}))


class KitConfig(ToolConfig):
    tools: tuple[ToolConfig, ...] = (SawConfig(), SawConfig(teeth=9))
    sizes: tuple[int, ...] = (1, 2, 3)


TOOLS.register("kit", KitConfig)(type("Kit", (), {}))


class OptimConfig(Config):
    lr: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the rate falls."""


class JobConfig(Config):
    """Does a job."""

    run: Place[str]
    """Folder of the run."""
    tool: ToolConfig = SawConfig(teeth=33)
    optim: OptimConfig = OptimConfig(lr=2e-4)
    steps: Budget[int] = 10
    init: str | None = None
    dtype: str = "fp32"
    exact: bool = True


@pytest.fixture
def config_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "job.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def job(*argv: str, aliases=None) -> JobConfig:
    return parse(JobConfig, ["--run", "r", *argv], aliases)[0]


def mistakes(*argv: str, aliases=None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(JobConfig, argv, aliases)
    return caught.value.errors


def test_defaults_then_config_then_flags(config_file):
    path = config_file("run: a\nsteps: 20\noptim: {lr: 1e-2}\ntool: {type: saw, teeth: 5}")
    config, flags = parse(JobConfig, ["--steps", "30", "--config", path, "--optim.schedule=constant"])
    assert config == JobConfig(run="a", steps=30, optim=OptimConfig(lr=1e-2, schedule="constant"), tool=SawConfig(teeth=5))
    assert flags == Flags()
    assert parse(JobConfig, ["--run", "b", "--config", path])[0].run == "b"


def test_the_order_of_flags_does_not_matter_to_types(config_file):
    path = config_file("run: a\ntool: {type: saw, teeth: 5}")
    for argv in (["--tool.sizes", "[4]", "--tool.type", "kit"], ["--tool.type", "kit", "--tool.sizes", "[4]"]):
        assert parse(JobConfig, ["--config", path, *argv])[0].tool == KitConfig(sizes=(4,))


def test_a_flag_changes_one_part_of_a_default():
    assert job("--tool.maker", "me").tool == SawConfig(teeth=33, maker="me")
    assert job("--optim.schedule", "constant").optim == OptimConfig(lr=2e-4, schedule="constant")


@pytest.mark.parametrize("argv", [("--tool", "saw", "--tool.teeth", "3"), ("--tool.teeth", "3", "--tool", "saw")])
def test_a_part_and_the_whole_are_not_both_given(argv):
    """In silence one would be dropped: ``--temperature 0.9 --temperature.top 0.8``."""
    assert "--tool" in mistakes("--run", "a", *argv)[0] and "give it whole, or all its parts" in mistakes("--run", "a", *argv)[0]
    assert job("--tool={type: saw, teeth: 4}", "--tool.maker", "me").tool == SawConfig(teeth=4, maker="me")


def test_another_type_by_flag_starts_from_that_types_defaults(config_file):
    path = config_file("run: a\ntool: {type: saw, teeth: 5, grip: {type: saw, teeth: 6}}")
    assert parse(JobConfig, ["--config", path, "--tool.type", "kit"])[0].tool == KitConfig()
    assert parse(JobConfig, ["--config", path, "--tool.type", "saw"])[0].tool == SawConfig(teeth=5, grip=SawConfig(teeth=6))
    assert parse(JobConfig, ["--config", path, "--tool.grip.type", "kit"])[0].tool == SawConfig(teeth=5, grip=KitConfig())
    assert job("--tool.grip.type", "kit", "--tool.grip.sizes.1", "7").tool == SawConfig(teeth=33, grip=KitConfig(sizes=(1, 7, 3)))


def test_a_part_that_does_not_name_its_type_has_the_default_one(config_file):
    """Two spellings of one configuration are changed alike by a flag."""
    for kind in ("saw", "kit"):
        found = [
            parse(JobConfig, ["--config", config_file(f"run: a\ntool: {tool}"), "--tool.type", kind])[0].tool
            for tool in ("{type: saw, teeth: 5}", "{teeth: 5}")
        ]
        assert found[0] == found[1] == (SawConfig(teeth=5) if kind == "saw" else KitConfig())


def test_items_of_lists_are_set_by_number(config_file):
    path = config_file("run: a\ntool: {type: kit, tools: [{type: saw}, {type: saw, teeth: 3}], sizes: [5, 6]}")
    tool = parse(JobConfig, ["--config", path, "--tool.tools.1.teeth", "4", "--tool.sizes.0", "9", "--tool.tools.0.maker", "1"])[0].tool
    assert tool == KitConfig(tools=(SawConfig(maker="1"), SawConfig(teeth=4)), sizes=(9, 6))
    default = job("--tool.type", "kit", "--tool.tools.1.maker", "me").tool
    assert default == KitConfig(tools=(SawConfig(), SawConfig(teeth=9, maker="me")))
    assert KitConfig().tools == (SawConfig(), SawConfig(teeth=9)), "the default itself is not touched"
    assert job("--tool.type", "kit", "--tool.sizes", "[]").tool == KitConfig(sizes=())
    assert "--tool.sizes.3: '3' is no index into a list of 3" in mistakes("--run", "r", "--tool.type", "kit", "--tool.sizes.3", "1")
    assert "'x' is no index" in mistakes("--run", "r", "--tool.type", "kit", "--tool.tools.x.teeth", "1")[0]


def test_text_fields_take_text_as_it_is():
    config = parse(JobConfig, ["--run", "7", "--tool.maker", "no", "--init", "1e-4", "--dtype", "null"])[0]
    assert (config.run, config.tool.maker, config.init, config.dtype) == ("7", "no", "1e-4", "null")
    assert job("--init", "null").init is None and job("--init=~").init is None
    assert job("--tool.type", "kit", "--tool.tools.0.maker", "[x").tool.tools[0].maker == "[x"
    assert job("--run=--odd=1").run == "--odd=1"


def test_values_are_yaml_1_2():
    config = job("--optim.lr", "1e-4", "--exact", "false", "--steps=010")
    assert config.optim.lr == 1e-4 and config.exact is False and config.steps == 10
    assert mistakes("--run", "r", "--exact", "no") == ["exact: Input should be a valid boolean; got 'no'"]
    assert mistakes("--run", "r", "--optim.lr", "nan") == ["optim.lr: Input should be a valid number; got 'nan'"]
    assert mistakes("--run", "r", "--optim.lr", ".nan") == ["optim.lr: Input should be a finite number; got nan"]
    assert mistakes("--run", "r", "--tool.type", "kit", "--tool.sizes", "[1")[0].startswith("--tool.sizes: '[1' is no YAML value (line 1:")


def test_aliases_are_short_names_for_paths():
    assert job("--teeth", "4", aliases={"teeth": "tool.teeth"}).tool == SawConfig(teeth=4)
    said = mistakes("--run", "r", "--teeht", "4", aliases={"teeth": "tool.teeth"})
    assert said[0].startswith("--teeht: unknown key; did you mean 'teeth'?")
    assert "short names:\n  --teeth is --tool.teeth\n" in cli.help_text(JobConfig, "do", None, {"teeth": "tool.teeth"})


def test_flags_that_every_script_knows():
    argv = ["--run", "r", "--check", "--dry_run", "--max_steps", "3", "--resume", "x/y", "--allow_low_space", "--debug", "--import", "json"]
    assert parse(JobConfig, argv)[1] == Flags(True, True, 3, "x/y", True, True, ("json",))
    assert parse(JobConfig, ["--max_steps=1", "--run=r"])[1].max_steps == 1


def test_a_module_of_ones_own_is_imported_before_the_configuration_is_read(tmp_path, monkeypatch):
    (tmp_path / "own_tools.py").write_text(
        "from tests.test_cli import TOOLS, ToolConfig\n"
        "class DrillConfig(ToolConfig):\n    bits: int = 7\n"
        "TOOLS.register('drill', DrillConfig)(type('Drill', (), {}))\n"
    )
    (tmp_path / "broken_tools.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "tests.test_cli", sys.modules[__name__])
    config, flags = parse(JobConfig, ["--run", "r", "--tool.type", "drill", "--tool.bits=3", "--import", "own_tools"])
    try:
        assert config.tool.type_name == "drill" and config.tool.bits == 3 and flags.imports == ("own_tools",)
    finally:
        del TOOLS._classes["drill"], TOOLS._configs["drill"], sys.modules["own_tools"]
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        parse(JobConfig, ["--run", "r", "--import", "broken_tools"])


BAD_LINES = {
    ("--run", "r", "--import", "./mine.py"): "--import: './mine.py'; expected the name of a module",
    ("--run", "r", "--import", "no_such.module"): "--import: there is no module 'no_such.module' in the current folder or on Python's path",
    ("--run", "r", "--max_steps", "-1"): "--max_steps: '-1'; expected a whole number of at least 1",
    ("--run", "r", "--max_steps", "0"): "--max_steps: '0'; expected a whole number of at least 1",
    ("--run", "r", "--max_steps", "1.5"): "--max_steps: '1.5'; expected a whole number of at least 1",
    ("--run", "r", "--max_steps", "²"): "--max_steps: '²'; expected a whole number of at least 1",
    ("--run", "r", "--check=false"): "--check: 'false' is too much; the flag takes no value",
    ("--run", "r", "--maxsteps", "3"): "--maxsteps: unknown key; did you mean 'max_steps'? allowed: run, tool",
    ("--run", "r", "--optin.lr", "3"): "--optin.lr: unknown key; did you mean 'optim'?",
    ("--run", "r", "--steps"): "--steps: a value is missing",
    ("--run", "--check"): "--run: a value is missing",
    ("--run", "r", "steps=3"): "'steps=3': expected --key value",
    ("--run", "r", "-s", "3"): "'-s': expected --key value",
    ("--run", "r", "--", "3"): "'--': expected --key value",
    ("--run", "r", "--optim.lrr", "3"): "optim.lrr: unknown key; did you mean 'lr'? allowed: lr, schedule",
    ("--run", "r", "--tool.type", "swa"): "tool: unknown tool 'swa'; did you mean 'saw'? known: kit, saw",
    ("--run", "r", "--steps.x", "3"): "steps: Input should be a valid integer",
    ("--run", "r", "--optim.lr.x.y", "3"): "optim.lr: Input should be a valid number",
    ("--run", "r", "--optim", "3", "--optim.lr", "4"): "--optim.lr: 'optim' is 3 as a whole already; give it whole, or all its parts",
    ("--run", "r", "--optim.lr", "4", "--optim={schedule: constant}"): "--optim.lr and --optim {schedule: constant}: a part and the whole",
    ("--steps", "3"): "run: Field required",
    ("--run", "r", "--config", "no/such"): "--config: 'no/such' is neither a file nor a shipped configuration",
    ("--run", "r", "--config", "a", "--config", "b"): "--config: given twice, 'a' and 'b'",
}


@pytest.mark.parametrize("argv", BAD_LINES, ids=[" ".join(argv) for argv in BAD_LINES])
def test_a_bad_command_line_is_answered_in_one_line(argv):
    assert any(line.startswith(BAD_LINES[argv]) for line in mistakes(*argv)), mistakes(*argv)


def test_all_mistakes_of_a_line_and_a_file_come_at_once(config_file):
    path = config_file("setps: 3\noptim: {lr: x}")
    said = mistakes("--config", path, "--max_steps", "x", "--foo", "1")
    assert [line.split(":")[0] for line in said] == ["--max_steps", "--foo", "setps", "run", "optim.lr"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: 1\na: 2", "line 2: the key 'a' stands twice"),
        (b"- 1", "holds a list; expected a mapping"),
        (b"\xff\xfe", "can't decode byte 0xff"),
        (b"a: [" * 40, "nested more than 32 deep"),
        (b"#" * (1 << 20) + b"#", "1048577 bytes; at most 1048576 are read"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, said):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    (line,) = mistakes("--config", str(path))
    assert line.startswith(f"{path}: ") and said in line


def test_an_empty_file_holds_the_defaults(config_file):
    assert parse(JobConfig, ["--config", config_file("# nothing\n"), "--run", "r"])[0] == JobConfig(run="r")


def test_config_finds_a_file_first_then_a_shipped_name(tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    (shipped / "set").mkdir(parents=True)
    (shipped / "set/one.yaml").write_text("run: shipped")
    monkeypatch.setattr(cli, "configs_folder", lambda: shipped)
    monkeypatch.chdir(tmp_path)
    assert cli.shipped_configs() == ["set/one"]
    assert parse(JobConfig, ["--config", "set/one"])[0].run == parse(JobConfig, ["--config", "set/one.yaml"])[0].run == "shipped"
    (said,) = mistakes("--config", "set/oen", "--run", "r")
    assert said.endswith("did you mean 'set/one'? shipped: set/one")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/one.yaml").write_text("run: own")
    assert parse(JobConfig, ["--config", "set/one.yaml"])[0].run == "own"


def test_a_reader_that_leaves_before_the_end_of_the_help_is_no_error(root):
    script = "from intarsia.cli import parse\nfrom tests.test_cli import JobConfig\nparse(JobConfig, ['--help'], program='do' * 100000)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=60) == 0


def test_help_lists_every_field_with_value_class_and_doc(capsys, config_file):
    with pytest.raises(SystemExit) as stop:
        parse(JobConfig, ["--help"], program="do")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith("usage: do ") and "Does a job." in out
    for line in (
        "--run (required; place)\n      Folder of the run.",
        "--tool.type ('saw'; identity)",
        "types: kit, saw;",
        "--tool.teeth (33; identity)\n      How many teeth.",
        "--optim.lr (0.0002; identity)",
        "--optim.schedule ('cosine'; identity)\n      How the rate falls.\n      one of: cosine, constant",
        "--steps (10; budget)",
        "--init (None; identity)",
        *(f"--{name}: " for name in ("check", "dry_run", "max_steps", "resume", "allow_low_space", "debug", "import")),
    ):
        assert line in out, line
    with pytest.raises(SystemExit):
        parse(JobConfig, ["--config", config_file("steps: 77"), "--tool.type", "kit", "-h"])
    out = capsys.readouterr().out
    assert "--tool.sizes ([1, 2, 3]; identity)" in out and "--tool.teeth" not in out and "--steps (77; budget)" in out


@pytest.mark.parametrize(
    "error", [ConfigError(["a: b", "c: d"]), UserError("a: b\nc: d"), ValueError("a: b\nc: d"), FileNotFoundError("a: b\nc: d")]
)
def test_a_users_mistake_ends_with_2_and_a_line_each(error, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog"])

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: a: b\nerror: c: d\n"


def test_a_message_is_never_empty(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(SystemExit):
        run_main(lambda: (_ for _ in ()).throw(ValueError()))
    assert capsys.readouterr().err == "error: ValueError()\n"


def test_debug_shows_the_traceback_and_other_errors_always_do(monkeypatch):
    def wrong():
        raise UserError("a")

    monkeypatch.setattr(sys, "argv", ["prog", "--debug"])
    with pytest.raises(UserError):
        run_main(wrong)
    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)


def test_paths_that_no_system_takes_are_reported_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog"])
    for wrong in (lambda: (tmp_path / ("a" * 300)).read_text(), lambda: tmp_path.read_text(), lambda: load_tree("a" * 300)):
        with pytest.raises(SystemExit) as stop:
            run_main(wrong)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    with pytest.raises(OSError, match="5"):  # no mistake of the user's
        run_main(lambda: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_ends_with_3_and_a_line_whoever_writes(number, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: (_ for _ in ()).throw(OSError(number, "full")))
    assert stop.value.code == 3 and capsys.readouterr().err.count("\n") == 1


def test_of_several_ranks_the_first_speaks_and_the_others_only_where_the_launcher_lets_them_live(capsys, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(sys, "argv", ["prog"])
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: (_ for _ in ()).throw(UserError("a")))
        assert stop.value.code == 2 and capsys.readouterr().err == "error: a\n" and len(waited) == int(rank)


def test_a_run_that_fails_ends_with_3_and_says_where(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog"])

    def main():
        error = RunError("loss: nan")
        error.add_note("rank 0, step 7")
        raise error

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 3 and capsys.readouterr().err == "error: loss: nan (rank 0, step 7)\n"


@pytest.mark.faults
@pytest.mark.parametrize(("world", "code"), [("2", 0), ("2", 143), ("1", 0)])
def test_a_launched_rank_is_not_torn_down_and_says_how_it_ended(world, code):
    """Teardown is made to abort: as threads of a process group may, once all work is done."""
    program = f"""
import atexit, os, sys
from intarsia.cli import run_main
class Last:
    def __del__(self, abort=os.abort):
        abort()
last = Last()
def main():
    atexit.register(print, "handled")
    print("done")
    if {code}:
        raise SystemExit({code})
run_main(main)
"""
    env = os.environ | {"WORLD_SIZE": world, "TORCHELASTIC_RUN_ID": "none"}
    done = subprocess.run([sys.executable, "-c", program], env=env, text=True, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (code if world == "2" else -signal.SIGABRT, "done\nhandled\n")
