"""The units under real service managers: the system's, and that of an ordinary user."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from folders import files_of, tensor, write_component, write_model
from managers import UID, Manager, booted
from running import wait_for

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
UNITS = sorted((ROOT / "systemd").glob("*/*.service")) + sorted((ROOT / "systemd").glob("*/*.target"))

SERVICE, MOUNT, TARGET = "modelcask.service", "modelcask-mount.service", "modelcask.target"


class Service:
    """The installed and running service of the system or of the user, and what a person does with it."""

    def __init__(self, manager: Manager, *, system: bool) -> None:
        self.manager = manager
        self.system = system
        self.drops = manager.root / "srv/imports" if system else manager.home / "imports"
        self.drops_inside = Path("/srv/imports" if system else "/home/tester/imports")
        self.models = Path("/srv/models") if system else Path("/home/tester/models")
        self.store = Path("/var/lib/modelcask") if system else Path("/home/tester/.local/share/modelcask")
        self.units = Path("/etc/systemd/system") if system else Path("/home/tester/.config/systemd/user")
        self.config = Path("/etc/modelcask") if system else Path("/home/tester/.config/modelcask")

    def run(self, *command: str | Path, status: int | None = 0) -> str:
        run = self.manager.system if self.system else self.manager.user
        return run(*command, status=status).out

    def cask(self, *arguments: str | Path, status: int | None = 0) -> str:
        return self.run(PYTHON, "-m", "modelcask", *arguments, status=status)

    def ctl(self, *arguments: str, status: int | None = 0) -> str:
        return self.run("systemctl", *([] if self.system else ["--user"]), *arguments, status=status)

    def install(self) -> str:
        return self.cask("install-service", *(["--system"] if self.system else []))

    def start(self) -> None:
        self.ctl("start", TARGET)
        wait_for(lambda: [self.state(unit) for unit in (SERVICE, MOUNT)] == ["active", "active"])

    def stop(self) -> None:
        self.ctl("stop", TARGET)
        wait_for(lambda: {self.state(unit) for unit in (SERVICE, MOUNT)} <= {"inactive", "failed"})

    def state(self, unit: str) -> str:
        return self.manager.show(unit, "ActiveState", system=self.system)

    def pid(self, unit: str) -> int:
        return int(self.manager.show(unit, "MainPID", system=self.system))

    def says(self) -> str:
        return self.manager.show(SERVICE, "StatusText", system=self.system)

    def put(self, folder: Path, name: str) -> None:
        """Drop a folder, as its owner."""
        self.give(folder)
        folder.rename(self.drops / name)

    def give(self, folder: Path) -> None:
        if not self.system:
            subprocess.run(["chown", "-R", f"{UID}:{UID}", str(folder)], check=True)

    def made(self, name: str, **options: object) -> Path:
        """A model folder beside the drops."""
        return write_model(self.drops.parent / "made" / name, transformer=name, **options)  # type: ignore[arg-type]

    def shown(self, name: str) -> dict[str, str]:
        """The sha256 of each file of a model in the mount, as a user reads it."""
        folder = self.models / "diffusers/library" / name / "latest"
        out = self.manager.user("sh", "-c", f"cd {folder} && find . -type f -exec sha256sum {{}} +", status=None)
        return {line[66:]: line[:64] for line in out.out.splitlines()} if out.status == 0 else {}

    def write(self, path: Path, text: str) -> None:
        """Write a file of the installation's owner."""
        outside = self.manager.root / path.relative_to("/")
        outside.parent.mkdir(parents=True, exist_ok=True)
        outside.write_text(text)
        self.give(outside.parent)


def digests(folder: Path) -> dict[str, str]:
    import hashlib

    return {f"./{name}": hashlib.sha256(data).hexdigest() for name, data in files_of(folder).items()}


@pytest.fixture(scope="module")
def manager() -> Iterator[Manager]:
    if os.environ.get("MODELCASK_NO_FUSE") == "1":
        pytest.skip("MODELCASK_NO_FUSE=1: this machine has no FUSE")
    with booted([ROOT]) as manager:
        yield manager


@pytest.fixture(params=["user", "system"], scope="module")
def installed(manager: Manager, request: pytest.FixtureRequest) -> Service:
    service = Service(manager, system=request.param == "system")
    service.install()
    # The tests kill more often than a unit may die, and have less patience.
    for unit in (SERVICE, MOUNT):
        soon = "[Service]\nTimeoutStopSec=2\n" if unit == MOUNT else ""
        service.write(service.units / f"{unit}.d/50-tests.conf", f"[Unit]\nStartLimitBurst=1000\n{soon}")
    service.ctl("daemon-reload")
    return service


@pytest.fixture
def service(installed: Service) -> Iterator[Service]:
    installed.start()
    yield installed
    installed.stop()


pytestmark = [pytest.mark.fuse]


def test_what_is_dropped_is_imported_and_shown_and_status_says_so(service: Service) -> None:
    folder = service.made("seen")
    expected = digests(folder)
    service.put(folder, "seen")
    wait_for(lambda: service.shown("seen") == expected)
    wait_for(lambda: "1 imported" in service.ctl("status", "--no-pager", SERVICE))
    assert f"{service.models} shows {service.store}" in service.ctl("status", "--no-pager", MOUNT)


def test_status_shows_the_progress_of_an_import(service: Service) -> None:
    # Quantizing where nothing is compiled yet takes seconds, and needs numba's cache to be writable.
    folder = service.made("slow")
    weights = {f"w{number}.weight": tensor(f"w{number}", 2048, 2048) for number in range(12)}
    write_component(folder / "transformer", [weights], stem="diffusion_pytorch_model")
    (service.drops / "int4").mkdir()
    service.give(service.drops / "int4")
    service.put(folder, "int4/slow")
    wait_for(lambda: re.search(r"Status: .*importing library/slow:int4", service.ctl("status", "--no-pager", SERVICE)))
    wait_for(lambda: "importing" not in service.says(), seconds=120)
    assert "library/slow:int4" in service.cask("ls", "--store", service.store)
    cache = Path("/var/cache") if service.system else Path("/home/tester/.cache")
    assert service.run("find", cache / "modelcask/numba", "-name", "*.nbc")


def test_reload_takes_a_new_configuration_and_refuses_a_faulty_one(service: Service) -> None:
    file = service.config / "config.toml"
    where = f'store = "{service.store}"\nmount = "{service.models}"\n[[drop]]\npath = "{service.drops_inside}"\n'
    before = service.run("cat", file, status=None) if service.system else ""
    running = service.pid(SERVICE)
    service.write(file, where + 'namespace = "lab"\n')
    service.ctl("reload", SERVICE)
    folder = service.made("reloaded")
    service.put(folder, "reloaded")
    wait_for(lambda: "lab/reloaded:latest" in service.cask("ls", "--store", service.store))
    service.write(file, where + 'after = "burn"\n')
    service.ctl("reload", SERVICE)
    wait_for(lambda: f"{file}, line 5: drop 1: after: 'burn' is neither" in service.manager.log)
    service.put(service.made("after"), "after")
    wait_for(lambda: "lab/after:latest" in service.cask("ls", "--store", service.store))
    assert service.pid(SERVICE) == running
    if before:
        service.write(file, before)
    else:
        service.run("rm", file)


def test_a_killed_import_goes_on_and_nothing_is_lost(service: Service) -> None:
    folder = service.made("killed", shards=2)
    weights = {f"w{number}.weight": tensor(f"k{number}", 4096, 4096) for number in range(8)}
    write_component(folder / "transformer", [weights], stem="diffusion_pytorch_model")
    expected = digests(folder)
    mount = service.pid(MOUNT)
    service.put(folder, "killed")
    for _ in range(2):
        wait_for(lambda: "importing" in service.says() or service.shown("killed"))
        killed = service.pid(SERVICE)
        service.run("kill", "-9", str(killed))
        wait_for(lambda killed=killed: service.state(SERVICE) == "active" and service.pid(SERVICE) not in (0, killed))
    wait_for(lambda: service.shown("killed") == expected)
    assert "all sound" in service.cask("verify", "--store", service.store)
    assert service.pid(MOUNT) == mount


def test_a_killed_mount_answers_again_and_imports_are_not_touched(service: Service) -> None:
    folder = service.made("remounted")
    expected = digests(folder)
    service.put(folder, "remounted")
    wait_for(lambda: service.shown("remounted") == expected)
    watch, killed = service.pid(SERVICE), service.pid(MOUNT)
    service.run("kill", "-9", str(killed))
    wait_for(lambda: service.pid(MOUNT) not in (0, killed) and service.shown("remounted") == expected)
    assert service.pid(SERVICE) == watch


def test_the_service_starts_beside_a_dead_mount(service: Service) -> None:
    service.run("systemctl", *([] if service.system else ["--user"]), "kill", "--signal=KILL", MOUNT)
    service.ctl("restart", SERVICE)
    wait_for(lambda: service.state(MOUNT) == "active")


def test_the_watchdog_ends_a_loop_that_hangs(service: Service) -> None:
    override = service.units / f"{SERVICE}.d/60-watchdog.conf"
    service.write(override, "[Service]\nWatchdogSec=5\nTimeoutAbortSec=1\n")
    service.ctl("daemon-reload")
    service.ctl("restart", SERVICE)
    hung = service.pid(SERVICE)
    # It works: longer than the watchdog's patience, with nothing to do, it is not ended.
    service.run("sleep", "7")
    assert service.pid(SERVICE) == hung
    service.run("kill", "-STOP", str(hung))
    wait_for(lambda: service.pid(SERVICE) not in (0, hung))
    assert re.search(r"modelcask.service: Watchdog timeout \(limit 5s\)", service.manager.log)
    service.run("rm", override)
    service.ctl("daemon-reload")


def test_what_is_open_is_served_to_its_end_though_the_mount_is_stopped(service: Service) -> None:
    service.put(service.made("open"), "open")
    wait_for(lambda: service.shown("open"))
    file = service.models / "diffusers/library/open/latest/model_index.json"
    # Reads the first byte, waits to be told, reads the rest.
    script = f"import sys; f = open({str(file)!r}, 'rb', 0); print(f.read(1)); sys.stdin.read(1); print(len(f.read()))"
    enter = ["nsenter", f"--target={service.manager.pid}", "--mount", "--pid", "--cgroup"]
    become = [] if service.system else ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
    reader = subprocess.Popen(
        [*enter, *become, PYTHON, "-u", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "b'{'\n"
    service.ctl("restart", MOUNT)
    wait_for(lambda: service.shown("open"))
    size = (service.drops / "open/model_index.json").stat().st_size
    rest, _ = reader.communicate("\n", timeout=10)
    assert rest == f"{size - 1}\n"


def test_a_stop_leaves_no_mount_and_a_start_shows_all_again(service: Service) -> None:
    service.put(service.made("again"), "again")
    wait_for(lambda: service.shown("again"))
    service.stop()
    assert service.state(MOUNT) == "inactive"
    assert service.run("findmnt", "--noheadings", service.models, status=None) == ""
    service.start()
    wait_for(lambda: service.shown("again"))
    assert "again" in service.cask("ls", "--store", service.store)


def test_the_service_is_confined(service: Service) -> None:
    status = (service.manager.root / f"proc/{service.pid(SERVICE)}/status").read_text()
    for line in ("NoNewPrivs:\t1", "Seccomp:\t2", "CapBnd:\t0000000000000000"):
        assert line in status
    mounts = (service.manager.root / f"proc/{service.pid(SERVICE)}/mountinfo").read_text()
    options = {line.split()[4]: line.split()[5] for line in mounts.splitlines()}
    assert options["/"].startswith("ro,")
    assert options["/home"].startswith("ro,")
    assert options[str(service.store)].startswith("rw,")
    assert options[str(service.drops_inside)].startswith("rw,")


@pytest.mark.parametrize("installed", ["system"], indirect=True)
def test_the_mount_of_the_system_has_one_capability(service: Service) -> None:
    status = (service.manager.root / f"proc/{service.pid(MOUNT)}/status").read_text()
    sys_admin = "0000000000200000"
    for line in ("NoNewPrivs:\t1", "Seccomp:\t2", f"CapBnd:\t{sys_admin}", f"CapEff:\t{sys_admin}"):
        assert line in status
    assert "Uid:\t0" not in status


def test_installing_again_changes_nothing(installed: Service) -> None:
    said = installed.install()
    assert "wrote" not in said
    assert said.count("unchanged") == (6 if installed.system else 5)


def test_a_user_whose_machine_has_no_namespaces_gets_a_service_all_the_same(manager: Manager) -> None:
    service = Service(manager, system=False)
    manager.system("mkdir", "-p", "/run/systemd/system/tester.service.d", "/etc/systemd/system/tester.service.d")
    override = manager.root / "etc/systemd/system/tester.service.d/no-namespaces.conf"
    override.write_text("[Service]\nRestrictNamespaces=~user\n")
    manager.system("systemctl", "daemon-reload")
    manager.system("systemctl", "restart", "tester.service")
    try:
        assert "allows users no namespaces" in service.install()
        service.ctl("start", SERVICE)
        folder = service.made("unconfined")
        service.put(folder, "unconfined")
        wait_for(lambda: "library/unconfined:latest" in service.cask("ls"))
        assert "20-no-namespaces.conf" in service.ctl("status", "--no-pager", SERVICE)
    finally:
        override.unlink()
        manager.system("systemctl", "daemon-reload")
        manager.system("systemctl", "restart", "tester.service")
    assert "removed" in service.install()


def test_uninstalling_takes_the_units_and_leaves_the_rest(installed: Service) -> None:
    installed.ctl("enable", "--now", TARGET)
    models = installed.cask("ls", "--store", installed.store)
    said = installed.cask("uninstall-service", *(["--system"] if installed.system else []))
    assert "the store, the configuration and the drops" in said
    wait_for(lambda: {installed.state(unit) for unit in (SERVICE, MOUNT)} == {"inactive"})
    left = installed.run("find", installed.units, "-name", "*modelcask*").split()
    assert sorted(Path(path).name for path in left) == [f"{MOUNT}.d", f"{SERVICE}.d"]  # the tests' own
    assert installed.cask("ls", "--store", installed.store) == models
    assert "nothing is installed" in installed.cask("uninstall-service", *(["--system"] if installed.system else []))


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_verification_has_nothing_to_say(manager: Manager, unit: Path) -> None:
    scope = ["--user"] if unit.parent.name == "user" else []
    run = manager.user if scope else manager.system
    assert run("systemd-analyze", *scope, "verify", unit).out == ""


# Of the figures in DESIGN.md, "systemd".
@pytest.mark.parametrize(
    ("unit", "most"),
    [("user/modelcask.service", 15), ("system/modelcask.service", 3), ("system/modelcask-mount.service", 27)],
)
def test_the_units_are_as_hard_as_is_said(manager: Manager, unit: str, most: int) -> None:
    scope = ["--user"] if unit.startswith("user") else []
    run = manager.user if scope else manager.system
    path = ROOT / "systemd" / unit
    run("systemd-analyze", *scope, "security", "--offline=true", f"--threshold={most}", path)
