"""A real browser without a screen, driven through a pipe by the DevTools protocol: no package is needed for it."""

import fcntl
import json
import os
import subprocess
from base64 import b64decode
from pathlib import Path
from typing import Any

from tests.pictures import BROWSER

_OPTIONS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-sync --disable-component-update --hide-scrollbars --remote-debugging-pipe"""


def _moved(end: int) -> int:
    """One end of a pipe under a number that the browser does not use, closed in programs that are started."""
    moved = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(end)
    return moved


class Browser:
    """Chromium with one tab."""

    def __init__(self, profile: Path) -> None:
        assert BROWSER
        to_read, self._write, self._read, to_write = map(_moved, (*os.pipe(), *os.pipe()))

        def connect() -> None:  # the browser reads from 3 and writes to 4
            os.dup2(to_read, 3)
            os.dup2(to_write, 4)

        command = [BROWSER, *_OPTIONS.split(), f"--user-data-dir={profile}", "about:blank"]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, preexec_fn=connect, close_fds=False, **quiet)
        os.close(to_read)
        os.close(to_write)
        self._waiting, self._count, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._session = ""
        self.call("Browser.close")
        self._process.wait(timeout=60)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its result; events that come in between are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        os.write(
            self._write, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while True:
            found = self._next()
            if found.get("id") == self._count:
                assert "error" not in found, found["error"]
                return found["result"]
            self.events.append(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            read = os.read(self._read, 1 << 20)
            assert read, "the browser has gone"
            self._waiting += read
        message, self._waiting = self._waiting.split(b"\0", 1)
        return json.loads(message)

    # -- what a person does -------------------------------------------------------------------------------------------

    def open(self, url: str, width: int = 1100, height: int = 800, *, dark: bool = False, script: bool = True) -> None:
        """Go to an address and wait until it has loaded."""
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        for address in ("about:blank", url):  # between two views of one page, which a hash would not load again
            self._loaded("Page.navigate", url=address)
        self.call("Page.bringToFront")

    def _loaded(self, method: str, **parameters: Any) -> None:
        """Do what loads a page, and wait for it."""
        self.events.clear()
        self.call(method, **parameters)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def submit(self, selector: str, text: str) -> None:
        """Fill a form in, and wait for the page that it leads to."""
        fill = (
            f"(e => {{ e.value = {json.dumps(text)}; e.form.requestSubmit() }})(document.querySelector({selector!r}))"
        )
        self._loaded("Runtime.evaluate", expression=fill)

    def run(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["result"]
        return found["result"].get("value")

    def mouse(self, selector: str, *, shift: bool = False, click: bool = False) -> None:
        """Move to the first line of an element, and click on request."""
        found = f"document.querySelector({selector!r})"
        self.run(f"{found}.scrollIntoView({{block: 'nearest'}})")
        x, y, w, h = self.run(f"(r => [r.x, r.y, r.width, r.height])({found}.getClientRects()[0])")
        where: dict[str, Any] = {"x": x + w / 2, "y": y + h / 2, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **where)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def away(self) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **(text if kind == "keyDown" else {}))

    def choose(self, id: str, value: object) -> None:
        """Choose in a list, or tick a box."""
        found, given = f"document.getElementById({id!r})", json.dumps(value)
        self.run(f"{found}[{found}.type === 'checkbox' ? 'checked' : 'value'] = {given}")
        self.run(f"for (const kind of ['input', 'change']) {found}.dispatchEvent(new Event(kind))")

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(b64decode(shot["data"]))

    @property
    def requests(self) -> list[str]:
        """The addresses that the page asked for, itself left out."""
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls[1:] if not url.startswith(("data:", "about:"))]

    @property
    def complaints(self) -> list[str]:
        """Exceptions, and what the browser logged, such as what the content security policy refused."""
        thrown = [
            e["params"]["exceptionDetails"]["text"] for e in self.events if e["method"] == "Runtime.exceptionThrown"
        ]
        return thrown + [e["params"]["entry"]["text"] for e in self.events if e["method"] == "Log.entryAdded"]
