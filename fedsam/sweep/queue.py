"""How the cells of a sweep are run: alone or as one program, in processes here or Ray tasks."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from multiprocessing.process import BaseProcess

from fedsam.base.errors import TrainingError, UsageError
from fedsam.config.schema import Config, dump, keys
from fedsam.runs.run import ending
from fedsam.sweep.cell import PRELOADED, run_cells
from fedsam.sweep.grid import SweepPoint

Failures = dict[str, str]  # by the names of cells that failed: why


def jobs_of(cells: Sequence[SweepPoint], together: int) -> list[list[SweepPoint]]:
    """Return the cells as jobs of up to ``together`` that can share one program."""
    jobs: list[list[SweepPoint]] = []
    open_job: dict[str, list[SweepPoint]] = {}  # by what it shares: the one that has room
    for cell in cells:
        job = open_job.get(_shared(cell.config))
        if job is None or len(job) == together:
            job = open_job[_shared(cell.config)] = []
            jobs.append(job)
        job.append(cell)
    return jobs


def _shared(config: Config) -> str:
    """Return what runs in one program have in common, as text.

    Options may differ in floats, but not in a switch's start: a program trains one method.
    """
    options = [*config.minimizer_options.items(), *config.client_options.items()]
    kinds = [(k, type(v) if isinstance(v, float) and k != "start" else v) for k, v in options]
    return repr([*(getattr(config, key) for key in keys("shared")), kinds])


def run_here(cells: Sequence[SweepPoint]) -> Failures:
    """Run cells in this process."""
    from fedsam.simulate.joint import run_together
    from fedsam.simulate.resume import went_on
    from fedsam.simulate.run import run

    try:
        places = [went_on(cell.prepare()) for cell in cells]
        begins = [place for place in places if place is not None]
        configs, snapshots = [c for c, _ in begins], [s for _, s in begins]
        if len(begins) == 1:
            run(configs[0], snapshot=snapshots[0])
        elif begins:
            run_together(configs, snapshots=snapshots)
    except (UsageError, TrainingError) as error:
        return _failures(cells, str(error))
    return {}


class ProcessPool:
    """Runs jobs in processes of this machine.

    Parameters
    ----------
    number : int
        At a time.
    """

    def __init__(self, number: int) -> None:
        self._pool = ThreadPoolExecutor(number, "fedsam-job")
        self._running: set[BaseProcess] = set()
        self._processes = get_context("forkserver")
        self._processes.set_forkserver_preload(PRELOADED)
        # open for as long as this process lives
        self._heard, self._alive = self._processes.Pipe(duplex=False)

    def submit(self, cells: Sequence[SweepPoint]) -> Future[Failures]:
        """Run a job in a process of its own, when there is room."""
        return self._pool.submit(self._run, cells)

    def close(self) -> None:
        """Begin no more jobs, and end those that run."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self._running):
            process.terminate()
        self._pool.shutdown()
        for end in (self._heard, self._alive):
            end.close()

    def _run(self, cells: Sequence[SweepPoint]) -> Failures:
        files = [cell.folder.parent / f"{cell.name}.yaml" for cell in cells]  # beside the folder
        for file, cell in zip(files, cells, strict=True):
            file.write_text(dump(cell.prepare()))
        log = cells[0].log
        words = [str(file) for file in files]
        process = self._processes.Process(target=run_cells, args=(words, log, self._heard))
        process.start()
        self._running.add(process)
        process.join()
        self._running.discard(process)
        for file in files:
            file.unlink()
        said = log.read_text(errors="replace")
        log.unlink()
        if process.exitcode == 0:
            return {}
        last = (said.strip().splitlines() or [f"it ended with {process.exitcode}"])[-1]
        failed = _failures(cells, last)
        for cell in cells:
            if cell.name in failed:
                cell.log.write_text(said)
        return failed


class RayTasks:
    """Runs jobs as Ray tasks; their folders must lie on a file system that all nodes share.

    Parameters
    ----------
    config : Config
        Of any cell: a task's cores are its ``threads``.

    Raises
    ------
    UsageError
        If Ray is not installed, or has not what is asked for.
    """

    def __init__(self, config: Config) -> None:
        try:
            from fedsam.engines.ray import TaskPool
        except ModuleNotFoundError as error:
            raise UsageError("--ray: Ray is not installed; pip install 'fedsam[ray]'") from error
        self._tasks = TaskPool(config.threads, config.gpus_per_worker, config.ray_address)

    def submit(self, cells: Sequence[SweepPoint]) -> Future[Failures]:
        """Run a job as a task, when there is room."""
        return self._tasks.submit(partial(run_here, cells))

    def close(self) -> None:
        """End all tasks."""
        self._tasks.close()


def _failures(cells: Sequence[SweepPoint], default: str) -> Failures:
    """Return why the cells of a job failed that did: what their own run said, else the job."""
    endings = {cell.name: ending(cell.folder) for cell in cells}
    return {name: reason or default for name, (finished, reason) in endings.items() if not finished}
