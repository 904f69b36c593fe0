"""The page as a browser shows it: a headless Chromium on the router's own parts over engines' doubles.

PREFILLSHARE_PICTURES names a folder that the pictures are kept in, for whoever changes the page to look at.
"""

import asyncio
import itertools
import os
import struct
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import chromium
import pytest
import pytest_asyncio
from double import engines
from double.page import REFUSED, app_of, served
from double.system import system

from prefillshare.kvshare.caller import ANONYMOUS, Caller
from prefillshare.kvshare.errors import ResumeReason
from prefillshare.kvshare.replica_info import ReplicaStats
from prefillshare.router.tenants import KeysFile, Tenants

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(chromium.left_out(), reason=f"{chromium.VARIABLE}={chromium.OFF}"),
]

KEY, OTHER = "psk-first-tenants-key", "psk-second-tenants-key"
TENANTS = Tenants(KeysFile.model_validate({"tenants": {"research": {"keys": [KEY]}, "support": {"keys": [OTHER]}}}).tenants)
PROMPT = list(range(20, 68))
WIDE, NARROW = 1280, 390
ROWS = "document.querySelectorAll('#lanes tbody tr').length"
#: The cells of a row in words, and the widths of its bar's parts in percent.
CELLS = "[...document.querySelectorAll('#lanes li')[{lane}].querySelectorAll('tbody tr')].map((row) => "
FIGURES = CELLS + "['decoder', 'cached span', 'computed span', 'generated span', 'made :last-child', 'ran :last-child']" \
    ".map((cell) => row.querySelector(`.${{cell}}`).textContent))"  # fmt: skip
WIDTHS = CELLS + "[...row.querySelectorAll('.bar i')].map((part) => parseFloat(part.style.width)))"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser(tmp_path_factory):
    async with chromium.chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(autouse=True)
def _quick_engines(monkeypatch):
    monkeypatch.setattr(engines, "STEP_S", 0.002)


@pytest.fixture
def keep(tmp_path):
    """keep(name, PNG): for whoever wants to look. Returns (width, height)."""
    folder = Path(os.environ.get("PREFILLSHARE_PICTURES", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, picture: bytes) -> tuple[int, int]:
        (folder / f"{name}.png").write_bytes(picture)
        assert picture.startswith(b"\x89PNG")
        return struct.unpack(">II", picture[16:24])

    return write


@asynccontextmanager
async def page_of(browser, running, tenants=None, width=WIDE, path="/ui", light=False, **router):
    """The page, opened. What the browser complains of is an error, and so is a request to another host."""
    async with served(app_of(running, tenants, **router)) as url:
        page = await browser.open(url + path, width, light=light)
        yield page
        assert page.errors == []
        assert [asked for asked in page.requests if not asked.startswith((url, "blob:", "data:"))] == []


async def session(running, name: str, decoders: str, caller: Caller = ANONYMOUS, tokens: int = 8) -> None:
    """A turn by each decoder, a letter each; every turn adds its answer and eight tokens."""
    context = list(PROMPT)
    for decoder in decoders:
        stream = running.run(decoder, context, tokens, caller, session=name)
        context += [token async for chunk in stream for token in chunk.token_ids] + list(range(10, 18))


# What it shows


@pytest.mark.parametrize("width", [WIDE, NARROW])
async def test_one_sees_that_the_second_decoder_computes_only_what_is_new(browser, width, keep):
    async with system(1) as running:
        await session(running, "s1", "abab")
        async with page_of(browser, running, width=width) as page:
            await page.wait_for(f"{ROWS} === 4")
            made, ran = "thereprefill-1", "agents-1"
            assert await page.run(FIGURES.format(lane=0)) == [
                ["a", "0", "47", "8", made, ran],
                ["b", "40", "23", "8", made, ran],
                ["a", "56", "23", "8", made, ran],
                ["b", "72", "23", "8", made, ran],
            ]
            whole = 48 + 3 * 16 + 8
            for number, parts in enumerate(await page.run(WIDTHS.format(lane=0))):
                cached, computed = (0, 47) if number == 0 else (24 + 16 * number, 23)
                assert parts == pytest.approx([100 * n / whole for n in (cached, computed, 0, 8)], abs=0.01)
            bar = await page.run("document.querySelectorAll('#lanes .tokens .bar')[1].ariaLabel")
            assert bar == "40 cached, 23 computed, 8 generated"
            assert "58 % cached" in await page.text("#lanes summary")
            assert (await page.text("#figures")).split("\n")[:3] == ["found cached", "58 %", "of 288 prompt tokens"]
            assert keep(f"session-{width}", await page.picture())[0] == width


async def test_colours_are_the_decoders_and_patterns_tell_what_became_of_the_tokens_without_any(browser, keep):
    async with system(1) as running:
        await session(running, "s1", "ab")
        await session(running, "s2", "ss")
        async with served(app_of(running)) as url:
            page = await browser.open(f"{url}/ui", deficiency="achromatopsia")
            await page.wait_for(f"{ROWS} === 4")
            keep("without-colour", await page.picture())
            look = (
                "[...document.querySelectorAll('#lanes li:last-child tbody .bar')].map((bar) => ['.cached', '.computed', "
                "'.generated'].map((kind) => { const style = getComputedStyle(bar.querySelector(kind)); "
                "return [style.backgroundImage.split('(')[0], style.backgroundColor]; }))"
            )
            first, second = await page.run(look)
            assert [image for image, _ in first] == ["repeating-linear-gradient", "none", "radial-gradient"]
            assert [image for image, _ in second] == [image for image, _ in first], "a pattern is the same for every decoder"
            assert first[1][1] != second[1][1], "the colour is not"
            assert [row[0] for row in await page.run(FIGURES.format(lane=1))] == ["a", "b"], "which is said in words, too"


async def test_a_turn_is_seen_while_it_runs(browser, monkeypatch):
    monkeypatch.setattr(engines, "STEP_S", 0.05)
    async with system(1) as running, page_of(browser, running) as page:
        await page.wait_for("!document.querySelector('#empty').hidden")
        assert "No turn has been taken yet" in await page.text("#empty")
        async with aclosing(running.run("a", PROMPT, 400, session="live")) as stream:
            await anext(stream)
            reading = asyncio.create_task(_read(stream))
            generated = "Number(document.querySelector('#lanes .generated span')?.textContent)"
            seen = await page.wait_for(f"{generated} > 0 && {generated}")
            assert "running" in await page.text("#lanes summary")
            await page.wait_for(f"{generated} > {seen}")
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        await page.wait_for("document.querySelector('#lanes tbody tr').dataset.outcome === 'cancelled'")
        assert await page.run(ROWS) == 1


async def _read(stream) -> None:
    async for _ in stream:
        pass


async def test_a_failed_turn_says_why_in_its_details(browser, monkeypatch):
    monkeypatch.setattr(engines, "STEP_S", 0.05)
    async with system(1) as running:
        with pytest.raises(Exception, match="the deadline passed"):
            await running.turn("a", PROMPT, 99, session="late", deadline_s=0.3)
        async with page_of(browser, running) as page:
            await page.wait_for("document.querySelector('#lanes tr[data-outcome=failed]')")
            assert (await page.text("#lanes .first")) == "failed"
            await page.click("#lanes .number")
            details = await page.text("#lanes .details")
    assert "outcome\nDeadlineExceeded" in details
    assert "a prefill replica made what was missing: there was no other way" in details


async def test_pools_show_queues_and_kv_and_an_ejected_replica_by_more_than_a_colour(browser):
    async with system(2) as running:
        async def busy() -> ReplicaStats:
            return ReplicaStats(3, 4_096, running=3, waiting=1_200, blocks_used=970, blocks_total=1_000)

        running.cluster.pools["agents"].replicas["agents-2"].engine.stats = busy
        async with page_of(browser, running) as page:
            line = "document.querySelectorAll('.pool')[2]?.querySelectorAll('.replicas li')[1]"
            words = f"{line}?.innerText.replace(/\\s+/g, ' ')"
            text = await page.wait_for(f"{words}?.includes('1,200') && {words}")
            assert text == "agents-2 usable 3 running, 1,200 waiting, 4,096 tokens to prefill KV held 97 %"
            running.fleet.pools["agents"].replicas.wellbeing.failed("agents-2", ResumeReason.GONE, for_good=True)
            await page.wait_for(f"{words}.startsWith('agents-2 ejected: gone 3 running')")
            meter = f"{line}.querySelector('[role=meter]')"
            assert await page.run(f"[{meter}.ariaValueNow, {meter}.ariaValueText]") == ["97", "970 of 1,000 blocks"]


async def test_calls_without_a_session_stand_on_a_lane_together_if_they_continue_each_other(browser):
    async with system(1) as running:
        said = await running.turn("a", PROMPT)
        await running.turn("b", [*PROMPT, *said, 1, 2])
        await running.turn("a", [5, *PROMPT])
        async with page_of(browser, running) as page:
            await page.wait_for(f"{ROWS} === 3")
            summaries = "[...document.querySelectorAll('#lanes summary')]"
            lanes = await page.run(f"{summaries}.map((lane) => lane.innerText.split('\\n').slice(0, 2))")
    assert lanes == [["r2", "1 call, 1 decoder"], ["r0", "2 calls, 2 decoders"]]


async def test_names_that_look_like_markup_are_text(browser):
    name = "<img src=x onerror=alert(1)><b>bold</b>"
    async with system(1) as running:
        await session(running, name, "a")
        async with page_of(browser, running) as page:
            await page.wait_for(f"{ROWS} === 1")
            assert await page.text("#lanes .name") == name
            assert await page.run("document.querySelectorAll('#lanes img, #lanes .name b').length") == 0


async def test_many_turns_and_lanes_are_shown_in_part_until_asked_for(browser):
    async with system(1) as running:
        await session(running, "long", "ab" * 8, tokens=1)
        await asyncio.gather(*(running.turn("a", [n, *PROMPT], 1, session=f"s{n}") for n in range(45)))
        async with page_of(browser, running) as page:
            await page.wait_for("document.querySelectorAll('#lanes > li').length === 40")
            assert await page.text("#more") == "Show 6 more lanes"
            await page.click("#more")
            await page.wait_for("document.querySelectorAll('#lanes > li').length === 46")
            await page.run("document.querySelector('#filter').focus()")
            await page.type("LONG")
            await page.wait_for("document.querySelectorAll('#lanes > li').length === 1")
            await page.run("document.querySelector('#lanes summary').click()")
            await page.wait_for(f"{ROWS} === 12")
            assert await page.text(".earlier") == "Show 4 earlier turns"
            await page.click(".earlier")
            await page.wait_for(f"{ROWS} === 16")
            assert await page.focused() == "button Turn 1, a: details"


async def test_turns_of_several_routers_are_put_together(browser):
    async with system(1) as one, system(1) as two:
        context = [*PROMPT]
        for running, decoder in ((one, "a"), (two, "b")):
            context += await running.turn(decoder, context, session="s1")
        apps = itertools.cycle([app_of(running, replicas=2, redis_url="redis://one") for running in (one, two)])
        data = {"turn": next(apps)}

        async def either(scope, receive, send):
            data["turn"] = next(apps) if scope["path"] == "/ui/data" else data["turn"]
            await data["turn"](scope, receive, send)

        async with served(either) as url:
            page = await browser.open(f"{url}/ui")
            await page.wait_for(f"{ROWS} === 2")
            assert [row[0] for row in await page.run(FIGURES.format(lane=0))] == ["a", "b"]
            assert "Turns of 2 of 2 routers" in await page.text("#notes")
            assert page.errors == []


async def test_a_router_that_does_not_answer_is_said_not_to_and_asked_again(browser):
    async with system(1) as running:
        app, silent = app_of(running), asyncio.Event()

        async def sometimes(scope, receive, send):
            if silent.is_set() and scope["path"] == "/ui/data":
                await send({"type": "http.response.start", "status": 503, "headers": []})
                return await send({"type": "http.response.body", "body": b"no"})
            await app(scope, receive, send)

        async with served(sometimes) as url:
            page = await browser.open(f"{url}/ui")
            await page.wait_for("document.querySelector('#status').textContent === 'live'")
            silent.set()
            await page.wait_for("document.querySelector('#status').textContent.startsWith('no answer')")
            assert await page.text("#status") == "no answer, trying again: the router answered 503"
            silent.clear()
            await page.wait_for("document.querySelector('#status').textContent === 'live'")


# For everybody


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("width", [WIDE, NARROW])
async def test_text_is_legible_in_both_themes_and_nothing_is_wider_than_the_window(browser, width, light, keep):
    async with system(2) as running:
        await session(running, "a-session-with-a-name-that-is-much-longer-than-there-is-room-for-it-" + "x" * 60, "abs")
        await session(running, "short", "cdc")
        with pytest.raises(Exception, match="the deadline passed"):
            await running.turn("a", PROMPT, 999, session="late", deadline_s=0.3)
        async with page_of(browser, running, width=width, light=light, ui="full") as page:
            await page.wait_for("document.querySelector('#play-message') && document.querySelectorAll('.lane').length === 3")
            await page.run("document.querySelectorAll('#lanes .number').forEach((button) => button.click())")
            assert await page.run((Path(__file__).parent / "contrast.js").read_text()) == []
            assert keep(f"{'light' if light else 'dark'}-{width}", await page.picture())[0] == width
            wider = "filter((one) => one.getBoundingClientRect().right > innerWidth + 0.5)"
            wide = f"[...document.querySelectorAll('body *')].{wider}.map((one) => one.outerHTML.slice(0, 80))"
            assert await page.run(wide) == []
            scheme = await page.run("getComputedStyle(document.documentElement).colorScheme")
            assert scheme == ("light" if light else "dark")


async def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser):
    async with system(1) as running:
        await session(running, "s1", "ab")
        async with page_of(browser, running, ui="full") as page:
            await page.wait_for(f"{ROWS} === 2 && document.querySelector('#play-message')")
            reached = []
            for _ in range(14):
                await page.press("Tab")
                reached.append(await page.focused())
                ring = await page.run("getComputedStyle(document.activeElement).outlineStyle")
                assert ring not in ("none", ""), reached[-1]
            assert reached[:4] == ["a Skip to the sessions", "button#pause Pause", "input#filter ", reached[3]]
            assert reached[3].startswith("summary s1")
            assert reached[4:6] == ["button Turn 1, a: details", "button Turn 2, b: details"]
            assert any(name.startswith("textarea#play-message") for name in reached)
            assert reached.index("button Ask a") > reached.index("select Decoder 2")
            await page.run("document.querySelector('#lanes .number').focus()")
            await page.press("Enter")
            await page.wait_for("document.querySelector('#lanes .details')")
            assert await page.run("document.activeElement.ariaExpanded") == "true"
            await page.run("document.querySelector('#lanes summary').focus()")
            await page.press(" ")
            await page.wait_for("!document.querySelector('#lanes details').open")


async def test_screen_readers_are_told_names_of_controls_rows_of_tables_and_what_a_bar_shows(browser):
    async with system(1) as running:
        await session(running, "s1", "ab")
        for width in (WIDE, NARROW):
            async with page_of(browser, running, width=width, ui="full") as page:
                await page.wait_for(f"{ROWS} === 2 && document.querySelector('#play-message')")
                nodes = [node for node in (await page.ask("Accessibility.getFullAXTree"))["nodes"] if not node["ignored"]]
                named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
                images = {"image", "img"}
                controls = {"button", "textbox", "searchbox", "combobox", "radio", "spinbutton", "link", "meter"}
                assert [role for role, name in named if role in controls | images and not name] == []
                assert ("table", "Turns of session s1") in named
                assert [role for role, _ in named].count("row") == 3
                assert [name for role, name in named if role == "columnheader"][3:6] == ["cached", "computed", "generated"]
                assert any(role in images and name == "40 cached, 23 computed, 8 generated" for role, name in named)
                assert [name for role, name in named if role == "heading"][:2] == ["prefillshare", "In these turns"]


async def test_it_can_be_stopped_and_goes_on(browser):
    async with system(1) as running, page_of(browser, running) as page:
        await page.wait_for("document.querySelector('#status').textContent === 'live'")
        await page.click("#pause")
        assert await page.run("document.querySelector('#pause').ariaPressed") == "true"
        await session(running, "s1", "a")
        asked = len(page.requests)
        await asyncio.sleep(1.2)  # more than a round
        assert (len(page.requests), await page.run(ROWS), await page.text("#status")) == (asked, 0, "paused")
        await page.click("#pause")
        await page.wait_for(f"{ROWS} === 1")


# Keys


async def test_the_page_asks_for_a_key_and_keeps_it_in_memory_only(browser, keep):
    async with system(1) as running:
        await session(running, "ours", "a", Caller("research", "research"))
        await session(running, "theirs", "a", Caller("support", "support"))
        async with served(app_of(running, TENANTS, ui="full")) as url:
            page = await browser.open(f"{url}/ui")
            await page.wait_for("!document.querySelector('#key').hidden")
            assert await page.run("document.querySelector('#shown').hidden")
            assert "theirs" not in await page.run("document.documentElement.outerHTML")
            keep("key", await page.picture())
            await page.type("psk-nobodys-key-at-all")
            await page.press("Enter")
            await page.wait_for("document.querySelector('#key-error').textContent.startsWith('no tenant has this API key')")
            await page.type(KEY)
            await page.press("Enter")
            await page.wait_for(f"{ROWS} === 1")
            assert "tenant research" in await page.text("#facts")
            html = await page.run("document.documentElement.outerHTML")
            assert ("ours" in html, "theirs" in html, KEY in html) == (True, False, False)
            kept = "[localStorage.length, sessionStorage.length, document.cookie, location.href, history.length > 0]"
            assert (await page.run(kept))[:4] == [0, 0, "", f"{url}/ui"]
            assert not [asked for asked in page.requests if KEY in asked]
            await page.click("#forget")
            await page.wait_for("document.querySelector('#key') && !document.querySelector('#key').hidden")
            assert await page.run(ROWS) == 0


async def test_another_tenants_key_shows_nothing_of_the_first(browser):
    async with system(1) as running:
        await session(running, "ours", "a", Caller("research", "research"))
        app, keys = app_of(running, TENANTS), {"revoked": False}

        async def revoking(scope, receive, send):
            gone = f"Bearer {KEY}".encode() if keys["revoked"] else b""
            await app({**scope, "headers": [one for one in scope["headers"] if one[1] != gone]}, receive, send)

        async with served(revoking) as url:
            page = await browser.open(f"{url}/ui")
            await page.wait_for("!document.querySelector('#key').hidden")
            await page.type(KEY)
            await page.press("Enter")
            await page.wait_for(f"{ROWS} === 1")
            keys["revoked"] = True
            await page.wait_for("!document.querySelector('#key').hidden")
            await page.type(OTHER)
            await page.press("Enter")
            await page.wait_for("document.querySelector('#facts').textContent.includes('tenant support')")
            assert await page.run(ROWS) == 0
            assert await page.run("document.querySelector('#figures b').textContent") == "–"


# What it does not do


async def test_a_name_pointed_at_the_router_by_somebody_else_shows_an_error_and_no_page(browser):
    async with system(1) as running, served(app_of(running)) as url:
        name = url.replace("127.0.0.1", chromium.REBOUND)
        page = await browser.open(f"{name}/ui")
        assert "host: this page is not served under" in await page.text()
        page = await browser.open(url.replace("127.0.0.1", "localhost") + "/ui")
        await page.wait_for("document.querySelector('#status').textContent === 'live'")


async def test_the_policy_keeps_the_page_from_other_hosts_and_from_markup(browser):
    async with system(1) as running, served(app_of(running)) as url, served(app_of(running)) as other:
        page = await browser.open(f"{url}/ui")
        assert await page.run(f"fetch('{other}/ui/icon.svg').then(() => 'sent', () => 'refused')") == "refused"
        shown = "(done) => Object.assign(new Image(), { onload: () => done('shown'), onerror: () => done('refused'), src: "
        assert await page.run(f"new Promise({shown}'{other}/ui/icon.svg' }}))") == "refused"
        made = "(() => { try { document.body.innerHTML = '<p>x'; return 'made'; } catch { return 'refused'; } })()"
        assert await page.run(made) == "refused"
        assert len(page.errors) >= 3, "the browser says that it was the policy"


async def test_without_full_there_is_no_playground(browser):
    async with system(1) as running, page_of(browser, running) as page:
        await page.wait_for("document.querySelector('#status').textContent === 'live'")
        assert await page.run("document.querySelectorAll('.playground, textarea').length") == 0
        assert not [asked for asked in page.requests if "playground.js" in asked]


# The playground


@pytest.mark.parametrize("width", [WIDE, NARROW])
async def test_two_decoders_talk_in_turn_and_each_answer_says_what_it_computed(browser, width, keep):
    async with system(1) as running, served(app_of(running, TENANTS, ui="full")) as url:
        page = await browser.open(f"{url}/ui", width)
        await page.wait_for("!document.querySelector('#key').hidden")
        await page.type(KEY)
        await page.press("Enter")
        await page.wait_for("document.querySelector('#play-message')")
        assert await page.text(".playground button.primary") == "Ask a"
        await page.click(".playground button.primary")
        await page.wait_for("document.querySelectorAll('.talk .cost').length === 1")
        assert await page.text(".playground button.primary") == "Ask b", "they take turns"
        assert (await page.focused()).startswith("textarea#play-message")
        await page.type("And dogs?")
        await page.press("Enter", modifiers=2)
        await page.wait_for("document.querySelectorAll('.talk .cost').length === 2")
        first, second = await page.run("[...document.querySelectorAll('.talk .cost')].map((cost) => cost.textContent)")
        turns = running.orchestrator.services.recent.since("research", 0).turns
        assert [turn.decoder for turn in turns] == ["a", "b"]
        assert turns[0].lane == turns[1].lane, "without sessions over HTTP, the second call continues the first"
        for turn, text in zip(turns, (first, second), strict=True):
            usage = turn.usage
            assert text == (
                f"{usage.prompt_tokens} prompt tokens: {usage.cached_tokens} cached, {usage.computed_tokens} computed, "
                f"{usage.completion_tokens} generated"
            )
        assert turns[1].usage.cached_tokens >= turns[0].usage.prompt_tokens - engines.BLOCK
        await page.wait_for(f"{ROWS} === 2")
        assert keep(f"playground-{width}", await page.picture())[0] == width


async def test_the_playground_sends_the_history_and_one_session_for_both(browser):
    async with system(1) as running:
        app = app_of(running, ui="full")
        async with served(app) as url:
            page = await browser.open(f"{url}/ui")
            await page.wait_for("document.querySelector('#play-message')")
            for number in (1, 2):
                await page.run(f"document.querySelector('#play-message').value = 'question {number}'")
                await page.click(".playground button.primary")
                await page.wait_for(f"document.querySelectorAll('.talk .cost').length === {number}")
            (one, first), (two, second) = app.chat.asked
            assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]
            assert (first["model"], second["model"]) == ("a", "b")
            assert second["messages"][:2] == first["messages"]
            assert one["x-prefillshare-session"] == two["x-prefillshare-session"]
            await page.click(".playground .row button:last-child")
            await page.run("document.querySelector('#play-message').value = 'again'")
            await page.click(".playground button.primary")
            await page.wait_for("document.querySelectorAll('.talk .cost').length === 1")
            three, third = app.chat.asked[2]
            assert three["x-prefillshare-session"] != one["x-prefillshare-session"]
            assert [message["role"] for message in third["messages"]] == ["system", "user"]


async def test_a_refused_turn_is_said_and_a_stopped_one_leaves_the_session_as_it_was(browser, monkeypatch):
    async with system(1) as running:
        app = app_of(running, ui="full")
        async with served(app) as url:
            page = await browser.open(f"{url}/ui")
            await page.wait_for("document.querySelector('#play-message')")
            await page.run(f"document.querySelector('#play-message').value = '{REFUSED}'")
            await page.click(".playground button.primary")
            await page.wait_for(f"document.querySelector('.playground .error').textContent === '{REFUSED}'")
            assert await page.run("document.querySelectorAll('.talk li').length") == 0
            assert await page.run("document.querySelector('#play-message').value") == REFUSED, "nothing typed is lost"
            monkeypatch.setattr(engines, "STEP_S", 0.05)
            await page.run("document.querySelector('#play-message').value = 'hello'")
            await page.click(".playground button.primary")
            await page.wait_for("document.querySelector('.talk .text')?.textContent.length > 1")
            await page.click(".playground .row button:nth-of-type(2)")
            await page.wait_for("document.querySelector('.playground .error').textContent.startsWith('Stopped')")
            await page.wait_for("document.querySelector('#lanes tr[data-outcome=cancelled]')")
            monkeypatch.setattr(engines, "STEP_S", 0.002)
            await page.click(".playground button.primary")
            await page.wait_for("document.querySelectorAll('.talk .cost').length === 1")
            assert [message["role"] for message in app.chat.asked[-1][1]["messages"]] == ["system", "user"]
