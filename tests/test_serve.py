"""The explorer's server: what it answers, and what it refuses."""

import http.client
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from typer.testing import CliRunner

import tl_scopes as tls
from tests.browser import Browser
from tests.pictures import needs_browser
from tests.test_left_as_found import unchanged
from tl_scopes import serve
from tl_scopes.__main__ import main
from tl_scopes.cli_serve import app
from tl_scopes.serve import PromptServer

PROMPT = "The keys to the old cabinet"


@contextmanager
def serving(explore: Callable[[str], Any], **options: Any) -> Iterator[PromptServer]:
    with PromptServer(explore, port=0, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def get(server: PromptServer, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    """The status, headers and text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.headers), text


def told(page: str) -> str:
    """What a page says was wrong."""
    found = re.search('<p class="error" role="alert">(.*?)</p>', page, re.DOTALL)
    return unescape(found[1]) if found else ""


def refused(prompt: str) -> Any:
    raise AssertionError(f"the model was asked {prompt!r}")


def test_the_page_is_that_of_explore(tiny: Any) -> None:
    """Below a form that holds the prompt; line breaks are those that were typed."""
    asked: list[str] = []

    def explore(prompt: str) -> tls.Explorer:
        asked.append(prompt)
        return tls.explore(tiny, prompt, tls.SemanticScope())

    with serving(explore, title="tl_scopes: tiny") as server:
        assert server.url == f"http://127.0.0.1:{server.server_address[1]}/"
        status, headers, page = get(server)
        assert (status, told(page), asked) == (200, "", [])
        assert "<h1>tl_scopes: tiny</h1>" in page
        status, headers, page = get(server, f"/?prompt={quote(PROMPT + ' <b>' + chr(13) + chr(10) + 'é')}")
    assert asked == [f"{PROMPT} <b>\né"]
    assert status == 200
    assert f"{PROMPT} &lt;b&gt;\né</textarea>" in page
    body = tls.explore(tiny, asked[0], tls.SemanticScope()).to_html()
    data = re.search('id="data">(.*?)</script>', body, re.DOTALL)
    assert data
    assert data[0] in page
    assert json.loads(data[1])["bos"]
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:8000"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[::1"}, 403),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "none"}, 200),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
    ],
    ids=str,
)
def test_only_its_own_pages_are_answered(headers: dict[str, str], status: int) -> None:
    """No web site reaches it by pointing a name of its own at this computer, or by a link."""
    with serving(refused) as server:
        found, _, page = get(server, "/" if status == 200 else "/?prompt=x", **headers)
    assert found == status
    if status == 403:
        assert told(page) == "this server answers pages of its own alone."


@pytest.mark.parametrize(
    ("path", "method", "status", "message"),
    [
        ("/etc/passwd", "GET", 404, "there is one page here, at /"),
        ("/../../etc/passwd", "GET", 404, "there is one page here"),
        ("//evil.example/", "GET", 404, "there is one page here"),
        ("/", "POST", 501, "Unsupported method"),
        ("/?prompt=%ff", "GET", 400, "the prompt must be UTF-8"),
        ("/?" + "&".join(["a=1"] * 20), "GET", 400, r"^the address has more than 8 fields: there is one, prompt\.$"),
        ("/?prompt=" + "a" * 20_001, "GET", 413, "the prompt has 20,001 characters, and the page takes 20,000: ask"),
        ("/?prompt=" + "a" * 66_000, "GET", 414, "longer than 65,536 bytes: ask a shorter prompt"),
        ("/favicon.ico", "GET", 204, ""),
    ],
    ids=lambda value: str(value)[:20],
)
def test_requests_are_bounded(path: str, method: str, status: int, message: str) -> None:
    with serving(refused) as server:
        found, _, page = get(server, path, method)
    assert found == status
    assert re.search(message, told(page))


def test_errors_stand_on_the_page(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Below the prompt that was asked; a bug is told in the terminal alone."""
    with serving(lambda prompt: tls.explore(tiny, prompt, tls.SemanticScope())) as server:
        status, _, page = get(server, "/?prompt=")
        assert (status, told(page)) == (400, "the prompt is empty: give at least one character.")

    def fails(error: Exception) -> Callable[[str], Any]:
        def explore(prompt: str) -> Any:
            raise error

        return explore

    for error, status, message in (
        (MemoryError("the graph <needs> 9 GB"), 500, "the graph <needs> 9 GB"),
        (KeyError("secret"), 500, "the prompt could not be answered: see what the server wrote in its terminal."),
    ):
        with serving(fails(error)) as server:
            found, _, page = get(server, "/?prompt=a%20b")
        assert (found, told(page)) == (status, message)
        assert "a b</textarea>" in page
    log = capsys.readouterr().err
    assert "KeyError: 'secret'" in log
    assert "prompt=" not in log


def test_one_at_a_time(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    """A second prompt waits; one that waits too long is told so."""
    inside, go_on = threading.Event(), threading.Event()
    answer = tls.explore(tiny, "The", tls.SemanticScope())

    def explore(prompt: str) -> tls.Explorer:
        assert not inside.is_set()
        inside.set()
        assert go_on.wait(60)
        inside.clear()
        return answer

    statuses: list[int] = []
    with serving(explore) as server:
        first = threading.Thread(target=lambda: statuses.append(get(server, "/?prompt=one")[0]))
        first.start()
        assert inside.wait(60)
        assert get(server)[0] == 200  # the form does not wait
        monkeypatch.setattr(serve, "PATIENCE", 0.1)
        status, _, page = get(server, "/?prompt=two")
        assert (status, told(page)) == (503, "the model is still at work on another prompt: ask again in a while.")
        monkeypatch.setattr(serve, "PATIENCE", 60.0)
        second = threading.Thread(target=lambda: statuses.append(get(server, "/?prompt=three")[0]))
        second.start()
        go_on.set()
        first.join()
        second.join()
    assert statuses == [200, 200]


def test_the_model_stops_for_a_browser_that_is_gone(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It is left as it was found, and free for the next prompt; a prompt that waits for its turn gives up too."""
    began, ended = threading.Event(), threading.Event()
    asked: list[str] = []

    def explore(prompt: str) -> tls.Explorer:
        asked.append(prompt)
        if prompt == "short":
            return tls.explore(tiny, "The", tls.SemanticScope())
        try:
            while True:
                began.set()
                tls.explore(tiny, PROMPT, tls.SemanticScope())
        finally:
            ended.set()

    with serving(explore) as server:
        address = server.server_address[:2]
        with unchanged(tiny):
            with socket.create_connection(address) as first, socket.create_connection(address) as second:
                first.sendall(b"GET /?prompt=long HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert began.wait(60)
                second.sendall(b"GET /?prompt=waiting HTTP/1.1\r\nHost: localhost\r\n\r\n")
                second.close()
            assert ended.wait(60)
            assert get(server, "/?prompt=short")[0] == 200
    assert asked == ["long", "short"]
    assert capsys.readouterr().err.count("GET / the browser no longer waited for the answer") == 2


def test_a_silent_browser_blocks_nobody() -> None:
    with serving(refused) as server, socket.create_connection(server.server_address[:2]):  # it says nothing
        assert get(server)[0] == 200


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_a_port_in_use() -> None:
    with serving(refused) as server, pytest.raises(ValueError, match=r"cannot listen at 127.0.0.1 port \d+ \(Address"):
        PromptServer(refused, port=server.server_address[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 65536}, "the port is a number from 0 to 65535, got 65536"),
        ({"port": -1}, "the port is a number from 0 to 65535, got -1"),
        ({"host": "192.0.2.1", "port": 0}, "cannot listen at 192.0.2.1 port 0 .*: another program"),
        ({"host": "no such name", "port": 0}, "cannot listen at no such name port 0"),
    ],
    ids=str,
)
def test_where_it_cannot_listen(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptServer(refused, **options)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_tells_a_port_in_use() -> None:
    with serving(refused) as server:
        result = CliRunner().invoke(app, ["--port", str(server.server_address[1])])
    assert result.exit_code == 2
    assert "error: cannot listen at 127.0.0.1 port" in " ".join(result.stderr.split())


def test_the_command_tells_a_wrong_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--port", "0", "--model", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "there is no folder" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rules", "nope", "--model", "/none"], "there are no rules called 'nope'"),
        (["--rules", "linear", "--scope", "heta"], "what curves the network is constant: leave --rules out."),
        (["--chat"], "the model's tokenizer has no chat template"),
        (["--generate", "256"], "--generate 256 leaves no room for a prompt: the model's context is 256."),
    ],
    ids=str,
)
def test_the_command_tells_what_no_prompt_can_be_asked(args: list[str], message: str) -> None:
    """Before it serves, in one line."""
    result = CliRunner().invoke(app, ["--port", "0", *args], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in " ".join(result.stderr.split())
    assert "(Ctrl+C ends it)" not in result.stderr


def test_help() -> None:
    result = CliRunner().invoke(app, ["--help"])
    shown = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    for option in ("--scope", "--chat", "--generate", "--rules", "--model", "--port", "--host", "--bos", "Ctrl+C"):
        assert option in shown


def run_as_a_person(monkeypatch: pytest.MonkeyPatch, args: list[str], visit: Callable[[str], None]) -> None:
    """Run `tl-scopes serve`, go to its address in another thread, and then press Ctrl+C."""
    errors: list[BaseException] = []
    threads: list[threading.Thread] = []

    def person(url: str) -> None:
        try:
            visit(url)
        except BaseException as error:
            errors.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    class Watched(PromptServer):
        def serve_forever(self, poll_interval: float = 0.05) -> None:
            threads.append(threading.Thread(target=person, args=[self.url]))
            threads[0].start()
            super().serve_forever(poll_interval)

    monkeypatch.setattr(serve, "PromptServer", Watched)
    monkeypatch.setattr(sys, "argv", ["tl-scopes", "serve", "--port", "0", *args])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        for thread in threads:
            thread.join()
        signal.signal(signal.SIGINT, before)
    if errors:
        raise errors[0]
    assert ended.value.code == 0


def test_what_the_model_says_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def visit(address: str) -> None:
        with urlopen(f"{address}?prompt={quote(PROMPT)}") as answer:
            page = answer.read().decode()
        found = re.search('<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
        assert found
        data = json.loads(found[1])
        assert [map["scope"] for map in data["maps"]] == ["SemanticScope()", "TemperatureScope()"]
        assert data["said"]
        assert [row is not None for row in data["maps"][0]["rows"]] == [False] * 7 + [True] * 3

    run_as_a_person(monkeypatch, ["--generate", "3"], visit)


def test_an_empty_chat_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def visit(address: str) -> None:
        for prompt in ("", " "):
            with pytest.raises(HTTPError, match="400") as refused:
                urlopen(f"{address}?prompt={quote(prompt)}")
            assert told(refused.value.read().decode()) == "the prompt is empty: give at least one character."

    load = tls.load_tiny

    def chatty(**options: Any) -> Any:
        model = load(**options)
        model.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        return model

    monkeypatch.setattr(tls, "load_tiny", chatty)
    run_as_a_person(monkeypatch, ["--chat"], visit)


@needs_browser
def test_a_form_that_is_at_work(browser: Browser) -> None:
    """Ctrl+Enter asks once; the button says that the model is at work, until the person writes on."""
    asked: list[str] = []

    def explore(prompt: str) -> Any:
        asked.append(prompt)
        raise ValueError("enough")

    # In one expression, since the browser runs no second one while it waits for an answer.
    person = """(() => {
        const area = document.querySelector("textarea"), button = document.querySelector("button");
        const key = {key: "Enter", ctrlKey: true, bubbles: true};
        const press = () => area.dispatchEvent(new KeyboardEvent("keydown", key));
        const seen = () => [button.innerText, button.disabled];
        area.value = "The keys";
        press(); press();
        const busy = seen();
        area.dispatchEvent(new Event("input", {bubbles: true}));
        return [busy, seen()];
    })()"""
    with serving(explore) as server:
        browser.open(server.url)
        assert browser.run(person) == [["at work …", True], ["Explore", False]]
        while not asked:
            browser.events.append(browser._next())
    assert asked == ["The keys"]


@needs_browser
def test_type_a_prompt_in(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a person does: the command, a prompt, its explorer, another scope, another prompt, one that is wrong."""
    addresses: list[str] = []

    def visit(address: str) -> None:
        addresses.append(address)
        browser.open(address)
        assert browser.run("document.title") == "tl_scopes: tiny"
        assert browser.run("document.activeElement.tagName") == "TEXTAREA"  # one can type at once
        for prompt, shown in ((PROMPT, "·cabinet (6)"), ("<b> The", "The (")):
            browser.submit("textarea", prompt)
            assert shown in browser.run("document.getElementById('what').innerText")
            assert browser.run("document.querySelector('textarea').value") == prompt
            browser.choose("scope", 1)
            chosen = browser.run("document.getElementById('scope').selectedOptions[0].text")
            assert chosen == "RelevanceScope() under linear rules"
            assert "scope=1" in browser.run("location.hash")
        browser.submit("textarea", "")
        assert "the prompt is empty" in browser.run("document.querySelector('.error').innerText")
        assert [text for text in browser.complaints if "400" not in text] == []

    run_as_a_person(monkeypatch, ["--scope", "semantic", "--scope", "relevance", "--rules", "linear"], visit)
    assert f"tl_scopes: tiny at {addresses[0]} (Ctrl+C ends it)" in capsys.readouterr().err


def test_a_prompt_may_be_the_name_of_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tl-scopes", "--json", "-", "--", "serve"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "".join(tls.Attribution.from_json(capsys.readouterr().out).str_tokens).endswith("serve")
