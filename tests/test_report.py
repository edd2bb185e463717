"""The report of a study: what it says, what it never says, how large it is."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from rlx.documents import Code, Heading, Paragraph, Picture, Table, markdown, page
from rlx.findings import findings
from rlx.report import LIMIT, write
from rlx.results import read
from rlx.study import Size, Task
from tests.studies import ENVS, make_study, programs_of, record

COMMAND = "rlx reproduce tiny --size small"


class Page(HTMLParser):
    """Tags that are open and must be closed, sources of pictures, every attribute that could load something."""

    VOID = {"meta", "img", "!doctype"}

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.tags = [], [], set()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def report(tmp_path, study, folder="report"):
    found = findings(study, "small", COMMAND, [read(program, tmp_path / "runs") for program in programs_of(study)])
    write(found, tmp_path / folder)
    return tmp_path / folder


def record_all(tmp_path, study, level=500.0, **keywords):
    rng = np.random.default_rng(0)
    for program in programs_of(study):
        scores = rng.normal(level, 30.0, len(program.seeds))
        record(tmp_path / "runs", program, scores, **keywords)


def test_a_document_is_the_same_in_both_forms():
    blocks = [
        Heading(2, "a < b"),
        Paragraph("`x|y` and **bold** & more"),
        Code("rlx <x>"),
        Table(["n", "|"], [["1|2", "`c`"]]),
        Picture("p.png", 'a "picture"'),
    ]
    assert markdown(blocks) == (
        "## a < b\n\n`x|y` and **bold** & more\n\n```\nrlx <x>\n```\n\n"
        '| n | \\| |\n| --- | --- |\n| 1\\|2 | `c` |\n\n![a "picture"](p.png)\n'
    )
    text = page("T & t", blocks, {"p.png": b"\x89PNG"})
    assert "<h2>a &lt; b</h2>" in text and "<title>T &amp; t</title>" in text
    assert "<code>x|y</code> and <strong>bold</strong> &amp; more" in text
    assert "<td>1|2</td><td><code>c</code></td>" in text and "<pre>rlx &lt;x&gt;</pre>" in text
    assert Page(text).sources == ["data:image/png;base64,iVBORw=="]


def test_a_report_says_what_was_run_and_how_it_stands(tmp_path):
    study = make_study(3)
    first, second = programs_of(study)
    record(tmp_path / "runs", first, [700.0, 710.0, 720.0])
    record(tmp_path / "runs", second, [500.0, 100.0, 510.0], failed=[1])
    folder = report(tmp_path, study)
    text = (folder / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| ppo | `probe/lqr`"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[2:7] == ["1,000", "3", "710", "10", "710"]
    assert cells[8:12] == ["500 ± 50", "2k", "high", "**better**, at 1k of 2k steps"]
    assert "**not comparable**, 1 of 3 runs met a NaN" in text and "seed 1, stopped: loss is nan" in text
    for part in (
        COMMAND,
        "cpu, 2 cores, physics mujoco",
        "abc123",
        "tuned on 100",
        "algo.gamma = 0.9",
        "their table 3",
    ):
        assert part in text, part
    assert "`num_envs" not in text  # a default
    assert "1 better, 1 not comparable" in text
    found = json.loads((folder / "results.json").read_text())
    assert found["programs"][0]["verdict"] == "better" and found["programs"][0]["mean"] == 710.0
    assert found["programs"][0]["runs"][2]["returns"] == [0.0, 180.0, 360.0, 540.0, 720.0]
    assert found["programs"][1]["runs"][1] == {
        "seed": 1,
        "score": None,
        "error": "loss is nan",
        "steps": [0, 250],
        "returns": [0.0, 25.0],
    }
    assert found["exploratory"] is True and found["seeds"] == [0, 1, 2]


def test_few_seeds_name_no_winner_and_ten_do(tmp_path):
    for seeds, folder in ((9, "few"), (10, "many")):
        study = make_study(seeds, ("good", "bad"))
        for program in programs_of(study):
            base = 900.0 if program.variant == "good" else 100.0
            record(tmp_path / folder / "runs", program, base + np.arange(float(seeds)))
        text = (report(tmp_path / folder, study) / "report.md").read_text()
        assert ("good is better" in text) == (seeds == 10)
        assert ("**Exploratory.**" in text) == ("name no winner" in text) == (seeds == 9)
        comparison = json.loads((tmp_path / folder / "report/results.json").read_text())["comparisons"][0]
        assert comparison["claim"] == ("better" if seeds == 10 else "exploratory")


def test_a_report_of_a_part_says_what_is_missing(tmp_path):
    study = make_study(2, ("ppo", "other"))
    programs = programs_of(study)
    record(tmp_path / "runs", programs[0], [500.0, 510.0])
    record(tmp_path / "runs", programs[1], [500.0, 510.0], finished=False)
    folder = report(tmp_path, study)
    text = (folder / "report.md").read_text()
    assert "| programs finished | 1 of 4 |" in text
    assert "other on probe/lqr (begun), ppo on probe/memory (missing), other on probe/memory (missing)" in text
    assert not (folder / "profile.png").exists() and "All environments together" not in text
    states = [program["state"] for program in json.loads((folder / "results.json").read_text())["programs"]]
    assert states == ["finished", "begun", "missing", "missing"]


def test_a_report_of_nothing_and_of_one_seed_can_be_written(tmp_path):
    study = make_study(1)
    text = (report(tmp_path, study) / "report.md").read_text()
    assert "nothing was run yet" in text and "0 of 2" in text
    record_all(tmp_path, study)
    assert "**within**" in (report(tmp_path, study) / "report.md").read_text()


def test_the_same_runs_give_the_same_bytes_and_neither_host_nor_path(tmp_path):
    study = make_study(3, ("a", "b"))
    record_all(tmp_path, study)
    first, second = report(tmp_path, study, "one"), report(tmp_path, study, "two")
    names = sorted(path.name for path in first.iterdir())
    pictures = ["curves.png", "minutes.png", "profile.png"]
    assert names == [*pictures, "report.html", "report.md", "results.json", "scores.png"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    for name in ("report.html", "report.md", "results.json"):
        assert str(tmp_path) not in (first / name).read_text()
    for name in ("report.md", "results.json"):  # a short name may stand in a picture's letters by chance
        assert not re.search(rf"\b{re.escape(platform.node())}\b", (first / name).read_text())
    assert "draw.py:function" in (first / "report.md").read_text()  # without its folder


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    study = make_study(3, ("a", "b"))
    record_all(tmp_path, study)
    found = Page((report(tmp_path, study) / "report.html").read_text())
    assert len(found.sources) == 4 and all(source.startswith("data:image/png;base64,") for source in found.sources)
    assert not found.tags & {"script", "link", "iframe"}


def test_no_file_of_a_large_study_is_above_the_limit(tmp_path):
    """25 environments, ten seeds, 21 evaluations each."""
    study = make_study(10, envs=[f"playground/Task{index}" for index in range(25)])
    record_all(tmp_path, study, points=21)
    folder = report(tmp_path, study)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert max(sizes.values()) <= LIMIT == 300_000, sizes
    from matplotlib.image import imread

    height, width, _ = imread(folder / "curves.png").shape
    assert width >= 800 and height >= 600  # still to be read


def test_normalised_scores_take_the_range_of_the_task(tmp_path):
    study = make_study(3, environments={ENVS[0]: Task(0.0, 1000.0), ENVS[1]: Task(400.0, 600.0)})
    for program in programs_of(study):
        record(tmp_path / "runs", program, [500.0, 500.0, 500.0])
    together = json.loads((report(tmp_path, study) / "results.json").read_text())["together"]["ppo"]
    assert together["mean"] == together["iqm"] == 0.5


def test_reports_need_no_jax():
    code = "import sys, rlx.report, rlx.findings, rlx.results, rlx.study; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("seeds", [2, 12])
def test_the_size_decides_whether_a_report_is_exploratory(seeds):
    study = make_study(3, sizes={"small": Size(tuple(range(seeds)))})
    assert findings(study, "small", COMMAND, []).exploratory == (seeds < 10)
