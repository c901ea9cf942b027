"""The explorer for prompts that are typed in: a server on this computer alone.

It is the standard library's `http.server`. The page is one document without parts to load, one person asks at a time,
and nothing is kept between requests, so that a framework would add a dependency with a web stack of its own (Gradio
brings thirty packages, a build of a front end, and by default a call home) and no feature that is used here. What
`http.server` leaves to its users is done below and tested: an address must be asked for by a name of this computer, so
that no web site can reach the server by pointing a name of its own at it; a request that another site makes is refused;
requests are bounded in size and time; there is one path, which reads no files and runs no code that was sent; and the
model stops when the browser no longer waits for it, so that it is free for the next prompt.
"""

import ipaddress
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, no_type_check
from urllib.parse import parse_qs, urlsplit

import torch
from torch.overrides import TorchFunctionMode

from tl_scopes.explorer import Explorer
from tl_scopes.views import explorer as view

LONGEST = 20_000
"""How many characters a prompt has at most. A request is 65,536 bytes long at most, as `http.server` has it."""
PATIENCE = 30.0
"""How many seconds a request waits for the one before it, and for a browser to say what it wants."""
_FIELDS = 8


class Gone(BaseException):
    """Nobody waits for the answer any more. Like an interrupt it is not an Exception, so that it is rarely caught."""


class WhileWaitedFor(TorchFunctionMode):
    """Inside, this thread stops computing soon after nobody waits for its answer any more.

    It asks whether anybody does a few times a second, and only before large operations, of which a forward pass has
    hundreds. Code that puts a model back as it was has none of them, so that it is never cut off.

    Args:
        is_gone: says whether nobody waits.

    Raises:
        Gone: at the next of these operations, when nobody waits.
    """

    LARGE = frozenset(
        {torch.nn.functional.linear, torch.nn.functional.softmax, torch.matmul, torch.einsum, torch.autograd.grad}
    )
    EVERY = 0.2
    """How many seconds pass before it asks again."""

    def __init__(self, is_gone: Callable[[], bool]) -> None:
        super().__init__()
        self.is_gone, self.next = is_gone, 0.0

    @no_type_check
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.LARGE and time.monotonic() > self.next:
            if self.is_gone():
                raise Gone
            self.next = time.monotonic() + self.EVERY
        return func(*args, **kwargs) if kwargs else func(*args)


class PromptServer(ThreadingHTTPServer):
    """A server of explorers. Each request has a thread, and one at a time runs the model.

    Args:
        explore: from a prompt to its explorer.
        host: the interface to listen at. The default can be reached from this computer alone.
        port: the port; 0 is any that is free.
        title: what the page is called before anything was asked.

    Raises:
        ValueError: for a port that is taken, that this user may not use, or that is none, and for an address that this
            computer does not have.
    """

    daemon_threads = True
    request_queue_size = 16

    def __init__(
        self, explore: Callable[[str], Explorer], host: str = "127.0.0.1", port: int = 8000, title: str = "tl_scopes"
    ) -> None:
        self.explore, self.title, self.one_at_a_time = explore, title, threading.Lock()
        self.asked_for = host
        if not 0 <= port <= 65535:
            raise ValueError(f"the port is a number from 0 to 65535, got {port}.")
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.address_family = family
            super().__init__((str(address[0]), int(address[1])), _Handler)
        except OSError as error:
            raise ValueError(
                f"cannot listen at {host} port {port} ({error.strerror or error}): another program may have it. Give "
                "another port, or port=0 for any that is free."
            ) from error

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        host, port = self.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else str(host)
        return f"http://{shown}:{port}/"

    def knows(self, host: str) -> bool:
        """Whether a Host header names this server: by an address, localhost, or the name that was asked for.

        A web site may point its own name at 127.0.0.1, and a browser then sends that name.
        """
        name = ""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            ipaddress.ip_address(name)
        except ValueError:
            return name in ("localhost", self.asked_for.lower(), socket.gethostname().lower())
        return True


class _Handler(BaseHTTPRequestHandler):
    server: PromptServer
    server_version, sys_version = "tl_scopes", ""
    timeout = PATIENCE

    def do_GET(self) -> None:
        """Answer with a form, and below it with the explorer of the prompt, where one was asked."""
        if not self._is_ours():
            return self.send_error(HTTPStatus.FORBIDDEN, "this server answers pages of its own alone")
        address = urlsplit(self.path)
        if address.path == "/favicon.ico":
            return self._send(HTTPStatus.NO_CONTENT, "")
        if address.path != "/":
            return self.send_error(HTTPStatus.NOT_FOUND, "there is one page here, at /")
        try:
            fields = parse_qs(address.query, keep_blank_values=True, errors="strict", max_num_fields=_FIELDS)
        except UnicodeDecodeError as error:
            return self.send_error(HTTPStatus.BAD_REQUEST, f"the prompt must be UTF-8: {error}")
        except ValueError:
            told = f"the address has more than {_FIELDS} fields: there is one, prompt"
            return self.send_error(HTTPStatus.BAD_REQUEST, told)
        if "prompt" not in fields:
            return self._send(HTTPStatus.OK, view.asked(self.server.title))
        try:
            return self._send(*self._answer(fields["prompt"][0].replace("\r\n", "\n")))
        except (Gone, ConnectionError):
            self.close_connection = True
            self.log_message("%s: %s", self.requestline, "the browser no longer waited for the answer")

    def _answer(self, prompt: str) -> tuple[HTTPStatus, str]:
        """The status and the page for a prompt.

        Raises:
            Gone: when the browser no longer waits.
        """
        if len(prompt) > LONGEST:
            told = f"the prompt has {len(prompt):,} characters, and the page takes {LONGEST:,}: ask a part of it."
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, view.asked(self.server.title, prompt[:LONGEST], told)
        if not self._turn():
            told = "the model is still at work on another prompt: ask again in a while."
            return HTTPStatus.SERVICE_UNAVAILABLE, view.asked(self.server.title, prompt, told)
        try:
            with WhileWaitedFor(self._is_gone):
                explored = self.server.explore(prompt)
            return HTTPStatus.OK, view.page(explored, view.form(prompt))
        except (ValueError, TypeError) as error:
            return HTTPStatus.BAD_REQUEST, view.asked(self.server.title, prompt, str(error))
        except (RuntimeError, MemoryError) as error:
            return HTTPStatus.INTERNAL_SERVER_ERROR, view.asked(self.server.title, prompt, str(error) or repr(error))
        except Exception:
            traceback.print_exc()
            told = "the prompt could not be answered: see what the server wrote in its terminal."
            return HTTPStatus.INTERNAL_SERVER_ERROR, view.asked(self.server.title, prompt, told)
        finally:
            self.server.one_at_a_time.release()

    def _turn(self) -> bool:
        """Wait for the prompt before this one, and say whether it is this one's turn.

        Raises:
            Gone: when the browser no longer waits.
        """
        end, lock = time.monotonic() + PATIENCE, self.server.one_at_a_time
        while not (ours := lock.acquire(timeout=max(0.0, min(0.5, end - time.monotonic())))) and time.monotonic() < end:
            if self._is_gone():
                raise Gone
        if ours and self._is_gone():
            lock.release()
            raise Gone
        return ours

    def _is_gone(self) -> bool:
        """Whether the browser has closed its connection, as it does with a tab and when it goes to another page."""
        try:
            ready, _, _ = select.select([self.connection], [], [], 0)
            return bool(ready) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except ValueError:  # more connections than `select` knows numbers for
            return False
        except OSError:
            return True

    def _is_ours(self) -> bool:
        """Whether the request came for this server, from one of its pages or from the person."""
        site = self.headers.get("Sec-Fetch-Site", "none")
        return self.server.knows(self.headers.get("Host", "")) and site in ("none", "same-origin")

    def _send(self, status: HTTPStatus, page: str) -> None:
        data = page.encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Length": str(len(data)),
            "Content-Security-Policy": "frame-ancestors 'none'",  # the rest of the policy stands in the page
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            "Connection": "close",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with a page that says what is wrong."""
        status = HTTPStatus(code)
        self.close_connection = True
        if status == HTTPStatus.REQUEST_URI_TOO_LONG:
            message = "the request is longer than 65,536 bytes: ask a shorter prompt"
            self.request_version, self.command = "HTTP/1.1", "GET"
        self._send(status, view.asked(self.server.title, "", f"{message or status.phrase}."))

    def log_message(self, format: str, *args: object) -> None:
        """Say in the terminal what was asked, but for the prompt itself."""
        line = str(args[0]).split("?")[0] if args else ""
        sys.stderr.write(f"{self.log_date_time_string()} {line} {' '.join(map(str, args[1:2]))}\n")
