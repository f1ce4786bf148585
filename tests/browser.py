"""Chromium, driven by its DevTools protocol through a pair of pipes: no driver to install, no port to open.

``python -m tests.browser demo/report.html docs`` takes the pictures of the README.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "needs the browser chromium (on Debian: apt-get install chromium)"
TIMEOUT = 60.0
"""Seconds for one answer: a busy machine takes some to start a browser."""
FLAGS = (
    "--headless",
    "--no-sandbox",  # of the kernel, which containers refuse; the pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)
# A browser reads commands at descriptor 3 and answers at 4, whatever numbers the pipes have here.
LAUNCH = "import os,sys; r,w=map(int,sys.argv[1:3]); r,w=os.dup(r),os.dup(w); r=os.dup2(r,13); w=os.dup2(w,14); "
LAUNCH += "os.dup2(13,3); os.dup2(14,4); os.execv(sys.argv[3],sys.argv[3:])"


class Page:
    """One page and everything that it said and asked for since it was opened."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.complaints: list[str] = []
        """Errors and warnings of the console, exceptions of scripts, and what the content security policy refused."""
        self.requests: list[str] = []
        """Addresses asked for, that of the page itself first."""
        self.loaded = False

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command of the protocol."""
        return self._browser.call(method, self._session, **parameters)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, path: Path) -> None:
        """Load a file, and wait until everything is there."""
        self.loaded = False
        self.call("Page.navigate", url=path.absolute().as_uri())
        self._browser.wait_until(lambda: self.loaded, f"{path} to load")

    def resize(self, width: int, height: int = 900, *, scale: float = 1.0) -> None:
        """As wide as a phone or a desk."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def media(self, *, scheme: str = "light", kind: str = "screen") -> None:
        """Light or dark, on screen or printed."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=kind, features=features)

    def click(self, selector: str) -> None:
        """A click of the mouse in the middle of an element."""
        x, y = self.run(
            f"(e => {{ e.scrollIntoView({{block: 'center', behavior: 'instant'}}); const r = e.getBoundingClientRect(); "
            f"return [r.x + r.width / 2, r.y + r.height / 2]; }})(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Text where the focus is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """A key where the focus is, such as ``press("Enter", 13)``."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of what is seen, or of the whole page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def pdf(self, path: Path) -> None:
        """The page as it is printed."""
        self.media(kind="print")
        paper = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": False}
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", **paper)["data"]))

    def hear(self, method: str, event: dict[str, Any]) -> None:
        """One event of the protocol."""
        if method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(arg.get("value", arg)) for arg in event["args"]))
        elif method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            self.complaints.append(str(details.get("exception", details).get("description", details["text"])))
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.complaints.append(event["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded = True


class Browser:
    """A browser without a window. Use as a context manager."""

    def __init__(self) -> None:
        assert CHROMIUM is not None, MISSING
        self._profile = tempfile.mkdtemp(prefix="pyro-vi-lab-browser-")
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [sys.executable, "-S", "-c", LAUNCH, str(theirs_in), str(theirs_out)]
        command += [CHROMIUM, *FLAGS, f"--user-data-dir={self._profile}"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), **quiet)
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._count = b"", 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    @contextlib.contextmanager
    def page(self) -> Iterator[Page]:
        """A new page, closed at the end."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        try:
            yield page
        finally:
            self.call("Target.closeTarget", targetId=target)
            del self._pages[session]

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of one command of the protocol."""
        self._count += 1
        number = self._count
        message = {"id": number, "method": method, "params": parameters}
        text = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while text:
            text = text[os.write(self._out, text) :]
        self.wait_until(lambda: number in self._answers, method)
        answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def wait_until(self, done: Any, what: str) -> None:
        """Read events until something is so."""
        end = time.monotonic() + TIMEOUT
        while not done():
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"waited {TIMEOUT:.0f} s for {what}"
            read = os.read(self._in, 2**16)
            assert read, f"the browser ended while it was asked for {what}"
            *messages, self._buffer = (self._buffer + read).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers[message["id"]] = message
                elif message.get("sessionId") in self._pages:
                    self._pages[message["sessionId"]].hear(message["method"], message["params"])


def main(report: Path, directory: Path) -> None:
    """The top of a report, light and dark."""
    with Browser() as browser, browser.page() as page:
        page.resize(1100, 970)
        for name, scheme in (("report.png", "light"), ("report-dark.png", "dark")):
            page.media(scheme=scheme)
            page.open(report)
            page.screenshot(directory / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
