"""A live deployment for tests: the scripts of the deployment guide, and a look at what they start.

Tests that start one stand in the xdist group "deployment", one after the other.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ROOT / "docs" / "deploy"
BIN = Path(sys.executable).parent
NEEDED = ("bash", "openssl", "ssh-keygen", "ps")

in_group = [
    pytest.mark.xdist_group("deployment"),
    pytest.mark.skipif(
        not all(map(shutil.which, NEEDED)) or not Path("/proc/net/tcp").exists(),
        reason=f"needs Linux with {', '.join(NEEDED)}",
    ),
]
needs_flower = pytest.mark.skipif(
    not (BIN / "flower-superlink").exists(),
    reason="Flower's commands are not beside this Python",
)


def make_keys(folder: Path, nodes: int, *hosts: str) -> subprocess.CompletedProcess[str]:
    """Run keys.sh."""
    call = ["bash", SCRIPTS / "keys.sh", folder, nodes, *hosts]
    return subprocess.run([str(word) for word in call], capture_output=True, text=True, timeout=60)


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment with Flower's commands on PATH."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return os.environ | quiet | {"PATH": path} | more


@dataclass
class Deployment:
    """A run of local.sh: its keys, its folder of logs and results, its process."""

    keys: Path
    work: Path
    nodes: int
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        """What local.sh has said."""
        return self.work.with_suffix(".log").read_text()

    @property
    def address(self) -> str:
        """Where the SuperLink listens; known as soon as a SuperNode is connected."""
        return (self.work / "cli" / "config.toml").read_text().split('"')[1]

    def wait_for_nodes(self) -> None:
        """Wait until every SuperNode is connected."""
        logs = [self.work / f"node-{k}.log" for k in range(self.nodes)]
        end = time.monotonic() + 90
        while not all(path.exists() and "SuperNode ID" in path.read_text() for path in logs):
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.1)

    def supernode(self, key: Path | None, port: int, config: str) -> list[str]:
        """Return the command of one more SuperNode, which needs a FLWR_HOME of its own."""
        call = [BIN / "flower-supernode", "--superlink", self.address, "--port", port]
        call += ["--root-certificates", self.keys / "ca.pem", "--node-config", config]
        call += [] if key is None else ["--auth-supernode-private-key", key]
        return [str(word) for word in call]

    def processes(self, home: str = "") -> list[Path]:
        """Return /proc's folders of what runs with a Flower home below the folder of results.

        ``home`` narrows it down to one: "superlink", "node-0". Zombies have none.
        """
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                given = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"FLWR_HOME={self.work}/{home}".encode() in given:
                found.append(entry)
        return found


@contextmanager
def deployment(
    folder: Path, nodes: int, config: str = "", scripts: Path = SCRIPTS, **more: str
) -> Iterator[Deployment]:
    """Start local.sh in a folder, with keys of its own; terminate it at the end.

    Parameters
    ----------
    folder : Path
        Gets ``keys``, ``work`` and ``work.log``.
    nodes : int
        SuperNodes, and clients of the run.
    config : str
        Keys of the run over those of local.sh, as for ``flwr run --run-config``.
    scripts : Path
        Folder of local.sh, which deploys the app that it belongs to.
    **more : str
        Environment variables of everything that is started.
    """
    keys, work = folder / "keys", folder / "work"
    made = make_keys(keys, nodes)
    assert made.returncode == 0, made.stderr
    with work.with_suffix(".log").open("w") as out:
        process = subprocess.Popen(
            ["bash", str(scripts / "local.sh"), str(keys), str(work), config],
            env=environment(LIMIT="240", FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.1") | more,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
    try:
        yield Deployment(keys, work, nodes, process)
    finally:
        process.terminate()
        process.wait(timeout=30)
