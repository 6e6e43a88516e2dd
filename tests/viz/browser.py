"""Opens a page in headless Chromium, and reports what it shows and all errors of its scripts."""

import html
import json
import re
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), "")
_FIRST = """<script>window.failures = [];
addEventListener("error", (e) => failures.push(String(e.message)));
addEventListener("unhandledrejection", (e) => failures.push(String(e.reason)));
addEventListener("securitypolicyviolation", (e) => failures.push(`blocked: ${e.blockedURI}`));
</script>"""
_LAST = """<script>{
let result = null;
try { result = (() => { %s })(); } catch (error) { failures.push(String(error)); }
const out = document.createElement("pre");
out.id = "outcome";
out.textContent = JSON.stringify({ failures, result });
document.body.append(out);
}</script></body>"""


def run(page: str, folder, script: str, width: int = 1000, dark: bool = False):
    """Returns the result of `script`, a function body run at the end of a page; fails on any error.

    It writes a screenshot, page.png, into the folder.
    """
    if not PROGRAM:
        pytest.skip("no Chromium")
    for name, text in (
        ("shown", page),
        ("run", page.replace("<style>", _FIRST + "<style>", 1).replace("</body>", _LAST % script)),
    ):
        (folder / f"{name}.html").write_text(text)
    common = [
        PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000",
        f"--blink-settings=preferredColorScheme={int(not dark)}",
    ]  # fmt: skip
    dom = _start(*common, f"--window-size={width},1600", "--dump-dom", folder / "run.html")
    picture = f"--screenshot={folder / 'page.png'}"
    _start(*common, f"--window-size={width},3600", picture, folder / "shown.html")
    found = re.search(r'<pre id="outcome">(.*?)</pre>', dom, re.S)
    assert found, "the page's scripts did not come to their end"
    outcome = json.loads(html.unescape(found[1]))
    assert outcome["failures"] == []
    return outcome["result"]


def _start(*command) -> str:
    *options, path = command
    done = subprocess.run([*options, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
