"""Stands in for `peer_worker.py`: the same protocol, and every call takes a fixed time."""

from __future__ import annotations

import json
import sys
import time

for line in sys.stdin:
    request = json.loads(line)
    command = request["command"]
    before = time.process_time()
    answer: dict[str, object] = {}
    if command == "load":
        if request["model"] == "refused.gguf":
            answer = {"error": "the tensor table is of cheese"}
        elif request["model"] == "crash.gguf":
            sys.exit("out of cheese")
        else:
            answer = {"version": "1.2", "seen": [request["threads"], request["context"]]}
    elif command == "prefill":
        answer = {"seconds": 0.5}
    elif command == "decode":
        answer = {"seconds": 0.25 * len(request["tokens"])}
    answer["cpu_seconds"] = [before, time.process_time()]
    print(json.dumps(answer), flush=True)
