"""Chrome traces, images and the page."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from seq1f1b.schedule import Action, Kind, interleaved, one_f_one_b
from seq1f1b.timeline import Span, Timeline, chrome_trace, html_page, palette
from seq1f1b.timeline.figure import save_figure
from tests.timeline.drawn import planned, with_copies

PLAN = planned(one_f_one_b(3, 4, 2))
SVG = "{http://www.w3.org/2000/svg}"


def test_gaps_and_busy_time_make_up_the_step():
    for stage in range(3):
        gaps = sum(end - start for start, end in PLAN.gaps(stage))
        assert gaps + PLAN.busy(stage) == pytest.approx(PLAN.length)
        assert gaps / PLAN.length == pytest.approx(PLAN.idle_ratio(stage))
    assert PLAN.gaps(0)[0] == (2.0, 4.0)


@pytest.mark.parametrize(
    "value, text", [(12.5, "12.5 s"), (0.0125, "12.5 ms"), (1.25e-5, "12.5 µs"), (0.0, "0 µs")]
)
def test_times_in_seconds_are_written_in_the_unit_that_suits(value, text):
    assert Timeline("", (), seconds=True).time(value) == text
    assert Timeline("", ()).time(value) == f"{value:.4g}"


def test_a_chrome_trace_has_every_action_once():
    trace = chrome_trace([PLAN, planned(one_f_one_b(2, 2), seconds=True)])
    events = json.loads(json.dumps(trace))["traceEvents"]
    drawn = [event for event in events if event["ph"] == "X"]
    assert len(drawn) == 3 * 4 * 2 * 2 + 2 * 2 * 2
    first = next(event for event in drawn if event["name"] == "0B0.1" and event["tid"] == 2)
    # a unit of time of a plan is shown as a millisecond
    assert (first["pid"], first["ts"], first["dur"], first["cat"]) == (0, 2000.0, 1000.0, "B")
    assert first["args"] == {"chunk": 0, "micro-batch": 0, "sub-sequence": 1}
    assert {event["dur"] for event in drawn if event["pid"] == 1} == {1e6, 2e6}
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"seq1f1b", "1f1b"}
    assert any(event["ph"] == "C" and event["args"]["held"] > 0 for event in events)


def test_copies_are_threads_of_a_chrome_trace_below_their_stage():
    timeline = with_copies()
    events = chrome_trace([timeline])["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    places = {e["tid"]: e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"}
    assert [names[tid] for tid in sorted(names, key=places.get)] == [
        *("stage 0", "stage 0 in", "stage 0 out"),
        *("stage 1", "stage 1 in", "stage 1 out"),
    ]
    drawn = [(names[e["tid"]], e["name"]) for e in events if e["ph"] == "X"]
    for stage, lanes in enumerate(timeline.copies):
        for lane, copies in zip(("in", "out"), lanes, strict=True):
            assert [name for thread, name in drawn if thread == f"stage {stage} {lane}"] == [
                str(span.action) for span in copies
            ]


def test_a_step_with_copies_lasts_until_the_last_of_them():
    timeline = with_copies()
    last = max(span.end for spans in timeline.stages for span in spans)
    assert timeline.length == pytest.approx(last + 0.75)
    # 3 loads and 2 gradients of 0.75
    assert timeline.copying_ratio(0, 0) == pytest.approx(3 * 0.75 / timeline.length)
    assert timeline.copying_ratio(1, 1) == pytest.approx(2 * 0.75 / timeline.length)
    assert timeline.num_chunks == 2


def test_an_svg_has_a_row_for_each_direction_of_copies(tmp_path):
    path = tmp_path / "copies.svg"
    save_figure([with_copies()], path)
    texts = [
        "".join(node.itertext()).strip() for node in ElementTree.parse(path).iter(f"{SVG}text")
    ]
    assert (texts.count("in"), texts.count("out")) == (2, 2)
    assert {"chunk loaded", "gradients out", "stage 1"} <= set(texts)
    assert sum("% busy" in text for text in texts) == 4


def brightness(color: str) -> float:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2


@given(st.integers(0, 50), st.integers(1, 8), st.data())
def test_labels_stand_out_and_backwards_are_darker(micro_batch, num_splits, data):
    j = data.draw(st.integers(0, num_splits - 1))
    fills = {}
    for kind in (Kind.F, Kind.B, Kind.I, Kind.W):
        action = Action(kind, 0, micro_batch, j)
        fills[kind] = palette.fill(action, num_splits)
        light, dark = sorted((brightness(fills[kind]), brightness(palette.ink(action))))[::-1]
        assert (light + 0.05) / (dark + 0.05) > 3.0
    for kind in (Kind.LOAD_F, Kind.LOAD_B, Kind.FREE_B):
        copy = Action(kind, 0, micro_batch, j)
        ink, fill = map(brightness, (palette.ink(copy), palette.fill(copy, num_splits)))
        assert (ink + 0.05) / (fill + 0.05) > 4.5
    assert brightness(fills[Kind.F]) > brightness(fills[Kind.W]) > brightness(fills[Kind.B])


def test_an_svg_has_its_labels_as_text(tmp_path):
    path = tmp_path / "plan.svg"
    save_figure([PLAN], path)
    tree = ElementTree.parse(path)
    texts = ["".join(node.itertext()).strip() for node in tree.iter(f"{SVG}text")]
    for spans in PLAN.stages:
        for span in spans:
            assert PLAN.label(span.action) in texts
    assert {"stage 0", "stage 2", "forward", "backward", "idle"} <= set(texts)
    assert any("bubble ratio 20.0%" in text for text in texts)
    once = path.read_bytes()
    save_figure([PLAN], path)
    assert path.read_bytes() == once


def test_a_png_holds_both_timelines_on_one_axis(tmp_path):
    path = tmp_path / "both.png"
    save_figure([PLAN, planned(interleaved(3, 2, 4, 2), seconds=False)], path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert width == 14 * 150
    assert height > 6 * 0.42 * 150


def page_data(html: str) -> dict:
    return json.loads(re.search(r"const DATA = (.*);\n", html)[1])


def test_a_page_holds_all_and_asks_the_network_for_nothing():
    html = html_page([PLAN], "a </script> title")
    assert not re.search(r"(src|href)=|url\(|https?:|import\(|fetch\(", html)
    assert html.count("</script>") == 1
    data = page_data(html)
    assert data["title"] == "a </script> title"
    (timeline,) = data["timelines"]
    spans = [
        [Span(Action(Kind(kind), *part[:3]), *part[3:5]) for kind, *part in spans]
        for spans in timeline["stages"]
    ]
    assert spans == [list(each) for each in PLAN.stages]
    assert timeline["memory"] == json.loads(json.dumps(PLAN.memory))
    assert timeline["copies"] == []


def test_a_page_holds_copies():
    timeline = with_copies()
    (data,) = page_data(html_page([timeline]))["timelines"]
    copies = [
        [
            [Span(Action(Kind(kind), *part[:3]), *part[3:5]) for kind, *part in lane]
            for lane in lanes
        ]
        for lanes in data["copies"]
    ]
    assert copies == [[list(lane) for lane in lanes] for lanes in timeline.copies]
    assert data["copying"][0] == [timeline.copying_ratio(0, lane) for lane in (0, 1)]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


# Points at the backward of 0.1 on stage 2, from 2 to 3 of 15, then turns the wheel there.
GESTURES = """
<script>
  const box = canvas.getBoundingClientRect();
  const at = { clientX: box.left + x(2.5), clientY: box.top + blocks[1].rows + 2.5 * (ROW + GAP) };
  canvas.dispatchEvent(new PointerEvent("pointermove", at));
  const all = to - from;
  canvas.dispatchEvent(new WheelEvent("wheel", { ...at, deltaY: -300 }));
  canvas.dataset.zoom = all / (to - from);
  canvas.dataset.still = Math.abs(moment(at.clientX - box.left) - 2.5) < 0.05;
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_a_browser_draws_every_action_and_follows_the_pointer(tmp_path):
    measured = Timeline("measured", PLAN.stages, seconds=True)
    path = tmp_path / "page.html"
    path.write_text(html_page([measured, PLAN], "Both").replace("</body>", GESTURES + "</body>"))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    run = subprocess.run(
        [CHROMIUM, *options, "--window-size=1200,800", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=100,
    )
    page = run.stdout
    assert "<title>Both</title>" in page, run.stderr
    assert re.search(r"<span><i [^>]*></i>backward</span>", page)
    assert float(re.search(r'data-zoom="([\d.]+)"', page)[1]) == pytest.approx(math.e)
    assert 'data-still="true"' in page
    tip = page[page.index('<div id="tip"') :]
    cells = re.findall(r"<(?:b|td)>([^<]*)</", tip[: tip.index("</table>")])
    assert cells[0] == "backward  0B0.1"
    assert dict(zip(cells[1::2], cells[2::2], strict=True)) == {
        "stage": "2",
        "micro-batch": "0",
        "sub-sequence": "1",
        "start": "2",
        "length": "1",
        "memory held": "1 micro-batches",
    }


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_a_browser_draws_every_action(tmp_path):
    path = tmp_path / "page.html"
    copies = with_copies()
    path.write_text(html_page([PLAN, PLAN, copies]))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    picture = tmp_path / "page.png"
    for wanted in (["--dump-dom"], [f"--screenshot={picture}"]):
        run = subprocess.run(
            [CHROMIUM, *options, "--window-size=1200,800", *wanted, path.as_uri()],
            capture_output=True,
            text=True,
            timeout=100,
        )
        if wanted == ["--dump-dom"]:
            drawn = int(re.search(r'data-drawn="(\d+)"', run.stdout)[1])
            assert drawn == 2 * (3 * 4 * 2 * 2) + 2 * 2 * 2 * 2 + 2 * (3 + 2)
    pixels = np.unique(imread(picture)[..., :3].reshape(-1, 3), axis=0)
    seen = {"#" + bytes(pixel).hex() for pixel in (pixels * 255).round().astype(np.uint8)}
    assert {palette.fill(span.action, 2) for spans in PLAN.stages for span in spans} <= seen
    lanes = [lane for lanes in copies.copies for lane in lanes]
    assert {palette.fill(span.action, 1) for lane in lanes for span in lane} <= seen


def test_the_page_is_beside_the_code_that_fills_it():
    import seq1f1b.timeline

    assert (Path(seq1f1b.timeline.__file__).parent / "page.html").is_file()
