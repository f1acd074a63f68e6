"""`moesaic trace` and `moesaic replay` on a small trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from papers import ROOT, pages
from trace_builders import clustered_trace
from typer.testing import CliRunner

from cluster.cli.main import app

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "t.npz"
    clustered_trace(num_requests=4, num_rows=6, seed=1).save(path)
    return path


def test_info_says_what_a_trace_holds(trace: Path) -> None:
    facts = json.loads(RUNNER.invoke(app, ["trace", "info", str(trace), "--json"]).stdout)

    assert facts["requests"] == 4 and facts["decode_rows"] == 24 and facts["domains"] == {"made-up": 4}
    assert "fingerprint" in RUNNER.invoke(app, ["trace", "info", str(trace)]).stdout


def test_replay_prints_every_combination(trace: Path, tmp_path: Path) -> None:
    policies = "lru,belady,eam+eam,belady+oracle"
    flags = ["--cache", "25%,0.5", "--link", "0.1,1", "--policies", policies, "--past", str(trace), "--json"]
    plot = tmp_path / "p.png"

    result = RUNNER.invoke(app, ["replay", str(trace), *flags, "--plot", str(plot)])

    cells = json.loads(result.stdout)["cells"]
    assert len(cells) == 16 and {c["cache"] for c in cells} == {0.25, 0.5}
    lru = [c for c in cells if c["policy"] == "lru"]
    assert all(c["gap_to_belady"] >= 0 and c["slowdown_to_oracle"] > 0 for c in lru)
    assert all(c["gap_to_belady"] == 0 for c in cells if c["policy"] == "belady")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_machine_can_be_described(trace: Path) -> None:
    def tpot_ms(*machine: str) -> float:
        flags = ["--cache", "50%", "--link", "0.1", "--policies", "lru+next-gate", "--json", *machine]
        return json.loads(RUNNER.invoke(app, ["replay", str(trace), *flags]).stdout)["cells"][0]["tpot_ms_mean"]

    usual = tpot_ms()

    assert tpot_ms("--layer-ms", "1.1") > usual + 5.9
    assert tpot_ms("--expert-ms", "0", "--row-ms", "0") < usual
    assert tpot_ms("--predict-ms", "1", "--predict-on-path") > usual + 5.9
    assert tpot_ms("--predict-ms", "0.01") >= usual


def test_replay_without_json_is_a_table(trace: Path) -> None:
    result = RUNNER.invoke(app, ["replay", str(trace), "--cache", "50%", "--link", "1", "--policies", "lru,mrs"])

    assert result.exit_code == 0
    assert "lru" in result.stdout and "mrs" in result.stdout and "timely" in result.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--policies", "fifo"], "no eviction policy 'fifo'"),
        (["--policies", "static"], "needs frequencies of a trace"),
        (["--cache", "1%"], "one token's"),
        (["--cache", "most"], "--cache most"),
        (["--link", "0"], "above 0"),
        (["--expert-bytes", "big"], "--expert-bytes"),
    ],
)
def test_wrong_flags_are_one_line_and_code_two(trace: Path, flags: list[str], said: str) -> None:
    result = RUNNER.invoke(app, ["replay", str(trace), "--link", "1", *flags])

    assert result.exit_code == 2
    assert said in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_past_of_another_model_is_refused_with_both_fingerprints(trace: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from cluster.policies.trace import load_trace

    other = load_trace(trace)
    replace(other, model=replace(other.model, fingerprint="e" * 16)).save(tmp_path / "o.npz")

    result = RUNNER.invoke(app, ["replay", str(trace), "--past", str(tmp_path / "o.npz")])

    assert result.exit_code == 2 and "e" * 16 in result.stderr and "f" * 16 in result.stderr


@pytest.mark.parametrize("content", ["", "no json\n", '{"text": "a"}\n', "[1]\n"])
def test_prompts_that_are_none_are_refused_with_the_line(tmp_path: Path, content: str) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(content)

    result = RUNNER.invoke(app, ["trace", "record", "--prompts", str(prompts), "--out", str(tmp_path / "t.npz")])

    assert result.exit_code == 2 and "p.jsonl" in result.stderr
    assert not (tmp_path / "t.npz").exists()


@pytest.mark.slow
def test_recorded_trace_replays(tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "t.npz"
    prompts.write_text("".join(json.dumps({"prompt": text, "domain": text[:1]}) + "\n" for text in ("def f(", "Am")))

    recorded = RUNNER.invoke(
        app, ["trace", "record", "--prompts", str(prompts), "--out", str(out), "--max-tokens", "4", "--threads", "1"]
    )

    assert recorded.exit_code == 0, recorded.output
    facts = json.loads(RUNNER.invoke(app, ["trace", "info", str(out), "--json"]).stdout)
    assert facts["model"] == "moesaic-demo" and facts["domains"] == {"d": 1, "A": 1} and facts["decode_rows"] <= 6
    cells = RUNNER.invoke(app, ["replay", str(out), "--cache", "25%", "--link", "1", "--policies", "lru", "--json"])
    assert json.loads(cells.stdout)["cells"][0]["loads_per_token"] > 0


@pytest.mark.slow
def test_documented_commands_can_use_the_sample_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = "models/prompts.jsonl"
    commands = [words for page in pages() for words in page.command_lines() if sample in words]
    assert commands
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)

    for words in commands:
        assert Path(words[0]).name == "moesaic" and words[1:3] == ["trace", "record"], "say here how to shorten it"
        result = RUNNER.invoke(app, [*words[1:], "--max-tokens", "2", "--limit", "2", "--threads", "1"])
        assert result.exit_code == 0, result.output
        out = words[words.index("--out") + 1]
        assert json.loads(RUNNER.invoke(app, ["trace", "info", out, "--json"]).stdout)["requests"] == 2
