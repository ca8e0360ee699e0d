"""Keeps a deployment as its settings want it: places processes, tells them their peers, and notices what changed.

It holds no request: gateways and workers go on without it. Ray starts it again when it dies, and it finds the
processes by their names then.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvferry.deploy.cluster.autoscaler import ROLES, Autoscaler, KnownWorker, RoleScaling, WorkerRole
from kvferry.deploy.cluster.members import DirectoryActor, GatewayActor, Started, StoreActor, WorkerActor
from kvferry.deploy.cluster.plan import Machine, Member, choose_machine, wanted_members
from kvferry.deploy.cluster.worker_stats import WorkerStatsPoller
from kvferry.deploy.security import peer_security
from kvferry.deploy.settings import Settings
from kvferry.kvstore.process_logs import configure_logs

logger = logging.getLogger(__name__)

CONTROLLER = "controller"
INTERVAL_S = 1.0
STOP_TIMEOUT_S = 10.0
STOP_DRAIN_S = 5.0
"""For running requests when all of it ends."""
LEAVE_DRAIN_S = 60.0
"""For running requests of a worker that leaves while others stay."""
FAILED_WAIT_S = 10.0
"""Before a process whose start failed is asked again."""
RESOURCE_SHARE = 0.001
"""How much of `resource` a worker takes: the resource says where, not how many."""

State = Literal["waiting", "starting", "up", "failed"]


@dataclass(frozen=True, kw_only=True)
class MemberState:
    """What the controller knows of a process."""

    name: str
    role: str
    state: State
    machine: str = ""
    """The address of the machine where it was placed; empty: none has room."""
    started: Started | None = None
    """What it said last; a process that is starting again listens there again, if its port is fixed."""
    problem: str = ""
    num_starts: int = 0
    """How many processes it had."""


@dataclass
class _Process:
    """A member and its actor."""

    member: Member
    handle: Any
    machine_id: str
    machine: str
    call: Any = None
    """The running `ensure`, if any."""
    asked_at: float = 0.0
    started: Started | None = None
    problem: str = ""
    num_starts: int = 0
    state: State = "starting"


class Controller:
    """A Ray actor with a thread that does the work; its methods answer at once, but for `stop`."""

    def __init__(self, settings: Settings) -> None:
        configure_logs(settings.log.config(), process=CONTROLLER)
        self._settings = settings
        self._head = ray.get_runtime_context().get_node_id()
        self._counts = {
            "directory": 0 if settings.cluster.directory else 1,
            "store": 0 if settings.store.nodes else settings.store.count,
            "prefill": settings.prefill.count,
            "decode": settings.decode.count,
            "gateway": settings.gateway.count,
        }
        self._counts |= _counts_of_running(settings.cluster.name)
        self._autoscaler = Autoscaler(settings, self._counts, now=time.monotonic())
        self._counts |= self._autoscaler.counts()
        self._stats = WorkerStatsPoller(peer_security(settings.security))
        self._processes: dict[str, _Process] = {}
        self._leaving: set[str] = set()
        self._restarting: set[str] = set()
        self._problem = ""
        self._born = time.monotonic()
        self._enough_machines = bool(_names_of_running(settings.cluster.name))
        """A controller that comes with the loss of a machine must not wait for it before it replaces what ran there."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._thread.start()
        if self._autoscaler.roles:
            self._stats.start()

    def members(self) -> list[MemberState]:
        processes = self._processes
        states = []
        for member in self._wanted(has_gpus=False):
            process = processes.get(member.name)
            if process is None:
                states.append(MemberState(name=member.name, role=member.role, state="waiting", problem=self._problem))
            else:
                states.append(
                    MemberState(
                        name=member.name,
                        role=member.role,
                        state=process.state,
                        machine=process.machine,
                        started=process.started,
                        problem=process.problem,
                        num_starts=process.num_starts,
                    )
                )
        return states

    def scaling(self) -> list[RoleScaling]:
        """Of each role that has workers: how many are wanted and how many are up, and why."""
        states = self.members()
        now = time.monotonic()
        return [
            self._autoscaler.describe(
                role,
                now,
                count=self._counts[role],
                running=sum(state.role == role and state.state == "up" for state in states),
            )
            for role in ROLES
            if self._counts[role]
        ]

    def scale(self, role: WorkerRole, count: int) -> None:
        """From now on so many workers of this role, or at least so many where it is scaled by load.

        Those with the highest numbers leave. Raises ValueError.
        """
        if role not in ("prefill", "decode") or not (0 if role == "prefill" else 1) <= count <= 64:
            raise ValueError(f"{count} workers of role {role!r}: decode takes 1 to 64, prefill 0 to 64")
        if role == "prefill" and (count == 0) != (self._settings.prefill.count == 0):
            raise ValueError("prefill workers cannot be taken away or added where decode workers have both roles")
        if role in self._autoscaler.roles:
            self._autoscaler.set_floor(role, count)  # the next step takes it up
        else:
            self._counts[role] = count

    def restart(self, name: str, drain_s: float) -> None:
        """Has a process drain, end and start anew on its machine; returns at once. Raises ValueError when it is not up,
        or on its way already."""
        process = self._processes.get(name)
        if process is None or process.state != "up" or name in self._restarting:
            raise ValueError(f"{name} is not up")
        self._restarting.add(name)
        threading.Thread(target=self._let_restart, args=(process, drain_s), daemon=True).start()

    def stop(self) -> None:
        """Ends every process, gateways first. Bounded by `STOP_TIMEOUT_S` for each role."""
        self._stopping.set()
        self._thread.join(STOP_TIMEOUT_S)
        if self._autoscaler.roles:
            self._stats.stop()
        for role in ("gateway", "decode", "prefill", "store", "directory"):
            _end([p for p in self._processes.values() if p.member.role == role], STOP_DRAIN_S)
        self._processes = {}

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            try:
                self._step()
            except Exception:  # the loop must go on; what failed is tried again
                logger.exception("a step failed")

    def _step(self) -> None:
        if self._autoscaler.roles:
            self._autoscale()
        machines = {machine.id: machine for machine in sorted(_machines(), key=lambda m: m.id != self._head)}
        wanted = {m.name: m for m in self._wanted(has_gpus=any(m.resources.get("GPU") for m in machines.values()))}
        leaving = [self._processes.pop(name) for name in list(self._processes) if name not in wanted]
        if leaving:  # they may take a while
            self._leaving |= {process.member.name for process in leaving}
            threading.Thread(target=self._let_leave, args=(leaving,), daemon=True).start()
        for process in list(self._processes.values()):
            self._poll(process, machines)
        for member in wanted.values():
            if member.name in self._processes or member.name in self._leaving:
                continue  # one that is wanted again keeps its name until it has left
            if not self._adopt(member, machines) and self._may_place(machines):
                self._place(member, machines)
        known = self._processes.get("directory")
        own = "" if known is None or known.started is None else known.started.address
        directory = self._settings.cluster.directory or own
        for process in self._processes.values():
            if process.member.name in self._restarting:
                continue  # asked now, it would start anew in a process that is about to end
            if directory or process.member.role == "directory":
                self._ask(process, directory)

    def _autoscale(self) -> None:
        """Sets the counts of the roles that are scaled by load, from what their workers said last."""
        workers: dict[WorkerRole, list[KnownWorker]] = {}
        addresses: dict[str, str] = {}
        for role in self._autoscaler.roles:
            processes = [self._processes.get(f"{role}-{i}") for i in range(self._counts[role])]
            workers[role] = [
                KnownWorker(name=f"{role}-{i}", has_started=process is not None and process.num_starts > 0)
                for i, process in enumerate(processes)
            ]
            for process in processes:
                if process is not None and process.state == "up" and process.started is not None:
                    addresses[process.member.name] = process.started.address
        self._stats.follow(addresses)
        self._counts |= self._autoscaler.step(time.monotonic(), workers, self._stats.latest())

    def _let_leave(self, processes: list[_Process]) -> None:
        try:
            _end(processes, LEAVE_DRAIN_S)
        finally:
            self._leaving -= {process.member.name for process in processes}

    def _let_restart(self, process: _Process, drain_s: float) -> None:
        """Ray starts a process again that it has ended in this way."""
        try:
            ray.wait([process.handle.stop.remote(drain_s)], timeout=drain_s + STOP_TIMEOUT_S)
            ray.kill(process.handle, no_restart=False)
            logger.info("%s has ended and starts again", process.member.name)
        finally:
            self._restarting.discard(process.member.name)

    def _wanted(self, *, has_gpus: bool) -> list[Member]:
        prefill, decode = self._settings.prefill, self._settings.decode
        gpus_of_a_rank = 1.0 if has_gpus and self._settings.device != "cpu" else 0.0
        return wanted_members(
            **self._counts,
            prefill_ranks=prefill.num_ranks,
            decode_ranks=decode.num_ranks,
            prefill_gpus=gpus_of_a_rank * prefill.num_ranks if prefill.gpus is None else prefill.gpus,
            decode_gpus=gpus_of_a_rank * decode.num_ranks if decode.gpus is None else decode.gpus,
            prefill_resource=prefill.resource,
            decode_resource=decode.resource,
        )

    def _may_place(self, machines: dict[str, Machine]) -> bool:
        cluster = self._settings.cluster
        if not self._enough_machines:
            waited = time.monotonic() - self._born
            self._enough_machines = len(machines) >= cluster.machines or waited > cluster.wait_s
            self._problem = "" if self._enough_machines else f"{len(machines)} of {cluster.machines} machines are there"
        return self._enough_machines

    def _adopt(self, member: Member, machines: dict[str, Machine]) -> bool:
        """Takes over a process that is there already: this controller's memory is new, or the actor's."""
        try:
            handle = ray.get_actor(member.name, namespace=self._settings.cluster.name)
            started: Started | None = ray.get(handle.ensure.remote(None), timeout=INTERVAL_S)
        except (ValueError, ray.exceptions.RayError):
            return False
        machine = None if started is None else machines.get(started.machine)
        if machine is None:
            return False
        self._processes[member.name] = _Process(
            member, handle, machine.id, machine.address, started=started, num_starts=1, state="up"
        )
        return True

    def _place(self, member: Member, machines: dict[str, Machine]) -> None:
        placed: dict[str, list[Member]] = {}
        for process in self._processes.values():
            placed.setdefault(process.machine_id, []).append(process.member)
        candidates = [m for m in machines.values() if member.role != "directory" or m.id == self._head]
        machine = choose_machine(member, candidates, placed)
        if machine is None and member.one_per_machine:
            self._problem = f"every machine has a {member.role} already"
            return
        # Without room anywhere, the actor waits in Ray: its autoscaler sees that, and adds a machine where it may.
        strategy = (
            "DEFAULT"
            if machine is None
            else NodeAffinitySchedulingStrategy(machine.id, soft=not member.one_per_machine)
        )
        handle = _actor_class(member).options(
            name=member.name,
            namespace=self._settings.cluster.name,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=member.cpus,
            num_gpus=member.gpus,
            resources={member.resource: RESOURCE_SHARE} if member.resource else None,
            scheduling_strategy=strategy,
        ).remote(*_arguments(member, self._settings))  # fmt: skip
        where = "no machine yet" if machine is None else machine.address
        logger.info("%s: placed on %s", member.name, where)
        self._processes[member.name] = _Process(
            member, handle, "" if machine is None else machine.id, "" if machine is None else machine.address
        )

    def _ask(self, process: _Process, directory: str) -> None:
        is_early = process.state == "failed" and time.monotonic() - process.asked_at < FAILED_WAIT_S
        if process.call is None and not is_early:
            process.call = process.handle.ensure.remote(directory)
            process.asked_at = time.monotonic()

    def _poll(self, process: _Process, machines: dict[str, Machine]) -> None:
        """Looks whether `ensure` has ended, and how. Forgets a process that will not come back."""
        name = process.member.name
        if process.call is None or not ray.wait([process.call], timeout=0)[0]:
            return
        call, process.call = process.call, None
        try:
            started: Started = ray.get(call, timeout=INTERVAL_S)
        except ray.exceptions.RayTaskError as error:
            if process.state != "failed":
                logger.error("%s does not start: %s", name, error.cause)
            process.state, process.problem = "failed", f"does not start: {error.cause}"
        except ray.exceptions.RayError as error:
            if process.state == "up":
                logger.warning("%s is lost: %s", name, type(error).__name__)
            process.state, process.problem = "starting", "its process ended; Ray starts it again"
            if isinstance(error, ray.exceptions.ActorDiedError) or process.machine_id not in machines:
                self._forget_if_dead(process)
        else:
            if process.started is None or process.started.pid != started.pid:
                process.num_starts += 1
                logger.info("%s is up on %s", name, started.address)
            process.started, process.state, process.problem = started, "up", ""
            machine = machines.get(started.machine)
            if machine is not None:  # Ray may have started it again elsewhere
                process.machine_id, process.machine = machine.id, machine.address

    def _forget_if_dead(self, process: _Process) -> None:
        """A dead actor's name is free; one that Ray is starting again keeps it."""
        name = process.member.name
        try:
            ray.get_actor(name, namespace=self._settings.cluster.name)
        except ValueError:
            logger.warning("%s will be placed anew", name)
            del self._processes[name]


def _names_of_running(namespace: str) -> list[str]:
    """The processes that are there, when this controller was started again; none where the deployment is new."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == namespace and actor["name"] != CONTROLLER]


def _counts_of_running(namespace: str) -> dict[str, int]:
    """Prefill and decode workers by the processes that are there: `scale` may have been called before this controller
    was started again. Empty where there is none yet."""
    found: dict[str, int] = {}
    for name in _names_of_running(namespace):
        role, _, index = name.rpartition("-")
        if role in ("prefill", "decode"):
            found[role] = max(found.get(role, 0), int(index) + 1)
    return found


def _machines() -> list[Machine]:
    return [
        Machine(id=node["NodeID"], address=node["NodeManagerAddress"], resources=node["Resources"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def _end(processes: list[_Process], drain_s: float) -> None:
    """Asks them to stop, all at once, and then ends them."""
    calls = [process.handle.stop.remote(drain_s) for process in processes]
    if calls:
        ray.wait(calls, num_returns=len(calls), timeout=drain_s + STOP_TIMEOUT_S)
    for process in processes:
        ray.kill(process.handle, no_restart=True)
        logger.info("%s has ended", process.member.name)


def _actor_class(member: Member) -> Any:
    kinds: dict[str, type] = {"directory": DirectoryActor, "store": StoreActor, "gateway": GatewayActor}
    return ray.remote(kinds.get(member.role, WorkerActor))


def _arguments(member: Member, settings: Settings) -> tuple[object, ...]:
    match member.role:
        case "prefill" | "decode" as role:
            return settings, member.name, role, member.index
        case _:
            return settings, member.name
