"""Pictures of any metric: which lines they have, and how those are named."""

import json
from pathlib import Path

import matplotlib.figure
import pytest
import yaml

from plait.errors import UserError
from plait.pretrain.plot import plot_losses, plot_metric

STEPS = 40


@pytest.fixture
def run_of(tiny, tmp_path):
    """Makes a run's folder: its config, and steps that `record` gives by their number."""

    def make(name: str, pattern: str, record) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tiny["model"]["pattern"] = pattern
        (folder / "config.yaml").write_text(yaml.dump(tiny))
        lines = [json.dumps({"step": step} | record(step)) for step in range(1, STEPS + 1)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    return make


@pytest.fixture
def panels(monkeypatch):
    """Of the last picture: each panel's title, the names of its legend, and all that its lines show."""
    found = []
    write = matplotlib.figure.Figure.savefig

    def read(figure, path):
        found[:] = [
            (
                axes.get_title(),
                [text.get_text() for text in axes.get_legend().get_texts()],
                [list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()],
            )
            for axes in figure.axes
        ]
        write(figure, path)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", read)
    return found


def test_a_number_is_a_line_a_run(run_of, panels, tmp_path):
    runs = [run_of(name, "M", lambda step, by=by: {"lr": step / by}) for name, by in (("a", 10), ("b", 20))]
    out = plot_metric(runs, "lr", tmp_path / "lr.png")
    assert out.read_bytes().startswith(b"\x89PNG")
    [(_, names, lines)] = panels
    assert names == ["a", "b"]
    assert lines == [[(step, step / by) for step in range(1, STEPS + 1)] for by in (10, 20)]


def test_a_number_of_some_steps(run_of, panels, tmp_path):
    run = run_of("a", "M", lambda step: {"loss": 1.0} | ({"validation_loss": 2.0} if step % 20 == 0 else {}))
    plot_metric([run], "validation_loss", tmp_path / "x.png")
    assert [lines for _, _, lines in panels] == [[[(20, 2.0), (40, 2.0)]]]


def test_a_list_is_a_line_a_layer_in_a_panel_a_run(run_of, panels, tmp_path):
    runs = [
        run_of("a", "ME[ME]x2", lambda step: {"max_violation": [step, 2 * step, 3 * step]}),
        run_of("b", "E", lambda step: {"max_violation": [step]}),
    ]
    plot_metric(runs, "max_violation", tmp_path / "x.png")
    assert [(title, names) for title, names, _ in panels] == [
        ("a", ["layer 1", "layer 3", "layer 5"]),
        ("b", ["layer 0"]),
    ]
    assert [line[-1] for line in panels[0][2]] == [(STEPS, STEPS), (STEPS, 2 * STEPS), (STEPS, 3 * STEPS)]


def test_runs_of_one_layer_are_drawn_over_each_other(run_of, panels, tmp_path):
    runs = [run_of(name, "-M", lambda step: {"state_norm": [step]}) for name in "ab"]
    plot_metric(runs, "state_norm", tmp_path / "x.png")
    assert [names for _, names, _ in panels] == [["a, layer 1", "b, layer 1"]]


def test_of_many_layers_the_first_and_the_last_are_named(run_of, panels, tmp_path):
    run = run_of("a", "[ME]x20", lambda step: {"dead_experts": [0] * 20})
    plot_metric([run], "dead_experts", tmp_path / "x.png")
    [(_, names, lines)] = panels
    assert names == ["layer 1", "layer 39"]
    assert len(lines) == 20


def test_all_runs_are_named_however_many(run_of, panels, tmp_path):
    runs = [run_of(f"run{i}", "M", lambda step: {"loss": 1.0}) for i in range(12)]
    plot_metric(runs, "loss", tmp_path / "x.png")
    assert panels[0][1] == [run.name for run in runs]


def test_shares_of_sources_that_come_later(run_of, panels, tmp_path):
    run = run_of(
        "a", "M", lambda step: {"blend_share": {"x": 0.5, "y": 0.5} | ({"z": 0.1} if step > 30 else {})}
    )
    plot_metric([run], "blend_share", tmp_path / "x.png")
    [(_, names, lines)] = panels
    assert names == ["x", "y", "z"]
    assert [len(line) for line in lines] == [STEPS, STEPS, STEPS - 30]


@pytest.mark.parametrize("metric", ["nonsense", "step", ""])
def test_an_unknown_metric_names_the_known(run_of, metric, tmp_path):
    runs = [
        run_of("a", "M", lambda step: {metric: 1, "loss": 1.0}),
        run_of("b", "M", lambda step: {"loss": 1.0, "lr": 0.1}),
    ]
    line = f"--metric {metric}: {runs[1]} has no such metric; name one of loss, lr"
    with pytest.raises(UserError) as error:
        plot_metric(runs[::-1], metric, tmp_path / "x.png")
    assert str(error.value) == line
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("draw", [plot_losses, lambda runs, out: plot_metric(runs, "loss", out)])
def test_a_picture_that_cannot_be_written(run_of, draw, tmp_path):
    run = run_of("a", "M", lambda step: {"loss": 1.0})
    with pytest.raises(UserError, match=r"x.foo: no picture can be written as .foo; name a .png with --out"):
        draw([run], tmp_path / "x.foo")
    with pytest.raises(UserError, match=r"x.png: No such file or directory; name another picture"):
        draw([run], tmp_path / "none" / "x.png")
