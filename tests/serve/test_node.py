import signal
import subprocess
import sys
import time

import pytest

from serve.node import _address

WRAPPER = """
import sys
import serve.node as node
node._hand_over = lambda name, address, notice: print("handing over", address, notice, flush=True)
node.sys.executable = sys.argv[1]
print("running", flush=True)
code = node.run_node(["--address=head:1"], 3.0)
print("ended", code, flush=True)
"""


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        (["--address=head:6379"], "head:6379"),
        (["--num-cpus=2", "--address", "head:6379", "--block"], "head:6379"),
        (["--head"], "auto"),
    ],
)
def test_the_address_of_the_cluster_is_found_in_the_arguments_of_ray_start(arguments, address):
    assert _address(arguments) == address


def test_a_node_that_is_told_to_go_hands_over_first_and_stops_then(tmp_path):
    ray = tmp_path / "ray"
    ray.write_text("#!/bin/sh\ntrap 'echo ray stops; exit 7' TERM\necho ray $*\nwhile true; do sleep 0.05; done\n")
    ray.chmod(0o755)
    with subprocess.Popen([sys.executable, "-c", WRAPPER, str(ray)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "running\n"
        started = process.stdout.readline()
        assert started.startswith("ray -m ray.scripts.scripts start --block --node-name=")
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read().splitlines() == ["handing over head:1 3.0", "ray stops", "ended 7"]
