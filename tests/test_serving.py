"""The server as OpenAI's own client sees it, and its scheduler's promises."""

import concurrent.futures
import json
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moesaic
from moesaic import InputError, ServeConfig, complete
from moesaic.checkpoint.builtin import shipped_folder
from moesaic.models.tokenizer import token_bytes
from moesaic.serving.schedulers import SCHEDULERS, check_scheduler
from moesaic.serving.schedulers.order import Candidate, Room, by_expert

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
parser = pytest.importorskip("prometheus_client.parser")

from moesaic.serving.schedulers.expert_aware import ExpertAwareScheduler  # noqa: E402
from moesaic.serving.schedulers.signatures import Part, PrefillSignatures, PregateSignatures, often  # noqa: E402
from moesaic.serving.server.answers import Writer  # noqa: E402
from moesaic.serving.server.metrics import Metrics  # noqa: E402
from moesaic.serving.server.sampling import Sampling  # noqa: E402
from moesaic.serving.server.serve import listen  # noqa: E402
from moesaic.serving.server.text import TextStream  # noqa: E402

KEY = "a-key"
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
WORDS = ["The", "first", "In", "the", "year", "It", "was", "a", "When", "he", "They", "went", "on", "to"]
PROMPTS = [" ".join(WORDS[i % 7 : i % 7 + 3 + i % 5]) for i in range(40)]


@pytest.fixture(scope="module")
def loaded():
    """`tiny-moe` in float32, where a batch's company changes no token."""
    model, tokenizer = moesaic.load("tiny-moe", dtype=torch.float32, device="cpu")
    tokenizer.chat_template = CHAT
    return SimpleNamespace(model=model, tokenizer=tokenizer)


def served(loaded, **settings):
    return moesaic.serve(loaded.model, loaded.tokenizer, ServeConfig(port=0, name="tiny-moe", **settings))


@pytest.fixture(scope="module")
def server(loaded):
    with served(loaded, api_key=KEY, max_request_bytes=20_000, cache_tokens=4_096, max_batch_tokens=128) as running:
        yield running


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60)


def post(server, path="/v1/completions", key=KEY, **rest):
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    return httpx.post(server.url + path, headers=headers | rest.pop("headers", {}), timeout=60, **rest)


def is_idle(server):
    """Whether nothing has a place, within seconds."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if not server.app.batcher.running and not server.app.batcher.in_batch:
            return True
        time.sleep(0.05)
    return False


def metrics_of(server, key=KEY):
    text = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {key}"}).text
    return {
        s.name + "".join(s.labels.values()): s.value
        for f in parser.text_string_to_metric_families(text)
        for s in f.samples
    }


def test_a_completion_is_what_generate_gives(client, loaded):
    got = client.completions.create(model="tiny-moe", prompt="The first", max_tokens=24)
    assert got.choices[0].text == complete(loaded.model, loaded.tokenizer, "The first", max_new_tokens=24)
    assert got.choices[0].finish_reason == "length"
    prompt = len(loaded.tokenizer("The first")["input_ids"])
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (prompt, 24, prompt + 24)
    assert client.completions.create(model="tiny-moe", prompt="The first").usage.completion_tokens == 16


def post_chat(client, messages):
    got = client.chat.completions.create(model="tiny-moe", messages=messages, max_tokens=4)
    return got.choices[0].message.content, got.usage.prompt_tokens


def test_a_chat_goes_through_the_template(client, loaded):
    messages = [{"role": "user", "content": "The first"}]
    got = client.chat.completions.create(model="tiny-moe", messages=messages, max_completion_tokens=12)
    text = complete(loaded.model, loaded.tokenizer, "The first", max_new_tokens=12, chat=True)
    assert got.choices[0].message.content == text
    parts = [{"role": "user", "content": [{"type": "text", "text": "The first"}]}]
    again = client.chat.completions.create(model="tiny-moe", messages=parts, max_tokens=12)
    assert again.choices[0].message.content == text
    answer = {"role": "assistant", "content": "It was"}
    history = [*messages, answer, *messages]
    plain = post_chat(client, history)
    empty = {"refusal": None, "tool_calls": None, "function_call": None, "annotations": []}
    assert post_chat(client, [*messages, answer | empty, *messages]) == plain
    assert post_chat(client, [*messages, answer | {"tool_calls": []}, *messages]) == plain
    stream = client.chat.completions.create(model="tiny-moe", messages=messages, max_tokens=12, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    assert all(c.usage is None for c in chunks)


@pytest.mark.parametrize("stop", [None, [" the", ", and"], "e"])
def test_a_stream_is_the_whole_answer_in_pieces(client, stop):
    asked = {"model": "tiny-moe", "prompt": "The first", "max_tokens": 40, "stop": stop}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert all(c.usage is None for c in chunks[:-1])


def test_a_stop_ends_an_answer_before_it(client, loaded, server):
    whole = complete(loaded.model, loaded.tokenizer, "The first", max_new_tokens=40)
    stop = whole[20:26]
    got = client.completions.create(model="tiny-moe", prompt="The first", max_tokens=1_000, stop=[stop, "never so"])
    assert got.choices[0].text == whole[: whole.index(stop)]
    assert got.choices[0].finish_reason == "stop"
    assert got.usage.completion_tokens <= 40
    assert is_idle(server)


def test_several_prompts_and_tokens(client, loaded):
    tokens = [loaded.tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:3]]
    texts = [complete(loaded.model, loaded.tokenizer, prompt, max_new_tokens=8) for prompt in PROMPTS[:3]]
    for prompt in (PROMPTS[:3], tokens):
        got = client.completions.create(model="tiny-moe", prompt=prompt, max_tokens=8)
        assert [choice.text for choice in got.choices] == texts
        found = ["", "", ""]
        for chunk in client.completions.create(model="tiny-moe", prompt=prompt, max_tokens=8, stream=True):
            found[chunk.choices[0].index] += chunk.choices[0].text
        assert found == texts
    assert client.completions.create(model="tiny-moe", prompt=tokens[0], max_tokens=8).choices[0].text == texts[0]


def test_sampling_is_each_requests_own(client, loaded):
    greedy = complete(loaded.model, loaded.tokenizer, "The first", max_new_tokens=16)
    asked = [{"temperature": 1.0, "seed": 5}, {"temperature": 1.0, "seed": 6}, {}, {"temperature": 1.5, "top_p": 1e-6},
             {"logit_bias": {"40": 100}}, {"presence_penalty": 2, "frequency_penalty": 2}]  # fmt: skip

    def text(settings):
        return (
            client.completions.create(model="tiny-moe", prompt="The first", max_tokens=16, **settings).choices[0].text
        )

    alone = [text(settings) for settings in asked]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(text, asked * 2))
    assert together == alone * 2  # a seed gives its text in any company
    assert alone[2] == alone[3] == greedy
    assert len({alone[0], alone[1], greedy}) == 3
    assert alone[4] == loaded.tokenizer.decode([40] * 16)
    assert alone[5] != greedy


def test_logprobs_are_the_models(client, loaded):
    got = client.completions.create(model="tiny-moe", prompt="The first", max_tokens=6, logprobs=3).choices[0]
    ids = loaded.tokenizer("The first", return_tensors="pt").input_ids
    answer = loaded.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    with torch.inference_mode():
        logits = loaded.model(torch.cat([ids[0], answer])[None]).logits[0, ids.shape[1] - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(got.logprobs.token_logprobs), expected, rtol=0, atol=1e-4)
    assert "".join(got.logprobs.tokens) == got.text
    streamed = client.completions.create(
        model="tiny-moe", prompt="The first", max_tokens=6, logprobs=3, stream=True
    )  # fmt: skip
    offsets = [offset for c in streamed if c.choices[0].logprobs for offset in c.choices[0].logprobs.text_offset]
    assert offsets == got.logprobs.text_offset
    assert offsets == [len("".join(got.logprobs.tokens[:n])) for n in range(6)]
    assert all(len(top) <= 3 and max(top.values()) == pytest.approx(chosen)
               for top, chosen in zip(got.logprobs.top_logprobs, got.logprobs.token_logprobs, strict=True))  # fmt: skip
    chat = client.chat.completions.create(
        model="tiny-moe", messages=[{"role": "user", "content": "Hi"}], max_tokens=3, logprobs=True, top_logprobs=2,
        stream=True,
    )  # fmt: skip
    tokens = [t for c in chat if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [len(t.top_logprobs) for t in tokens] == [2, 2, 2]
    wrong = {"messages": [{"role": "user", "content": "Hi"}], "top_logprobs": 2}
    assert "'logprobs': true" in post_error(client, wrong)


def post_error(client, body):
    with pytest.raises(openai.BadRequestError) as found:
        client.post("/chat/completions", body=body, cast_to=object)
    return found.value.message


def test_parts_of_characters_have_their_own_bytes(loaded):
    tokenizer = loaded.tokenizer
    ids = tokenizer("é漢 a", add_special_tokens=False)["input_ids"]
    parts = [token_bytes(tokenizer, token, tokenizer.decode([token])) for token in ids]
    assert b"".join(parts) == "é漢 a".encode()
    split = [token for token in ids if "\ufffd" in tokenizer.decode([token])]
    assert split
    writer = Writer("", "", False, tokenizer)
    assert [writer._name(token).startswith("bytes:\\x") for token in split] == [True] * len(split)
    assert len({writer._name(token) for token in split}) == len(set(split))


BAD = [
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"), ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"), ({"n": 2}, "n"), ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": []}, "prompt"), ({"prompt": [99_999]}, None), ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2**40]}, "prompt"), ({"prompt": [[5], [10**30]]}, "prompt"),
    ({"logit_bias": {"\ud800": 1}}, "logit_bias"),
    ({"prompt": "\ud800"}, None), ({"stream": "yes"}, "stream"),
    ({"top_p": 0}, "top_p"), ({"stop": [""]}, "stop"), ({"seed": "x"}, "seed"), ({"echo": True}, "echo"),
    ({"best_of": 3}, "best_of"), ({"suffix": "x"}, "suffix"), ({"tempreature": 1}, "tempreature"),
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logprobs": 99}, "logprobs"), ({"max_tokens": 10**30}, "prompt"), ({"messages": []}, "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: json.dumps(value)[:40])
def test_a_bad_field_is_a_400_in_openais_form(server, fields, param):
    got = post(server, content=json.dumps({"prompt": "The first"} | fields))
    assert got.status_code == 400, got.text
    error = got.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert len(error["message"]) > 10


@pytest.mark.parametrize(
    ("messages", "says"),
    [([], "messages"), ([{"content": "x"}], "no role"), ([{"role": "user"}], "no content"), ("hello", "messages"),
     ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "no text"),
     ([{"role": "assistant", "content": "x", "tool_calls": ["x"]}], "has 'tool_calls', which is not supported"),
     ([{"role": "user", "content": "x", "name": "me"}], "has 'name', which is not supported"),
     ([{"role": "tool", "content": "x"}], "is what a tool said"),
     ([{"role": "user", "content": "\udc00"}], "surrogate")],
)  # fmt: skip
def test_bad_messages_are_a_400(server, messages, says):
    got = post(server, "/v1/chat/completions", content=json.dumps({"messages": messages}))
    assert got.status_code == 400, got.text
    assert says in got.json()["error"]["message"]


def test_a_client_cannot_bring_a_template(server):
    body = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}
    assert post(server, "/v1/chat/completions", json=body).status_code == 400


@pytest.mark.parametrize("body", ["{", "", "[1]", '"x"', "\xff", '{"prompt": ' + "[" * 5_000, "null"])
def test_malformed_json_is_a_400(server, body):
    got = post(server, content=body.encode("latin-1"))
    assert got.status_code == 400
    assert "error" in got.json()


def test_who_may_and_how_much(server, client):
    for key in (None, "wrong", "a-ke", "ä"):
        headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
        for path in ("/v1/models", "/metrics", "/v1/nowhere"):
            got = httpx.get(server.url + path, headers=headers)
            assert (got.status_code, got.json()["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert post(server, json={"prompt": "x" * 30_000}).status_code == 413
    assert post(server, content=iter([b"x" * 8_000] * 9)).status_code == 413  # of no length known before
    assert post(server, content="{}", headers={"Content-Type": "text/plain"}).status_code == 415
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt="The first")
    assert post(server, content=json.dumps({"model": "\ud800", "prompt": "The first"})).status_code == 404
    assert "model" not in post(server, json={"prompt": "The first"}).json().get("error", {})


def test_only_these_routes_are_open(server, client):
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/systemone", "/v1/audio/transcriptions", "/docs"):
        got = post(server, path, json={})
        assert (got.status_code, got.json()["error"]["type"]) == (404, "invalid_request_error"), path
    refused = post(server, "/v1/models", json={})
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET")
    assert [model.id for model in client.models.list()] == ["tiny-moe"]
    assert client.models.retrieve("tiny-moe").id == "tiny-moe"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_what_exceeds_the_context_is_refused_before_it_waits(server, client, loaded):
    with pytest.raises(openai.BadRequestError, match="context of 2,048") as refused:
        client.completions.create(model="tiny-moe", prompt="The first", max_tokens=2_048)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="tiny-moe", prompt="word " * 3_000)
    small = served(loaded, cache_tokens=64)
    assert small.app.context == 64
    small.close()


def test_forty_at_once_are_all_exact(server, loaded):
    expected = [complete(loaded.model, loaded.tokenizer, prompt, max_new_tokens=6) for prompt in PROMPTS]

    def ask(prompt):
        return post(server, json={"prompt": prompt, "max_tokens": 6}).json()["choices"][0]["text"]

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        assert list(pool.map(ask, PROMPTS)) == expected
    assert is_idle(server)


@pytest.mark.parametrize("scheduler", ["prefill-first", "expert-aware"])
def test_every_scheduler_gives_the_same_text(loaded, scheduler):
    """In batches of eight tokens, where the order matters; and the cache is so small that requests give way."""
    expected = [complete(loaded.model, loaded.tokenizer, prompt, max_new_tokens=10) for prompt in PROMPTS[:16]]
    with served(loaded, scheduler=scheduler, max_batch_tokens=8, cache_tokens=256) as server:
        assert type(server.app.batcher.scheduler).__name__.lower().startswith(scheduler.replace("-", "")[:7])

        def ask(prompt):
            return post(server, json={"prompt": prompt, "max_tokens": 10}).json()["choices"][0]["text"]

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            assert list(pool.map(ask, PROMPTS[:16])) == expected


def test_overload_is_a_429_and_passes(loaded):
    with served(loaded, max_queue=2) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        asked = {"model": "tiny-moe", "prompt": "The first"}
        streams = [client.completions.create(**asked, max_tokens=1_500, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(**asked)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.code == "overloaded"
        for stream in streams:
            stream.close()
        assert is_idle(server)
        assert client.completions.create(**asked).usage.completion_tokens == 16
        with pytest.raises(openai.BadRequestError, match="3 prompts are more than the 2"):
            client.completions.create(model="tiny-moe", prompt=["a", "b", "c"])  # never, so not to be tried again


SLOW_CLIENT = """
import json, socket, sys
port, stream = int(sys.argv[1]), sys.argv[2] == "stream"
body = json.dumps({"prompt": "The first", "max_tokens": 2000, "stream": stream}).encode()
connection = socket.create_connection(("127.0.0.1", port))
connection.sendall(b"POST /v1/completions HTTP/1.1\\r\\nHost: x\\r\\nContent-Type: application/json\\r\\n"
                   b"Authorization: Bearer a-key\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
if stream:
    connection.recv(1000)
print("sent", flush=True)
while connection.recv(1000):
    pass
"""


@pytest.mark.parametrize("kind", ["stream", "whole"])
def test_a_client_that_is_killed_frees_its_place(server, kind):
    port = server.url.rpartition(":")[2]
    process = subprocess.Popen([sys.executable, "-c", SLOW_CLIENT, port, kind], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "sent\n"
    end = time.monotonic() + 20
    while not server.app.batcher.in_batch and time.monotonic() < end:
        time.sleep(0.01)
    assert server.app.batcher.in_batch == 1
    process.kill()
    process.communicate()
    assert is_idle(server)
    assert not server.app.batcher.manager.output_router.result_handlers
    assert server.app.batcher.manager.batch_processor.cache.compute_free_capacity() > 0.9


def test_a_request_has_its_time(loaded):
    with served(loaded, timeout=0.3) as server:
        body = {"prompt": "The first", "max_tokens": 2_000}
        got = post(server, json=body)
        assert (got.status_code, got.json()["error"]["code"]) == (504, "timeout")
        lines = post(server, json=body | {"stream": True}).text.strip().splitlines()
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert is_idle(server)


def test_metrics_are_prometheus(loaded):
    loaded.model.expert_store = SimpleNamespace(
        counts=SimpleNamespace(hits=30, misses=10, prefetched=5, bytes_read=1e6)
    )
    try:
        with served(loaded) as server:
            for status in (200, 200, 400):
                assert (
                    post(server, json={"prompt": "The first" if status == 200 else 7, "max_tokens": 5}).status_code
                    == status
                )
            found = metrics_of(server)
    finally:
        del loaded.model.expert_store
    prompt = len(loaded.tokenizer("The first")["input_ids"])
    assert (found["moesaic_requests_total200"], found["moesaic_requests_total400"]) == (2, 1)
    assert (found["moesaic_prompt_tokens_total"], found["moesaic_generated_tokens_total"]) == (2 * prompt, 10)
    assert found["moesaic_time_to_first_token_seconds_count"] == 2
    assert found["moesaic_time_per_output_token_seconds_count"] == 2
    assert (found["moesaic_requests_running"], found["moesaic_requests_waiting"]) == (0, 0)
    assert found["moesaic_tokens_per_second"] > 0
    assert (found["moesaic_experts_hits_total"], found["moesaic_experts_hit_ratio"]) == (30, 0.75)
    assert found["moesaic_experts_bytes_read_total"] == 1e6


def test_a_dead_worker_is_a_503(loaded, monkeypatch):
    with served(loaded) as server:
        monkeypatch.setattr(loaded.model, "forward", None)
        for _ in range(2):
            got = post(server, json={"prompt": "The first"})
            assert (got.status_code, got.json()["error"]["code"]) == (503, "worker_dead")
        assert httpx.get(f"{server.url}/health").status_code == 503


def test_a_read_that_fails_ends_its_batch_only():
    model, tokenizer = moesaic.load("tiny-moe", dtype=torch.float32, store=moesaic.StoreOptions("30%"))
    with moesaic.serve(model, tokenizer, ServeConfig(port=0, name="tiny-moe")) as server:
        expected = post(server, json={"prompt": "The first", "max_tokens": 8}).json()["choices"][0]["text"]
        read = model.expert_store.source.read

        def away(key, out):
            raise OSError("the disk is away")

        model.expert_store.source.read = away
        got = post(server, json={"prompt": "He went to the year", "max_tokens": 8})
        assert (got.status_code, "the disk is away" in got.json()["error"]["message"]) == (500, True)
        model.expert_store.source.read = read
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert post(server, json={"prompt": "The first", "max_tokens": 8}).json()["choices"][0]["text"] == expected
        assert is_idle(server)


def test_a_stopping_server_lets_running_requests_finish(loaded):
    with served(loaded) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(post, server, json={"prompt": "The first", "max_tokens": 80})
        while not server.app.batcher.in_batch:
            time.sleep(0.005)
        server._background.server.drain()
        late = post(server, json={"prompt": "The first"})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "stopping")
        assert running.result().json()["usage"]["completion_tokens"] == 80


@pytest.fixture
def command(tmp_path):
    """A server started from the command line: (process, url)."""
    arguments = [sys.executable, "-m", "moesaic.cli", "serve", "tiny-moe", "--port", "0", "--json", "--device", "cpu"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    said = json.loads(process.stdout.readline())
    assert said["pid"] == process.pid
    yield process, said["url"]
    process.kill()
    process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_after_the_running_requests(command, number, code):
    process, url = command
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        body = {"prompt": "The first", "max_tokens": 80}
        running = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
        while "moesaic_requests_running 1" not in httpx.get(f"{url}/metrics").text:
            time.sleep(0.01)
        process.send_signal(number)
        assert running.result().json()["usage"]["completion_tokens"] == 80
    assert process.wait(30) == code
    said = process.stderr.read()
    assert f"curl {url}/v1/completions" in said
    assert "Traceback" not in said


def test_bad_options_are_refused_before_a_model_is_loaded(run):
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    for options, says in (
        (["--scheduler", "expert-awre"], "Did you mean 'expert-aware'"), (["--port", "70000"], "--port is 70000"),
        (["--port", port], "in use"), (["--host", "no.such.host.invalid"], "no address"),
        (["--host", ""], "--host is ''"), (["--host", "192.0.2.1"], "no address of this machine; give --host"),
        (["--api-key", "a b"], "--api-key"), (["--timeout", "0"], "--timeout"), (["--max-queue", "0"], "--max-queue"),
    ):  # fmt: skip
        code, out, err = run("serve", "no/such-model", *options)
        assert (code, out) == (2, ""), err
        assert says in err
    taken.close()
    code, _, err = run("serve", "tiny", "--port", "0", "--scheduler", "expert-aware", "--dry-run")
    assert code == 2
    assert "is dense" in err
    code, _, err = run("serve", "tiny", "--port", "0", "--cache-tokens", str(2**30), "--dry-run")
    assert code == 2
    assert "--cache-tokens" in err


def test_an_address_is_one_servers():
    with listen(ServeConfig(port=0)) as first, pytest.raises(InputError, match="in use"):
        listen(ServeConfig(port=first.getsockname()[1]))


def test_tokens_of_the_last_seconds_are_all_that_is_kept(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("moesaic.serving.server.metrics.time.perf_counter", lambda: now[0])
    counts = Metrics()
    for _ in range(1_000):
        now[0] += 0.1
        counts.took(0.0, 1.0, 2, 1)
    assert counts.tokens_per_second() == pytest.approx(20, rel=0.02)
    assert len(counts._recent) <= 101


def test_a_model_that_cannot_be_batched_is_refused_at_the_start(loaded):
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1,
        topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=8,
        first_k_dense_replace=0,
    )  # fmt: skip
    with pytest.raises(InputError, match="cannot run this 'deepseek_v3'"):
        moesaic.serve(AutoModelForCausalLM.from_config(config).eval(), loaded.tokenizer, ServeConfig(port=0))


def test_an_empty_key_in_the_environment_is_refused(run, monkeypatch):
    monkeypatch.setenv("MOESAIC_API_KEY", "")
    code, _, err = run("serve", "tiny-moe", "--port", "0", "--dry-run")
    assert (code, "holds nothing" in err) == (2, True)


def test_other_machines_are_warned_of(run):
    code, out, err = run("serve", "tiny-moe", "--host", "0.0.0.0", "--port", "0", "--dry-run", "--json")
    assert code == 0
    assert "other machines" in err
    assert json.loads(out)["model"] == "tiny-moe"
    _, _, err = run("serve", "tiny-moe", "--host", "0.0.0.0", "--port", "0", "--dry-run", "--api-key", KEY)
    assert "other machines" not in err
    assert KEY not in err


def test_a_missing_package_says_how_to_install_it(run, monkeypatch):
    monkeypatch.setattr("moesaic.compat.find_spec", lambda name: None if name == "fastapi" else True)
    code, _, err = run("serve", "tiny-moe")
    assert code == 2
    assert "pip install 'moesaic[serve]'" in err


# the text of tokens


@given(st.lists(st.integers(0, 1023), max_size=60), st.lists(st.text("ab e", min_size=1, max_size=3), max_size=3))
@settings(deadline=None, max_examples=60)
def test_a_text_stream_is_the_decoded_text_cut_at_the_first_stop(tokens, stops):
    from transformers import AutoTokenizer

    tokenizer = tokenizers.setdefault(0, AutoTokenizer.from_pretrained(shipped_folder("tiny-moe")))
    stream = TextStream(tokenizer, stops)
    found = "".join([*(stream.push([token]) for token in tokens), stream.finish()])
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    cuts = [whole.index(stop) for stop in stops if stop in whole]
    assert found == whole[: min(cuts, default=len(whole))]
    assert stream.stopped == bool(cuts)


tokenizers = {}


def test_biases_of_a_whole_vocabulary():
    biases = {token: float(token % 7) for token in range(100_000)}
    sampling, row_V = Sampling(1, logit_bias=biases), torch.zeros(100_000)
    found = sampling.choose(row_V, lambda: [5], [])
    assert torch.equal(found, torch.arange(100_000.0) % 7)
    assert not row_V.any()


def test_gumbel_noise_draws_from_the_distribution():
    row = torch.tensor([2.0, 1.0, 0.0, -9.0])
    sampling = Sampling(1, temperature=0.7, seed=3)
    drawn = (
        torch.stack([sampling.choose(row, lambda: [0], []).argmax() for _ in range(8_000)]).bincount(minlength=4)
        / 8_000
    )
    torch.testing.assert_close(drawn, (row / 0.7).softmax(-1), rtol=0, atol=0.02)
    assert row.tolist() == [2.0, 1.0, 0.0, -9.0]


# the order of requests


def read_me(candidates, budget):
    """Algorithm 1 as it is written: one expert each, longest queue first until the batch is full."""
    queues = {}
    for i, candidate in enumerate(candidates):
        queues.setdefault(candidate.experts, []).append(i)
    batch, room = [], budget
    while room > 0 and queues:
        longest = max(queues, key=lambda e: len(queues[e]))
        for i in queues.pop(longest):
            if room > 0:
                batch.append(i)
                room -= candidates[i].tokens
    return batch


ONE = st.builds(lambda e, t: Candidate(frozenset({e}), t), st.integers(0, 5), st.integers(1, 4))
MANY = st.builds(Candidate, st.frozensets(st.integers(0, 8)), st.integers(1, 9), st.integers(0, 12))


@given(st.lists(ONE, max_size=30), st.integers(1, 20))
def test_with_one_expert_each_it_is_read_mes_algorithm(candidates, budget):
    if sum(c.tokens for c in candidates) > budget:
        expected = read_me(candidates, budget)
        assert by_expert(candidates, Room(budget, 100)).offered[: len(expected)] == expected


@given(st.lists(MANY, max_size=40), st.integers(1, 60), st.frozensets(st.integers(0, 9)), st.none() | st.integers(1, 6))
def test_nothing_is_lost_and_the_late_go_first(candidates, budget, resident, most):
    order, kept_back = by_expert(candidates, Room(budget, 8, resident, most))
    assert sorted([*order, *kept_back]) == list(range(len(candidates)))
    assert order or not candidates
    late = [i for i, c in enumerate(candidates) if c.waited >= 8]
    assert sorted(order[: len(late)]) == late
    waits = [candidates[i].waited for i in order[: len(late)]]
    assert waits == sorted(waits, reverse=True)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=25), st.integers(1, 6), st.integers(1, 5))
@settings(deadline=None)
def test_no_request_starves(experts, budget, patience):
    """Of requests that each want one token a batch, beside a rival whose queue is always the longest."""
    waited = [0] * len(experts)
    for _ in range(3 * (patience + len(experts))):
        offered = [Candidate(frozenset({e}), 1, w) for e, w in zip(experts, waited, strict=True)]
        rival, room = len(offered), budget
        waited = [w + 1 for w in waited]
        for i in by_expert([*offered, Candidate(frozenset({99}), 50)], Room(budget, patience)).offered:
            if room == 0 or i == rival:
                break
            waited[i], room = 0, room - 1
        assert max(waited) <= patience + 1 + len(experts) // budget


def test_few_experts_share_a_batch():
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(0, 8, (64,), generator=generator).tolist()
    candidates = [Candidate(frozenset({e}), 1) for e in experts]
    ours = {experts[i] for i in by_expert(candidates, Room(16, 8)).offered[:16]}
    assert len(ours) <= 3 < len(set(experts[:16]))


def test_a_batch_keeps_to_what_fast_memory_holds():
    candidates = [Candidate(frozenset({e}), 1) for e in (0, 1, 2, 0, 3, 1, 2)]
    order = by_expert(candidates, Room(16, 8, frozenset({1, 2}), experts=2))
    assert order == ([1, 5, 2, 6], [0, 3, 4])  # 0 and 3 wait: they would push out 1 or 2
    late = [c._replace(waited=8) if c.experts == {3} else c for c in candidates]
    assert by_expert(late, Room(16, 8, frozenset({1, 2}), experts=2)) == ([4, 0, 3], [1, 2, 5, 6])


# signatures


@pytest.fixture(scope="module")
def ahead(tmp_path_factory):
    """The folder of a model with a router ahead of it, which decides for two groups of layers."""
    out = tmp_path_factory.mktemp("ahead") / "out"
    config = moesaic.ConvertConfig(
        plan="S2A2E16", router="pregate:groups=2,steps=20", partition="paths", tokens=1_024, window=64,
        held_out_tokens=256, format="moesaic",
    )  # fmt: skip
    moesaic.convert("tiny", out, config)
    return out


def request(name, prompt, generated=(), offset=0):
    return SimpleNamespace(
        request_id=name, initial_tokens=list(prompt), generated_tokens=list(generated), position_offset=offset
    )


def test_a_router_ahead_is_asked_once_for_each_token(ahead, monkeypatch):
    model, _ = moesaic.load(ahead)
    network, asked = model.pregate, []
    route = network.route_tokens
    monkeypatch.setattr(network, "route_tokens", lambda name, ids: asked.append((name, list(ids))) or route(name, ids))
    signatures = PregateSignatures(model, network)
    whole = network.route(torch.tensor([[11, 12, 13, 25]]))[0]
    numbered = whole + torch.tensor([0, network.num_experts])[:, None]  # each group's experts have their own numbers
    assert signatures.experts(request("a", [11, 12, 13]), 2) == set(numbered[:2].flatten().tolist())
    assert signatures.experts(request("a", [11, 12, 13], [25], offset=3), 1) == set(numbered[3].flatten().tolist())
    assert signatures.experts(request("a", [11, 12, 13, 25]), 4) == set(numbered.flatten().tolist())  # started again
    assert asked == [("a", [11, 12, 13]), ("a", [25])]
    signatures.scheduled([Part("a", 1, False, request("a", [11, 12, 13], [25], offset=3))])
    assert torch.equal(network.given_TGK, whole[3:])
    signatures.forget("a")
    assert not network.requests
    signatures.close()
    assert network.given_TGK is None


def test_a_router_ahead_cannot_prefer_what_is_in_memory(ahead):
    with pytest.raises(InputError, match="routed ahead of its layers"):
        moesaic.load(ahead, store=moesaic.StoreOptions("50%", cache_bias=0.2))


@pytest.mark.parametrize("memory", [None, "30%"])
@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_a_model_routed_ahead_gives_the_same_text(ahead, scheduler, memory):
    plain, tokenizer = moesaic.load(ahead, dtype=torch.float32)
    store = memory and moesaic.StoreOptions(memory)
    model, _ = moesaic.load(ahead, dtype=torch.float32, store=store)
    prompts = ["Once upon a time", "def sort(", "The first thing", "In 1900", "Dear Sir", "A recipe"]
    expected = [moesaic.complete(plain, tokenizer, prompt, max_new_tokens=8) for prompt in prompts]
    config = ServeConfig(port=0, scheduler=scheduler, max_batch_tokens=12)
    with moesaic.serve(model, tokenizer, config) as server, concurrent.futures.ThreadPoolExecutor(6) as pool:
        bodies = [{"prompt": prompt, "max_tokens": 8} for prompt in prompts]
        found = list(pool.map(lambda body: post(server, json=body).json()["choices"][0]["text"], bodies))
    assert found == expected
    assert not model.pregate.requests
    assert moesaic.complete(model, tokenizer, prompts[0], max_new_tokens=8) == expected[0]  # decides for itself again


@pytest.mark.parametrize("scheduler", ["fifo", "expert-aware"])
def test_a_server_that_stops_in_the_middle_says_so_and_leaves_the_model_as_it_was(ahead, scheduler, caplog):
    model, tokenizer = moesaic.load(ahead, dtype=torch.float32)
    expected = moesaic.complete(model, tokenizer, "Once", max_new_tokens=4)
    config = ServeConfig(port=0, scheduler=scheduler, max_batch_tokens=8, grace=0)
    with moesaic.serve(model, tokenizer, config) as server, concurrent.futures.ThreadPoolExecutor(12) as pool:
        body = {"prompt": "Once upon a time", "max_tokens": 1_000}
        answers = [pool.submit(post, server, json=body) for _ in range(12)]
        while len(server.app.batcher.running) < 12 or not server.app.batcher.in_batch:
            time.sleep(0.005)
        server._background.stop()
        server.close()
    ends = [answer.result() for answer in answers]
    assert {(end.status_code, end.json()["error"]["code"]) for end in ends} == {(503, "stopping")}
    assert not [record for record in caplog.records if record.exc_info]
    assert model.pregate.given_TGK is None
    assert not model.pregate.requests
    assert moesaic.complete(model, tokenizer, "Once", max_new_tokens=4) == expected


def test_a_prefill_leaves_its_experts(loaded):
    signatures = PrefillSignatures(loaded.model)
    ids = loaded.tokenizer("The first In the year", return_tensors="pt").input_ids
    length = ids.shape[1]
    signatures.scheduled([Part("a", length - 2, True, None), Part("b", 2, False, None)])
    seen = {}
    blocks = moesaic.find_blocks(loaded.model)
    handles = [b.watch(lambda h, r, n=n: seen.update({n: r.top_k_index})) for n, b in enumerate(blocks)]
    with torch.inference_mode():
        loaded.model(ids)
    for handle in handles:
        handle.remove()
    counts = [seen[n][: length - 2].flatten().bincount(minlength=16) for n in range(len(blocks))]
    assert signatures.experts(request("a", []), 1) == often(counts) != frozenset()
    assert signatures.experts(request("b", []), 1) == frozenset()
    signatures.forget("a")
    assert signatures.experts(request("a", []), 1) == frozenset()


def test_what_prefills_ran_keeps_nothing_back():
    """It is a guess: held to it, a batch was one request where the store is small, and the server a quarter slower."""
    model, _ = moesaic.load("tiny-moe", store=moesaic.StoreOptions("10%"))
    signatures = PrefillSignatures(model)
    with torch.inference_mode():
        model(torch.arange(8)[None])
    assert signatures.resident()
    few, many = frozenset({1, 2}), frozenset(range(40))
    candidates = [Candidate(few, 4), Candidate(many, 4), Candidate(frozenset(), 4), Candidate(few, 4)]
    room = Room(12, 16, signatures.resident(), signatures.most())
    found = by_expert(candidates, room)
    assert (sorted(found.offered), found.kept_back) == ([0, 1, 2, 3], [])
    signatures.close()


def test_names_of_schedulers():
    from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

    assert {check_scheduler(name) for name in SCHEDULERS} <= SCHEDULER_MAPPING.keys()
    assert SCHEDULER_MAPPING[check_scheduler("expert-aware")] is ExpertAwareScheduler
    assert check_scheduler("prefill_first") == check_scheduler("prefill-first")
    with pytest.raises(InputError, match="Did you mean 'fifo'"):
        check_scheduler("fif")
