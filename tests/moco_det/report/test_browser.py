"""The report in a real browser: it renders, asks for nothing, and logs no error."""

import json
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

from moco_det.report.build import build_report
from moco_det.report.runs import read_runs
from tests.moco_det.report_cases import two_groups, write_pretraining

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
# Runs in a copy of the page that allows scripts, and writes down what the browser made of it.
PROBE = """<script>
const seen = {errors: 0, refused: 0};
addEventListener('error', () => seen.errors++, true);
document.addEventListener('securitypolicyviolation', () => seen.refused++);
addEventListener('load', () => {
  const images = [...document.images];
  seen.images = images.length;
  seen.decoded = images.filter(image => image.complete && image.naturalWidth > 100).length;
  seen.tables = document.querySelectorAll('table').length;
  seen.rows = document.querySelectorAll('tbody tr').length;
  seen.requests = performance.getEntriesByType('resource').length;
  seen.overflow = Math.max(0, document.documentElement.scrollWidth - innerWidth);
  seen.hidden = [...document.querySelectorAll('td')].filter(c => !c.closest('details')
    && !c.getBoundingClientRect().height).length;
  document.documentElement.dataset.seen = JSON.stringify(seen);
});
</script>"""


def browse(folder, page, *options):
    """Open a page without a display; returns what the browser wrote to stdout and to stderr."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--enable-logging=stderr", "--no-first-run", "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
        "--window-size=1280,1600", *options, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
def test_the_page_renders_whole_and_asks_for_nothing(tmp_path):
    paths = [*two_groups(tmp_path / "runs", predictions=True), write_pretraining(tmp_path / "pre")]
    report = build_report(read_runs(paths), tmp_path / "out", num_images=2)
    page = report.write(tmp_path / "out")
    html = page.read_text(encoding="utf-8")
    policy = "script-src 'unsafe-inline'; img-src data:"
    watched = page.with_name("watched.html")
    watched.write_text(
        html.replace("img-src data:", policy).replace("<head>", "<head>" + PROBE), encoding="utf-8"
    )
    dom, _ = browse(tmp_path, watched, "--dump-dom")
    seen = re.search(r'data-seen="([^"]+)"', dom)[1].replace("&quot;", '"')
    seen = json.loads(seen)
    assert (seen["errors"], seen["refused"], seen["requests"]) == (0, 0, 0)
    assert seen["images"] == seen["decoded"] == html.count("<img ") >= 5
    assert (seen["overflow"], seen["hidden"]) == (0, 0)
    assert seen["tables"] == html.count("<table") >= 6
    assert seen["rows"] + seen["tables"] == len(re.findall(r"<tr[ >]", html))

    _, log = browse(tmp_path, page, f"--screenshot={tmp_path / 'shot.png'}")
    assert not [line for line in log.splitlines() if "CONSOLE" in line]
    shot = cv2.imread(str(tmp_path / "shot.png"))
    assert shot.shape[:2] == (1600, 1280)
    bands = shot.reshape(16, 100, 1280, 3)  # something is drawn nearly everywhere down the page
    assert sum(np.ptp(band) > 60 for band in bands) >= 12
