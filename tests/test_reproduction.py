"""The whole paper in one command: parts in order, each once, whatever kills it; and a page that hides nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from physioray.grid import Grid
from physioray.grid_plan import find_grid
from physioray.presets import find_preset
from physioray.pretrain import PretrainJob
from physioray.pretrainings import describe_pretraining
from physioray.reproduction.course import Course, describe_plan
from physioray.reproduction.parts import GridPart, make_options
from physioray.reproduction.plan import PRESETS, find_reproduction
from physioray.reproduction.spent import measure_spent
from physioray.selection import SELECTION_SPLITS
from physioray.signals import LookupMiss
from physioray.steps import Step, StepStore
from physioray.storage import open_location
from tests.reproduced_paper import CONFIG, Reproduction, Told, make_reproduction
from tests.test_report import Reader
from tests.written_cohorts import write_cohort

CHROMIUM = Path("/usr/bin/chromium")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reproduced") / "cohort"
    made = write_cohort(folder, [12] * 10)
    splits = {name: sorted(made.list_subjects(name)) for name in ("pretrain", "train", "validation", "test")}
    subsets = {"2": splits["train"][:2], "4": splits["train"][:4]}
    division = {"splits": splits, "training_subsets": subsets, "seed": 0, "stratified": False, "notes": []}
    (made.location / "splits.json").write_json(division)
    return str(folder)


def list_done(folder: Path) -> dict[str, float]:
    """When every finished step was begun, by identity."""
    store = StepStore(open_location(str(folder / "steps")))
    return {record.identity: record.created for record in store.list_steps() if record.state == "done"}


@pytest.fixture(scope="module")
def killed(cohort: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]], Reproduction]:
    """A reproduction killed twice and then run to its end: its folder, what stood after each kill, and its last run."""
    out, stood = tmp_path_factory.mktemp("killed") / "out", []
    for sign in ("steps/pretrain/*/done.json", "sweeps/*/trials/0000/outcome.json"):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.reproduced_paper", cohort, str(out)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        until = time.monotonic() + 240
        while not list(out.glob(sign)):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < until, f"no {sign}"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        stood.append(list_done(out))
    last = make_reproduction(cohort, out)
    last.run()
    return out, stood, last


def test_killed_and_typed_again_it_goes_on_and_computes_nothing_twice(
    killed: tuple[Path, list[dict[str, float]], Reproduction],
) -> None:
    out, stood, last = killed
    assert [record.state for record in last.course.records.values()] == ["done"] * 6
    assert 1 <= len(stood[0]) < len(stood[1])
    end = list_done(out)
    for before in stood:
        assert {identity: end[identity] for identity in before} == before
    # Found done: the parts that were whole before the last run. The figures were still to do.
    assert last.course.records["strategies"].words == "found done"
    assert last.course.records["figures-scratch"].words == "1 look inside"


def test_a_second_run_finds_everything_done(
    cohort: str, killed: tuple[Path, list[dict[str, float]], Reproduction]
) -> None:
    out, _, _ = killed
    again, before = make_reproduction(cohort, out), list_done(out)
    standings = again.course.look()
    assert not any(standing.missing for standing in standings.values())
    assert "All parts are done" in describe_plan(again.parts, standings, 2)
    again.course.run(standings)
    assert list_done(out) == before and not again.screen.updates


def test_one_pretraining_serves_tables_figures_and_sizes(
    killed: tuple[Path, list[dict[str, float]], Reproduction],
) -> None:
    """Two for the tables and figures, two for the sweep (one per share of hidden tokens) at two sizes each."""
    store = StepStore(open_location(str(killed[0] / "steps")))
    assert sum(record.name == "pretrain" for record in store.list_steps()) == 4


def test_where_test_subjects_are_held_out_sweeps_share_the_pretraining_of_the_tables(cohort: str) -> None:
    config = replace(CONFIG.grid, probe=replace(CONFIG.grid.probe, cross_validate_below=2))
    grid = Grid(cohort=cohort, store="unused", config=config, threads=1)
    assert grid.plan.protocol.folds is None
    recipe = CONFIG.sweeps[0]
    base = recipe.set_up(make_options(CONFIG, grid), "probe").plan.base
    job = PretrainJob(
        cohort=cohort,
        out="",
        model=base["model"],
        objective=base["objective"],
        train=base["train"],
        splits=SELECTION_SPLITS,
    )
    fingerprint = grid.plan.cohort.fingerprint
    assert describe_pretraining(job, fingerprint) == describe_pretraining(grid.make_job("multimae_drop"), fingerprint)


def test_the_page_stands_alone_and_says_whose_signals_in_every_heading(
    killed: tuple[Path, list[dict[str, float]], Reproduction],
) -> None:
    text = (killed[0] / "reproduction.html").read_text()
    reader = Reader(text)
    assert all(link.startswith(("#", "data:")) for link in reader.links) and "<script" not in text
    assert len(reader.ids) == len(set(reader.ids)), "figures of one page have identifiers of their own"
    assert len(reader.headings) > 20
    for heading in reader.headings:
        assert re.search(r"SIMULATED signals, \d+ people", heading), heading
    words = re.sub(r"\s+", " ", "".join(reader.text))
    for part in ("Table 7", "Figure 3", "Figures 2, 4 and 6", "Assumptions in force", "Environment", "core-hours"):
        assert part in words
    for fact in ("TrainConfig.betas", "AnalysisConfig.windows", "torch", "computed with", "cannot be told"):
        assert fact in words
    assert "The temperature" in words and "not part of this test" in words.lower()
    alts = re.findall(r'<svg[^>]*role="img"[^>]*aria-label="([^"]+)"', text)
    assert len(alts) == text.count("<svg") and len(set(alts)) == len(alts)


def test_the_claim_on_reconstruction_is_checked_with_the_errors_of_multimae(
    killed: tuple[Path, list[dict[str, float]], Reproduction],
) -> None:
    text = (killed[0] / "reproduction.html").read_text()
    row = next(row for row in Reader(text).rows if row and "reconstructing EMG" in row[0])
    assert not row[1].strip().startswith("not run")


def test_what_fails_or_was_not_run_stands_on_the_page_with_its_reason(cohort: str, tmp_path: Path) -> None:
    made = make_reproduction(cohort, tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the <lamp> went out")

    sweep = next(part for part in made.parts if part.name == "mask_ratio-probe")
    broken = replace(sweep, runners=replace(sweep.runners, sweep=fail))  # type: ignore[type-var]
    parts = [made.parts[0], broken, *made.parts[3:]]
    course = Course(made.out, parts, made.screen)
    course.look()
    # No time is left from the second part on: the pretrainings are not there, the sweep fails, nothing can be drawn.
    course.run_part(parts[1], made.screen, None)
    course.run_part(parts[2], made.screen, None)
    standings = {part.name: part.stand() for part in parts}
    course.run(
        {**standings, parts[1].name: replace(standings[parts[1].name], missing=0)}, deadline=time.monotonic() - 1
    )
    record = course.records["mask_ratio-probe"]
    assert record.state == "failed" and record.reason == "RuntimeError: the <lamp> went out"
    assert "Traceback" in (tmp_path / "failure-mask_ratio-probe.txt").read_text()
    assert course.records["strategies"].state == "not finished" and "--hours" in course.records["strategies"].reason
    page = replace(made, course=course, parts=parts).write().read_text()
    words = re.sub(r"\s+", " ", "".join(Reader(page).text))
    assert "the <lamp> went out" in words and "<lamp>" not in page
    assert "✗ failed" in words and "… not finished" in words and "There are no scores yet" in words
    assert "MultiMAE is missing" in words and "python this.py" in words


def test_tables_without_their_pretrainings_say_so_and_do_not_pretrain(cohort: str, tmp_path: Path) -> None:
    made = make_reproduction(cohort, tmp_path)
    part = made.parts[1]
    assert isinstance(part, GridPart)
    outcome = part.run(Told(), time.monotonic() - 1)
    assert any("its pretraining is not there" in text for text in outcome.failures)
    assert any("untrained" in text for text in outcome.left)
    assert not (tmp_path / "steps" / "pretrain").exists()


def test_steps_measure_their_own_time_and_the_bill_counts_those_of_the_folder_once(tmp_path: Path) -> None:
    out = open_location(str(tmp_path / "out"))
    store = StepStore(open_location(str(tmp_path / "steps")), device="cuda:0", commit="abc")
    inner, outer, other = (Step(name=name, version=1) for name in ("embed", "probe", "pretrain"))

    def work(folder: object) -> None:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
        (folder / "x").write_text("x")  # type: ignore[operator]

    def work_more(folder: object) -> None:
        store.run(inner, work)
        work(folder)

    store.run(outer, work_more)
    (out / "tables" / "x").write_text("x")
    store.refer(out / "tables")
    store.run(other, work)
    bill = measure_spent(store, out)
    assert [(kind.title, kind.steps) for kind in bill.kinds] == [("embedding windows", 1), ("probes", 1)]
    assert bill.commits == ("abc",)
    for kind in bill.kinds:
        assert 0.2 <= 3600 * kind.core_hours < 0.39, "without the step that was computed on the way"
        assert kind.gpu_hours == kind.hours >= kind.core_hours * 0.9
    assert bill.total.core_hours == pytest.approx(sum(kind.core_hours for kind in bill.kinds))


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_has_the_paper_s_parts(name: str) -> None:
    config = find_reproduction(name, passes=7)
    assert config.grid == replace(find_grid(name), passes=7) and config.sweeps[0].name == "mask_ratio"
    run = {recipe.title for recipe in config.sweeps} | set(config.left_out)
    assert len(run) == 4, "figure 3 and three more sweeps, run or said to be left out"
    assert find_preset(config.grid.sizes)


def test_a_misspelt_preset_names_those_there_are() -> None:
    with pytest.raises(LookupMiss, match="smoke, small, paper, but got 'smok'"):
        find_reproduction("smok")


CHECK = """() => {
  // Contrast as WCAG 2 defines it; 4.5 is its least for text.
  const channel = v => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const faint = [], cut = [];
  let read = 0;
  for (const node of document.querySelectorAll('main *')) {
    if (node.closest('svg') || ![...node.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const both = [luminance(parse(getComputedStyle(node).color)), luminance(behind(node))];
    read += 1;
    if ((Math.max(...both) + .05) / (Math.min(...both) + .05) < 4.5) faint.push(node.outerHTML.slice(0, 120));
  }
  for (const node of document.querySelectorAll('h1, h2, h3, p, td, th, dd, li')) {
    const box = node.getBoundingClientRect();
    const outside = box.width && box.right > innerWidth + 1 && !node.closest('.scroll, figure');
    if (outside) cut.push(node.outerHTML.slice(0, 120));
  }
  return {width: document.documentElement.scrollWidth, faint, cut, read};
}"""


@pytest.mark.browser
def test_the_page_fits_every_screen_asks_for_nothing_and_can_be_read(
    killed: tuple[Path, list[dict[str, float]], Reproduction], tmp_path: Path
) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    if not CHROMIUM.exists():
        pytest.skip(f"needs a browser at {CHROMIUM} (apt-get install chromium)")
    place = (killed[0] / "reproduction.html").as_uri()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        for width, media in ((1280, "screen"), (400, "screen"), (720, "print")):
            page = browser.new_page(viewport={"width": width, "height": 900})
            asked: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            errors: list[str] = []
            page.on("console", lambda message, errors=errors: errors.append(message.text))
            page.emulate_media(media=media)
            page.goto(place, timeout=120_000)
            found = page.evaluate(CHECK)
            assert found["width"] <= width, f"{width} px {media}: the page is {found['width']} wide"
            assert found["read"] > 500 and not found["faint"] and not found["cut"], f"{width} px {media}"
            assert asked == [place] and not errors
            page.close()
        page = browser.new_page()
        page.goto(place, timeout=120_000)
        page.pdf(path=str(tmp_path / "page.pdf"), format="A4")
        browser.close()
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
