"""A reward that a server gives: one POST of JSON for some samples, retried when the server is busy or gone."""

from __future__ import annotations

import base64
import http.client
import json
import math
import random
import string
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastppo.rewards.policy import RewardPolicy
from fastppo.rewards.scores import parse_scores

# Too early, busy, or not there at the moment: worth another try.
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_MOST_BYTES = 16 * 2**20  # of an answer: a million scores have room


class RewardServerError(RuntimeError):
    """A reward server that cannot be reached or gives no usable answer. Its text names the host and nothing more."""


class URLReward:
    """The scores that a server gives to a POST of `{"prompts": [...], "completions": [...], "columns": {...}}`.

    It answers `{"scores": [...]}`: one number for each completion, or null for one without a score. Chats are sent as
    lists of messages, columns without token ids. Timeouts, lost connections and the statuses 408, 425, 429, 500, 502,
    503 and 504 are tried again after a pause that doubles (or the server's Retry-After, at most `timeout`). After the
    last try a timeout leaves the samples without a score; everything else is a `RewardServerError`, as are redirects,
    which are not followed, other statuses, and answers that are not as above.

    Args:
        url: http or https; a user and password in it are sent as basic authentication.
        timeout: seconds that the server may leave a request without a sign of life, and that an answer may take.
        retries: tries after the first.
        backoff: seconds before the second try, give or take a half.
        batch_size: samples in a request.
        concurrency: requests under way at the same time.
        on_error: what a `RewardServerError` means; see `RewardPolicy`.
        headers: sent with every request, such as {"Authorization": "Bearer ..."}.

    Neither the URL beyond its host nor the headers appear in messages. Proxies of the environment are not used.
    Raises ValueError for a URL of another kind.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        batch_size: int = 8,
        concurrency: int = 8,
        on_error: str | float = "raise",
        headers: Mapping[str, str] | None = None,
    ):
        parts, port = _split(url)
        if timeout <= 0 or retries < 0 or backoff < 0:
            raise ValueError(
                f"timeout must be greater than 0, retries and backoff at least 0, got {timeout}, {retries}, {backoff}"
            )
        self._connect: Callable[..., http.client.HTTPConnection] = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._host, self._port = str(parts.hostname), port
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        self._path = urllib.parse.quote(path, safe=string.punctuation)
        private = {**_login(parts), **(headers or {})}
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", **private}
        self._secrets = _secrets(self._path, private)
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self._random = random.Random()  # pauses must not draw from the numbers that a seed stands for
        self.__name__ = f"URLReward({parts.scheme}://{self._host}{f':{port}' if port else ''})"
        # Nothing but a server that sends a byte now and then outlasts this.
        most = (retries + 1) * (2 * timeout) + retries * max(timeout, 1.5 * backoff * 2**retries)
        self.reward_policy = RewardPolicy(
            timeout=most, on_error=on_error, batch_size=batch_size, concurrency=concurrency
        )

    def __repr__(self) -> str:
        return self.__name__

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        prompt_ids: Any = None,
        completion_ids: Any = None,
        **columns: Any,
    ) -> Tensor:
        """Return the scores, (B,) fp32, NaN for null. Raises TimeoutError and `RewardServerError`."""
        content = {"prompts": list(prompts), "completions": list(completions), "columns": columns}
        try:
            body = json.dumps(content, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self} cannot send the data's columns {sorted(columns)} as JSON ({error}); leave out or change those "
                "that are not texts, finite numbers or lists of them"
            ) from None
        return self._parse(self._answer(body), len(completions))

    # --- requests ---------------------------------------------------------------------------------------------

    def _answer(self, body: bytes) -> bytes:
        """Return what the server answers, after as many tries as it takes."""
        for attempt in range(self.retries + 1):
            pause = self.backoff * 2**attempt * self._random.uniform(0.5, 1.5)
            try:
                status, headers, content = self._post(body)
            except TimeoutError:
                failure: Exception = TimeoutError(f"{self} did not answer within {self.timeout} seconds")
            except (OSError, http.client.HTTPException) as error:
                failure = RewardServerError(f"{self} cannot be reached: {type(error).__name__}; is it running?")
            else:
                if 200 <= status < 300:
                    return content
                failure = self._refusal(status, content)
                if status not in _TRANSIENT:
                    raise failure
                pause = max(pause, min(_seconds(headers.get("Retry-After")), self.timeout))
            if attempt < self.retries:
                time.sleep(pause)
        tries = f" ({self.retries + 1} tries)"
        raise type(failure)(str(failure) + tries)

    def _post(self, body: bytes) -> tuple[int, Any, bytes]:
        """Return status, headers and content of one request. Raises OSError and HTTPException."""
        connection = self._connect(self._host, self._port, timeout=self.timeout)
        end = time.monotonic() + self.timeout
        try:
            connection.request("POST", self._path, body, self._headers)
            response = connection.getresponse()
            content = bytearray()
            while part := response.read1(65536):
                content += part
                if time.monotonic() > end:
                    raise TimeoutError
                if len(content) > _MOST_BYTES:
                    raise http.client.HTTPException("too long")
            if response.length:  # it promised more
                raise http.client.IncompleteRead(bytes(content), response.length)
            return response.status, response.headers, bytes(content)
        finally:
            connection.close()

    def _refusal(self, status: int, content: bytes) -> RewardServerError:
        if 300 <= status < 400:
            return RewardServerError(f"{self} redirects (status {status}), which is not followed; give the final URL")
        return RewardServerError(f"{self} answered with status {status}{self._said(content)}")

    def _said(self, content: bytes) -> str:
        """Return the beginning of an answer to quote, without what was sent in confidence."""
        text = content.decode(errors="replace")
        for secret in self._secrets:
            text = text.replace(secret, "[redacted]")
        text = " ".join(text.split())[:200]
        return f": {text!r}" if text else ""

    def _parse(self, content: bytes, count: int) -> Tensor:
        expected = f'expected {{"scores": [...]}} with {count} numbers or nulls'
        try:
            answer = json.loads(content)
        except ValueError as error:
            raise RewardServerError(f"{self} did not answer in JSON{self._said(content)}; {expected}") from error
        if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
            raise RewardServerError(f"{self} answered{self._said(content)}; {expected}")
        try:
            return parse_scores(answer["scores"], count)
        except ValueError as error:
            raise RewardServerError(f"{self}: {error}; {expected}") from error


def _split(url: str) -> tuple[urllib.parse.SplitResult, int | None]:
    """Return a URL's parts and its port. Raises ValueError, which does not quote it: it may hold a password."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts, parts.port
    except ValueError:
        pass
    shown = "one that may hold a password" if set(url) & set("@?") else repr(url)
    raise ValueError(f"a reward's URL must be http[s]://[user:password@]host[:port][/path], got {shown}")


def _secrets(path: str, headers: Mapping[str, str]) -> list[str]:
    """Return what no message may quote, the longest first: the path, the values of its query, and the headers."""
    values = [value for _, value in urllib.parse.parse_qsl(urllib.parse.urlsplit(path).query)]
    for value in headers.values():
        values += [value, value.rpartition(" ")[2]]
    return sorted({value for value in [path, *values] if len(value) > 1}, key=len, reverse=True)


def _login(parts: urllib.parse.SplitResult) -> dict[str, str]:
    if parts.username is None:
        return {}
    pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def _seconds(retry_after: str | None) -> float:
    """Return the seconds that a server asks to wait; 0 for a date, which would need its clock."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
