"""A headless Chromium over the DevTools protocol's pipe: what the report's tests look at pages with."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"),
)

MIDDLE = """element => {
    element.scrollIntoView({block: "center"});
    const box = element.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
}"""


def executable() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page. `problems`: console errors and exceptions; `requests`: the URLs it asked for."""

    def __init__(self, path: Path, width: int = 1280, height: int = 900, theme: str = "light"):
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._folder = tempfile.mkdtemp(prefix="chromium-")
        self._buffer, self._number, self._session = b"", 0, None
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        here = os.dup(theirs_in), os.dup(theirs_out)  # Chromium reads 3 and writes 4

        def take() -> None:
            high = [os.dup2(descriptor, 60 + n) for n, descriptor in enumerate(here)]
            for n, descriptor in enumerate(high):
                os.dup2(descriptor, 3 + n)

        command = [str(executable()), *FLAGS, f"--user-data-dir={self._folder}", "about:blank"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, pass_fds=(3, 4, *here), preexec_fn=take, **quiet)
        for descriptor in (theirs_in, theirs_out, *here):
            os.close(descriptor)
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self.resize(width, height)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self("Page.navigate", url=path.resolve().as_uri())
        self.wait(lambda: self.run("document.readyState") == "complete")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self._session = None
            self("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer, noting what happens meanwhile."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        result = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"])[:600])
        return result["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def click(self, selector: str, times: int = 1) -> None:
        """With the mouse, in the middle of the element."""
        x, y = self.run(f"({MIDDLE})(document.querySelector({json.dumps(selector)}))")
        for n in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=n)

    def move(self, x: float, y: float) -> None:
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def type(self, text: str) -> None:
        self("Input.insertText", text=text)

    def screenshot(self, path: Path, clip: dict[str, float] | None = None) -> None:
        options: dict[str, Any] = {"clip": clip | {"scale": 1}} if clip else {}
        image = self("Page.captureScreenshot", captureBeyondViewport=True, **options)
        path.write_bytes(base64.b64decode(image["data"]))

    def wait(self, true: Callable[[], Any], seconds: float = 60) -> None:
        """Until it is true."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "the page did not load"
            time.sleep(0.05)

    def _read(self, seconds: float = 120) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], seconds)[0]:
                raise TimeoutError("Chromium does not answer")
            chunk = os.read(self._in, 1 << 20)
            if not chunk:
                raise RuntimeError(f"Chromium ended: {self._process.poll()}")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(parameters["exceptionDetails"])[:600])
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning"):
                self.problems.append(f"{parameters['type']}: {json.dumps(parameters['args'])[:600]}")
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.problems.append(json.dumps(parameters["entry"])[:600])
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"][:200])
