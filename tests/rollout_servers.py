"""A small stand-in for vLLM and SGLang: their HTTP APIs over an engine on a tiny model."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading

import torch

from rlfast.rollout import Engine, SamplingParams
from tests.decoders import decoder


def engine() -> Engine:
    """On a tiny model, the same in every process."""
    return Engine(decoder("llama"), kv_budget=1 << 22)


class StandIn:
    """What the servers do, and what they were asked."""

    def __init__(self, engine: Engine, broken: str = ""):
        self.engine, self.broken, self.calls, self.lock = engine, broken, [], threading.Lock()
        self.go = threading.Event()  # clear: answers wait
        self.go.set()

    def answer(self, path: str, body: dict):
        """(status, JSON)."""
        self.calls.append((path, body))
        if self.broken == "status":
            return 503, {"error": "not ready"}
        if self.broken == "shape":
            return 200, {"choices": [{"index": 0}]} if "completions" in path else {"text": "only"}
        if self.broken == "list":
            return 200, ["no", "object"]
        if path.startswith("/reset_prefix_cache"):  # vLLM has blocks that running requests hold, and says 200
            return 200, {"success": path.endswith("?reset_running_requests=true") and self.broken != "cache"}
        if path in ("/v1/completions", "/generate"):
            self.go.wait()
        with self.lock:
            if path == "/v1/completions":
                return 200, self.completions(body)
            if path == "/generate":
                assert body["return_logprob"]
                each = zip(body["input_ids"], body["sampling_params"], strict=True)
                return 200, [answer for one in each for answer in self.sglang(*one)]
        return 200, {"success": True}

    def rollouts(self, prompt, **params):
        found = self.engine.generate([prompt], SamplingParams(**params))
        if self.broken == "id":
            found[0].tokens[0] = -5
        if self.broken == "log-prob":
            found[0].logp[0] = torch.nan
        if self.broken == "infinite":
            found[0].logp[0] = -torch.inf
        if self.broken == "fewer":
            found = found[1:]
        return [found[0]._replace(finish_reason="gibberish"), *found[1:]] if self.broken == "reason" else found

    def completions(self, body: dict) -> dict:
        """vLLM's: -1 is no top-k; ``token_ids`` because ``return_token_ids``; one sample of greedy ones."""
        assert body["return_token_ids"] and body["logprobs"] == 0 and (body["temperature"] > 0 or body["n"] == 1)
        found = self.rollouts(
            body["prompt"], n=body["n"], temperature=body["temperature"], top_p=body["top_p"],
            top_k=max(body["top_k"], 0), min_p=body["min_p"], max_tokens=body["max_tokens"],
            min_tokens=body["min_tokens"], seed=body["seed"], stop_token_ids=tuple(body["stop_token_ids"]),
            ignore_eos=body["ignore_eos"], repetition_penalty=body["repetition_penalty"],
        )  # fmt: skip
        choices = [
            {"index": r.index, "token_ids": r.tokens, "finish_reason": r.finish_reason, "text": r.text,
             "logprobs": {"token_logprobs": r.logp.tolist()}}
            for r in found
        ]  # fmt: skip
        return {"choices": choices[::-1]}

    def sglang(self, ids: list[int], p: dict) -> list[dict]:
        """Those of one prompt of a batch, which all have its seed."""
        found = []
        for _ in range(p.get("n", 1)):
            found += self.rollouts(
                ids, temperature=p["temperature"], top_p=p["top_p"], top_k=max(p["top_k"], 0), min_p=p["min_p"],
                max_tokens=p["max_new_tokens"], min_tokens=p["min_new_tokens"], seed=p["sampling_seed"],
                ignore_eos=p["ignore_eos"],
            )  # fmt: skip
        return [
            {"text": r.text, "meta_info": {
                "output_token_logprobs": [[x, t, None] for x, t in zip(r.logp.tolist(), r.tokens, strict=True)],
                "finish_reason": {"type": r.finish_reason},
            }}
            for r in found
        ]  # fmt: skip


@contextlib.contextmanager
def serving(stand_in: StandIn):
    """Its URL, while it runs."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers.get("Content-Length") or 0)
            status, found = stand_in.answer(self.path, json.loads(self.rfile.read(length) or b"{}"))
            text = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
