"""A scoring server in a thread that answers as vLLM does from a tiny local LLM, and misbehaves on demand.

The answers' shapes are those of vLLM 0.32 (checked against a running one).
Scores come from one plain forward a sequence, so that nothing is shared with the code under test.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

Entry = tuple[float | None, int]  # log p of a token (None before the first one's) and its id


class Stub:
    """The server's state; tests change it while it runs.

    Attributes:
        url: its address.
        faults: what the next scoring requests meet, one each; ``ok`` for nothing.
        always: what every scoring request meets that no entry of ``faults`` is left for.
        poison: (token ids) → whether a request that holds such a sequence is answered with status 500.
        key: wanted in the Authorization header; None = none.
        prefix: of the message that refuses a key.
        models, max_model_len: what ``/v1/models`` tells.
        retry_after: seconds, sent with status 429.
        slow: seconds that every answer takes.
        bodies, headers: of the scoring requests so far.
        most_in_flight: largest number of scoring requests under way at once.
    """

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.url = ""
        self.faults: deque[str] = deque()
        self.always = "ok"
        self.poison: Callable[[list[int]], bool] = lambda ids: False
        self.key: str | None = None
        self.prefix = ""
        self.max_model_len: int | None = 512
        self.retry_after = 1
        self.models = [{"id": "tiny", "object": "model", "root": "tiny-root"}]
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0
        self.slow = 0.0
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self._known: dict[tuple[int, ...], list[Entry]] = {}

    def reset(self) -> None:
        """Back to good behaviour, with nothing remembered."""
        self.faults.clear()
        self.bodies.clear()
        self.headers.clear()
        self.always, self.key, self.max_model_len, self.retry_after, self.slow = "ok", None, 512, 1, 0.0
        self.poison, self.prefix = lambda ids: False, ""
        self.in_flight = self.most_in_flight = 0

    def entries(self, ids: list[int]) -> list[Entry]:
        """One entry a token, and one for the most probable next token."""
        with self.lock, torch.no_grad():
            if tuple(ids) not in self._known:
                logp = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
                following = [*ids[1:], int(logp[-1].argmax())]
                values = logp.gather(1, torch.tensor(following)[:, None])[:, 0].tolist()
                self._known[tuple(ids)] = [(None, ids[0]), *zip(values, following, strict=True)]
            return self._known[tuple(ids)]


def _damaged(fault: str, entries: list[Entry]) -> list[Entry]:
    """The entries of an input as a faulty server would give them."""
    if fault == "off_by_one":
        return entries[1:] + entries[-1:]
    if fault == "shifted_values":  # the ids are right: only the start-up check can tell
        values = [value for value, _ in entries]
        return [(None, entries[0][1]), *((values[min(n + 1, len(values) - 1)], i) for n, (_, i) in _tail(entries))]
    if fault == "truncate":
        return entries[:-1]
    if fault == "nan":
        return [*entries[:-1], (float("nan"), entries[-1][1])]
    if fault == "positive":
        return [*entries[:-1], (3.0, entries[-1][1])]
    if fault == "null":
        return [*entries[:-1], (None, entries[-1][1])]
    return entries


def _tail(entries: list[Entry]) -> list[tuple[int, Entry]]:
    return list(enumerate(entries))[1:]


def _vllm(stub: Stub, body: dict[str, Any], fault: str) -> Any:
    choices = []
    for n, ids in enumerate(body["prompt"]):
        *inputs, (generated_logp, generated) = stub.entries(ids)
        prompt_logprobs = [
            None if value is None and t == 0 else {str(i): {"logprob": value, "rank": 1, "decoded_token": "x"}}
            for t, (value, i) in enumerate(_damaged(fault, inputs))
        ]
        choice = {"index": n, "text": "x", "finish_reason": "length", "prompt_logprobs": prompt_logprobs}
        if fault == "missing":
            del choice["prompt_logprobs"]
        if "logprobs" in body:
            choice["logprobs"] = {"tokens": [f"token_id:{generated}"], "token_logprobs": [generated_logp]}
        choices.append(choice)
    if fault == "reorder":
        for a, b in zip(choices, reversed(range(len(choices))), strict=True):
            a["index"] = b
    if fault == "other_order":  # as a server may: the indices tell
        choices.reverse()
    if fault.startswith("index="):
        choices[-1]["index"] = json.loads(fault.removeprefix("index="))
    if fault == "fewer":
        choices.pop()
    return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: Stub

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def do_GET(self) -> None:
        stub = self.stub
        if self._refused():
            return
        if self.path != "/v1/models":
            self._send(404, {"detail": "Not Found"})
            return
        length = {} if stub.max_model_len is None else {"max_model_len": stub.max_model_len}
        models = [{**model, **length} if isinstance(model, dict) else model for model in stub.models]
        self._send(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        stub = self.stub
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        with stub.lock:
            stub.bodies.append(body)
            stub.headers.append({name.title(): value for name, value in self.headers.items()})
            fault = stub.faults.popleft() if stub.faults else stub.always
            stub.in_flight += 1
            stub.most_in_flight = max(stub.most_in_flight, stub.in_flight)
        try:
            time.sleep(stub.slow)
            self._answer(body, fault)
        finally:
            with stub.lock:
                stub.in_flight -= 1

    def _refused(self) -> bool:
        given = self.headers.get("Authorization", "")
        if self.stub.key is None or given == f"Bearer {self.stub.key}":
            return False
        self._send(401, {"error": f"{self.stub.prefix}Incorrect key provided: {given.removeprefix('Bearer ')}"})
        return True

    def _answer(self, body: dict[str, Any], fault: str) -> None:
        stub = self.stub
        sequences = body["prompt"]
        if self.path != "/v1/completions":
            self._send(404, {"detail": "Not Found"})
        elif not any(isinstance(m, dict) and m.get("id") == body["model"] for m in stub.models):
            self._send(404, {"error": {"message": "The model does not exist."}})
        elif fault.isdigit() or any(map(stub.poison, sequences)):
            status = int(fault) if fault.isdigit() else 500
            extra = (
                {"Retry-After": str(stub.retry_after)} if status == 429 else {"Location": "/"} if status == 307 else {}
            )
            self._send(status, {"error": {"message": f"injected {status}"}}, **extra)
        elif max(map(len, sequences)) > (stub.max_model_len or 512):
            self._send(400, {"error": {"message": "too long"}})
        elif fault == "hang":
            stub.stopped.wait(30)
            self.close_connection = True
        else:
            self._send(200, _vllm(stub, body, fault), fault=fault)

    def _send(self, status: int, content: Any, *, fault: str = "ok", **headers: str) -> None:
        data = json.dumps(content).encode()
        if fault == "html":
            data = b"<html>It works!</html>"
        if fault == "half_json":
            data = data[: len(data) // 2]
        if fault == "huge":
            data += b" " * 2**17
        if fault == "gzip":
            data, headers = gzip.compress(data + b" " * 2**20), {"Content-Encoding": "gzip"}
        if fault == "endless":
            self._send_endless()
            return
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if fault == "trickle":
            for byte in data:
                if self.stub.stopped.wait(0.05):
                    break
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.close_connection = self.close_connection or fault == "cut"

    def _send_endless(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while not self.stub.stopped.is_set():
            self.wfile.write(b"1000\r\n" + b" " * 0x1000 + b"\r\n")

    def handle(self) -> None:
        """A client that has gone away in the middle of an answer is no error here."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            super().handle()


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Stub]:
    """Runs a stub of a server over the LLM in ``folder``."""
    stub = Stub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": stub}))
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.stopped.set()
        server.shutdown()
        server.server_close()
