"""What the service adds to a generation: one job through HTTP against the same under torchrun.

Both sides use the same ranks and threads, have their models loaded, and include text, VAE and MP4.
The rounds alternate on one machine, so only the ratio means something.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from cluster.local_service import local_service

PROMPT = "a slow pan over a mountain lake at dawn"
LIMIT = 1.15
SHORTEST_S = 10.0
LOOP_S = 900.0


def through_http(client: httpx.Client, size: str, num_frames: int, steps: int) -> float:
    """Seconds from sending the request to holding the MP4."""
    began = time.perf_counter()
    pusa = {"num_frames": num_frames, "num_inference_steps": steps, "seed": 1}
    response = client.post("/v1/videos", json={"prompt": PROMPT, "size": size, "pusa": pusa})
    response.raise_for_status()
    job = response.json()
    while job["status"] in ("queued", "in_progress"):
        time.sleep(int(response.headers["openai-poll-after-ms"]) / 1000)  # as the stock client does
        job = client.get(f"/v1/videos/{job['id']}").raise_for_status().json()
    if job["status"] != "completed":
        raise RuntimeError(f"job failed: {job['error']}")
    client.get(f"/v1/videos/{job['id']}/content", follow_redirects=True).raise_for_status()
    return time.perf_counter() - began


def plain_loop(
    model: str, ranks: int, size: str, num_frames: int, steps: int, out: Path, num_jobs: int = 1
) -> list[float]:
    """Seconds of each of the same generations in a plain loop over ranks, with everything loaded and warm.

    Raises:
        RuntimeError: it failed.
        TimeoutExpired: it took too long.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "pusa_dist"]
    command += ["generate", "--model", model, "--ulysses-degree", str(ranks), "--threads", "1", "--prompt", PROMPT]
    command += ["--size", size, "--num-frames", str(num_frames), "--num-inference-steps", str(steps), "--seed", "1"]
    command += ["--repeat", str(num_jobs + 1), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LOOP_S)
    if done.returncode:
        raise RuntimeError(f"torchrun ended with {done.returncode}:\n{done.stderr[-2000:]}")
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [float(one["seconds"]["total"]) for one in reports[-num_jobs:]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; exit code 1 above the limit or when the job was too short to tell."""
    parser = argparse.ArgumentParser(prog="python -m cluster.service_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="debug", help="model of both sides (default: %(default)s)")
    parser.add_argument("--size", default="288x192", help="WIDTHxHEIGHT of the video in pixels (default: %(default)s)")
    parser.add_argument("--num-frames", type=int, default=33, help="frames of the video, 4k+1 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of the video (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="videos made on each side (default: %(default)s)")
    arguments = parser.parse_args(argv)
    work = (arguments.size, arguments.num_frames, arguments.steps)
    say = sys.stdout.write
    http_s, plain_s = [], []
    with tempfile.TemporaryDirectory(prefix="pusa-cost-") as folder:
        state, out = Path(folder) / "state", Path(folder) / "plain.mp4"
        with local_service(arguments.model, state) as url, httpx.Client(base_url=url, timeout=60) as client:
            through_http(client, *work)  # warm-up
            for _ in range(arguments.rounds):
                plain_s += plain_loop(arguments.model, 2, *work, out)
                http_s.append(through_http(client, *work))
                say(f"plain {plain_s[-1]:6.2f} s   http {http_s[-1]:6.2f} s\n")
    ratio = min(http_s) / min(plain_s)
    passed = ratio <= LIMIT and min(plain_s) >= SHORTEST_S
    say("| job | plain loop, 2 ranks | through HTTP, 2 ranks | ratio | limit | verdict |\n|---|---|---|---|---|---|\n")
    say(
        f"| {arguments.size}, {arguments.num_frames} frames, {arguments.steps} steps | {min(plain_s):.2f} s "
        f"| {min(http_s):.2f} s | {ratio:.3f} | {LIMIT} | {'ok' if passed else 'MISSED'} |\n"
    )
    if min(plain_s) < SHORTEST_S:
        say(f"the plain loop took less than {SHORTEST_S:g} s, too short to judge; raise --steps\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
