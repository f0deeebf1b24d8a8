"""Stand-ins for the programs of an evaluation: `vllm serve` and the `lighteval` of Swallow.

They speak the interfaces of the real ones.  The server adds two numbers, and gets as many of every
ten sums wrong as WRONG_OF_TEN says; it writes each request to REQUESTS, and its process id to PID.
"""

from __future__ import annotations

import sys
from pathlib import Path

VLLM = r"""
import argparse, json, os, re, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("command", choices=["serve"])
parser.add_argument("model")
for option in ("served-model-name", "host", "reasoning-parser"):
    parser.add_argument(f"--{option}", required=True)
for option in ("port", "tensor-parallel-size", "max-model-len"):
    parser.add_argument(f"--{option}", type=int, required=True)
options = parser.parse_args()
if os.environ.get("VLLM_DIES"):
    sys.exit("CUDA out of memory")
if os.environ.get("VLLM_HANGS"):
    time.sleep(600)
with open(os.environ["PID"], "a") as file:
    print(os.getpid(), options.host, options.tensor_parallel_size, file=file)


def reply(text):
    first, second = map(int, re.findall(r"(\d+) \+ (\d+)", text)[-1])
    is_wrong = first % 10 < int(os.environ.get("WRONG_OF_TEN", "0"))
    return str(first + second + is_wrong)


class Handler(BaseHTTPRequestHandler):
    def answer(self, content, kind="application/json"):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/v1/models":
            model = {"id": options.served_model_name, "max_model_len": options.max_model_len}
            model["root"] = os.environ.get("VLLM_SERVES", options.model)
            return self.answer({"object": "list", "data": [model]})
        self.answer({})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(os.environ["REQUESTS"], "a") as file:
            print(json.dumps(request), file=file)
        message = {
            "role": "assistant",
            "reasoning_content": "Question: what do they want?",
            "content": reply(request["messages"][-1]["content"]),
        }
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.answer({"object": "chat.completion", "choices": [choice]})

    def log_message(self, *words):
        pass


ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()
"""

LIGHTEVAL = r"""
import argparse, datetime, json, os, re, urllib.request
from pathlib import Path
import pyarrow, pyarrow.parquet

parser = argparse.ArgumentParser()
parser.add_argument("kind", choices=["endpoint"])
parser.add_argument("backend", choices=["litellm"])
parser.add_argument("model_args")
parser.add_argument("task")
parser.add_argument("--use-chat-template", action="store_true", required=True)
parser.add_argument("--save-details", action="store_true", required=True)
parser.add_argument("--output-dir", type=Path, required=True)
parser.add_argument("--max-samples", type=int, default=200)
options = parser.parse_args()
# as lighteval 0.8.0 reads them
words = dict(re.findall(r"(\w+)=(\{.*\}|[^,]+)", options.model_args))
generation = json.loads(re.sub(r"(\w+):", r'"\1":', words["generation_parameters"]))
name = words["model"]
task = options.task.rpartition("|")[0]
if os.environ.get("LIGHTEVAL_FAILS") == task:
    raise SystemExit("DatasetNotFoundError")


def ask(question):
    request = {
        "model": name.removeprefix("hosted_vllm/"),
        "messages": [{"role": "user", "content": question}],
        "max_completion_tokens": generation["max_new_tokens"],
        "temperature": generation["temperature"],
        "top_p": generation["top_p"],
    }
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    posted = urllib.request.Request(
        words["base_url"] + "/chat/completions", json.dumps(request).encode()
    )
    return json.loads(opener.open(posted).read())["choices"][0]["message"]["content"]


date = datetime.datetime.now().isoformat().replace(":", "-")
details = options.output_dir / "details" / name / date
details.mkdir(parents=True)
results = {}
for subset in ("algebra", "physics"):
    key = task.replace("|0", f":{subset}|0")
    rows = []
    for number in range(options.max_samples):
        question = f"What is {number} + {len(subset)}?"
        found = ask(question)
        right = found == str(number + len(subset))
        rows.append({
            "example": question,
            "full_prompt": question,
            "gold": [str(number + len(subset))],
            "metrics": {"extractive_match": int(right), "inst_level": [right, True]},
            "predictions": [[found]],
            "specifics": None,
        })
    right = sum(row["metrics"]["extractive_match"] for row in rows)
    results[key] = {"extractive_match": right / len(rows)}
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, details / f"details_{key}_{date}.parquet")
folder = options.output_dir / "results" / name
folder.mkdir(parents=True, exist_ok=True)
content = {"config_general": {"lighteval_sha": "79cd3a8", "model_name": name}, "results": results}
(folder / f"results_{date}.json").write_text(json.dumps(content))
"""


def write_python_program(path: Path, text: str) -> str:
    """Write a program that this Python runs, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return str(path)
