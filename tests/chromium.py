"""A headless Chromium, driven over a pipe by its DevTools protocol, for tests of the page at /ui.

Debian's `chromium-headless-shell` is enough (`make test` installs it). PREFILLSHARE_CHROMIUM names another Chromium or Chrome;
"off" leaves these tests out.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

VARIABLE, OFF = "PREFILLSHARE_CHROMIUM", "off"
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WAIT_S = 20.0
#: A name that this browser finds at 127.0.0.1, as if its owner had pointed it there.
REBOUND = "rebound.example"
FLAGS = (
    "--headless", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check", "--disable-gpu",
    "--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking", "--hide-scrollbars",
    "--font-render-hinting=none", "--force-color-profile=srgb", f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1",
)  # fmt: skip
#: Keys that are not characters.
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}


def left_out() -> bool:
    return os.environ.get(VARIABLE) == OFF


def program() -> str:
    """Raises FileNotFoundError, which says what to do."""
    wanted = os.environ.get(VARIABLE)
    names = (wanted,) if wanted else NAMES
    if found := next(filter(None, map(shutil.which, names)), None):
        return found
    raise FileNotFoundError(
        f"no Chromium: {' or '.join(names)} is not there (fix: apt-get install {NAMES[0]}, or name one in {VARIABLE}; "
        f"{VARIABLE}={OFF} leaves out the tests that need it)"
    )


class Chromium:
    def __init__(self, to_browser: asyncio.StreamWriter, from_browser: asyncio.StreamReader):
        self._writer, self._reader = to_browser, from_browser
        self._numbers, self._answers = itertools.count(1), dict[int, asyncio.Future]()
        self._pages: dict[str, Page] = {}
        self._reading = asyncio.create_task(self._read())

    async def open(self, url: str, width: int = 1280, height: int = 860, *, light: bool = False, **vision: str) -> Page:
        """A page of a browser that has seen nothing before. `vision`: deficiency="achromatopsia"."""
        context = (await self.ask("Target.createBrowserContext"))["browserContextId"]
        target = (await self.ask("Target.createTarget", url="about:blank", browserContextId=context))["targetId"]
        session = (await self.ask("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM", "Accessibility"):
            await page.ask(f"{domain}.enable")
        await page.size(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "light" if light else "dark"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        await page.ask("Emulation.setEmulatedMedia", features=[scheme, still])
        await page.ask("Emulation.setFocusEmulationEnabled", enabled=True)
        if "deficiency" in vision:
            await page.ask("Emulation.setEmulatedVisionDeficiency", type=vision["deficiency"])
        await page.ask("Page.navigate", url=url)
        await page.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page

    async def ask(self, method: str, session: str | None = None, **params) -> dict:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        said = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self._writer.write(json.dumps(said).encode() + b"\0")
        await self._writer.drain()
        async with asyncio.timeout(WAIT_S):
            return await answer

    async def _read(self) -> None:
        while True:
            message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
            if answer := self._answers.pop(message.get("id"), None):
                if "error" in message:
                    answer.set_exception(RuntimeError(message["error"]["message"]))
                else:
                    answer.set_result(message["result"])
            elif page := self._pages.get(message.get("sessionId", "")):
                page.told(message["method"], message["params"])

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._writer.close()


class Page:
    """`errors`: what the browser has complained of: exceptions, refused loads, violations of the page's own policy. `requests`:
    the URLs that it has asked for."""

    def __init__(self, browser: Chromium, session: str):
        self._browser, self._session = browser, session
        self.errors: list[str] = []
        self.requests: list[str] = []

    async def ask(self, method: str, **params) -> dict:
        return await self._browser.ask(method, self._session, **params)

    def told(self, method: str, params: dict) -> None:
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    async def run(self, script: str):
        """The value of an expression, awaited. Raises RuntimeError."""
        done = await self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"].get("exception", {}).get("description", "it failed"))
        return done["result"].get("value")

    async def wait_for(self, condition: str, within_s: float = WAIT_S):
        """Until an expression is true; returns its value. It is looked at again whenever the page could have changed."""
        looking = f"(async () => {{ for (;;) {{ const found = {condition}; if (found) return found; " \
                  "await new Promise((done) => setTimeout(done, 20)); } })()"  # fmt: skip
        try:
            async with asyncio.timeout(within_s):
                return await self.run(looking)
        except TimeoutError:
            seen = await self.run("document.body.innerText")
            raise AssertionError(f"{condition} is not true after {within_s:g} s; the page shows:\n{seen}") from None

    async def text(self, selector: str = "body") -> str:
        return await self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    async def click(self, selector: str) -> None:
        await self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        place = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        box = await self.run(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({place})")
        for kind in ("mousePressed", "mouseReleased"):
            at = {"x": box[0], "y": box[1]}
            await self.ask("Input.dispatchMouseEvent", type=kind, **at, button="left", clickCount=1)

    async def press(self, key: str, modifiers: int = 0) -> None:
        """One of KEYS. `modifiers`: 2 is control, 8 is shift."""
        pressed = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        text = {"Enter": "\r", " ": " "}.get(key)
        await self.ask("Input.dispatchKeyEvent", type="keyDown", **pressed, **({"text": text} if text else {}))
        await self.ask("Input.dispatchKeyEvent", type="keyUp", **pressed)

    async def type(self, text: str) -> None:
        await self.ask("Input.insertText", text=text)

    async def focused(self) -> str:
        """What has the focus, in words."""
        return await self.run(
            "(({tagName, id, ariaLabel, textContent}) => `${tagName.toLowerCase()}${id ? '#' + id : ''} "
            "${(ariaLabel ?? textContent).trim().slice(0, 40)}`)(document.activeElement)"
        )

    async def size(self, width: int, height: int) -> None:
        of = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        await self.ask("Emulation.setDeviceMetricsOverride", **of)

    async def picture(self) -> bytes:
        """Of the whole page, however long it is, as PNG."""
        box = (await self.ask("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": box["width"], "height": box["height"], "scale": 1}
        answer = await self.ask("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(answer["data"])


@asynccontextmanager
async def chromium(folder: Path) -> AsyncIterator[Chromium]:
    """`folder`: where the browser keeps what it writes. Raises FileNotFoundError if there is none."""
    name, flags = program(), [*FLAGS, f"--user-data-dir={folder}"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # Chromium refuses to sandbox for root
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    quiet, nothing = asyncio.subprocess.DEVNULL, contextlib.suppress(ProcessLookupError)
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", name, *flags,
        pass_fds=(theirs_in, theirs_out), stdin=quiet, stdout=quiet, stderr=quiet,
    )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader(limit=1 << 28)
    reading, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours_in, "rb"))
    writing, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(ours_out, "wb"))
    browser = Chromium(asyncio.StreamWriter(writing, protocol, None, loop), reader)
    try:
        yield browser
    finally:
        await browser.close()
        reading.close()
        with nothing:
            process.terminate()
        await process.wait()
