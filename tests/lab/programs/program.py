# SPDX-License-Identifier: Apache-2.0
"""Stand-in for qm, pvesm and lvchange: ask the lab, print, exit as told."""

import json
import os
import socket
import sys

name = os.path.basename(sys.argv[0])
root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(sys.argv[0]))))
connection = socket.socket(socket.AF_UNIX)
try:
    connection.connect(os.path.join(root, "ctl"))
except OSError as error:
    sys.exit(f"{name}: the lab at {root} does not answer: {error}")
connection.sendall(json.dumps([name, *sys.argv[1:]]).encode() + b"\n")
with connection.makefile("rb") as stream:
    for line in stream:
        answer = json.loads(line)
        sys.stdout.write(answer.get("out", ""))
        sys.stdout.flush()
        sys.stderr.write(answer.get("err", ""))
        if "status" in answer:
            sys.exit(answer["status"])
sys.exit(f"{name}: the lab at {root} went away")
