"""The page in a real browser: every figure is drawn, and nothing is fetched.

Skipped where there is no Chromium (Debian: apt-get install chromium).
"""

import base64
import json
import re
import shutil
import subprocess

import pytest

from deepseek_jax.analysis import report, runs
from tests.analysis import synthetic

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="NO CHROMIUM: the report was not opened in a browser"
)

# Runs at the end of the page and leaves what it saw in the document.
PROBE = """
<script>
const failures = [];
addEventListener("error", (event) => failures.push(event.message));
addEventListener("load", () => setTimeout(() => {
  const see = (place) => {
    const box = place.getBoundingClientRect();
    const traces = [...place.querySelectorAll(".scatterlayer .trace, .hm image")];
    return {
      id: place.id, width: box.width, height: box.height, empty: place.textContent,
      plot: place.classList.contains("js-plotly-plot"),
      svg: place.querySelectorAll("svg.main-svg").length,
      shapes: traces.filter((t) => t.getBoundingClientRect().width > 0).length,
      asked: (place.data || []).length,
    };
  };
  const first = [...document.querySelectorAll(".plot")].map(see);
  const picker = document.getElementById("pick-0");
  if (picker) {
    picker.value = PICKED;
    picker.dispatchEvent(new Event("change"));
  }
  setTimeout(() => {
    const seen = {
      failures, first, then: [...document.querySelectorAll(".plot")].map(see),
      fetched: performance.getEntriesByType("resource").map((entry) => entry.name),
      dark: matchMedia("(prefers-color-scheme: dark)").matches,
      sideways: document.documentElement.scrollWidth - innerWidth,
    };
    const out = document.createElement("pre");
    out.id = "seen";
    out.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(seen))));
    document.body.append(out);
  }, 500);
}, 500));
</script>
"""


def browse(page, tmp_path, *, picked="", width=1240, dark=False):
    """What the probe saw."""
    probed = tmp_path / "probed.html"
    probe = PROBE.replace("PICKED", json.dumps(picked))
    probed.write_text(page.replace("<main>", f"<main>{probe}", 1))
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
            "--virtual-time-budget=15000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--dump-dom",
            f"file://{probed}",
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    found = re.search(r'<pre id="seen">([^<]+)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(base64.b64decode(found[1]))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep")
    return runs.read(synthetic.write_sweep(path, seeds=2))


def assert_drawn(plots):
    for plot in plots:
        assert plot["plot"] and plot["svg"] > 0, plot
        assert plot["shapes"] > 0 and plot["shapes"] >= plot["asked"], plot
        assert plot["width"] > 200 and plot["height"] > 200, plot


@pytest.mark.parametrize("dark", [False, True])
def test_every_figure_is_drawn_and_nothing_fetched(study, dark, tmp_path):
    page = report.page(study)
    seen = browse(page, tmp_path, picked="v3-s1", dark=dark)
    assert seen["dark"] == dark
    assert seen["failures"] == []
    assert seen["fetched"] == []
    expected = set(re.findall(r'class="plot" id="([^"]+)"', page))
    assert {plot["id"] for plot in seen["then"]} == expected
    # `none`, shown first, has no bias; v3, picked in its place, has.
    missing = [plot for plot in seen["first"] if not plot["plot"]]
    assert [plot["id"] for plot in missing] == ["bias-0"]
    assert "nothing to show" in missing[0]["empty"]
    assert_drawn([plot for plot in seen["first"] if plot["plot"]])
    assert_drawn(seen["then"])


def test_a_planted_request_is_caught(tmp_path):
    run = synthetic.write_run(tmp_path / "run", synthetic.config("v3", steps=4))
    page = report.page(runs.read(run))
    image = '<img src="http://example.org/a.png"></main>'
    seen = browse(page.replace("</main>", image), tmp_path)
    assert seen["fetched"] == ["http://example.org/a.png"]


def test_a_narrow_screen_does_not_scroll_sideways(study, tmp_path):
    seen = browse(report.page(study), tmp_path, width=500)
    assert seen["sideways"] <= 0


def test_a_single_run_is_drawn(tmp_path):
    run = synthetic.write_run(tmp_path / "run", synthetic.config("v3"))
    seen = browse(report.page(runs.read(run)), tmp_path)
    assert seen["failures"] == []
    assert_drawn(seen["then"])
