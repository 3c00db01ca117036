"""A server in a process of its own, for the benchmarks beside this file."""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx2
import openai


def quiet() -> None:
  """No line of log for every request."""
  for name in ("httpx2", "httpx", "openai"):
    logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def start(*flags: str) -> Iterator[tuple[str, int]]:
  """`./run.sh serve` on a free port; yields its address and process id.

  The model's name is "model". It must end well when it is told to.
  """
  command = [sys.executable, "-m", "apps.serve", "--name=model", "--port=0", *flags]
  server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
  try:
    line = server.stdout.readline()
    found = re.search(r"http://\S+", line)
    if not found:
      raise SystemExit(f"the server did not start: {line}")
    yield found[0], server.pid
  finally:
    server.send_signal(signal.SIGTERM)
    code = server.wait(60)
  # Uvicorn ends by the signal that it was sent, once all is done.
  if code not in (0, -signal.SIGTERM):
    raise SystemExit(f"the server ended with {code}")


def client(url: str, timeout: float = 300) -> openai.AsyncOpenAI:
  return openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=timeout)


async def metrics(url: str) -> dict[str, float]:
  """The server's own numbers, but those with labels."""
  async with httpx2.AsyncClient() as http:
    text = (await http.get(url.removesuffix("/v1") + "/metrics")).text
  found = re.findall(r"^(flaxworks_\w+) (\S+)$", text, re.MULTILINE)
  return {name: float(value) for name, value in found}
