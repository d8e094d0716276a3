"""The scripts of the deployment guide: TLS, node authentication, loopback only, the same bytes."""

import os
import ssl
import stat
import subprocess
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import free_port
from deployment import Deployment, deployment, environment, in_group, make_keys, needs_flower

NODES = 2
CONFIG = 'device="cpu" alpha=0.5 rounds=2'  # the CPU, so that its bytes can be compared
LOOPBACK = "0100007F"  # 127.0.0.1 as /proc/net/tcp writes it

pytestmark = in_group


def listening(running: Deployment):
    """Return the addresses, in hexadecimal, at which its processes listen."""
    sockets = set()
    for entry in running.processes():
        for descriptor in (entry / "fd").glob("*"):
            try:
                sockets.add(os.readlink(descriptor))
            except OSError:
                continue
    tables = "".join(Path("/proc/net", name).read_text() for name in ("tcp", "tcp6"))
    rows = [row.split() for row in tables.splitlines()]
    return {r[1].split(":")[0] for r in rows if r[3] == "0A" and f"socket:[{r[9]}]" in sockets}


def stranger(running: Deployment, home, key=None):
    """Run a SuperNode that nobody registered."""
    port = free_port()
    log = home.with_suffix(".log")
    with log.open("w") as out:  # a pipe would stay open in its child until the SuperNode is reaped
        code = subprocess.call(
            running.supernode(key, port, "partition-id=0"),
            env=environment(FLWR_HOME=str(home)),
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
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", folder / "unknown"],
        check=True,
    )
    with deployment(folder, NODES, CONFIG) as running:
        running.wait_for_nodes()
        listened_at = listening(running)
        unknown_key = stranger(running, folder / "stranger", folder / "unknown")
        no_key = stranger(running, folder / "stranger")
        url, ca = f"{running.address}/health", running.keys / "ca.pem"
        answers = {
            "plain": answer(f"http://{url}"),
            "no CA": answer(f"https://{url}"),
            "CA": answer(f"https://{url}", ca),
        }
        code = running.process.wait(timeout=240)
    left = running.processes()
    return Seen(running.work, code, running.log, unknown_key, no_key, answers, listened_at, left)


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
@needs_flower
def test_a_deployment_gives_the_bytes_of_the_local_engine(deployed, quick):
    assert deployed.code == 0, deployed.log[-4000:]
    assert "the run ended as finished:completed" in deployed.log
    local = quick(
        clients=NODES,
        clients_per_round=NODES,
        rounds=2,
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
@needs_flower
def test_a_supernode_that_is_not_registered_is_refused(deployed):
    code, log = deployed.unknown_key
    assert code != 0
    assert "Failed to activate SuperNode" in log
    code, log = deployed.no_key
    assert code != 0
    assert "All SuperNodes must be registered" in log


@pytest.mark.slow
@needs_flower
def test_only_a_client_with_tls_and_the_ca_gets_an_answer(deployed):
    assert deployed.answers["CA"] == 200
    assert deployed.answers["no CA"] is ssl.SSLCertVerificationError
    assert issubclass(deployed.answers["plain"], ConnectionError)


@pytest.mark.slow
@needs_flower
def test_a_deployment_listens_on_loopback_only_and_leaves_no_process(deployed):
    assert deployed.listened_at == {LOOPBACK}
    assert deployed.left == []


@pytest.mark.slow
@needs_flower
def test_a_deployment_that_is_terminated_leaves_no_process(tmp_path):
    with deployment(tmp_path, 1, CONFIG) as running:
        running.wait_for_nodes()
        assert running.processes()
    assert running.process.returncode == 143, running.log
    assert running.processes() == []
