"""The scripts of the deployment guide: TLS, node authentication, loopback only, the same bytes."""

import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ROOT / "docs" / "deploy"
BIN = Path(sys.executable).parent
NODES = 2
LOOPBACK = "0100007F"  # 127.0.0.1 as /proc/net/tcp writes it
NEEDED = ("bash", "openssl", "ssh-keygen", "ps")

pytestmark = [
    pytest.mark.xdist_group("deployment"),
    pytest.mark.skipif(
        not all(map(shutil.which, NEEDED)) or not Path("/proc/net/tcp").exists(),
        reason=f"needs Linux with {', '.join(NEEDED)}",
    ),
]
flower = pytest.mark.skipif(
    not (BIN / "flower-superlink").exists(),
    reason="Flower's commands are not beside this Python",
)


def script(name, *arguments):
    return ["bash", str(SCRIPTS / name), *map(str, arguments)]


def make_keys(folder, nodes, *hosts):
    call = script("keys.sh", folder, nodes, *hosts)
    return subprocess.run(call, capture_output=True, text=True, timeout=60)


def environment(**more):
    return os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | more


def start(keys, work, log):
    """Start local.sh; its run trains on the CPU, so that its bytes can be compared."""
    with log.open("w") as out:
        return subprocess.Popen(
            script("local.sh", keys, work, 'device="cpu" alpha=0.5'),
            env=environment(LIMIT="240", FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.1"),
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=work.parent,
        )


def wait_for_nodes(local, work, log):
    """Wait until every SuperNode is connected."""
    logs = [work / f"node-{k}.log" for k in range(NODES)]
    end = time.monotonic() + 90
    while not all(path.exists() and "SuperNode ID" in path.read_text() for path in logs):
        assert local.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def processes(work):
    """Return the processes that have a Flower home in ``work``; zombies have none."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            given = (entry / "environ").read_bytes()
        except OSError:
            continue
        if f"FLWR_HOME={work}".encode() in given:
            found.append(entry)
    return found


def listening(work):
    """Return the addresses, in hexadecimal, at which processes of ``work`` listen."""
    sockets = set()
    for entry in processes(work):
        for descriptor in (entry / "fd").glob("*"):
            try:
                sockets.add(os.readlink(descriptor))
            except OSError:
                continue
    tables = "".join(Path("/proc/net", name).read_text() for name in ("tcp", "tcp6"))
    rows = [row.split() for row in tables.splitlines()]
    return {r[1].split(":")[0] for r in rows if r[3] == "0A" and f"socket:[{r[9]}]" in sockets}


def stranger(keys, address, home, *key):
    """Run a SuperNode that nobody registered."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    call = [BIN / "flower-supernode", "--superlink", address, "--port", port, *key]
    call += ["--root-certificates", keys / "ca.pem", "--node-config", "partition-id=0"]
    log = home.with_suffix(".log")
    with log.open("w") as out:  # a pipe would stay open in its child until the SuperNode is reaped
        code = subprocess.call(
            [str(word) for word in call],
            env=environment(
                FLWR_HOME=str(home), FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1"
            ),
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=30,
        )
    return code, log.read_text()


def answer(url, trusted=None):
    """Return the status of an HTTP answer, or the class of what went wrong."""
    tls = ssl.create_default_context(cafile=trusted) if url.startswith("https") else None
    try:
        with urllib.request.urlopen(url, timeout=10, context=tls) as reply:
            return reply.status
    except OSError as error:
        return type(getattr(error, "reason", error))


@dataclass
class Seen:
    """What a deployment showed while it ran, and after."""

    work: Path
    code: int
    log: str
    unknown_key: tuple[int, str]
    no_key: tuple[int, str]
    answers: dict[str, object]
    listened_at: set[str]
    left: list[Path]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """Run the scripts once, and look at the SuperLink while they run."""
    folder = tmp_path_factory.mktemp("deployed")
    keys, work, log = folder / "keys", folder / "work", folder / "log"
    assert make_keys(keys, NODES).returncode == 0
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", folder / "unknown"],
        check=True,
    )
    local = start(keys, work, log)
    try:
        wait_for_nodes(local, work, log)
        listened_at = listening(work)
        address = (work / "cli" / "config.toml").read_text().split('"')[1]
        home = folder / "stranger"
        own = ("--auth-supernode-private-key", folder / "unknown")
        unknown_key = stranger(keys, address, home, *own)
        no_key = stranger(keys, address, home)
        answers = {
            "plain": answer(f"http://{address}/health"),
            "no CA": answer(f"https://{address}/health"),
            "CA": answer(f"https://{address}/health", keys / "ca.pem"),
        }
        code = local.wait(timeout=240)
    finally:
        local.terminate()
        local.wait(timeout=30)
    left = processes(work)
    return Seen(work, code, log.read_text(), unknown_key, no_key, answers, listened_at, left)


def test_private_keys_are_their_owners_alone_and_nothing_is_overwritten(tmp_path):
    made = make_keys(tmp_path / "keys", 2, "superlink.example.org", "192.0.2.7", "2001:db8::7")
    assert made.returncode == 0, made.stderr
    private = {"ca.key", "superlink.key", "node-0", "node-1"}
    public = {"ca.pem", "superlink.pem", "node-0.pub", "node-1.pub", "partitions"}
    assert {path.name for path in (tmp_path / "keys").iterdir()} == private | public
    for name in private:
        assert stat.S_IMODE((tmp_path / "keys" / name).stat().st_mode) == 0o600
    call = ["openssl", "x509", "-in", tmp_path / "keys" / "superlink.pem", "-noout", "-text"]
    text = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    assert "DNS:localhost, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1" in text
    assert "DNS:superlink.example.org, IP Address:192.0.2.7, IP Address:2001:DB8" in text
    again = make_keys(tmp_path / "keys", 2)
    assert again.returncode == 2
    assert again.stderr == f"keys.sh: FOLDER {tmp_path / 'keys'}: exists already; name a new one\n"


@pytest.mark.slow
@flower
def test_a_deployment_gives_the_bytes_of_the_local_engine(deployed, quick):
    assert deployed.code == 0, deployed.log[-4000:]
    assert "the run ended as finished:completed" in deployed.log
    local = quick(
        clients=NODES,
        clients_per_round=NODES,
        rounds=3,
        eval_every=1,
        alpha=0.5,
        algorithm="fedasam",
        swa=True,
        swa_start=1,
        swa_cycle=1,
    )
    for name in ("model.safetensors", "model-trained.safetensors"):
        assert (deployed.work / "run" / name).read_bytes() == (local.folder / name).read_bytes()


@pytest.mark.slow
@flower
def test_a_supernode_that_is_not_registered_is_refused(deployed):
    code, log = deployed.unknown_key
    assert code != 0
    assert "Failed to activate SuperNode" in log
    code, log = deployed.no_key
    assert code != 0
    assert "All SuperNodes must be registered" in log


@pytest.mark.slow
@flower
def test_only_a_client_with_tls_and_the_ca_gets_an_answer(deployed):
    assert deployed.answers["CA"] == 200
    assert deployed.answers["no CA"] is ssl.SSLCertVerificationError
    assert issubclass(deployed.answers["plain"], ConnectionError)


@pytest.mark.slow
@flower
def test_a_deployment_listens_on_loopback_only_and_leaves_no_process(deployed):
    assert deployed.listened_at == {LOOPBACK}
    assert deployed.left == []


@pytest.mark.slow
@flower
def test_a_deployment_that_is_terminated_leaves_no_process(tmp_path):
    keys, work, log = tmp_path / "keys", tmp_path / "work", tmp_path / "log"
    assert make_keys(keys, NODES).returncode == 0
    local = start(keys, work, log)
    try:
        wait_for_nodes(local, work, log)
        assert processes(work)
    finally:
        local.terminate()
        code = local.wait(timeout=30)
    assert code == 143, log.read_text()
    assert processes(work) == []
