"""FedAvg in BlazeFL (arXiv 2604.03606) on what benchmarks/engines.py hands over; needs BlazeFL.

Server, sampling of threads or processes, transport and averaging are BlazeFL's; the local loop is
its users' to write.
"""

import multiprocessing
import threading
import time
from pathlib import Path

import numpy as np
import torch
from blazefl.contrib import FedAvgBaseServerHandler
from blazefl.contrib.fedavg import (
    FedAvgDownlinkPackage,
    FedAvgProcessPoolUplinkPackage,
    FedAvgUplinkPackage,
)
from blazefl.core import (
    ProcessPoolClientTrainer,
    SHMHandle,
    ThreadPoolClientTrainer,
    deserialize_model,
    serialize_model,
)
from contest import serve
from handed import Client, Handed, loss_of
from torch import Tensor, nn


def train(net: nn.Module, state: Tensor, client: Client) -> Tensor:
    """Return what a client makes of the model's parameters, one flat tensor."""
    handed = client.handed
    deserialize_model(net, state)
    net.train()
    optimiser = torch.optim.SGD(net.parameters(), lr=handed.lr, weight_decay=handed.weight_decay)
    for batch in client:
        optimiser.zero_grad()
        loss_of(net, batch.images, batch.targets, bf16=handed.bf16).backward()
        optimiser.step()
    return serialize_model(net)


class Server(FedAvgBaseServerHandler):
    """BlazeFL's FedAvg with fedsam's cohorts."""

    def __init__(self, handed: Handed) -> None:
        self.handed, self.model, self.round = handed, handed.new_network(), 0
        self.num_clients_per_round = handed.cohort_size
        self.client_buffer_cache: list[FedAvgUplinkPackage] = []

    def sample_clients(self) -> list[int]:
        return self.handed.cohort(self.round + 1)


class Trainer:
    """What both of BlazeFL's pools ask of a trainer."""

    device, device_count = "cpu", 0

    def __init__(self, handed: Handed, workers: int) -> None:
        self.handed, self.num_parallels, self.number = handed, workers, 0
        self.cache: list[FedAvgUplinkPackage] = []

    def uplink_package(self) -> list[FedAvgUplinkPackage]:
        package, self.cache = self.cache, []
        return package


class Threads(Trainer, ThreadPoolClientTrainer):
    """Clients on BlazeFL's threads, which it starts anew each round."""

    def __init__(self, handed: Handed, workers: int) -> None:
        super().__init__(handed, workers)
        self.stop_event, self.own = threading.Event(), threading.local()

    def worker(
        self, cid: int, device: str, payload: FedAvgDownlinkPackage, stop_event: threading.Event
    ) -> FedAvgUplinkPackage:
        if not hasattr(self.own, "net"):  # one network a thread
            self.own.net = self.handed.new_network()
        client = self.handed.client(self.number, cid)
        state = train(self.own.net, payload.model_parameters, client)
        return FedAvgUplinkPackage(cid, state, len(client))


class Processes(Trainer, ProcessPoolClientTrainer):
    """Clients in BlazeFL's processes, which it starts anew each round: forked, the quickest."""

    forked: tuple[Handed, nn.Module]  # what processes have from their parent

    def __init__(self, handed: Handed, workers: int) -> None:
        super().__init__(handed, workers)
        multiprocessing.set_start_method("fork")
        torch.multiprocessing.set_sharing_strategy("file_system")  # a thousand files are too many
        self.manager = torch.multiprocessing.Manager()
        self.stop_event = self.manager.Event()
        Processes.forked = handed, handed.new_network()
        self.buffer = serialize_model(Processes.forked[1])

    def get_client_config(self, cid: int) -> tuple[int, int]:
        return self.number, cid

    def prepare_uplink_package_buffer(self) -> FedAvgProcessPoolUplinkPackage:
        return FedAvgProcessPoolUplinkPackage(-1, torch.empty_like(self.buffer), 0)

    def convert_buffer_to_uplink(
        self, buffer: FedAvgProcessPoolUplinkPackage
    ) -> FedAvgUplinkPackage:
        return FedAvgUplinkPackage(buffer.cid, buffer.model_parameters, buffer.data_size)

    @staticmethod
    def worker(
        config: tuple[int, int],
        payload: FedAvgDownlinkPackage,
        device: str,
        stop_event: threading.Event,
        *,
        shm_buffer: FedAvgProcessPoolUplinkPackage,
    ) -> FedAvgProcessPoolUplinkPackage:
        handed, net = Processes.forked
        client = handed.client(*config)
        shm_buffer.model_parameters.copy_(train(net, payload.model_parameters, client))
        return FedAvgProcessPoolUplinkPackage(config[1], SHMHandle(), len(client))


WAYS: dict[str, type[Threads | Processes]] = {"threads": Threads, "processes": Processes}


def compete(folder: Path, way: str, workers: int) -> None:
    """Serve rounds of BlazeFL's threads or processes, one compute thread each."""
    torch.set_num_threads(1)
    handed = Handed(folder)
    server, trainer = Server(handed), WAYS[way](handed, workers)

    def play() -> float:
        begin = time.perf_counter()
        clients = server.sample_clients()
        trainer.number = server.round + 1
        trainer.local_process(server.downlink_package(), clients)
        for package in trainer.uplink_package():
            server.load(package)
        return time.perf_counter() - begin

    def save(path: str) -> None:
        named = server.model.state_dict().items()
        np.savez(path, allow_pickle=False, **{name: tensor.numpy() for name, tensor in named})

    serve(play, save)
